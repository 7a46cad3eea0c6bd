"""Accuracy by depth and width at every stage of the cloud's training, and of networks alone.

The paper's 16 sub-networks, each with its own classifier (the paper's "Linear" column): cut out of
the trained reference model, cut out after the reordering, after width distillation, after depth
distillation, and trained alone from scratch (`acme_jax.experiments.alone` says with what budget).
Rows with a `stage` are accuracies; those with `budget` say what training costs.
"""

from __future__ import annotations

from acme_jax.config import Config
from acme_jax.experiments import alone, final, grid_accuracy
from acme_jax.experiments.experiment import Experiment, Row
from acme_jax.experiments.study import Study

STAGES = ("trained", "reordered", "width_adaptive", "elastic")
"""Of `acme_jax.supernet_training.Stages`, in order."""


def units(config: Config) -> list[str]:
    """All stages of the supernet, then each sub-network alone."""
    return ["stages", *_alone_units(config)]


def _alone_units(config: Config) -> dict[str, tuple[float, float]]:
    """Depth and width by the unit's name."""
    fractions = sorted(config.search.fractions)
    return {f"alone_{d:g}_{w:g}": (d, w) for d in fractions for w in fractions}


def run(study: Study, unit: str) -> list[Row]:
    """Rows of one unit."""
    if unit == "stages":
        return _stages(study)
    depth, width = _alone_units(study.config)[unit]
    lengths: list[alone.Length] = ["same_compute"]
    if (depth, width) in alone.LONG_POINTS:
        lengths.append("same_epochs")
    return [_alone(study, depth, width, length) for length in lengths]


def _stages(study: Study) -> list[Row]:
    context, stages = study.context, study.stages
    archs = [point.arch for point in study.grid]
    budgets: list[Row] = [
        {
            "budget": "supernet",
            "epochs": alone.supernet_epochs(context),
            "train_flops": alone.supernet_flops(context),
        }
    ]
    for length in ("same_compute", "same_epochs"):
        epochs = alone.epochs_of(study, length)
        flops = alone.alone_flops(context, archs, epochs)
        budgets.append({"budget": length, "epochs": epochs, "train_flops": flops})
    return budgets + [
        {"stage": stage, **row}
        for stage in STAGES
        for row in grid_accuracy.measure(study, getattr(stages, stage))
    ]


def _alone(study: Study, depth: float, width: float, length: alone.Length) -> Row:
    point, epochs = study.point(depth, width), alone.epochs_of(study, length)
    trained = alone.train(study, point, epochs)
    classify = alone.classifier(study, trained.params, point.arch)
    return {
        "stage": length,
        "depth": point.depth,
        "width": point.width,
        "select_accuracy": alone.select_accuracy(study, classify),
        "test_accuracy": final.network(study, classify),
        "epochs": epochs,
        "train_flops": alone.alone_flops(study.context, [point.arch], epochs),
        "train_seconds": trained.train_seconds,
    }


EXPERIMENT = Experiment(
    name="backbone_grid",
    title="Accuracy by depth and width at each stage of the supernet, and trained alone",
    units=units,
    run=run,
)
