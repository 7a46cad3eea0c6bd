"""Pictures of the experiment `selection`."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results_selection_numbers import (
    GOAL_SHARE,
    LIMIT,
    SEARCHERS,
    Document,
    column,
    share,
    steps,
)

from acme_jax.experiments import paper_candidates
from acme_jax.experiments.statistics import estimate
from acme_jax.plot_style import COLOURS, GREY, WIDTH

MARKS = {
    "grid_filter": ("*", COLOURS[1], "grid, then size limit (the paper's code)"),
    "lowest_error": ("s", COLOURS[0], "highest accuracy (= size limit, then grid)"),
    "trade_off": ("P", COLOURS[2], "best trade-off score"),
    "nearest_ideal": ("D", COLOURS[3], "nearest to the ideal point"),
    "largest": ("v", COLOURS[4], "largest"),
}
"""Rules in the pictures."""


def candidates_figure(document: Document) -> Figure:
    """Accuracy against energy and size: the paper's candidates above, ours below."""
    figure = Figure((WIDTH, 7.2), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    theirs = paper_candidates.candidates()
    seed = document["seeds"][0]
    ours = [r for r in document["rows"] if r["kind"] == "candidate" and r["seed"] == seed]
    accuracy = np.array([row["select_accuracy"] for row in ours])
    size = np.array([row["size"] for row in ours])
    for place, name in enumerate(("energy", "size")):
        costs = (getattr(theirs, name), np.array([row[name] for row in ours]))
        for axis, cost, level, sizes, unit, who in (
            (axes[0, place], costs[0], theirs.accuracy, theirs.size, "paper", "the paper's 400"),
            (axes[1, place], costs[1], accuracy, size, "archive", f"our 16, seed {seed}"),
        ):
            _draw_candidates(axis, document, unit, name, (cost, level, sizes <= LIMIT))
            axis.set_title(f"{who}: accuracy and {name}")
            axis.set_xlabel(f"{name}, 0: cheapest, 1: dearest")
        axes[1, place].set_ylim(accuracy.min() - 0.012, accuracy.max() + 0.012)
    for row in axes:
        row[0].set_ylabel("accuracy (selection)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _draw_candidates(
    axis: Axes,
    document: Document,
    unit: str,
    name: str,
    drawn: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    cost, level, fits = drawn
    axis.plot(cost[fits], level[fits], ".", ms=4, color=GREY, label=f"within S ≤ {LIMIT}")
    axis.plot(cost[~fits], level[~fits], ".", ms=4, color="#dddddd", label="too large")
    for place, (rule, (marker, colour, label)) in enumerate(MARKS.items()):
        wanted = {"unit": unit, "kind": "choice", "rule": rule, "limit": LIMIT}
        x = column(document, name, **wanted)[0]
        y = column(document, "accuracy", **wanted)[0]
        # Open marks of falling size, so that rules with the same choice all show.
        axis.plot(
            x, y, marker, ms=15 - 2 * place, mfc="none", mec=colour, mew=1.6, ls="none",
            label=label, clip_on=False,
        )  # fmt: skip


def hypervolume_figure(document: Document) -> Figure:
    """Hypervolume by evaluations, in the uniform space and in that of single layers."""
    figure = Figure((WIDTH, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for searcher in ("nsga2", "random"):
        label, colour = SEARCHERS[searcher]
        x = steps(document, "uniform", searcher)
        wanted = {"kind": "uniform", "searcher": searcher}
        found = [estimate(column(document, "share", evaluations=n, **wanted)) for n in x]
        low = [estimate(column(document, "share_low", evaluations=n, **wanted)).mean for n in x]
        mean = [value.mean for value in found]
        left.plot(x, mean, "o-", color=colour, label=label)
        left.fill_between(x, low, mean, color=colour, alpha=0.15, lw=0)
    left.axhline(GOAL_SHARE, color="black", lw=0.8, ls=":")
    left.axvline(16, color="black", lw=0.8, ls=":")
    left.set_title("16 uniform sub-networks (shaded: down to the worst 5 %)")
    left.set_ylabel("hypervolume, part of the exhaustive")
    left.legend(loc="lower right")
    for searcher, (label, colour) in SEARCHERS.items():
        x = steps(document, "per_layer", searcher)
        found = [share(document, searcher, n) for n in x]
        middle = np.array([value.mean for value in found])
        half = np.nan_to_num([value.half_width for value in found])
        right.plot(x, middle, "-", color=colour, label=label)
        right.fill_between(x, middle - half, middle + half, color=colour, alpha=0.15, lw=0)
        held = share(document, searcher, x[-1], "test_share")
        right.errorbar(
            x[-1] + 14, held.mean, np.nan_to_num(held.half_width), fmt="D", ms=5, capsize=3,
            color=colour,
        )  # fmt: skip
    right.axhline(1.0, color="black", lw=0.8, ls=":")
    right.set_title("each layer by itself (1: all uniform sub-networks)")
    right.legend(loc="lower right", title="diamonds: the last front on test data")
    for axis in (left, right):
        axis.set_xlabel("evaluations")
        axis.grid(axis="y", color="#eeeeee")
        axis.set_axisbelow(True)
    return figure
