"""Pictures of the experiment `backbone_grid`."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results_backbone_grid_numbers import STAGES, Document, places, values

from acme_jax.experiments.statistics import estimate
from acme_jax.plot_style import COLOURS, WIDTH, ink

_CURVES = {
    "elastic": (COLOURS[0], "o", "supernet"),
    "same_compute": (COLOURS[1], "s", "alone, same compute in all"),
    "same_epochs": (COLOURS[2], "D", "alone, same epochs each"),
}


def stages_figure(document: Document) -> Figure:
    """Heat maps of test accuracy by depth and width, one for each stage."""
    stages = ("trained", "reordered", "width_adaptive", "elastic", "same_compute")
    depths, widths = (sorted({place[axis] for place in places(document)}) for axis in (0, 1))
    figure = Figure((WIDTH, 6.6), layout="constrained")
    figure.suptitle("Test accuracy of the sub-networks at each stage, %", x=0.01, ha="left")
    axes = figure.subplots(2, 3).reshape(-1)
    image = None
    for axis, stage in zip(axes, stages, strict=False):
        accuracy = np.full((len(depths), len(widths)), np.nan)
        for place in places(document):
            mean = estimate(values(document, stage, place)).mean
            accuracy[depths.index(place[0]), widths.index(place[1])] = 100 * mean
        image = axis.imshow(
            accuracy, origin="lower", cmap="viridis", aspect="auto", vmin=0, vmax=100
        )
        for (row, column), value in np.ndenumerate(accuracy):
            axis.text(
                column, row, f"{value:.1f}", ha="center", va="center", color=ink(image, value)
            )
        axis.set_xticks(range(len(widths)), [f"{w:g}" for w in widths])
        axis.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
        axis.set_title(STAGES[stage])
        axis.set_xlabel("width")
        axis.set_ylabel("depth")
    axes[-1].set_axis_off()
    if image is not None:
        figure.colorbar(image, ax=axes[-1], label="test accuracy, %", fraction=0.5, aspect=10)
    return figure


def alone_figure(document: Document) -> Figure:
    """Supernet and networks alone by depth, one panel for each width."""
    widths = sorted({place[1] for place in places(document)})
    depths = sorted({place[0] for place in places(document)})
    figure = Figure((WIDTH, 4.2), layout="constrained")
    figure.suptitle("One supernet against sub-networks trained alone", x=0.01, ha="left")
    axes = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    for axis, width in zip(axes, widths, strict=True):
        for number, stage in enumerate(_CURVES):
            _curve(axis, document, stage, width, depths, number - 1)
        axis.set_title(f"width {width:g}")
        axis.set_xlabel("depth")
        axis.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axis.set_xlim(-0.5, len(depths) - 0.5)
        axis.grid(axis="y", color="#eeeeee")
    axes[0].set_ylabel("test accuracy, %\n(bars: 95 % intervals over seeds)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def _curve(
    axis: Axes, document: Document, stage: str, width: float, depths: list[float], shift: int
) -> None:
    """Means with intervals, a little aside so that bars do not cover each other."""
    colour, marker, label = _CURVES[stage]
    found = [
        (place, estimate(of_seeds))
        for place, depth in enumerate(depths)
        if (of_seeds := values(document, stage, (depth, width)))
    ]
    axis.errorbar(
        [place + 0.12 * shift for place, _ in found],
        [100 * value.mean for _, value in found],
        yerr=[100 * np.nan_to_num(value.half_width) for _, value in found],
        color=colour,
        marker=marker,
        ms=5,
        lw=1.2,
        capsize=2.5,
        label=label,
        ls="none" if stage == "same_epochs" else "-",
    )
