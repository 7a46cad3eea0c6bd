"""Pictures of what the edges and devices did: accuracy, similarity, pruned gates, traffic.

Each function takes the run's results and returns a matplotlib Figure, or None when the results
hold nothing to draw.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from acme_jax.plot_style import COLOURS, GREY, WIDTH, edge_colour, ink
from acme_jax.wording import Results, all_methods, method, quantity, traffic_rows

_METHOD_STYLES = {
    "unpersonalized": ("#999999", "o"),
    "linear": ("#E69F00", "v"),
    "no_pruning": ("#000000", "_"),
    "alone": ("#56B4E9", "s"),
    "avg": ("#009E73", "D"),
    "js": ("#CC79A7", "^"),
    "wasserstein": ("#D55E00", "*"),
}


def figure_similarity(results: Results) -> Figure | None:
    """How much each device listens to each other device of its edge."""
    shown = results.get("similarity", ())[:6]
    if not shown:
        return None
    kinds = [
        k
        for k in (("weights", _measure(shown[0])), ("js_weights", "Jensen-Shannon"))
        if k[0] in shown[0]
    ]
    per_row = min(3, len(shown))
    bands = -(-len(shown) // per_row)
    figure = Figure((WIDTH, 0.9 + 2.6 * len(kinds) * bands), layout="constrained")
    figure.suptitle(
        "Whose importance each device uses: row = the device, column = the device it listens to",
        x=0.01,
        ha="left",
    )
    axes = figure.subplots(len(kinds) * bands, per_row, squeeze=False)
    labels = {d["device"]: d.get("labels", ()) for d in results.get("devices", ())}
    top = max(np.max(entry[key]) for entry in shown for key, _ in kinds if key in entry)
    image: Any = None
    for axis in axes.flat:
        axis.set_visible(False)
    for place, entry in enumerate(shown):
        for kind, (key, name) in enumerate(kinds):
            if key not in entry:
                continue
            axis = axes[place // per_row * len(kinds) + kind, place % per_row]
            axis.set_visible(True)
            weights, ids = np.asarray(entry[key]), entry["devices"]
            image = axis.imshow(weights, cmap="viridis", vmin=0, vmax=top)
            if len(ids) <= 8:
                for (row, col), value in np.ndenumerate(weights):
                    axis.text(
                        col,
                        row,
                        f"{value:.2f}",
                        ha="center",
                        va="center",
                        size=7.5,
                        color=ink(image, value),
                    )
            axis.set_xticks(range(len(ids)), ids)
            axis.set_yticks(range(len(ids)), [_device_label(i, labels.get(i, ())) for i in ids])
            axis.tick_params(length=0, labelsize=7.5)
            axis.spines[:].set_visible(False)
            axis.set_title(f"edge {entry['edge']}, {name}")
    figure.colorbar(image, ax=axes, label="weight (each row sums to 1)", shrink=0.7, aspect=30)
    figure.supxlabel(
        "beside each row: the device and the labels of its data",
        size=8.5,
        x=0.01,
        ha="left",
        color="#555555",
    )
    return figure


def _measure(entry: Results) -> str:
    """What the weights rest on; runs before the choice was written down had but one."""
    return "kernel densities" if entry.get("measure") == "kde" else "Wasserstein"


def _device_label(device: int, labels: Any) -> str:
    labels = list(labels)
    text = " ".join(map(str, labels)) if len(labels) <= 5 else f"{len(labels)} labels"
    return f"{device}:  {text}" if labels else str(device)


def figure_accuracy(results: Results) -> Figure | None:
    """Test accuracy of each device under each method, and each method's mean."""
    devices, names = results.get("devices", ()), all_methods(results)
    if not names:
        return None
    devices = sorted(devices, key=lambda d: (d["edge"], d["device"]))
    figure = Figure((WIDTH, 4.8), layout="constrained")
    figure.suptitle("Accuracy of every device's own model on its own test data", x=0.01, ha="left")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3.4, 1))
    for i, (edge, first, last) in enumerate(_runs([d["edge"] for d in devices])):
        left.axvspan(
            first - 0.5, last + 0.5, color="#f3f3f3" if i % 2 == 0 else "white", lw=0, zorder=-2
        )
        left.annotate(
            f"edge {edge}",
            ((first + last) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
        )
    for place, name in enumerate(names):
        colour, marker = _METHOD_STYLES.get(name, (COLOURS[place % len(COLOURS)], "P"))
        size = {"*": 10, "_": 8}.get(marker, 5)
        style = {
            "color": colour,
            "marker": marker,
            "ms": size,
            "ls": "none",
            "mew": 2 if marker == "_" else 0.5,
        }
        offset = (place - (len(names) - 1) / 2) * 0.8 / len(names)
        points = [
            (i + offset, 100 * d["accuracy"][name])
            for i, d in enumerate(devices)
            if name in d["accuracy"]
        ]
        left.plot(*zip(*points, strict=True), label=method(name).label, clip_on=False, **style)
        values = np.array([value for _, value in points])
        right.errorbar(place, values.mean(), values.std(), capsize=3, lw=1.3, **style)
        top = values.mean() + values.std()
        right.annotate(
            f"{values.mean():.1f}",
            (place, top),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            size=7.5,
        )
    for i in range(len(devices) - 1):
        left.axvline(i + 0.5, color="#dddddd", lw=0.6, zorder=-1)
    step = -(-len(devices) // 25)
    left.set_xticks(range(0, len(devices), step), [d["device"] for d in devices[::step]])
    left.set_xlim(-0.5, len(devices) - 0.5)
    left.set_xlabel("device")
    left.set_ylabel("test accuracy, %")
    right.set_xticks(range(len(names)), [method(n).short for n in names], rotation=60)
    right.set_xlim(-0.7, len(names) - 0.3)
    right.set_title("mean ± std over devices")
    for axis in (left, right):
        axis.grid(axis="y", color="#dddddd", zorder=-1)
        axis.tick_params(axis="x", length=0)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(len(names), 7),
        columnspacing=1,
        handletextpad=0.2,
    )
    return figure


def figure_traffic(results: Results) -> Figure | None:
    """Bytes by tier, direction and kind of message, and the totals against centralised."""
    rows = traffic_rows(results)
    if not rows:
        return None
    bars = [
        (f"{kind.replace('_', ' ')}, {tier}", size, direction == "up", False)
        for tier, direction, kind, _, size in rows
    ]
    traffic = results["traffic"]
    totals = [
        (
            f"{who} {direction}",
            traffic[f"{prefix}{direction}_bytes"],
            direction == "uplink",
            bool(prefix),
        )
        for direction in ("uplink", "downlink")
        for who, prefix in (("ACME", ""), ("centralised", "centralized_"))
        if f"{prefix}{direction}_bytes" in traffic
    ]
    figure = Figure((WIDTH, 1.6 + 0.32 * (len(bars) + len(totals))), layout="constrained")
    figure.suptitle("What travelled: bytes of the whole run", x=0.01, ha="left")
    axes = figure.subplots(
        2, 1, sharex=True, height_ratios=(len(bars) + 0.6, max(len(totals), 1) + 0.6)
    )
    for axis, group in zip(axes, (bars, totals), strict=True):
        for place, (_, size, up, central) in enumerate(group):
            colour = COLOURS[0] if up else COLOURS[4]
            axis.barh(
                place,
                max(size, 1),
                color="white" if central else colour,
                edgecolor=colour,
                hatch="////" if central else None,
                height=0.72,
            )
            axis.annotate(
                quantity(size, "B"),
                (max(size, 1), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axis.set_yticks(range(len(group)), [label for label, *_ in group])
        axis.tick_params(axis="y", length=0)
        axis.invert_yaxis()
        axis.grid(axis="x", color="#eeeeee")
        axis.set_axisbelow(True)
    axes[0].set_title("by kind of message and tier")
    axes[1].set_title("totals")
    axes[1].set_xscale("log")
    axes[1].set_xlim(right=4 * max(size for _, size, *_ in bars + totals))
    axes[1].set_xlabel("bytes (logarithmic: each line is ten times the one before)")
    keys = [
        Rectangle((0, 0), 1, 1, color=COLOURS[0]),
        Rectangle((0, 0), 1, 1, color=COLOURS[4]),
        Rectangle((0, 0), 1, 1, fc="white", ec=GREY, hatch="////"),
    ]
    figure.legend(
        keys,
        [
            "up, towards the cloud",
            "down, towards the devices",
            "centralised training (raw data up, models down)",
        ],
        loc="outside lower center",
        ncols=3,
    )
    return figure


def figure_pruned(results: Results) -> Figure | None:
    """The part of each gate layer that was pruned, mean over the edge's devices."""
    by_edge: dict[int, list[dict[str, Any]]] = {}
    for device in results.get("devices", ()):
        if device.get("pruned_by_layer"):
            by_edge.setdefault(device["edge"], []).append(device["pruned_by_layer"])
    if not by_edge:
        return None
    per_row = min(3, len(by_edge))
    bands = -(-len(by_edge) // per_row)
    tallest = max(len(devices[0]) for devices in by_edge.values())
    figure = Figure((WIDTH, 1.2 + bands * (0.7 + 0.16 * tallest)), layout="constrained")
    figure.suptitle("Where the gates went: pruned part of each gate layer", x=0.01, ha="left")
    axes = figure.subplots(bands, per_row, squeeze=False, sharex=True).flatten()
    for axis in axes[len(by_edge) :]:
        axis.set_visible(False)
    for axis, (edge, devices) in zip(axes, sorted(by_edge.items()), strict=False):
        layers = list(devices[0])
        parts = np.array([[100 * d[k][0] / d[k][1] for k in layers if k in d] for d in devices])
        axis.barh(
            range(len(layers)), parts.mean(0), color=edge_colour(edge), alpha=0.6, height=0.75
        )
        for row in parts:
            axis.plot(row, range(len(layers)), ".", color="#333333", ms=3, clip_on=False)
        axis.set_yticks(range(len(layers)), [k if len(k) <= 30 else k[:29] + "…" for k in layers])
        axis.set_ylim(tallest - 0.4, -0.6)
        axis.tick_params(axis="y", length=0, labelsize=7)
        axis.set_title(f"edge {edge}")
        axis.grid(axis="x", color="#eeeeee")
        axis.set_axisbelow(True)
    figure.supxlabel(
        "gates pruned, % (bar: mean over the edge's devices; dots: the devices)", size=9
    )
    return figure


def _runs(values: list[int]) -> Iterator[tuple[int, int, int]]:
    """(value, first place, last place) of each run of equal values."""
    first = 0
    for place, value in enumerate(values):
        if place + 1 == len(values) or values[place + 1] != value:
            yield value, first, place
            first = place + 1
