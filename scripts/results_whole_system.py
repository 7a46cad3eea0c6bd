"""Tables, pictures and claims of the experiment `whole_system`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results_claims import Claim, Verdict, percent

from acme_jax.experiments.statistics import Estimate, estimate, paired
from acme_jax.plot_style import COLOURS, GREY, WIDTH

Document = dict[str, Any]

GOAL = 0.10
"""ACME's claim: accuracy over the baseline, on average."""
OURS = "acme"
UNITS = {"c3": "C3: four labels a device", "dirichlet": "Dirichlet 0.5"}
METHODS = {
    "acme": "ACME",
    "acme_unpruned": "ACME without pruning (header trained alone)",
    "edge_header": "ACME before refinement (header of the edge)",
    "cloud_full": "cloud: full network for all",
    "cloud_one_size": "cloud: one size that fits all",
    "cloud_fitted": "cloud: sub-network of each edge's budget",
    "local_scratch": "alone, from scratch: own sub-network",
    "local_network": "alone: cloud's sub-network fine-tuned",
    "local_header": "alone: edge's header fine-tuned, rate chosen",
    "fedavg_header": "FedAvg of the edge's header",
    "fedavg_header_tuned": "FedAvg of the header, then alone",
    "ditto_header": "Ditto on the edge's header",
    "fedavg_one_size": "FedAvg of one size that fits all",
    "fedavg_one_size_tuned": "FedAvg of one size, then alone",
    "heterofl_scratch": "HeteroFL from scratch",
    "heterofl_cloud": "HeteroFL from the supernet",
    "heterofl_cloud_tuned": "HeteroFL from the supernet, then alone",
}
"""What tables and pictures call them, in this order."""
OWN = ("acme", "acme_unpruned", "edge_header")
RIVALS = tuple(name for name in METHODS if name not in OWN)

_STYLES = {
    "acme": ("*", COLOURS[1]),
    "acme_unpruned": ("P", COLOURS[1]),
    "edge_header": ("X", COLOURS[1]),
    "cloud_full": ("s", GREY),
    "cloud_one_size": ("v", GREY),
    "cloud_fitted": ("D", GREY),
    "local_scratch": ("v", COLOURS[4]),
    "local_network": ("D", COLOURS[4]),
    "local_header": ("o", COLOURS[4]),
    "fedavg_header": ("v", COLOURS[2]),
    "fedavg_header_tuned": ("D", COLOURS[2]),
    "ditto_header": ("o", COLOURS[2]),
    "fedavg_one_size": ("v", COLOURS[3]),
    "fedavg_one_size_tuned": ("D", COLOURS[3]),
    "heterofl_scratch": ("v", COLOURS[0]),
    "heterofl_cloud": ("o", COLOURS[0]),
    "heterofl_cloud_tuned": ("D", COLOURS[0]),
}


def values(document: Document, unit: str, method: str, column: str) -> list[float]:
    """One column of a method's rows, seed by seed."""
    rows = {
        row["seed"]: row[column]
        for row in document["rows"]
        if row["unit"] == unit and row["kind"] == "method" and row["method"] == method
    }
    return [float(rows[seed]) for seed in document["seeds"]]


def difference(document: Document, unit: str, rival: str, column: str) -> Estimate:
    """ACME minus a rival, seed by seed."""
    return paired(values(document, unit, OURS, column), values(document, unit, rival, column))


def bytes_text(value: float) -> str:
    """Bytes for a table: "0", "612 B", "14.2 kB", "3.2 MB"."""
    if value < 1000:
        return "0" if value == 0 else f"{value:.0f} B"
    return f"{value / 1e3:.1f} kB" if value < 1e6 else f"{value / 1e6:.1f} MB"


def methods_table(unit: str) -> Callable[[Document], list[str]]:
    """The table of all methods of a unit."""

    def table(document: Document) -> list[str]:
        lines = [
            "| | accuracy, % | worst tenth, % | ACME minus it, points | up | down "
            "| training, GFLOP | inference, MFLOP | fits |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for method, name in METHODS.items():

            def mean(column: str, method: str = method) -> float:
                return estimate(values(document, unit, method, column)).mean

            accuracy, worst = (
                percent(estimate(values(document, unit, method, column)))
                for column in ("test_accuracy", "worst_tenth_test_accuracy")
            )
            ahead = difference(document, unit, method, "test_accuracy")
            cells = [
                name,
                accuracy,
                worst,
                "" if method == OURS else percent(ahead, signed=True),
                bytes_text(mean("uplink_bytes")),
                bytes_text(mean("downlink_bytes")),
                f"{mean('train_flops') / 1e9:.1f}",
                f"{mean('inference_flops') / 1e6:.2f}",
                f"{100 * mean('fits'):.0f} %",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return lines

    return table


def edges_table(document: Document) -> list[str]:
    """What every edge handed out, of each seed."""
    lines = [
        "| edge | seed | limit | ACME: depth, width | header: select accuracy, % "
        "| rivals: depth, width | one size: depth, width |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [
        row
        for row in document["rows"]
        if row["kind"] == "edge" and row["unit"] == next(iter(UNITS))
    ]
    for row in sorted(rows, key=lambda row: (row["edge"], row["seed"])):
        cells = [
            str(row["edge"]),
            str(row["seed"]),
            bytes_text(row["limit_bytes"]),
            f"{row['depth']:.2f}, {row['width']:.2f}",
            f"{100 * row['header_select_accuracy']:.1f}",
            f"{row['rival_depth']:.2f}, {row['rival_width']:.2f}",
            f"{row['one_size_depth']:.2f}, {row['one_size_width']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def traffic_figure(document: Document) -> Figure:
    """Accuracy against what a device sends, on a logarithmic axis, one panel a distribution."""
    figure = Figure((WIDTH, 5.4), layout="constrained")
    figure.suptitle("Accuracy on the devices against what each of them sends", x=0.01, ha="left")
    axes = figure.subplots(1, len(UNITS), sharey=True)
    sent = [
        estimate(values(document, unit, m, "uplink_bytes")).mean for unit in UNITS for m in METHODS
    ]
    none = 10 ** (math.floor(math.log10(min(x for x in sent if x > 0))) - 1)
    for axis, (unit, title) in zip(axes, UNITS.items(), strict=True):
        _draw_methods(axis, document, unit, float(none))
        axis.set_title(title)
        axis.set_xlabel("bytes that a device sends in all (mean)")
    axes[0].set_ylabel("test accuracy, mean of the devices, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _draw_methods(axis: Axes, document: Document, unit: str, none: float) -> None:
    """Each method's point with its interval; those that send nothing stand at `none`, spread."""
    silent = [m for m in METHODS if not sum(values(document, unit, m, "uplink_bytes"))]
    for method, name in METHODS.items():
        sent = estimate(values(document, unit, method, "uplink_bytes")).mean
        if method in silent:
            place = silent.index(method) / max(1, len(silent) - 1) - 0.5
            sent = none * 10 ** (0.6 * place)
        accuracy = estimate(values(document, unit, method, "test_accuracy"))
        marker, colour = _STYLES[method]
        half = 0.0 if math.isnan(accuracy.half_width) else accuracy.half_width
        axis.errorbar(
            [sent],
            [100 * accuracy.mean],
            yerr=[100 * half],
            fmt=marker,
            color=colour,
            ms=13 if method == OURS else 7,
            mec="white",
            mew=0.6,
            elinewidth=1.2,
            label=name,
            zorder=5 if method == OURS else 3,
        )
    axis.set_xscale("log")
    ticks = [tick for tick in axis.get_xticks() if tick > 3 * none]
    low, high = axis.get_xlim()
    axis.set_xticks([none, *ticks], ["none", *(f"$10^{{{math.log10(t):.0f}}}$" for t in ticks)])
    axis.set_xlim(low, high)
    axis.minorticks_off()
    axis.grid(axis="y", color="#eeeeee")


def verdict(ahead: Estimate) -> Verdict:
    """How far ACME's claim of ten points is true against one rival."""
    if ahead.mean - ahead.half_width > GOAL:
        return "exceeds"
    if ahead.mean >= GOAL:
        return "holds"
    return "partly" if ahead.sign > 0 else "fails"


def claims(document: Document) -> list[Claim]:
    """ACME's ten points: on average over the rivals, and against each of them.

    The verdict looks at the mean over both distributions, seed by seed.
    """
    found = [_ten_points(document, "on average over these rivals", RIVALS)]
    found += [_ten_points(document, f"over {METHODS[rival]}", (rival,)) for rival in RIVALS]
    return [*found, _best_rival(document)]


def ahead_of(document: Document, rivals: tuple[str, ...], units: tuple[str, ...]) -> Estimate:
    """ACME's accuracy minus the mean of some rivals', over some units, seed by seed."""

    def mean(methods: tuple[str, ...]) -> list[float]:
        columns = [values(document, u, m, "test_accuracy") for u in units for m in methods]
        return [sum(seed) / len(columns) for seed in zip(*columns, strict=True)]

    return paired(mean((OURS,)), mean(rivals))


def _ten_points(document: Document, against: str, rivals: tuple[str, ...]) -> Claim:
    text = ", ".join(
        f"{unit} {percent(ahead_of(document, rivals, (unit,)), signed=True)} points"
        for unit in UNITS
    )
    return Claim(
        f"whole system: accuracy of ACME {against}",
        "+10 points on average (baseline not said)",
        text,
        verdict(ahead_of(document, rivals, tuple(UNITS))),
    )


def _best_rival(document: Document) -> Claim:
    """Whether any rival whose models fit all devices is more accurate, and what it sends."""
    units = tuple(UNITS)
    fitting = [m for m in RIVALS if all(min(values(document, u, m, "fits")) == 1 for u in units)]
    best = min(fitting, key=lambda rival: ahead_of(document, (rival,), units).mean)
    ahead = ahead_of(document, (best,), units)
    theirs, ours = (
        estimate([x for u in units for x in values(document, u, m, "uplink_bytes")]).mean
        for m in (best, OURS)
    )
    found: Verdict = {1: "holds", 0: "partly", -1: "fails"}[ahead.sign]  # type: ignore[assignment]
    return Claim(
        "whole system: no other way that fits every device is as accurate as ACME",
        "goal",
        f"best: {METHODS[best]}; ACME minus it {percent(ahead, signed=True)} points; a device "
        f"sends {bytes_text(theirs)} there, {bytes_text(ours)} here",
        found,
    )


TABLES: dict[str, Callable[[Document], list[str]]] = {
    **{f"whole_system_{unit}": methods_table(unit) for unit in UNITS},
    "whole_system_edges": edges_table,
}
FIGURES: dict[str, Callable[[Document], Figure]] = {"whole_system_traffic": traffic_figure}
