"""Dividing one data set among clients: labels (NumPy) and counts -> index arrays.

Every function returns one int64 array of indices per client. The arrays are disjoint, never
empty, in random order (so that a prefix of one is a fair sample of it; `natural_ids` keeps
the data's order), and a pure function of the arguments and the seed. A seed is whatever
`numpy.random.default_rng` takes, for example `(seed, stream, step)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fed.apportion import deal, round_shares, share_fairly
from fed.errors import PartitionError
from fed.paper_groups import paper_label_groups
from fed.partition_checks import (
    check_alpha,
    check_group,
    check_limit,
    check_minimum,
    checked_labels,
)

__all__ = [
    "PartitionError",
    "dirichlet",
    "iid",
    "label_groups",
    "natural_ids",
    "paper_label_groups",
    "pathological",
    "quantity_skew",
    "shards",
]

Seed = int | Sequence[int] | np.random.Generator
Indices = NDArray[np.int64]


def iid(
    labels: ArrayLike, num_clients: int, *, samples_per_client: int | None = None, seed: Seed
) -> list[Indices]:
    """Equal shares of a random permutation (sizes differ by at most one).

    Args:
      labels: int [N].
      num_clients: C.
      samples_per_client: upper limit for each client; None divides all samples.
      seed: see the module.

    Raises:
      PartitionError: invalid labels or counts, or more clients than samples.
    """
    size = len(checked_labels(labels, num_clients))
    check_limit(samples_per_client)
    order = np.random.default_rng(seed).permutation(size)
    return [part[:samples_per_client] for part in np.array_split(order, num_clients)]


def label_groups(
    labels: ArrayLike,
    groups: Sequence[Sequence[int]],
    *,
    samples_per_client: int | None = None,
    seed: Seed,
) -> list[Indices]:
    """Each client holds the given labels; clients that share a label share its samples.

    The samples of a label are divided disjointly and as equally as possible among its
    holders, each taking at most `samples_per_client // len(group)` of it; what one holder's
    limit leaves over goes to the others. ACME draws each device's samples independently, so
    that devices may hold the same image; here they never do.

    Args:
      labels: int [N].
      groups: the labels of each client, for example `paper_label_groups(...)`.
      samples_per_client: upper limit for each client; None divides all samples of the
        labels that are held.
      seed: see the module.

    Raises:
      PartitionError: invalid labels, a group that is empty, repeats a label or names one out
        of range, or a client that would get no samples.
    """
    array = checked_labels(labels, len(groups))
    check_limit(samples_per_client)
    num_labels = int(array.max()) + 1
    limits = np.zeros((len(groups), num_labels), np.int64)  # [C, K]
    for client, group in enumerate(groups):
        check_group(client, group, num_labels, samples_per_client)
        limit = len(array) if samples_per_client is None else samples_per_client // len(group)
        limits[client, list(group)] = limit
    rng = np.random.default_rng(seed)
    available = np.bincount(array, minlength=num_labels)
    counts = np.stack(
        [share_fairly(available[k], limits[:, k], rng) for k in range(num_labels)], axis=1
    )
    for client, group in enumerate(groups):
        if counts[client].sum() == 0:
            raise PartitionError(
                f"client {client} would get no samples of its labels {sorted(group)}; give it "
                "other labels, use fewer clients, or provide more data"
            )
    return deal(array, counts, rng)


def dirichlet(
    labels: ArrayLike,
    num_clients: int,
    alpha: float,
    *,
    samples_per_client: int | None = None,
    min_samples: int = 1,
    seed: Seed,
) -> list[Indices]:
    """Label skew: each label is divided in Dirichlet(alpha) proportions among the clients.

    Yurochkin et al. 2019, Li et al. 2022 (NIID-Bench). They draw again until the smallest
    client is large enough, which for small alpha may never end. Here one draw is repaired:
    while a client has fewer than `min_samples`, it takes one sample of the commonest label
    of the largest client, at most C * min_samples times.

    Args:
      labels: int [N].
      num_clients: C.
      alpha: concentration; small is skewed, large is IID.
      samples_per_client: upper limit; a random part of a larger client's samples is kept.
      min_samples: lower limit.
      seed: see the module.

    Raises:
      PartitionError: invalid labels or counts, alpha not positive, or fewer than
        C * min_samples samples.
    """
    array = checked_labels(labels, num_clients)
    check_alpha(alpha)
    check_minimum(len(array), num_clients, min_samples)
    check_limit(samples_per_client, min_samples)
    rng = np.random.default_rng(seed)
    counts = np.stack(
        [
            round_shares(int(total), rng.dirichlet(np.full(num_clients, alpha)))
            for total in np.bincount(array)
        ],
        axis=1,
    )  # [C, K]
    sizes = counts.sum(axis=1)
    while sizes.min() < min_samples:
        poor, rich = int(sizes.argmin()), int(sizes.argmax())
        label = int(counts[rich].argmax())
        counts[rich, label] -= 1
        counts[poor, label] += 1
        sizes[rich] -= 1
        sizes[poor] += 1
    return [part[:samples_per_client] for part in deal(array, counts, rng)]


def pathological(
    labels: ArrayLike,
    num_clients: int,
    labels_per_client: int,
    *,
    samples_per_client: int | None = None,
    seed: Seed,
) -> list[Indices]:
    """Every client holds exactly `labels_per_client` random labels.

    In the spirit of McMahan et al. 2017's two-digit clients, but exact: each client takes
    the labels that the fewest clients hold so far, ties at random, so any two labels have
    the same number of holders up to one. The samples are then divided as by `label_groups`.

    Args:
      labels: int [N].
      num_clients: C.
      labels_per_client: distinct labels of each client.
      samples_per_client: as for `label_groups`.
      seed: see the module.

    Raises:
      PartitionError: as for `label_groups`, or more labels per client than there are.
    """
    present = np.unique(checked_labels(labels, num_clients))
    if not 1 <= labels_per_client <= len(present):
        raise PartitionError(
            f"labels_per_client must be between 1 and the {len(present)} labels of the data, "
            f"got {labels_per_client}"
        )
    rng = np.random.default_rng(seed)
    holders = np.zeros(len(present), np.int64)
    groups = []
    for _ in range(num_clients):
        chosen = np.lexsort((rng.random(len(present)), holders))[:labels_per_client]
        holders[chosen] += 1
        groups.append(present[chosen].tolist())
    return label_groups(labels, groups, samples_per_client=samples_per_client, seed=rng)


def shards(
    labels: ArrayLike, num_clients: int, shards_per_client: int, *, seed: Seed
) -> list[Indices]:
    """Sort by label, cut into equal shards, deal them at random (McMahan et al. 2017).

    Args:
      labels: int [N].
      num_clients: C.
      shards_per_client: shards each client gets; shard sizes differ by at most one.
      seed: see the module.

    Raises:
      PartitionError: invalid labels or counts, or more shards than samples.
    """
    array = checked_labels(labels, num_clients)
    num_shards = num_clients * shards_per_client
    if not 1 <= num_shards <= len(array):
        raise PartitionError(
            f"{num_clients} clients x {shards_per_client} shards cannot be cut from "
            f"{len(array)} samples; use at least 1 shard per client and fewer in all"
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(array))
    pieces = np.array_split(shuffled[np.argsort(array[shuffled], kind="stable")], num_shards)
    dealt = rng.permutation(num_shards).reshape(num_clients, shards_per_client)
    return [rng.permutation(np.concatenate([pieces[i] for i in row])) for row in dealt]


def quantity_skew(
    labels: ArrayLike, num_clients: int, alpha: float, *, min_samples: int = 1, seed: Seed
) -> list[Indices]:
    """Equal label distributions, sizes in Dirichlet(alpha) proportions (Li et al. 2022).

    Args:
      labels: int [N].
      num_clients: C.
      alpha: concentration; small gives a few clients nearly everything.
      min_samples: every client gets this many first; the rest is divided.
      seed: see the module.

    Raises:
      PartitionError: as for `dirichlet`.
    """
    size = len(checked_labels(labels, num_clients))
    check_alpha(alpha)
    check_minimum(size, num_clients, min_samples)
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(num_clients, alpha))
    sizes = min_samples + round_shares(size - num_clients * min_samples, shares)
    return np.split(rng.permutation(size), np.cumsum(sizes)[:-1])


def natural_ids(ids: ArrayLike, *, min_samples: int = 1) -> list[Indices]:
    """One client per distinct id (writer, user, device), in the order of the sorted ids.

    Args:
      ids: [N] integers or strings.
      min_samples: clients with fewer samples are left out.

    Raises:
      PartitionError: no client has enough samples.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or array.size == 0:
        raise PartitionError(f"ids must be a non-empty vector, got shape {array.shape}")
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    parts = [p for p in np.split(order, np.cumsum(counts)[:-1]) if len(p) >= min_samples]
    if not parts:
        raise PartitionError(
            f"no client has {min_samples} samples (the largest has {counts.max()}); lower "
            "min_samples"
        )
    return parts
