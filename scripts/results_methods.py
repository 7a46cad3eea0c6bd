"""Tables and pictures of docs/METHODS.md: all federated methods on the same devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from results_claims import Claim, percent

from acme_jax.experiments.methods import DISTRIBUTIONS
from acme_jax.experiments.statistics import Estimate, estimate, paired
from acme_jax.methods.registry import METHODS
from acme_jax.plot_style import COLOURS, GREY, WIDTH

Document = dict[str, Any]

_REFERENCE = "fedavg"
_WITHOUT = "local"


class Headline(NamedTuple):
    """What a method's paper says, and whom ours is compared with to see it."""

    published: str
    rivals: tuple[str, ...]


HEADLINES = {
    "fedprox": Headline("more stable than FedAvg on unlike clients", ("fedavg",)),
    "ditto": Headline("personal models better and fairer than one for all", ("fedavg", "local")),
    "heterofl": Headline("weak clients serve a larger global model", ("smallest", "local")),
    "fedrolex": Headline("rolling sub-models above static ones", ("heterofl",)),
    "acme": Headline("4 points above no pruning", ("local",)),
    "acme_kde": Headline("none, a part of our own", ("acme",)),
    "feddh": Headline("50.3 against FedAvg's 48.9 % (CIFAR-10, LeNet)", ("fedavg",)),
    "fedad": Headline("49.9 against FedAvg's 48.9 %, faster", ("fedavg",)),
    "celora": Headline("above federated LoRA on unlike clients, 192 times less sent",
                       ("fedavg", "local")),
    "celora_frozen": Headline("as CE-LoRA", ("celora", "local")),
    "fedvtc": Headline("above FedProto, FedGen, CCVR where data are skewed", ("local",)),
    "pa3dfl": Headline("Fashion-MNIST: 89.6, HeteroFL 85.7, FedAvg 87.8, local 75.0 %",
                       ("heterofl", "fedavg", "local")),
    "fedmosaic": Headline("above local training and FedAvg on unlike tasks", ("fedavg", "local")),
    "pfedhr": Headline("CIFAR-10 of two classes a client: 71.7, FedGH 70.3, FedMD 66.0 %",
                       ("local",)),
}  # fmt: skip


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


def _difference(document: Document, name: str, other: str = _WITHOUT) -> Estimate:
    field = "test_accuracy"
    return paired(_values(document, name, None, field), _values(document, other, None, field))


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
        "part of FedAvg's | the same at equal FLOPs | keeps to capacities |",
        "|---|---|---|---|---|---|---|---|---|",
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
            f"{down / 1e3:,.1f} | {flops / 1e9:.2f} | {devices / seconds:.3g} | "
            f"{base_seconds / seconds:.2f} | {relative:.2f} | "
            f"{'yes' if method.serves_capacities else 'no'} |"
        )
    return [
        *rows,
        "",
        "Bytes of a device in all rounds, the setup included, the backbone apart. FLOPs are dense: "
        "what a device of that capacity needs for the header, its frozen features apart. Devices "
        "per second of the whole simulation, compiling left out. Masked sub-headers run at full "
        "size, so a method of half the FLOPs is not twice as fast; both readings are given.",
    ]


def headlines(document: Document) -> list[str]:
    """What the papers say beside what is seen here."""
    rows = ["| method | published | here, mean over distributions, points |", "|---|---|---|"]
    for name, headline in HEADLINES.items():
        if name in METHODS:
            differences = "; ".join(
                f"{percent(_difference(document, name, rival), signed=True)} against "
                f"{METHODS[rival].title}"
                for rival in headline.rivals
            )
            rows.append(f"| {METHODS[name].title} | {headline.published} | {differences} |")
    return rows


def bytes_figure(document: Document) -> Figure:
    """Mean accuracy against the bytes that a device sends and receives."""
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    axis = figure.subplots()
    for place, (name, method) in enumerate(METHODS.items()):
        accuracy = _mean(document, name, None, "test_accuracy")
        total = sum(_mean(document, name, None, f).mean for f in ("up_bytes", "down_bytes"))
        # Nothing at all stands at the left edge of a logarithmic axis.
        axis.errorbar(
            max(total / 1e3, 0.3), 100 * accuracy.mean, yerr=100 * accuracy.half_width,
            marker="os^Dv"[place // len(COLOURS)], color=COLOURS[place % len(COLOURS)],
            capsize=3, linestyle="none", label=method.title,
        )  # fmt: skip
    start = _mean(document, "start", None, "test_accuracy")
    axis.axhline(100 * start.mean, color=GREY, linestyle="--", linewidth=1, label="the start")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    axis.set_xscale("log")
    axis.set_xlabel("kB that a device sends and receives in all rounds (0.3: nothing)")
    axis.set_ylabel("accuracy, %")
    axis.set_title("Methods by accuracy and traffic, mean over five distributions of labels")
    return figure


TABLES: dict[str, Callable[[Document], list[str]]] = {
    "methods_accuracy": accuracy,
    "methods_costs": costs,
    "methods_headlines": headlines,
}
FIGURES: dict[str, Callable[[Document], Figure]] = {"methods_bytes": bytes_figure}


def claims(document: Document) -> list[Claim]:
    """None of the paper's: its comparisons with neighbours are not federated."""
    del document
    return []
