"""What the results of `headers` say, as numbers: rows picked, paired and averaged."""

from __future__ import annotations

from typing import Any

from acme_jax.experiments.statistics import Estimate, paired

Document = dict[str, Any]
Place = tuple[str, float, float]
"""Kind of backbone, depth, width."""

GOAL = 0.10
"""Points over the best hand-made header at the small end."""
SMALL = 0.5
"""Largest depth and width of the small end."""
FIXED = {"linear": "linear", "mlp": "MLP", "cnn": "CNN", "mixer": "mixer"}
SEARCHED, BEST, CLASSIFIER = "searched", "best hand-made", "own classifier"
KINDS = {"dynavit": "distilled supernet", "plain": "plain network, sliced"}
REMEDIES = {
    "frozen": "as compared above",
    "all states": "header sees all states and the class token",
    "all public data": "edge holds all public training data",
    "backbone trained": "header and backbone trained together",
}
PAPER = {(1.0, 1.0): (0.9207, 0.9524), (0.25, 0.25): (0.2262, 0.6767)}
"""Linear and searched header, CIFAR-100."""
PAPER_CNN = (0.5093, 0.6767)
"""The better CNN header and the searched one, at depth and width 0.25."""


def places(document: Document, kind: str) -> list[Place]:
    """The backbones of a kind, largest first."""
    found = {
        (row["backbone"], row["depth"], row["width"])
        for row in document["rows"]
        if row["variant"] == "frozen" and row["backbone"] == kind
    }
    return sorted(found, key=lambda place: (-place[1], -place[2]))


def column(
    document: Document, place: Place, header: str, name: str, variant: str = "frozen"
) -> list[float]:
    """One column of a header's rows, seed by seed; `BEST`: of each seed's best on select."""
    rows: dict[int, dict[str, Any]] = {}
    for row in document["rows"]:
        here = (row["backbone"], row["depth"], row["width"]) == place
        wanted = row["header"] != SEARCHED if header == BEST else row["header"] == header
        if not (here and wanted and row["variant"] == variant):
            continue
        before = rows.get(row["seed"])
        if before is None or row["select_accuracy"] > before["select_accuracy"]:
            rows[row["seed"]] = row
    return [rows[seed][name] for seed in document["seeds"]]


def accuracy(document: Document, place: Place, header: str, variant: str = "frozen") -> list[float]:
    """Test accuracies, seed by seed."""
    return column(document, place, header, "test_accuracy", variant)


def lead(document: Document, place: Place, over: str = BEST, variant: str = "frozen") -> Estimate:
    """The searched header minus another one, seed by seed."""
    return paired(
        accuracy(document, place, SEARCHED, variant), accuracy(document, place, over, variant)
    )


def small_end(document: Document, kind: str) -> list[Place]:
    """Backbones of width and depth at most one half."""
    return [place for place in places(document, kind) if max(place[1:]) <= SMALL]


def own_accuracy(document: Document, place: Place) -> list[float]:
    """Test accuracies of the network's own classifier, seed by seed."""
    return accuracy(document, place, CLASSIFIER, CLASSIFIER)


def averaged(columns: list[list[float]]) -> list[float]:
    """The mean of several columns, seed by seed."""
    return [sum(seed) / len(columns) for seed in zip(*columns, strict=True)]


def mean_lead(document: Document, where: list[Place], over: str = BEST) -> Estimate:
    """The lead averaged over backbones within each seed."""
    ours = averaged([accuracy(document, place, SEARCHED) for place in where])
    return paired(ours, averaged([accuracy(document, place, over) for place in where]))
