"""What the rows of `backbone_grid` come to."""

from __future__ import annotations

from typing import Any

import numpy as np

from acme_jax.experiments.statistics import Estimate, paired

Document = dict[str, Any]
Place = tuple[float, float]
"""Depth and width."""

STAGES = {
    "trained": "cut out",
    "reordered": "reordered",
    "width_adaptive": "width distillation",
    "elastic": "depth distillation",
    "same_compute": "alone, same compute",
    "same_epochs": "alone, same epochs",
}
"""By the rows' `stage`: how tables call it."""


def places(document: Document) -> list[Place]:
    """All sub-networks, the smallest first."""
    found = {(row["depth"], row["width"]) for row in document["rows"] if "stage" in row}
    return sorted(found)


def values(document: Document, stage: str, place: Place) -> list[float]:
    """Test accuracy of one sub-network, seed by seed; empty where it was not trained."""
    found = {
        row["seed"]: row["test_accuracy"]
        for row in document["rows"]
        if row.get("stage") == stage and (row["depth"], row["width"]) == place
    }
    return [found[seed] for seed in document["seeds"]] if found else []


def mean_of(document: Document, stage: str, among: list[Place] | None = None) -> list[float]:
    """Mean over sub-networks (None: all), seed by seed."""
    chosen = places(document) if among is None else among
    columns = np.asarray([values(document, stage, place) for place in chosen])
    means: list[float] = columns.mean(axis=0).tolist()
    return means


def mean_difference(document: Document, ours: str, theirs: str) -> Estimate:
    """Paired, over the sub-networks that both stages have."""
    both = [
        place
        for place in places(document)
        if values(document, ours, place) and values(document, theirs, place)
    ]
    return paired(mean_of(document, ours, both), mean_of(document, theirs, both))


def budget(document: Document, name: str) -> dict[str, Any]:
    """Epochs and training FLOPs, which are the same for every seed."""
    row: dict[str, Any] = next(row for row in document["rows"] if row.get("budget") == name)
    return row
