"""Clients whose programs differ: grouped by a static key, each group with its own functions.

Clients with different models cannot share one program without wasting work on masks. The
caller gives every client a static key (an architecture, say) and makes the client functions
for a key once; `run_buckets` runs every client with those of its bucket. Messages and updates
have one shape for all: a bucket's `client_init` cuts what it needs out of the message and its
`client_final` puts the result back, so that the server's functions need not know of buckets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np

from fed.algorithm import FedAlgorithm

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """A cohort divided by static keys; closed over, never passed through jit."""

    algorithms: tuple[FedAlgorithm, ...]
    """One for each bucket; their client functions are used."""

    bucket_of: tuple[int, ...]
    """[C] the bucket of each row of the cohort."""

    cost: tuple[float, ...]
    """[C] relative work of each row, to spread it evenly over devices."""

    def rows(self, bucket: int) -> np.ndarray:
        """The rows of the cohort in one bucket, ascending: int [n]."""
        return np.flatnonzero(np.asarray(self.bucket_of) == bucket)


def make_buckets(
    keys: Sequence[Key],
    algorithm_for: Callable[[Key], FedAlgorithm],
    *,
    cost: Sequence[float] | None = None,
) -> Buckets:
    """Groups the rows of a cohort by key, in order of first appearance.

    Args:
      keys: one for each row [C]; equal keys share a bucket and its compiled program.
      algorithm_for: key -> algorithm, called once for each distinct key.
      cost: relative work of each row [C], for instance FLOPs a sample; None: all equal.

    Raises:
      ValueError: no keys, or costs that are not one positive number for each.
    """
    if not keys:
        raise ValueError("keys is empty; give one key for each client of the cohort")
    numbers: dict[Key, int] = {}
    bucket_of = tuple(numbers.setdefault(key, len(numbers)) for key in keys)
    work = tuple(float(c) for c in (cost if cost is not None else [1.0] * len(keys)))
    if len(work) != len(keys) or not all(c > 0 for c in work):
        raise ValueError(
            f"cost must be {len(keys)} positive numbers, one for each client, got {work}"
        )
    return Buckets(tuple(algorithm_for(key) for key in numbers), bucket_of, work)


def balance(cost: Sequence[float], num_parts: int) -> list[np.ndarray]:
    """Divides rows over parts so that the largest sum of costs is small.

    Longest first, each to the part with the least so far (Graham 1969: at most 4/3 of the
    best possible).

    Args:
      cost: of each row [C].
      num_parts: devices.

    Returns:
      For each part its rows, heaviest first; parts may differ in length.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    total = np.zeros(num_parts)
    for row in np.argsort(-np.asarray(cost), kind="stable"):
        lightest = int(np.argmin(total))
        parts[lightest].append(int(row))
        total[lightest] += cost[row]
    return [np.asarray(part, np.int64) for part in parts]


def check_buckets(buckets: Buckets, num_clients: int, bucket_of: Any) -> None:
    """Buckets must say where every client of the cohort belongs.

    Raises:
      ValueError: they are of another number of clients.
    """
    found = (len(buckets.bucket_of),) if bucket_of is None else np.shape(bucket_of)
    if found != (num_clients,):
        raise ValueError(
            f"the buckets are of {found} clients, the cohort has {num_clients}; make_buckets "
            "needs one key for each client"
        )
