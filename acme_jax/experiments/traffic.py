"""What travels, in bytes by kind of message, beside centralised training; and how to send less.

Units: "measured" runs the refinement of `acme_jax.refine` on the study's devices and reads its
ledger; "encoded" encodes messages in the shapes of the paper's ViT-B for images of 32 x 32 and
224 x 224; the units of `FLEETS` refine 10 devices under every wire setting, on equal data, in equal
order, from equal starts, and measure the accuracy.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from acme_jax import edge, header_layout, header_slots, number_formats, refine, system
from acme_jax.config import Config, Distribution, RefineConfig, SketchFormat
from acme_jax.device import DeviceState, Mixing
from acme_jax.experiments import cohorts, final, traffic_bytes
from acme_jax.experiments.cohorts import Method
from acme_jax.experiments.experiment import Experiment, Row
from acme_jax.experiments.study import Study
from acme_jax.experiments.wire_settings import (
    SETTINGS,
    Models,
    apply_setting,
    uplink_of_device,
)
from acme_jax.fleet import Device
from fed.clients import ClientData, stack_clients
from nas.cells import StaticCell

BACKBONE = (0.5, 0.5)
"""Depth and width of the backbone on which the devices refine."""
NUM_DEVICES = 10


class FleetUnit(NamedTuple):
    """One unit of devices."""

    distribution: Distribution
    pruned: float | None = None
    """Part of the gates that is pruned in all rounds together; None: as the run does it."""


FLEETS = {
    "c3": FleetUnit("c3"),
    "dirichlet": FleetUnit("dirichlet"),
    # So many that it must show when importances are wrong.
    "c3_hard": FleetUnit("c3", pruned=0.7),
}
BASELINES = {
    "avg": "float32 importances, their plain average, no sketch",
    "alone": "nothing goes up: every device prunes by its own importance",
}
"""What the settings are compared with besides "float32"."""


def units(config: Config) -> list[str]:
    """Real messages, messages in the paper's shapes, and the accuracy under each setting."""
    del config
    return ["measured", "encoded", *FLEETS]


def run(study: Study, unit: str) -> list[Row]:
    """Rows of one unit, told apart by `kind`.

    "bytes": see `traffic_bytes`; "accuracy": one device under one setting, with the bytes that it
    sends up, those of its raw samples, and how many of its pruned gates "float32" prunes too.
    """
    if unit == "encoded":
        return traffic_bytes.encoded()
    models = searched(study)
    if unit == "measured":
        return traffic_bytes.measured(study, models)
    return _accuracies(study, models, FLEETS[unit])


def searched(study: Study) -> Models:
    """The edge's backbone and the header that it searched, once in a study."""
    context = study.context
    point, dims = study.point(*BACKBONE), context.header_dims
    backbone = study.backbone(point.arch)

    def make() -> tuple[Any, dict[str, Any]]:
        found = edge.search_header(
            study.key("traffic header"), *study.edge_data(backbone), dims, context.config.header
        )
        return jax.tree.map(np.asarray, found.params), {"cell": found.cell}

    params, facts = study.cached("traffic_header", make)
    cell: StaticCell = tuple(tuple(block) for block in facts["cell"])
    gates = header_layout.num_gates(dims, cell)
    return Models(point.arch, backbone, cell, params, context.encoder.embed_dim, gates)


def _accuracies(study: Study, models: Models, unit: FleetUnit) -> list[Row]:
    context, base = study.context, study.config.refine
    fleet = study.fleet(num_edges=1, devices_per_edge=NUM_DEVICES, distribution=unit.distribution)
    pruned = refine.gates_per_round(context, models.cell)
    if unit.pruned is not None:
        pruned = cohorts.gates_per_round(base, context.header_dims, models.cell, unit.pruned)
    features = [
        system.compute_features(context, models.backbone, device.train.inputs) for device in fleet
    ]
    tokens, summaries = (_stacked(study, part, fleet) for part in zip(*features, strict=True))
    configs = {name: apply_setting(base, name) for name in SETTINGS}
    states: dict[str, DeviceState] = {}
    # One program for all settings of equal rounds; formats are data of the cohort's rows.
    for schedule in dict.fromkeys((c.rounds, c.local_epochs) for c in configs.values()):
        names = [n for n, c in configs.items() if (c.rounds, c.local_epochs) == schedule]
        shared = {name: configs[name] for name in names}
        states |= _refined(study, models, tokens, summaries, shared, pruned * base.rounds)
    accuracies = final.devices(
        study, models.backbone, fleet, cohorts.evaluator(states, context.header_dims)
    )
    rows: list[Row] = []
    gates = header_slots.gate_positions(context.header_dims, models.cell)
    closed = {name: np.asarray(state.mask)[:, gates] == 0 for name, state in states.items()}
    for name, of_devices in zip(states, accuracies, strict=True):
        for place, (device, accuracy) in enumerate(zip(fleet, of_devices, strict=True)):
            own, exact = closed[name][place], closed["float32"][place]
            rows.append(
                {
                    "kind": "accuracy",
                    "distribution": unit.distribution,
                    "setting": name,
                    "device": device.id,
                    "gates": models.num_gates,
                    "pruned": int(own.sum()),
                    "same_pruned": int(np.sum(own & exact)),
                    "num_train": len(device.train),
                    "test_accuracy": float(accuracy),
                    "uplink_bytes": _uplink(base, models, name, len(device.train)),
                    "raw_bytes": round(len(device.train) * (context.sample_bytes + 1)),
                }
            )
    return rows


def _refined(
    study: Study,
    models: Models,
    tokens: ClientData,
    summaries: ClientData,
    configs: dict[str, RefineConfig],
    pruned: int,
) -> dict[str, DeviceState]:
    """The devices' states under settings with one schedule, and with the run's own the baselines.

    Args:
      study: for keys and sizes.
      models: of the edge.
      tokens: of the devices' training samples.
      summaries: of the same.
      configs: by setting.
      pruned: gates in all rounds together.
    """
    context, count = study.context, NUM_DEVICES
    schedule = next(iter(configs.values()))
    each_round = pruned // schedule.rounds
    methods: dict[str, Method] = {}
    bits: dict[str, int] = {}
    for name, config in configs.items():
        mixing = _mixing(study, summaries, config.sketch_format, config.num_quantiles)
        methods[name] = Method(np.asarray(mixing.wasserstein), each_round)
        bits[name] = number_formats.IMPORTANCE_BITS[config.importance_format]
        if name == "float32":
            methods["avg"] = Method(np.asarray(mixing.avg), each_round)
            methods["alone"] = Method(np.eye(count), each_round)
            bits |= dict.fromkeys(BASELINES, number_formats.EXACT_BITS)
    each = tuple(bits[name] for name in methods for _ in range(count))
    # What the program is kept by: the run's own fields, but for the schedule.
    config = dataclasses.replace(
        study.config.refine, rounds=schedule.rounds, local_epochs=schedule.local_epochs
    )
    return cohorts.refine(
        study.key("traffic refinement"),
        config,
        context.header_dims,
        models.cell,
        models.header,
        tokens,
        methods,
        context.mesh,
        wrap=number_formats.importance_as_read(each),
    )


def _mixing(study: Study, summaries: ClientData, form: SketchFormat, num_quantiles: int) -> Mixing:
    """The edge's weights from the sketches as it reads them."""
    context = study.context
    config = dataclasses.replace(study.config.refine, num_quantiles=num_quantiles)
    programs = refine.programs(
        context.header_dims, config, context.mesh, context.config.compute.client_chunk
    )
    sketches = np.asarray(programs.sketch(summaries.inputs, summaries.size))
    sent = [number_formats.sketch(rows, form) for rows in sketches]
    read = jnp.asarray(np.stack([number_formats.read(rows) for rows in sent]))
    return programs.mix(read, summaries.size, study.key("traffic mix"))


def _uplink(base: RefineConfig, models: Models, name: str, num_train: int) -> int:
    if name == "alone":
        return 0
    config = base if name == "avg" else apply_setting(base, name)
    return uplink_of_device(config, models, num_train, sketch=name != "avg")


def _stacked(study: Study, inputs: Any, fleet: list[Device]) -> ClientData:
    """Rows of the devices, padded to one length for all distributions: one program serves them."""
    data = stack_clients([(x, d.train.labels) for x, d in zip(inputs, fleet, strict=True)])
    config = study.config.fleet
    # Every label is divided by itself, so rounding may leave a sample of each to train on.
    longest = round(config.samples_per_device * (1.0 - config.test_fraction))
    longest += study.context.encoder.num_classes
    extra = max(0, longest - data.labels.shape[1])
    rows = ((0, 0), (0, extra))
    padded = np.pad(np.asarray(data.inputs), rows + ((0, 0),) * (data.inputs.ndim - 2))
    return ClientData(
        jnp.asarray(padded), jnp.asarray(np.pad(np.asarray(data.labels), rows)), data.size
    )


EXPERIMENT = Experiment(
    "traffic",
    "bytes by kind of message against centralised training, and accuracy with fewer of them",
    units,
    run,
)
