"""Personalisation by data distribution: what listening to similar devices is worth, and why.

Ten devices of one edge (or 5, or 50) refine the edge's searched header on a frozen backbone, under
every variant of `personal_methods` at once: the same samples in the same order, rounds and rates.
A fifth of every device's training samples is set aside; variants are chosen by it, never by test
data. Rows of kind "method" hold accuracies over the devices of one variant in one unit, a row of
kind "evidence" says how much importances differ between devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from acme_jax import edge, header_layout, header_slots
from acme_jax.config import Config
from acme_jax.device import DeviceState
from acme_jax.experiments import (
    cohorts,
    final,
    held_out,
    personal_evidence,
    personal_fleet,
    personal_methods,
    personal_rivals,
)
from acme_jax.experiments.experiment import Experiment, Row
from acme_jax.experiments.personal_fleet import Cohort
from acme_jax.experiments.personal_methods import CHOICES, Variant
from acme_jax.experiments.personal_rivals import Models, Rival
from acme_jax.experiments.study import Study

BACKBONE = (0.25, 0.25)
"""Depth and width, as the original code's."""
NUM_DEVICES = 10
"""As the paper has for ten classes."""
DISTRIBUTIONS = ("iid", "c2", "c3", "c4", "dirichlet_0.1", "dirichlet_0.5", "dirichlet_1")
FEW_SAMPLES = (50, 20)
MakeRivals = Callable[[Study, Models, Cohort], dict[str, Rival]]


class Unit(NamedTuple):
    """Devices, and the variants that they try."""

    distribution: str
    variants: tuple[Variant, ...] = personal_methods.MAIN
    devices: int = NUM_DEVICES
    samples: int | None = None
    """Of each device's training samples; None: all."""
    rivals: tuple[MakeRivals, ...] = ()


_RIVALS: tuple[MakeRivals, ...] = (
    personal_rivals.untrained,
    personal_rivals.unequal,
    personal_rivals.averaged,
)

_UNITS: dict[str, Unit] = {
    **{name: Unit(name, rivals=_RIVALS) for name in DISTRIBUTIONS},
    **{
        f"{name}_samples_{samples}": Unit(
            name, personal_methods.FEW, samples=samples, rivals=_RIVALS
        )
        for name in ("iid", "c3", "dirichlet_0.5")
        for samples in FEW_SAMPLES
    },
    "c3_remedies": Unit("c3", personal_methods.REMEDIES, rivals=(personal_rivals.other_rates,)),
    "dirichlet_0.5_remedies": Unit("dirichlet_0.5", personal_methods.REMEDIES),
    "c3_devices_5": Unit("c3", personal_methods.FEW, devices=5),
    "c3_devices_50": Unit("c3", personal_methods.FEWEST, devices=50),
    "c3_temperatures": Unit("c3", personal_methods.ONE_FORM),
    "c3_temperatures_few": Unit("c3", personal_methods.ALL_FORMS, samples=FEW_SAMPLES[0]),
    "c3_parts": Unit("c3", personal_methods.ALL_PARTS),
}


def units(config: Config) -> list[str]:
    """Distributions, then fewer samples, other numbers of devices, temperatures and parts."""
    del config
    return list(_UNITS)


def run(study: Study, unit: str) -> list[Row]:
    """Rows of one unit."""
    setting = _UNITS[unit]
    models = searched(study)
    cohort = personal_fleet.make_cohort(
        study, models.backbone, setting.distribution, setting.devices, setting.samples
    )
    states = refined(study, models, cohort, setting.variants)
    rivals: dict[str, Rival] = {}
    for make in setting.rivals:
        rivals |= make(study, models, cohort)
    everything = states | {name: rival.states for name, rival in rivals.items()}
    dims, config = study.context.header_dims, study.config.refine
    evaluate = held_out.padded(cohorts.evaluator(everything, dims, study.context.mesh))
    select = np.asarray(evaluate(cohort.parts.check), np.float64)
    named: dict[str, Variant | Rival] = {v.name: v for v in setting.variants} | rivals
    rows = []
    for place, (name, source) in enumerate(named.items()):
        if isinstance(source, Variant):
            facts = _facts(source.method, source.listens, source.temperature, source.part)
            facts["uplink_bytes"] = personal_methods.uplink_bytes(
                source, config, dims, models.cell, models.header
            )
        else:
            facts = _facts(name, "", None, 0.0)
            facts["uplink_bytes"] = source.uplink_bytes
        facts |= _sizes(study, models, everything[name])
        rows.append({**facts, "select_accuracy": float(select[place].mean())})
    # Everything is trained by now; choices follow from the samples set aside alone.
    chosen = _choose(rows)
    tested = final.devices(study, models.backbone, cohort.fleet, evaluate)
    for row, accuracies in zip(rows, tested, strict=True):
        row["test_accuracy"] = float(accuracies.mean())
        row["worst_tenth_test_accuracy"] = worst_tenth(accuracies)
    rows += [
        {**rows[place], "method": name, "chosen": rows[place]["method"]}
        for name, place in chosen.items()
    ]
    about = {
        "distribution": setting.distribution,
        "devices": setting.devices,
        "samples": setting.samples,
        "train_samples": float(np.asarray(cohort.fit.size).mean()),
    }
    found: list[Row] = [{"kind": "method", **about, **row} for row in rows]
    if setting.variants is personal_methods.MAIN:
        evidence = personal_evidence.measure(states, cohort, dims, models.cell)
        found.append({"kind": "evidence", **about, **evidence})
    return found


def searched(study: Study) -> Models:
    """The backbone and the header that the edge searched on it, once in a study."""
    context = study.context
    backbone = study.backbone(study.point(*BACKBONE).arch)

    def make() -> tuple[Any, dict[str, Any]]:
        found = edge.search_header(
            study.key("personalization header"),
            *study.edge_data(backbone),
            context.header_dims,
            context.config.header,
        )
        return jax.tree.map(np.asarray, found.params), {"cell": found.cell}

    params, facts = study.cached("personalization_header", make)
    return Models(backbone, tuple(tuple(block) for block in facts["cell"]), params)


def refined(
    study: Study, models: Models, cohort: Cohort, variants: Sequence[Variant]
) -> dict[str, DeviceState]:
    """The devices' states under some variants, by the variants' names."""
    context, config = study.context, study.config.refine
    plan = personal_methods.plan(variants, cohort, config, context.header_dims, models.cell)
    return cohorts.refine(
        study.key("personalization"),
        config,
        context.header_dims,
        models.cell,
        models.header,
        cohort.fit,
        plan.methods,
        context.mesh,
        wrap=personal_methods.wrap_of(plan, len(cohort.fleet), context.header_dims, config),
    )


def worst_tenth(accuracies: np.ndarray) -> float:
    """Mean over the tenth of the devices with the lowest accuracies, at least one."""
    count = math.ceil(accuracies.size / 10)
    return float(np.sort(accuracies)[:count].mean())


def _facts(method: str, listens: str, temperature: float | None, part: float) -> Row:
    return {
        "method": method,
        "listens": listens,
        "temperature": temperature,
        "part": part,
        "chosen": None,
    }


def _sizes(study: Study, models: Models, states: DeviceState) -> Row:
    """How much is pruned, and what that leaves; means over the devices."""
    dims, cell = study.context.header_dims, models.cell
    masks = np.asarray(states.mask)[:, header_slots.gate_positions(dims, cell)]
    params = [header_layout.num_params(dims, cell, mask) for mask in masks]
    return {
        "pruned_fraction": float((masks == 0).mean()),
        "header_params": float(np.mean(params)),
    }


def _choose(rows: Sequence[Row]) -> dict[str, int]:
    """Which row the samples set aside choose for each of `CHOICES`, where a unit has any."""
    found = {}
    for name, methods in CHOICES.items():
        places = [place for place, row in enumerate(rows) if row["method"] in methods]
        if places:
            found[name] = held_out.best(places, lambda place: rows[place]["select_accuracy"])
    return found


EXPERIMENT = Experiment(
    "personalization",
    "accuracy of the devices by data distribution, and what listening to similar ones is worth",
    units,
    run,
)
