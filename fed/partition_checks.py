"""Checks of what the partitions are asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fed.errors import PartitionError


def checked_labels(labels: ArrayLike, num_clients: int) -> NDArray[np.int64]:
    """The labels as int64 [N], at least as many as there are clients."""
    array = np.asarray(labels)
    if array.ndim != 1 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
        raise PartitionError(
            f"labels must be a non-empty integer vector, got {array.dtype} of shape {array.shape}"
        )
    if array.min() < 0:
        raise PartitionError(f"labels must not be negative, got {array.min()}")
    if num_clients < 1:
        raise PartitionError(f"the number of clients must be at least 1, got {num_clients}")
    if num_clients > array.size:
        raise PartitionError(
            f"{num_clients} clients cannot share {array.size} samples; use fewer clients or "
            "provide more data"
        )
    return array.astype(np.int64)


def check_group(
    client: int, group: Sequence[int], num_labels: int, samples_per_client: int | None
) -> None:
    """A client's labels are distinct, within range, and leave it samples of each."""
    if len(group) == 0 or len(set(group)) != len(group):
        raise PartitionError(
            f"client {client} must hold at least one label and none twice, got {list(group)}"
        )
    if min(group) < 0 or max(group) >= num_labels:
        raise PartitionError(
            f"client {client} holds labels {list(group)}, but the data's labels lie in 0.."
            f"{num_labels - 1}"
        )
    if samples_per_client is not None and samples_per_client < len(group):
        raise PartitionError(
            f"samples_per_client={samples_per_client} leaves no sample for each of the "
            f"{len(group)} labels of client {client}; use at least {len(group)}"
        )


def check_alpha(alpha: float) -> None:
    """A Dirichlet concentration is positive."""
    if not 0 < alpha < np.inf:
        raise PartitionError(f"alpha must be positive and finite, got {alpha}")


def check_minimum(size: int, num_clients: int, min_samples: int) -> None:
    """Every client can have min_samples."""
    if min_samples < 1 or num_clients * min_samples > size:
        raise PartitionError(
            f"{num_clients} clients with at least {min_samples} samples each do not fit "
            f"{size} samples; use fewer clients, a min_samples of at least 1, or more data"
        )


def check_limit(samples_per_client: int | None, min_samples: int = 1) -> None:
    """An upper limit of samples is not below the lower one."""
    if samples_per_client is not None and samples_per_client < min_samples:
        raise PartitionError(
            f"samples_per_client must be at least {min_samples}, got {samples_per_client}"
        )
