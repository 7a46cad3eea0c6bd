"""The numbers of the experiment `traffic` that its tables, pictures and claims share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from acme_jax.experiments.statistics import Estimate, estimate, paired
from acme_jax.experiments.traffic import BASELINES, FLEETS
from acme_jax.experiments.traffic_bytes import ORIGINAL, PAPER_IMAGES
from acme_jax.experiments.wire_settings import SETTINGS

Document = dict[str, Any]

GOAL, PAPER_SHARE, TOLERANCE = 0.01, 0.06, 0.005
"""Uplink and the paper's transmission volume, parts of centralised; a loss that still is none."""
EXACT, CENTRAL = "float32", "centralized"
ALL = {name: setting.meaning for name, setting in SETTINGS.items()} | BASELINES
FLEET_NAMES = {
    "c3": "C3",
    "dirichlet": "Dirichlet 0.5",
    "c3_hard": f"C3, {FLEETS['c3_hard'].pruned or 0:.0%} of the gates pruned",
}


def total(
    document: Document,
    place: str,
    setting: str,
    direction: str | None = None,
    *,
    without: str = "",
    seed: int | None = None,
) -> float:
    """Bytes of one edge and all its devices; the mean over seeds, or those of one.

    Args:
      document: of the experiment.
      place: the input, such as "32x32x3".
      setting: how they are sent.
      direction: "up" or "down"; None: both.
      without: a kind of message that does not count.
      seed: None: the mean.
    """
    seeds = document["seeds"] if seed is None else [seed]
    return sum(
        row["bytes"]
        for row in document["rows"]
        if row["kind"] == "bytes"
        and row["seed"] in seeds
        and (row["input"], row["setting"]) == (place, setting)
        and direction in (None, row["direction"])
        and row["message"] != without
    ) / len(seeds)


def inputs(document: Document) -> list[str]:
    """The measured one first."""
    names = dict.fromkeys(row["input"] for row in document["rows"] if row["kind"] == "bytes")
    return sorted(names, key=lambda name: (name in PAPER_IMAGES, list(names).index(name)))


def settings_of(document: Document, place: str) -> list[str]:
    """Of an input, in the order of `SETTINGS`."""
    found = {r["setting"] for r in document["rows"] if r["kind"] == "bytes" and r["input"] == place}
    return [name for name in (ORIGINAL, *SETTINGS) if name in found]


def fraction(value: float) -> str:
    """A part of centralised, with two significant digits."""
    return f"{100 * value:.2g} %" if value < 0.1 else f"{100 * value:.1f} %"


def accuracies(document: Document, unit: str, setting: str, name: str) -> list[float]:
    """One column of the devices' rows, its mean for every seed."""
    return [
        float(
            np.mean(
                [
                    row[name]
                    for row in document["rows"]
                    if row["kind"] == "accuracy"
                    and (row["unit"], row["seed"], row["setting"]) == (unit, seed, setting)
                ]
            )
        )
        for seed in document["seeds"]
    ]


def loss(document: Document, unit: str, setting: str) -> Estimate:
    """Accuracy minus that of exact float32 messages, seed by seed."""
    ours, theirs = (accuracies(document, unit, name, "test_accuracy") for name in (setting, EXACT))
    return paired(ours, theirs)


def uplink(document: Document, setting: str) -> Estimate:
    """A device's uplink, a part of its raw samples, in the first fleet."""
    sent, raw = (
        accuracies(document, "c3", setting, name) for name in ("uplink_bytes", "raw_bytes")
    )
    return estimate([a / b for a, b in zip(sent, raw, strict=True)])


def images_needed(document: Document, setting: str) -> int:
    """Samples of a device from which on its uplink is within the goal, in every seed."""
    sent, raw, count = (
        accuracies(document, "c3", setting, name)
        for name in ("uplink_bytes", "raw_bytes", "num_train")
    )
    return max(math.ceil(s / (GOAL * r / n)) for s, r, n in zip(sent, raw, count, strict=True))
