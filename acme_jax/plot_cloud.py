"""Pictures of what the cloud found: the Pareto front, the uniform sub-networks, the search.

Each function takes the run's results and returns a matplotlib Figure, or None when the results
hold nothing to draw.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from acme_jax.plot_style import COLOURS, GREY, WIDTH, edge_colour, ink
from acme_jax.wording import Results, column, percent, quantity


def figure_pareto_front(results: Results) -> Figure | None:
    """Error against size and against latency: archive, Pareto Front Grid, the edges' choices."""
    search = results.get("search", {})
    if not search.get("archive"):
        return None
    archive, names = np.asarray(search["archive"], float), search["objective_names"]
    if "error" not in names:
        return None
    panels = [
        p
        for p in (("size_bytes", "size", "B"), ("latency_s", "modelled latency", "s"))
        if p[0] in names
    ]
    figure = Figure((WIDTH, 5.0), layout="constrained")
    figure.suptitle("What the cloud found: the trade-off between error and cost", x=0.01, ha="left")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    y = names.index("error")
    for axis, (objective, label, unit) in zip(axes, panels, strict=True):
        x = names.index(objective)
        scale, prefix = _axis_scale(archive[:, x], unit)
        _draw_front_grid(axis, search, archive, (x, y), (scale, 0.01))
        if objective == "size_bytes":
            points = results.get("grid", ())
            axis.plot(
                [p["size_bytes"] / scale for p in points],
                [100 * (1 - p["select_accuracy"]) for p in points],
                "s",
                color=GREY,
                ms=5,
                mfc="none",
                label="uniform 4 x 4 sub-networks",
                ls="none",
            )
            for choice in search.get("choices", ()):
                axis.axvline(
                    choice["budget_bytes"] / scale,
                    color=edge_colour(choice["edge"]),
                    lw=1.4,
                    ls="--",
                )
        axis.plot(
            archive[:, x] / scale,
            100 * archive[:, y],
            "o",
            color="#444444",
            ms=3.5,
            ls="none",
            label=f"Pareto archive ({len(archive)} sub-networks)",
        )
        _draw_choices(axis, search, archive[:, x] / scale, 100 * archive[:, y])
        axis.set_xlabel(f"{label}, {prefix}")
        axis.set_title(f"error against {label}")
    axes[0].set_ylabel("error on the select split, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left")
    chosen = _choice_labels(results)
    lines = [axes[0].plot([], [], "o--", color=edge_colour(edge), ms=9)[0] for edge in chosen]
    columns = -(-len(chosen) // 4)
    if chosen:
        figure.legend(lines, chosen.values(), loc="outside lower right", ncols=columns)
    return figure


def _choice_labels(results: Results) -> dict[int, str]:
    """For each edge, "edge 0: 3 blocks, 123 kB (dashed: budget 150 kB)"."""
    search, labels = results["search"], {}
    edges = {edge["edge"]: edge for edge in results.get("edges", ())}
    for choice in search.get("choices", ()):
        row = dict(zip(search["objective_names"], search["archive"][choice["index"]], strict=True))
        depth = edges.get(choice["edge"], {}).get("depth")
        blocks = "" if depth is None else f"{depth} block{'s' if depth != 1 else ''}, "
        labels[choice["edge"]] = (
            f"edge {choice['edge']}: {blocks}{quantity(row.get('size_bytes'), 'B')} "
            f"(dashed: budget {quantity(choice['budget_bytes'], 'B')})"
        )
    return labels


def _draw_front_grid(
    axis: Axes,
    search: Any,
    archive: np.ndarray,
    objectives: tuple[int, int],
    scales: tuple[float, float],
) -> None:
    """The grid's lines between ideal and nadir, and the cells that hold archive points."""
    divisions = search["num_divisions"]
    lines, cells = [], []
    for objective, scale in zip(objectives, scales, strict=True):
        ideal, nadir = search["ideal"][objective], search["nadir"][objective]
        lines.append(np.linspace(ideal, nadir, divisions + 1) / scale)
        span = (nadir - ideal) or 1.0
        place = np.floor((archive[:, objective] - ideal) / span * divisions)
        cells.append(np.clip(place, 0, divisions - 1).astype(int))
    for ticks, line in ((lines[0], axis.vlines), (lines[1], axis.hlines)):
        other = lines[1] if ticks is lines[0] else lines[0]
        line(ticks, other[0], other[-1], color="#cfcfcf", lw=0.6, zorder=0)
    for column_, row in set(zip(*(c.tolist() for c in cells), strict=True)):
        axis.add_patch(
            Rectangle(
                (lines[0][column_], lines[1][row]),
                lines[0][1] - lines[0][0],
                lines[1][1] - lines[1][0],
                color="#fff2cc",
                lw=0,
                zorder=-1,
            )
        )
    axis.plot(
        [],
        [],
        "s",
        color="#ffe699",
        ms=9,
        ls="none",
        label="occupied cell of the Pareto Front Grid",
    )


def _draw_choices(axis: Axes, search: Any, x: np.ndarray, y: np.ndarray) -> None:
    """A numbered disc at each chosen sub-network; edges that chose the same one share it."""
    chosen: dict[int, list[int]] = {}
    for choice in search.get("choices", ()):
        chosen.setdefault(choice["index"], []).append(choice["edge"])
    for index, edges in chosen.items():
        axis.plot(
            x[index], y[index], "o", color=edge_colour(edges[0]), ms=14, mec="white", zorder=5
        )
        axis.annotate(
            ",".join(map(str, edges)),
            (x[index], y[index]),
            color="white",
            weight="bold",
            ha="center",
            va="center",
            zorder=6,
            fontsize=9 if len(edges) == 1 else 6,
        )


def figure_grid(results: Results) -> Figure | None:
    """Test accuracy of the uniform sub-networks by width and depth."""
    points = results.get("grid", ())
    if not points:
        return None
    widths, depths = (sorted({p[key] for p in points}) for key in ("width", "depth"))
    accuracy = np.full((len(depths), len(widths)), np.nan)
    for point in points:
        accuracy[depths.index(point["depth"]), widths.index(point["width"])] = point[
            "test_accuracy"
        ]
    figure = Figure((6.4, 4.6), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(100 * accuracy, origin="lower", cmap="viridis", aspect="auto")
    for point in points:
        place = widths.index(point["width"]), depths.index(point["depth"])
        text = f"{percent(point['test_accuracy'])} %\n{quantity(point.get('size_bytes'), 'B')}"
        axis.text(
            *place, text, ha="center", va="center", color=ink(image, 100 * point["test_accuracy"])
        )
    axis.set_xticks(range(len(widths)), [f"{w:.2g}" for w in widths])
    axis.set_yticks(range(len(depths)), [f"{d:.2g}" for d in depths])
    axis.set_xlabel("width: part of the heads and neurons kept")
    axis.set_ylabel("depth: part of the blocks kept")
    axis.set_title("One supernet, 16 sizes: test accuracy without further training", size=11)
    figure.colorbar(image, label="test accuracy, %")
    return figure


def figure_hypervolume(results: Results) -> Figure | None:
    """The search's progress."""
    history = results.get("search", {}).get("hypervolume", ())
    if not history:
        return None
    figure = Figure((6.4, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(range(1, len(history) + 1), history, "o-", color=COLOURS[0], ms=3.5, clip_on=False)
    axis.annotate(
        f"{history[-1]:.4g}",
        (len(history), history[-1]),
        xytext=(0, -14),
        textcoords="offset points",
        ha="right",
        color=COLOURS[0],
    )
    axis.set_xlabel("generation")
    axis.set_ylabel("hypervolume, part of the box\nbelow the reference (more is better)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title("Progress of the Pareto search", size=11)
    axis.grid(axis="y", color="#eeeeee")
    return figure


def _axis_scale(values: np.ndarray, unit: str) -> tuple[float, str]:
    """What to divide an axis' values by, and the unit then: (1000.0, "kB")."""
    prefixed, _ = column([float(np.median(values))], unit)
    return {"n": 1e-9, "µ": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9}.get(
        prefixed[: -len(unit)], 1.0
    ), prefixed
