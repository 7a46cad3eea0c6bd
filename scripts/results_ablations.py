"""Tables, pictures and claims of the experiment `ablations`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from results_claims import Claim, Verdict, percent

from acme_jax.experiments.ablations import VARIANTS
from acme_jax.experiments.statistics import Estimate, estimate, paired
from acme_jax.plot_style import COLOURS, WIDTH

Document = dict[str, Any]

NAMES = {
    "full": "the full pipeline",
    "no_reordering": "without reordering",
    "no_hidden_loss": "without the hidden-state loss",
    "no_depth_distillation": "without depth distillation",
    "fixed_cell": "with a fixed cell instead of header search",
    "linear_header": "with a linear header instead of header search",
    "average": "with a plain average instead of similarity",
    "no_smoothing": "without smoothing",
}
STAGE_SECONDS = {
    "no_reordering": ("reordering_seconds",),
    "no_depth_distillation": ("depth_seconds",),
    "fixed_cell": ("header_seconds",),
    "linear_header": ("header_seconds",),
    "average": ("similarity_seconds",),
}
"""Which of the full pipeline's seconds a variant saves. The hidden-state loss and smoothing are
a few additions in programs that run anyway."""
BASELINES = {"fixed_cell", "linear_header"}
"""Variants that train something else in the stage's place."""


def backbones(document: Document) -> list[tuple[float, float]]:
    """(depth, width), the smallest first."""
    return sorted({(row["depth"], row["width"]) for row in document["rows"] if "depth" in row})


def values(
    document: Document, variant: str, name: str, backbone: tuple[float, float] | None = None
) -> list[float]:
    """A column of one variant's rows, seed by seed: of one backbone, or the mean of its rows."""
    result = []
    for seed in document["seeds"]:
        found = [
            row[name]
            for row in document["rows"]
            if row["seed"] == seed
            and row["variant"] == variant
            and name in row
            and backbone in (None, (row.get("depth"), row.get("width")))
        ]
        if found:
            result.append(float(np.mean(found)))
    return result


def difference(
    document: Document, variant: str, name: str, backbone: tuple[float, float] | None = None
) -> Estimate:
    """The variant minus the full pipeline, paired by seed."""
    return paired(
        values(document, variant, name, backbone), values(document, "full", name, backbone)
    )


def stage_seconds(document: Document, variant: str) -> float | None:
    """What the ablated stage costs in the full pipeline; None: nothing to speak of.

    The least of the seeds, as other work on the machine only adds. A header search counts for one
    backbone, less what training the other header takes.
    """
    if variant not in STAGE_SECONDS:
        return None
    seconds = sum(min(values(document, "full", name)) for name in STAGE_SECONDS[variant])
    if variant in BASELINES:
        seconds -= min(values(document, variant, "header_seconds"))
    return seconds


def devices_table(document: Document) -> list[str]:
    """Accuracy of the refined devices, and the difference to the full pipeline."""
    places = backbones(document)
    names = [f"depth {depth:g}, width {width:g}" for depth, width in places]
    lines = [
        f"| variant | {' | '.join(names)} | mean | minus full | the stage takes, s |",
        "|---|" + "---|" * (len(places) + 3),
    ]
    for variant in VARIANTS:
        cells = [
            percent(estimate(values(document, variant, "test_accuracy", place)))
            for place in (*places, None)
        ]
        minus = percent(difference(document, variant, "test_accuracy"), signed=True)
        cells += ["" if variant == "full" else minus, _seconds(stage_seconds(document, variant))]
        lines.append(f"| {NAMES[variant]} | {' | '.join(cells)} |")
    return lines


def networks_table(document: Document) -> list[str]:
    """The supernet's own accuracy, where the cloud's training is ablated."""
    places = backbones(document)
    names = [f"depth {depth:g}, width {width:g}" for depth, width in places]
    lines = [
        f"| variant | {' | '.join(names)} | mean of the grid | minus full |",
        "|---|" + "---|" * (len(places) + 2),
    ]
    for variant, spec in VARIANTS.items():
        if not (spec.cloud or variant == "full"):
            continue
        cells = [
            percent(estimate(values(document, variant, "network_test_accuracy", place)))
            for place in places
        ]
        cells.append(percent(estimate(values(document, variant, "grid_test_accuracy"))))
        minus = percent(difference(document, variant, "grid_test_accuracy"), signed=True)
        cells.append("" if variant == "full" else minus)
        lines.append(f"| {NAMES[variant]} | {' | '.join(cells)} |")
    return lines


def headers_table(document: Document) -> list[str]:
    """Headers before refinement: select accuracy, size, seconds of searching and training."""
    lines = [
        "| header | select accuracy, % | minus searched | parameters | seconds |",
        "|---|---|---|---|---|",
    ]
    for variant, name in (
        ("full", "searched"), ("fixed_cell", "fixed cell"), ("linear_header", "linear"),
    ):  # fmt: skip
        minus = percent(difference(document, variant, "header_select_accuracy"), signed=True)
        cells = [
            percent(estimate(values(document, variant, "header_select_accuracy"))),
            "" if variant == "full" else minus,
            f"{np.mean(values(document, variant, 'header_params')):,.0f}",
            _seconds(min(values(document, variant, "header_seconds"))),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2g}" if abs(value) < 10 else f"{value:.0f}"


def differences_figure(document: Document) -> Figure:
    """What leaving a stage out changes: devices by backbone, and the supernet's grid."""
    variants = [variant for variant in VARIANTS if variant != "full"]
    figure = Figure((WIDTH, 4.8), layout="constrained")
    figure.suptitle("What leaving a stage out changes", x=0.01, ha="left")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    places = backbones(document)
    for number, place in enumerate(places):
        found = [difference(document, variant, "test_accuracy", place) for variant in variants]
        left.errorbar(
            [100 * value.mean for value in found],
            np.arange(len(variants)) + 0.2 * (number - (len(places) - 1) / 2),
            xerr=[100 * np.nan_to_num(value.half_width) for value in found],
            color=COLOURS[number],
            marker="osD"[number % 3],
            ls="none",
            capsize=2.5,
            label=f"depth {place[0]:g}, width {place[1]:g}",
        )
    cloud = [variant for variant in variants if VARIANTS[variant].cloud]
    found = [difference(document, variant, "grid_test_accuracy") for variant in cloud]
    right.errorbar(
        [100 * value.mean for value in found],
        [variants.index(variant) for variant in cloud],
        xerr=[100 * np.nan_to_num(value.half_width) for value in found],
        color=COLOURS[6],
        marker="o",
        ls="none",
        capsize=2.5,
    )
    for axis, title in ((left, "refined devices"), (right, "supernet, mean of the grid")):
        axis.axvline(0.0, color="#8a8a8a", lw=1)
        axis.set_title(title)
        axis.set_xlabel("points, minus the full pipeline")
        axis.grid(axis="x", color="#eeeeee")
    left.set_yticks(range(len(variants)), [NAMES[variant] for variant in variants])
    left.invert_yaxis()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def claims(document: Document) -> list[Claim]:
    """Every stage is worth having: devices, and for the cloud's stages the supernet as well."""
    found = []
    papers = {
        "no_reordering": "82.98 to 86.02 at width 0.9",
        "linear_header": "86.77 to 92.34 at depth 1, width 0.5 (CIFAR-100)",
        "average": "C3: +0.6 points over no pruning instead of +3.8",
    }
    for variant, spec in VARIANTS.items():
        if variant == "full":
            continue
        changes = [difference(document, variant, "test_accuracy")]
        ours = f"devices {percent(changes[0], signed=True)} points"
        if spec.cloud:
            changes.append(difference(document, variant, "grid_test_accuracy"))
            ours += f", supernet {percent(changes[1], signed=True)} points"
        claim = f"ACME is less accurate {NAMES[variant]}"
        found.append(Claim(claim, papers.get(variant, "goal"), ours, _verdict(changes)))
    return found


def _verdict(changes: list[Estimate]) -> Verdict:
    """Of differences that should all be negative."""
    worse = [value.sign < 0 for value in changes]
    if all(worse):
        return "holds"
    return "partly" if any(worse) else "fails"


TABLES: dict[str, Callable[[Document], list[str]]] = {
    "ablations_devices": devices_table,
    "ablations_networks": networks_table,
    "ablations_headers": headers_table,
}
FIGURES = {"ablations_differences": differences_figure}
