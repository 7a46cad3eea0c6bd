"""Tables, pictures and claims of the experiment `header_cells`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results_claims import Claim, percent

from acme_jax.experiments.statistics import Estimate, estimate, paired
from acme_jax.plot_style import COLOURS, GREY, WIDTH, ink

Document = dict[str, Any]

BACKBONES = {"largest": "largest backbone", "smallest": "smallest backbone"}
SIZES = (1, 2, 3)
SEARCHERS = {
    "none": "none: a uniform cell",
    "random": "random sampling",
    "evolution": "aging evolution",
    "controller": "LSTM controller",
}
PAPER = {"largest": (0.9453, 0.9337), "smallest": (0.5366, 0.6293)}
"""Accuracy at (B, U) = (1, 1) and (3, 3), CIFAR-100."""


def cell_accuracy(document: Document, backbone: str, blocks: int, repeats: int) -> list[float]:
    """Test accuracies of one place of the map, seed by seed."""
    found = {
        row["seed"]: row["test_accuracy"]
        for row in document["rows"]
        if row["kind"] == "map"
        and (row["backbone"], row["blocks"], row["repeats"]) == (backbone, blocks, repeats)
    }
    return [found[seed] for seed in document["seeds"]]


def growth(document: Document, backbone: str) -> Estimate:
    """Accuracy gained from (1, 1) to (3, 3) by the plane fitted to all nine places, per seed.

    The plane uses every place, so it is less noisy than the difference of two.
    """
    grid = np.asarray([[1.0, b, u] for b in SIZES for u in SIZES])
    columns = [cell_accuracy(document, backbone, b, u) for b in SIZES for u in SIZES]
    slopes = np.linalg.lstsq(grid, np.asarray(columns), rcond=None)[0][1:]
    return estimate(((SIZES[-1] - SIZES[0]) * slopes.sum(axis=0)).tolist())


def map_table(backbone: str) -> Callable[[Document], list[str]]:
    """Accuracy by blocks and repeats."""

    def table(document: Document) -> list[str]:
        lines = [
            "| | " + " | ".join(f"U = {repeats}" for repeats in SIZES) + " |",
            "|" + "---|" * (1 + len(SIZES)),
        ]
        for blocks in SIZES:
            cells = [
                percent(estimate(cell_accuracy(document, backbone, blocks, repeats)))
                for repeats in SIZES
            ]
            lines.append(f"| B = {blocks} | " + " | ".join(cells) + " |")
        return lines

    return table


def searches(document: Document, backbone: str, searcher: str, name: str) -> list[float]:
    """One column of a searcher's rows: the mean of its searches, seed by seed."""
    found: dict[int, list[float]] = {seed: [] for seed in document["seeds"]}
    for row in document["rows"]:
        if row["kind"] == "search" and (row["backbone"], row["searcher"]) == (backbone, searcher):
            found[row["seed"]].append(row[name])
    return [float(np.mean(values)) for values in found.values()]


def ahead_of(document: Document, backbone: str, searcher: str, other: str) -> Estimate:
    """Test accuracy of a searcher's winners minus another's, seed by seed."""
    return paired(
        searches(document, backbone, searcher, "test_accuracy"),
        searches(document, backbone, other, "test_accuracy"),
    )


def search_table(document: Document) -> list[str]:
    """What each search cost and found."""
    lines = [
        "| backbone | search | rewards | cells ranked | select, shared weights, % "
        "| select, trained, % | test, % | test minus no search |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for backbone, where in BACKBONES.items():
        for searcher, title in SEARCHERS.items():
            counts = [
                f"{np.mean(searches(document, backbone, searcher, name)):.0f}"
                for name in ("num_rewards", "num_ranked")
            ]
            accuracies = [
                percent(estimate(searches(document, backbone, searcher, name)))
                for name in ("shared_accuracy", "select_accuracy", "test_accuracy")
            ]
            ahead = (
                ""
                if searcher == "none"
                else percent(ahead_of(document, backbone, searcher, "none"), signed=True)
            )
            lines.append("| " + " | ".join([where, title, *counts, *accuracies, ahead]) + " |")
    return lines


def agreement(document: Document, backbone: str) -> Estimate:
    """Correlation of accuracy with shared weights and after training, over a seed's cells."""
    values = []
    for seed in document["seeds"]:
        pairs = {
            row["cell"]: (row["shared_accuracy"], row["select_accuracy"])
            for row in document["rows"]
            if row["kind"] == "search" and row["backbone"] == backbone and row["seed"] == seed
        }
        values.append(float(np.corrcoef(np.asarray(list(pairs.values())).T)[0, 1]))
    return estimate(values)


def spread(document: Document, backbone: str) -> Estimate:
    """Standard deviation of the test accuracy among uniform cells, trained, within a seed."""
    values = []
    for seed in document["seeds"]:
        found = [
            row["test_accuracy"]
            for row in document["rows"]
            if row["kind"] == "search"
            and (row["backbone"], row["searcher"], row["seed"]) == (backbone, "none", seed)
        ]
        values.append(float(np.std(found, ddof=1)))
    return estimate(values)


def room_table(document: Document) -> list[str]:
    """How much there is to win by choosing a cell, and whether shared weights tell."""
    lines = [
        "| backbone | standard deviation among uniform cells, trained, points "
        "| correlation of shared with trained accuracy |",
        "|---|---|---|",
    ]
    for backbone, where in BACKBONES.items():
        told = agreement(document, backbone)
        interval = "" if told.num < 2 else f" ± {told.half_width:.2f}"
        lines.append(
            f"| {where} | {percent(spread(document, backbone))} | {told.mean:.2f}{interval} |"
        )
    return lines


def map_figure(document: Document) -> Figure:
    """Both maps side by side, each on a scale of its own."""
    drawn = Figure((WIDTH, 4.2), layout="constrained")
    drawn.suptitle("Test accuracy by the size of the searched header", x=0.01, ha="left")
    for axis, (backbone, title) in zip(
        drawn.subplots(1, len(BACKBONES)), BACKBONES.items(), strict=True
    ):
        found = [[estimate(cell_accuracy(document, backbone, b, u)) for u in SIZES] for b in SIZES]
        means = np.asarray([[100 * one.mean for one in row] for row in found])
        image = axis.imshow(means, cmap="viridis")
        for (row, place), value in np.ndenumerate(means):
            axis.text(
                place,
                row,
                percent(found[row][place]),
                ha="center",
                va="center",
                color=ink(image, value),
            )
        axis.set_xticks(range(len(SIZES)), [str(repeats) for repeats in SIZES])
        axis.set_yticks(range(len(SIZES)), [str(blocks) for blocks in SIZES])
        axis.set_xlabel("U: the cell is stacked U + 2 times")
        axis.set_ylabel("B: blocks of a cell")
        axis.set_title(title)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        drawn.colorbar(image, ax=axis, label="test accuracy, %", shrink=0.8)
    return drawn


def search_figure(document: Document) -> Figure:
    """Every winner's test accuracy, and each search's mean with its interval."""
    drawn = Figure((WIDTH, 3.8), layout="constrained")
    drawn.suptitle("Trained winners of searches of equal cost", x=0.01, ha="left")
    axes = drawn.subplots(1, len(BACKBONES))
    for axis, (backbone, title) in zip(axes, BACKBONES.items(), strict=True):
        _draw_winners(axis, document, backbone)
        axis.set_title(title)
        axis.grid(axis="x", color="#eeeeee")
        axis.set_xlabel("test accuracy, %")
    axes[1].set_yticklabels([])
    return drawn


def _draw_winners(axis: Axes, document: Document, backbone: str) -> None:
    for number, searcher in enumerate(SEARCHERS):
        place = len(SEARCHERS) - 1 - number
        winners = [
            100 * row["test_accuracy"]
            for row in document["rows"]
            if row["kind"] == "search"
            and (row["backbone"], row["searcher"]) == (backbone, searcher)
        ]
        mean = estimate(searches(document, backbone, searcher, "test_accuracy"))
        axis.plot(winners, [place] * len(winners), "o", color=GREY, ms=3.5, alpha=0.5, ls="none")
        axis.errorbar(
            [100 * mean.mean],
            [place],
            xerr=[0.0 if mean.num < 2 else 100 * mean.half_width],
            fmt="D",
            color=COLOURS[number],
            ms=7,
            elinewidth=1.6,
            capsize=3,
            zorder=5,
        )
    axis.set_yticks(range(len(SEARCHERS)), list(SEARCHERS.values())[::-1])
    axis.set_ylim(-0.6, len(SEARCHERS) - 0.4)


def claims(document: Document) -> list[Claim]:
    """The paper's map, and what its search should be worth."""
    found = []
    for backbone, sign, words in (
        ("largest", -1, "the smallest header is best on the largest backbone"),
        ("smallest", 1, "the largest header is best on the smallest backbone"),
    ):
        gained, (small, large) = growth(document, backbone), PAPER[backbone]
        found.append(
            Claim(
                f"header_cells: {words}; accuracy gained from B = U = 1 to 3",
                f"{100 * (large - small):+.1f} points",
                f"{percent(gained, signed=True)} points",
                "holds" if gained.sign == sign else "fails",
            )
        )
    for other, words in (("none", "no search"), ("random", "random sampling"),
                         ("evolution", "aging evolution")):  # fmt: skip
        leads = [ahead_of(document, backbone, "controller", other) for backbone in BACKBONES]
        wins = sum(ahead.sign > 0 for ahead in leads)
        found.append(
            Claim(
                f"header_cells: the controller finds better cells than {words} at equal cost",
                "not compared",
                ", ".join(
                    f"{percent(ahead, signed=True)} points ({where})"
                    for ahead, where in zip(leads, BACKBONES.values(), strict=True)
                ),
                ("fails", "partly", "holds")[wins],
            )
        )
    return found


TABLES: dict[str, Callable[[Document], list[str]]] = {
    **{f"header_cells_{backbone}": map_table(backbone) for backbone in BACKBONES},
    "header_cells_search": search_table,
    "header_cells_room": room_table,
}
FIGURES: dict[str, Callable[[Document], Figure]] = {
    "header_cells_map": map_figure,
    "header_cells_searches": search_figure,
}
