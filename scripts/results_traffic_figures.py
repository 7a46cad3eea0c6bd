"""Pictures of the experiment `traffic`."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from results_traffic_numbers import (
    ALL,
    CENTRAL,
    EXACT,
    FLEET_NAMES,
    GOAL,
    PAPER_SHARE,
    Document,
    inputs,
    loss,
    settings_of,
    total,
    uplink,
)

from acme_jax.experiments.traffic_bytes import ORIGINAL
from acme_jax.experiments.wire_settings import RECOMMENDED
from acme_jax.plot_style import COLOURS, GREY, WIDTH

SHORT = {
    ORIGINAL: "float32, raw features",
    "log8": "8 bits",
    "small": "4 bits, small sketch",
    RECOMMENDED: "8 bits, small sketch, 2 rounds",
}
"""Settings in a narrow column."""
KINDS = {
    "device_profile": ("profiles", COLOURS[6]),
    "cluster_profile": ("profiles", COLOURS[6]),
    "feature_sketch": ("feature sketches", COLOURS[5]),
    "importance_set": ("importance sets", COLOURS[0]),
    "personalized_importance": ("personalised sets", COLOURS[4]),
    "header": ("headers", COLOURS[2]),
    "backbone": ("backbones", COLOURS[3]),
}
"""Names and colours of messages in pictures."""


def bytes_figure(document: Document) -> Figure:
    """Stacked bars by kind of message, in percent of centralised: uplink left, total right."""
    bars = [
        (place, name)
        for place in inputs(document)
        for name in settings_of(document, place)
        if name == EXACT or name in SHORT
    ]
    figure = Figure((WIDTH, 1.3 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, direction in zip(axes, ("up", None), strict=True):
        for place, (images, name) in enumerate(bars):
            whole = total(document, images, CENTRAL, direction)
            start = 0.0
            for kind, (label, colour) in KINDS.items():
                size = _of_kind(document, images, name, kind, direction) / whole * 100
                axis.barh(place, size, left=start, color=colour, height=0.7, label=label)
                start += size
            text = f" {start:.2g} %" if start < 10 else f" {start:.0f} %"
            axis.annotate(text, (start, place), va="center", size=8)
        axis.axvline(
            100 * (GOAL if direction else PAPER_SHARE),
            color="black",
            lw=0.9,
            ls=":",
        )
        axis.grid(axis="x", color="#eeeeee")
        axis.set_axisbelow(True)
        axis.set_xlim(0, 1.14 * max(axis.get_xlim()[1], 1))
    axes[0].set_title("uplink, % of raw samples (dotted: 1 %)")
    axes[1].set_title("everything, % of centralised (dotted: 6 %)")
    axes[0].set_yticks(
        range(len(bars)), [f"{place}: {SHORT.get(name, name)}" for place, name in bars]
    )
    axes[0].invert_yaxis()
    handles, names = axes[0].get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    figure.legend(unique.values(), unique, loc="outside lower center", ncols=len(unique))
    return figure


def _of_kind(
    document: Document, place: str, setting: str, kind: str, direction: str | None
) -> float:
    return total(document, place, setting, direction) - total(
        document, place, setting, direction, without=kind
    )


def accuracy_figure(document: Document) -> Figure:
    """Accuracy lost against bytes sent, for every fleet."""
    figure = Figure((WIDTH, 3.9), layout="constrained")
    axes = figure.subplots(1, len(FLEET_NAMES), sharey=True)
    names = [name for name in ALL if name != "alone"]
    for axis, (unit, title) in zip(axes, FLEET_NAMES.items(), strict=True):
        for place, name in enumerate(names):
            value = loss(document, unit, name)
            axis.errorbar(
                100 * uplink(document, name).mean,
                100 * value.mean,
                np.nan_to_num(100 * value.half_width),
                fmt="oosD^vPX*"[place % 9],
                color=COLOURS[place % 7],
                capsize=3,
                label=name.replace("_", " "),
            )
        alone = loss(document, unit, "alone")
        axis.axhline(100 * alone.mean, color=GREY, lw=1, ls="--", label="alone (sends nothing)")
        axis.axhline(0, color="black", lw=0.8)
        axis.axvline(100 * GOAL, color="black", lw=0.9, ls=":")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator([0.5, 1, 2, 5, 10, 20]))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_title(title)
        axis.set_xlabel("uplink, % of raw samples")
        axis.grid(axis="y", color="#eeeeee")
        axis.set_axisbelow(True)
    axes[0].set_ylabel("accuracy minus float32, points")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure
