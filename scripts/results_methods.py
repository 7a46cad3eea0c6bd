"""Tables and pictures of docs/METHODS.md: all federated methods on the same devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from results_claims import Claim, percent

from acme_jax.experiments.methods import DISTRIBUTIONS
from acme_jax.experiments.statistics import Estimate, estimate, paired
from acme_jax.methods.registry import METHODS
from acme_jax.plot_style import COLOURS, GREY, WIDTH

Document = dict[str, Any]

_REFERENCE = "fedavg"
_BEST_WITHOUT = "local"


def _values(document: Document, name: str, unit: str | None, field: str) -> list[float]:
    """One value for each seed; without a unit the mean over distributions."""
    found = []
    for seed in document["seeds"]:
        rows = [
            row[field]
            for row in document["rows"]
            if row["seed"] == seed and row["method"] == name and unit in (None, row["unit"])
        ]
        found.append(float(np.mean(rows)))
    return found


def _mean(document: Document, name: str, unit: str | None, field: str) -> Estimate:
    return estimate(_values(document, name, unit, field))


def _difference(document: Document, name: str) -> Estimate:
    field = "test_accuracy"
    return paired(
        _values(document, name, None, field), _values(document, _BEST_WITHOUT, None, field)
    )


def accuracy(document: Document) -> list[str]:
    """Mean accuracy of the devices, by distribution of labels."""
    units = list(DISTRIBUTIONS)
    rows = [
        f"| method | {' | '.join(units)} | mean | minus local training |",
        "|---|" + "---|" * (len(units) + 2),
    ]
    titles = {"start": "the start, untrained on devices"} | {
        name: method.title for name, method in METHODS.items()
    }
    for name, title in titles.items():
        cells = [percent(_mean(document, name, unit, "test_accuracy")) for unit in units]
        cells.append(percent(_mean(document, name, None, "test_accuracy")))
        cells.append(percent(_difference(document, name), signed=True))
        rows.append(f"| {title} | {' | '.join(cells)} |")
    return [
        *rows,
        "",
        "Accuracy on the devices' own test samples, %, mean over the devices; ± is the half width "
        "of the 95 % interval over seeds. The last column is paired by seed.",
    ]


def costs(document: Document) -> list[str]:
    """Bytes, FLOPs and seconds, means over distributions and seeds."""
    rows = [
        "| method | worst tenth of the devices, % | kB up | kB down | device GFLOP | devices/s | "
        "part of FedAvg's, at equal FLOPs | keeps to capacities |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def numbers(name: str) -> tuple[float, ...]:
        fields = ("up_bytes", "down_bytes", "device_flops", "seconds", "num_devices")
        return tuple(_mean(document, name, None, field).mean for field in fields)

    _, _, base_flops, base_seconds, _ = numbers(_REFERENCE)
    for name, method in METHODS.items():
        up, down, flops, seconds, devices = numbers(name)
        relative = flops / seconds / (base_flops / base_seconds)
        rows.append(
            f"| {method.title} | "
            f"{percent(_mean(document, name, None, 'worst_tenth_accuracy'))} | {up / 1e3:,.1f} | "
            f"{down / 1e3:,.1f} | {flops / 1e9:.2f} | {devices / seconds:,.0f} | {relative:.2f} | "
            f"{'yes' if method.serves_capacities else 'no'} |"
        )
    return [
        *rows,
        "",
        "Bytes of a device in all rounds, the setup included, the backbone apart. FLOPs are dense: "
        "what a device of that capacity needs for the header, its frozen features apart. Devices "
        "per second of the whole simulation, compiling left out; masked sub-headers run at full "
        "size.",
    ]


def bytes_figure(document: Document) -> Figure:
    """Mean accuracy against the bytes that a device sends and receives."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axis = figure.subplots()
    for place, (name, method) in enumerate(METHODS.items()):
        accuracy = _mean(document, name, None, "test_accuracy")
        total = sum(_mean(document, name, None, f).mean for f in ("up_bytes", "down_bytes"))
        colour = COLOURS[place % len(COLOURS)]
        # Nothing at all stands at the left edge of a logarithmic axis.
        x = max(total / 1e3, 0.3)
        axis.errorbar(
            x, 100 * accuracy.mean, yerr=100 * accuracy.half_width,
            marker="os^Dv"[place // len(COLOURS)], color=colour, capsize=3, linestyle="none",
        )  # fmt: skip
        axis.annotate(
            method.title, (x, 100 * accuracy.mean), xytext=(6, 4), textcoords="offset points",
            fontsize=8, color=colour,
        )  # fmt: skip
    start = _mean(document, "start", None, "test_accuracy")
    axis.axhline(100 * start.mean, color=GREY, linestyle="--", linewidth=1)
    axis.annotate(
        "the start", (0.3, 100 * start.mean), xytext=(0, 3), textcoords="offset points",
        fontsize=8, color=GREY,
    )  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlabel("kB that a device sends and receives in all rounds (0.3: nothing)")
    axis.set_ylabel("accuracy, %")
    axis.set_title("Methods by accuracy and traffic, mean over five distributions of labels")
    return figure


TABLES: dict[str, Callable[[Document], list[str]]] = {
    "methods_accuracy": accuracy,
    "methods_costs": costs,
}
FIGURES: dict[str, Callable[[Document], Figure]] = {"methods_bytes": bytes_figure}


def claims(document: Document) -> list[Claim]:
    """None of the paper's: its comparisons with neighbours are not federated."""
    del document
    return []
