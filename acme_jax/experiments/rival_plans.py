"""Which rivals there are, the choice of their rates, and their training.

Rates are chosen on samples set aside from the devices' training samples: those of headers after
all rounds; those of whole sub-networks, which take ten times as long, after half of them, and on
one distribution for all. ACME itself keeps the rate of its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from acme_jax import supernet
from acme_jax.blocks import Params
from acme_jax.experiments import cohorts, held_out, rival_headers, rival_networks
from acme_jax.experiments.device_costs import HeaderModel, Link
from acme_jax.experiments.held_out import Parts
from acme_jax.experiments.rival_headers import Headers, Rates
from acme_jax.experiments.rival_networks import Networks
from acme_jax.experiments.study import Study
from nas.arch import Arch

_SCRATCH, _CLOUD = "scratch", "cloud"


class NetworkRival(NamedTuple):
    """A rival that trains whole sub-networks."""

    start: str
    one_size: bool  # everyone has the sub-network that fits the smallest device
    averaged: bool
    tuned: str | None = None
    """The rival whose rate the second half of the rounds has, which everyone trains alone."""


NETWORK_RIVALS = {
    "local_scratch": NetworkRival(_SCRATCH, one_size=False, averaged=False),
    "local_network": NetworkRival(_CLOUD, one_size=False, averaged=False),
    "fedavg_one_size": NetworkRival(_CLOUD, one_size=True, averaged=True),
    "fedavg_one_size_tuned": NetworkRival(_CLOUD, True, True, tuned="fedavg_one_size"),
    "heterofl_scratch": NetworkRival(_SCRATCH, one_size=False, averaged=True),
    "heterofl_cloud": NetworkRival(_CLOUD, one_size=False, averaged=True),
    "heterofl_cloud_tuned": NetworkRival(_CLOUD, False, True, tuned="heterofl_cloud"),
}
HEADER_RIVALS = ("local_header", "fedavg_header", "fedavg_header_tuned", "ditto_header")

NETWORK_FACTORS = {_SCRATCH: (0.15, 0.5, 1.5), _CLOUD: (0.05, 0.15, 0.5)}
"""Rates to choose from, as parts of the rate that the cloud trained its full network with."""
HEADER_FACTORS = (1.0, 0.5, 2.5)
"""Rates to choose from, as parts of ACME's; of equals the first."""
STRENGTHS = (0.1, 1.0)
"""Of Ditto's proximal term."""


Option = dict[str, Any]
"""One that was tried: method, learning rate, accuracy on what was set aside."""


class EdgeSamples(NamedTuple):
    """What the devices of one edge train a header on."""

    number: int
    model: HeaderModel
    parts: Parts  # features


class Sizes(NamedTuple):
    """The sub-networks of the rivals: no header has to fit beside them."""

    own: list[Arch]  # [C] each device its edge's
    one_size: Arch


def choose_network_rates(
    study: Study, name: str, sizes: Sizes, samples: Callable[[], Parts]
) -> tuple[dict[str, float], list[Option]]:
    """Learning rate of each rival that is not tuned, or what was chosen the first time.

    Args:
      study: keeps the choice by `name`.
      name: of the choice.
      sizes: the rivals' sub-networks.
      samples: raw ones of all devices.

    Returns:
      The rates, and every option with its accuracy on what was set aside.
    """

    def make() -> tuple[Any, dict[str, Any]]:
        with study.context.session.phase("rates of whole sub-networks"):
            tried = _try_networks(study, sizes, samples())
        rates = {
            name: _best(tried, name)["learning_rate"]
            for name, rival in NETWORK_RIVALS.items()
            if rival.tuned is None
        }
        return _accuracies(tried), {"rates": rates, "tried": tried}

    _, facts = study.cached(name, make)
    return facts["rates"], facts["tried"]


def choose_header_rates(
    study: Study, name: str, edges: Sequence[EdgeSamples]
) -> tuple[Rates, list[Option]]:
    """Rates and Ditto's strength, as `choose_network_rates`; `edges` have the features."""

    def make() -> tuple[Any, dict[str, Any]]:
        with study.context.session.phase("rates of headers"):
            rates, tried = _try_headers(study, edges)
        return _accuracies(tried), {"rates": list(rates), "tried": tried}

    _, facts = study.cached(name, make)
    return Rates(*facts["rates"]), facts["tried"]


def train_networks(
    study: Study, sizes: Sizes, data: Parts, rates: dict[str, float]
) -> dict[str, Networks]:
    """All rivals with whole sub-networks, trained on everything."""
    rounds = study.config.refine.rounds
    half = rounds // 2
    found: dict[str, Networks] = {}
    halves: dict[str, Networks] = {}
    for name, rival in NETWORK_RIVALS.items():
        if rival.tuned is None:
            state = _start(study, rival, sizes)
            for part in (range(half), range(half, rounds)):
                state = rival_networks.network_rounds(
                    study,
                    state,
                    data.everything,
                    averaged=rival.averaged,
                    rate=rates[name],
                    rounds=part,
                )
                halves.setdefault(name, state)  # of the first part
            found[name] = state
        else:
            found[name] = rival_networks.network_rounds(
                study,
                halves[rival.tuned],
                data.everything,
                averaged=False,
                rate=rates["local_network"],
                rounds=range(half, rounds),
            )
    return found


def network_link(rival: NetworkRival, rounds: int) -> Link:
    """How often a device's sub-network travels: down before, up and down in every round shared."""
    shared = 0 if not rival.averaged else rounds if rival.tuned is None else rounds // 2
    first = int(rival.start == _CLOUD or rival.averaged)
    return Link(up=shared, down=first + shared)


def train_headers(study: Study, edge: EdgeSamples, rates: Rates) -> dict[str, Params]:
    """All rivals with the edge's header, trained on everything: parameters [C], uniform form."""
    rounds = study.config.refine.rounds
    half = rounds // 2
    alone = rates._replace(strength=0.0)
    start = _start_headers(study, edge)

    def run(headers: Headers, rates: Rates, part: range) -> Headers:
        return rival_headers.header_rounds(
            study, edge.number, edge.model.cell, headers, edge.parts.everything, rates, part
        )

    count = edge.parts.everything.size.shape[0]
    middle = run(start, alone, range(half))
    end = run(middle, alone, range(half, rounds))
    tuned = run(rival_headers.both(middle.shared, count), alone, range(half, rounds))
    ditto = run(start, rates, range(rounds))
    shared = rival_headers.both(end.shared, count)
    models = (end.personal, shared.personal, tuned.personal, ditto.personal)
    return dict(zip(HEADER_RIVALS, models, strict=True))


def header_link(name: str, rounds: int) -> Link:
    """How often a header travels: down before, up and down in every round shared.

    Ditto's devices need no shared header after their last step.
    """
    shared = {"local_header": 0, "fedavg_header_tuned": rounds // 2}.get(name, rounds)
    return Link(up=shared, down=shared + (name != "ditto_header"))


def _start(study: Study, rival: NetworkRival, sizes: Sizes) -> Networks:
    if rival.start == _CLOUD:
        params = study.stages.elastic
    else:
        init = jax.jit(supernet.init, static_argnums=1)
        params = init(study.key("rivals from scratch"), study.context.encoder)
    archs = [sizes.one_size] * len(sizes.own) if rival.one_size else sizes.own
    return rival_networks.start(params, archs)


def _try_networks(study: Study, sizes: Sizes, data: Parts) -> list[Option]:
    tried = []
    base = study.config.reference.learning_rate
    for name, rival in NETWORK_RIVALS.items():
        for factor in NETWORK_FACTORS[rival.start] if rival.tuned is None else ():
            state = rival_networks.network_rounds(
                study,
                _start(study, rival, sizes),
                data.fit,
                averaged=rival.averaged,
                rate=factor * base,
                rounds=range(study.config.refine.rounds // 2),
            )
            check = rival_networks.network_evaluator(study, [state])(data.check)
            tried.append(_option(name, factor * base, float(np.mean(np.asarray(check)))))
    return tried


def _try_headers(study: Study, edges: Sequence[EdgeSamples]) -> tuple[Rates, list[Option]]:
    config, dims = study.config.refine, study.context.header_dims
    tried: list[Option] = []

    def check(rates: Rates) -> tuple[float, float]:
        """Mean accuracy of the shared and of the personal headers of all devices."""
        found = []
        for edge in edges:
            after = rival_headers.header_rounds(
                study, edge.number, edge.model.cell, _start_headers(study, edge),
                edge.parts.fit, rates, range(config.rounds),
            )  # fmt: skip
            count = edge.parts.fit.size.shape[0]
            shared = rival_headers.both(after.shared, count).personal
            states = {
                kind: rival_headers.states(
                    headers, edge.model.params, edge.model.cell, dims, config
                )
                for kind, headers in (("shared", shared), ("personal", after.personal))
            }
            found.append(np.asarray(cohorts.evaluator(states, dims)(edge.parts.check)))
        shared_accuracy, personal_accuracy = np.concatenate(found, axis=1).mean(axis=1)
        return float(shared_accuracy), float(personal_accuracy)

    for factor in HEADER_FACTORS:
        rate = factor * config.learning_rate
        shared_accuracy, personal_accuracy = check(Rates(rate, rate, 0.0))
        tried.append(_option("fedavg_header", rate, shared_accuracy))
        tried.append(_option("local_header", rate, personal_accuracy))
    shared, personal = (
        _best(tried, name)["learning_rate"] for name in ("fedavg_header", "local_header")
    )
    for strength in STRENGTHS:
        _, accuracy = check(Rates(shared, personal, strength))
        tried.append({**_option("ditto_header", personal, accuracy), "strength": strength})
    return Rates(shared, personal, _best(tried, "ditto_header")["strength"]), tried


def _start_headers(study: Study, edge: EdgeSamples) -> Headers:
    count = edge.parts.everything.size.shape[0]
    return rival_headers.start(edge.model.params, edge.model.cell, study.context.header_dims, count)


def _option(method: str, rate: float, accuracy: float) -> Option:
    return {"method": method, "learning_rate": rate, "check_accuracy": accuracy}


def _best(tried: list[Option], method: str) -> Option:
    own = [option for option in tried if option["method"] == method]
    return held_out.best(own, lambda option: float(option["check_accuracy"]))


def _accuracies(tried: list[Option]) -> dict[str, np.ndarray]:
    """What a choice keeps beside its facts."""
    return {"accuracy": np.asarray([option["check_accuracy"] for option in tried])}
