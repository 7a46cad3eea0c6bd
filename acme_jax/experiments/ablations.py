"""Each stage of ACME left out in turn: what it is worth, and what it costs in seconds.

All variants share everything that is not ablated: the reference model, the three backbones'
sizes, the devices with their data, and the keys of the header search and of the refinement.
Their differences to the full pipeline are therefore paired.

* `no_reordering`: heads and neurons stay as trained; both distillations are done again.
* `no_hidden_loss`: students learn from logits only; both distillations are done again.
* `no_depth_distillation`: the supernet is DynaViT_W, which no depth but the full one has trained.
* `fixed_cell`, `linear_header`: no header search (`ablation_edge` says with what training).
* `average`: every device listens to all equally instead of by similarity.
* `no_smoothing`: a device prunes by the newest importance set alone.

Rows with a `depth` are of one backbone: accuracy of its own classifier (where the cloud's training
is ablated, and of the full pipeline), of the header on the select split, and, the mean over the
devices, of refined headers on the devices' own test samples. The one row without says
how good the supernet is over the whole grid and what its training took.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from acme_jax.blocks import Params
from acme_jax.config import Config
from acme_jax.experiments import ablation_cloud, grid_accuracy
from acme_jax.experiments.ablation_edge import (
    Header,
    HeaderKind,
    Weights,
    make_header,
    num_params,
    refine_header,
)
from acme_jax.experiments.experiment import Experiment, Row
from acme_jax.experiments.study import GridPoint, Study
from acme_jax.fleet import Device

BACKBONES = ((0.25, 0.25), (0.5, 0.5), (1.0, 1.0))
"""(depth, width), the same for all variants; the nearest sub-networks of the grid."""

NUM_DEVICES = 10
"""Of one edge."""


class Variant(NamedTuple):
    """What differs from the full pipeline."""

    cloud: bool = False
    """The supernet is another one."""
    header: HeaderKind = "searched"
    weights: Weights = "wasserstein"
    smoothing: float | None = None
    """None: the run's."""


VARIANTS = {
    "full": Variant(),
    "no_reordering": Variant(cloud=True),
    "no_hidden_loss": Variant(cloud=True),
    "no_depth_distillation": Variant(cloud=True),
    "fixed_cell": Variant(header="fixed"),
    "linear_header": Variant(header="linear"),
    "average": Variant(weights="avg"),
    "no_smoothing": Variant(smoothing=0.0),
}


def units(config: Config) -> list[str]:
    """The full pipeline, then every ablation."""
    del config
    return list(VARIANTS)


def run(study: Study, unit: str) -> list[Row]:
    """Rows of one variant."""
    variant, rows = VARIANTS[unit], []
    params, cloud_row = _supernet(study, unit)
    networks: list[Row] = []
    if variant.cloud or unit == "full":
        networks = grid_accuracy.measure(study, params)
        means = {
            f"grid_{split}_accuracy": float(np.mean([row[f"{split}_accuracy"] for row in networks]))
            for split in ("select", "test")
        }
        rows.append({**means, **cloud_row})
    fleet = study.fleet(num_edges=1, devices_per_edge=NUM_DEVICES, budgets=(1.0,))
    for number, point in enumerate(_backbones(study)):
        row = _backbone(study, variant, params, point, number, fleet)
        for network in networks:
            if (network["depth"], network["width"]) == (point.depth, point.width):
                row["network_select_accuracy"] = network["select_accuracy"]
                row["network_test_accuracy"] = network["test_accuracy"]
        rows.append(row)
    return [{"variant": unit, **row} for row in rows]


def _backbones(study: Study) -> list[GridPoint]:
    """The three, or fewer in a small grid."""
    points = [study.point(*place) for place in BACKBONES]
    return list({(point.depth, point.width): point for point in points}.values())


def _supernet(study: Study, unit: str) -> tuple[Params, Row]:
    """The variant's supernet, and the seconds of its stages."""
    stages, config = study.stages, study.config
    if unit in ("no_reordering", "no_hidden_loss"):
        changed = ablation_cloud.without_hidden_loss(config)
        stages = ablation_cloud.retrain(
            study,
            unit,
            config if unit == "no_reordering" else changed,
            reorder=unit != "no_reordering",
        )
        directory = ablation_cloud.directory(study, unit)
    else:
        directory = study.directory
    seconds: Row = {
        f"{phase}_seconds": ablation_cloud.phase_seconds(directory, f"{phase} distillation")
        for phase in ("width", "depth")
    }
    if unit == "full":
        seconds["reordering_seconds"] = ablation_cloud.reordering_seconds(study)
    if unit == "no_depth_distillation":
        return stages.width_adaptive, {**seconds, "depth_seconds": 0.0}
    return stages.elastic, seconds


def _backbone(
    study: Study,
    variant: Variant,
    params: Params,
    point: GridPoint,
    number: int,
    fleet: Sequence[Device],
) -> Row:
    """Header and refinement on one backbone."""
    backbone = study.backbone(point.arch, params)
    model = _header(study, variant, backbone, number)
    config = study.config.refine
    if variant.smoothing is not None:
        config = dataclasses.replace(config, smoothing=variant.smoothing)
    key = study.key("ablations refinement", number)
    refined = refine_header(study, key, backbone, model, fleet, variant.weights, config)
    return {
        "depth": point.depth,
        "width": point.width,
        "header_select_accuracy": model.select_accuracy,
        "header_params": num_params(study, model),
        "test_accuracy": float(refined.test_accuracies.mean()),
        "header_seconds": model.seconds,
        "similarity_seconds": refined.similarity_seconds,
        "refine_seconds": refined.refine_seconds,
    }


def _header(study: Study, variant: Variant, backbone: Params, number: int) -> Header:
    """The full pipeline's header is searched once in a study, for its own variants share it."""
    key = study.key("ablations header", number)
    if variant.cloud or variant.header != "searched":
        return make_header(study, key, study.edge_data(backbone), variant.header)

    def make() -> tuple[Any, dict[str, Any]]:
        found = make_header(study, key, study.edge_data(backbone), "searched")
        facts = {k: v for k, v in found._asdict().items() if k != "params"}
        return jax.tree.map(np.asarray, found.params), facts

    params, facts = study.cached(f"ablations_header_{number}", make)
    cell = tuple(tuple(block) for block in facts["cell"])
    return Header(cell, params, facts["select_accuracy"], facts["seconds"])


EXPERIMENT = Experiment(
    name="ablations",
    title="Each stage of ACME left out in turn: accuracy and seconds",
    units=units,
    run=run,
)
