"""What personalisation is compared with besides its own variants: no training, FedAvg, the paper.

All start at the edge's header. FedAvg has the rounds, epochs, batches, rate, momentum and decay of
the devices' refinement; with local training at the end it shares in the first half of the rounds.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from acme_jax import label_prior
from acme_jax.blocks import Params
from acme_jax.device import DeviceState
from acme_jax.experiments import cohorts, rival_headers
from acme_jax.experiments.personal_fleet import Cohort
from acme_jax.experiments.personal_methods import PSEUDO_COUNT, header_bytes
from acme_jax.experiments.rival_headers import Headers, Rates
from acme_jax.experiments.study import Study
from fed.clients import replicate
from nas.cells import StaticCell

UNEQUAL_RATE = 0.1
"""Part of the learning rate that the original code gives its baseline, for one epoch."""
RATES = {"no_pruning_quarter_rate": 0.25, "no_pruning_fourfold_rate": 4.0}
"""Other learning rates of plain training, as parts of the configuration's."""


class Models(NamedTuple):
    """What every device of an experiment starts with."""

    backbone: Params  # sliced
    cell: StaticCell
    header: Params  # in compact form


class Rival(NamedTuple):
    """The devices of one rival, trained."""

    states: DeviceState  # rows [C]
    uplink_bytes: int  # of one device in all rounds


def untrained(study: Study, models: Models, cohort: Cohort) -> dict[str, Rival]:
    """The edge's header as it comes down, and with each device's prior: no device trains."""
    config, dims = study.config.refine, study.context.header_dims
    count = len(cohort.fleet)
    start = rival_headers.start(models.header, models.cell, dims, count)
    plain = rival_headers.states(start.personal, models.header, models.cell, dims, config)
    prior = label_prior.log_prior(jnp.asarray(cohort.histograms), PSEUDO_COUNT)
    params = label_prior.add_to_classifier(plain.params, prior)
    return {
        "edge_header": Rival(plain, 0),
        "edge_header_prior": Rival(plain._replace(params=params), 0),
    }


def unequal(study: Study, models: Models, cohort: Cohort) -> dict[str, Rival]:
    """The original code's "without pruning": one epoch at a tenth of the rate (SPEC 8.12)."""
    config = study.config.refine
    short = dataclasses.replace(config, rounds=1, learning_rate=UNEQUAL_RATE * config.learning_rate)
    states = cohorts.refine(
        study.key("personalization"),
        short,
        study.context.header_dims,
        models.cell,
        models.header,
        cohort.fit,
        {"unequal": cohorts.Method(np.eye(len(cohort.fleet)), 0)},
        study.context.mesh,
    )
    return {name: Rival(state, 0) for name, state in states.items()}


def averaged(study: Study, models: Models, cohort: Cohort) -> dict[str, Rival]:
    """FedAvg of the header, and FedAvg in half of the rounds with local training after it."""
    config, dims = study.config.refine, study.context.header_dims
    cell, count = models.cell, len(cohort.fleet)
    rate = config.learning_rate
    half = config.rounds // 2
    start = rival_headers.start(models.header, cell, dims, count)
    headers = _train(study, models, cohort, start, rate, range(half))
    start = rival_headers.both(headers.shared, count)
    headers = _train(study, models, cohort, start, rate, range(half, config.rounds))
    each = header_bytes(cell, models.header)
    found = {
        "fedavg": (replicate(headers.shared, count), config.rounds),
        "fedavg_tuned": (headers.personal, half),
    }
    return {
        name: Rival(rival_headers.states(params, models.header, cell, dims, config), sent * each)
        for name, (params, sent) in found.items()
    }


def other_rates(study: Study, models: Models, cohort: Cohort) -> dict[str, Rival]:
    """Plain local training at `RATES`: is the baseline's rate a good one?

    Each round starts a fresh optimiser, unlike the devices' refinement, which keeps its momentum.
    """
    config, dims = study.config.refine, study.context.header_dims
    start = rival_headers.start(models.header, models.cell, dims, len(cohort.fleet))
    found = {}
    for name, part in RATES.items():
        rate = part * config.learning_rate
        trained = _train(study, models, cohort, start, rate, range(config.rounds))
        states = rival_headers.states(trained.personal, models.header, models.cell, dims, config)
        found[name] = Rival(states, 0)
    return found


def _train(
    study: Study, models: Models, cohort: Cohort, start: Headers, rate: float, rounds: range
) -> Headers:
    """FedAvg and training alone, side by side."""
    rates = Rates(rate, rate, 0.0)
    return rival_headers.header_rounds(study, 0, models.cell, start, cohort.fit, rates, rounds)
