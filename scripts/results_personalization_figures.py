"""Pictures of the experiment `personalization`."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results_personalization_numbers import (
    DISTRIBUTIONS,
    EXTENDED,
    FEW,
    NO_PRUNING,
    OURS,
    OURS_PRIOR,
    SAMPLED,
    Document,
    column,
    difference,
)

from acme_jax.experiments.personal_methods import PARTS
from acme_jax.experiments.statistics import Estimate, estimate
from acme_jax.plot_style import COLOURS, GREY, WIDTH

_STYLES = {
    "alone": ("s", COLOURS[5], "alone"),
    "avg": ("D", COLOURS[2], "average"),
    "js": ("^", COLOURS[3], "Jensen-Shannon"),
    OURS: ("*", COLOURS[1], "ACME (Wasserstein)"),
    OURS_PRIOR: ("P", COLOURS[1], "ACME, log prior"),
    EXTENDED: ("o", COLOURS[0], "weights by similarity, log prior"),
    "avg_sharing_prior": ("v", GREY, "FedRS"),
    "fedavg_tuned": ("X", COLOURS[6], "FedAvg, then alone"),
    "edge_header_prior": ("h", COLOURS[4], "log prior, no training"),
    "random": ("x", GREY, "random"),
}


def differences_figure(document: Document) -> Figure:
    """What each method adds to no pruning, by distribution."""
    figure = Figure((WIDTH, 4.6), layout="constrained")
    axis = figure.subplots()
    names = [name for name in _STYLES if name != "random"]
    for place, name in enumerate(names):
        offset = (place - (len(names) - 1) / 2) * 0.8 / len(names)
        found = [difference(document, unit, name) for unit in DISTRIBUTIONS]
        _points(axis, np.arange(len(found)) + offset, found, name, line=False)
    for place in range(len(DISTRIBUTIONS) - 1):
        axis.axvline(place + 0.5, color="#dddddd", lw=0.6, zorder=-1)
    axis.set_xticks(range(len(DISTRIBUTIONS)), list(DISTRIBUTIONS.values()))
    axis.set_title("Test accuracy minus that without pruning, same schedule")
    _finish(figure, [axis], "points")
    return figure


def samples_figure(document: Document) -> Figure:
    """What each method adds to no pruning, by the number of training samples."""
    figure = Figure((WIDTH, 3.8), layout="constrained")
    axes = figure.subplots(1, len(SAMPLED), sharey=True)
    names = ("alone", "avg", OURS, OURS_PRIOR, EXTENDED, "avg_sharing_prior", "edge_header_prior")
    for axis, name in zip(axes, SAMPLED, strict=True):
        units = [f"{name}_samples_{samples}" for samples in sorted(FEW)] + [name]
        sizes = [
            estimate(column(document, "train_samples", unit=unit, method=NO_PRUNING)).mean
            for unit in units
        ]
        for method in names:
            found = [difference(document, unit, method) for unit in units]
            _points(axis, np.asarray(sizes), found, method, line=True)
        axis.set_xscale("log")
        axis.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel("training samples of a device")
        axis.set_title(DISTRIBUTIONS[name])
    _finish(figure, list(axes), "points over no pruning")
    return figure


def parts_figure(document: Document) -> Figure:
    """Accuracy minus that without pruning against the part of the gates that is pruned, C3."""
    figure = Figure((WIDTH, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, names in zip(axes, (("random", "alone", OURS), ("alone", OURS)), strict=True):
        for name in names:
            found = [difference(document, "c3_parts", name, part=part) for part in PARTS]
            _points(axis, 100 * np.asarray(PARTS), found, name, line=True)
        axis.set_xlabel("gates pruned, %")
    axes[0].set_title("with random pruning")
    axes[1].set_title("by importance only (other scale)")
    _finish(figure, list(axes), "points over no pruning")
    return figure


def _points(
    axis: Axes, places: np.ndarray, found: list[Estimate], name: str, *, line: bool
) -> None:
    marker, colour, label = _STYLES[name]
    widths = np.nan_to_num(np.array([value.half_width for value in found]))
    axis.errorbar(
        places,
        100 * np.array([value.mean for value in found]),
        100 * widths,
        marker=marker,
        color=colour,
        label=label,
        ms=8 if marker == "*" else 5,
        lw=1.2,
        ls="-" if line else "none",
        capsize=2,
    )


def _finish(figure: Figure, axes: list[Axes], label: str) -> None:
    for axis in axes:
        axis.axhline(0, color="black", lw=0.8, zorder=-1)
        axis.grid(axis="y", color="#eeeeee", zorder=-2)
    axes[0].set_ylabel(label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
