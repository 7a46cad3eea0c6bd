"""Integer shares: how many things each client gets, and dealing them out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def share_fairly(
    available: int, limits: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Divides `available` things as equally as limits [C] permit (water-filling): int [C]."""
    counts = np.zeros_like(limits)
    # Smallest limit first, so that what it leaves over reaches the rest; ties at random.
    order = np.lexsort((rng.random(len(limits)), limits))
    order = order[limits[order] > 0]
    for position, client in enumerate(order):
        counts[client] = min(limits[client], available // (len(order) - position))
        available -= counts[client]
    return counts


def round_shares(total: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Integers that sum to total, nearest to total * shares [C] (largest remainder)."""
    exact = total * shares
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")
    counts[largest[: total - counts.sum()]] += 1
    return counts


def deal(
    labels: NDArray[np.int64], counts: NDArray[np.int64], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Disjoint random samples: counts [C, K] of each label to each client."""
    parts: list[list[NDArray[np.int64]]] = [[] for _ in counts]
    for label, column in enumerate(counts.T):
        pool = rng.permutation(np.flatnonzero(labels == label))
        for part, piece in zip(parts, np.split(pool, np.cumsum(column)), strict=False):
            part.append(piece)
    return [rng.permutation(np.concatenate(part)) for part in parts]
