"""Dropout of unimportant units at rates that fit the clients' data: FedAD's pure functions.

The second part of FedDHAD (arXiv 2507.10430). A few probe clients score the units of each layer;
a client with more data drops more of them, low scores first. Units are filters or neurons; a
model's layers are the leaves of any tree. Shape letters: C clients, J probes, U units of a
layer, B samples, R rounds.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fed.aggregate import weighted_mean


def probe_rows(key: jax.Array, sizes: jax.Array) -> jax.Array:
    """The clients that score units: most data, least data, and one other at random; int32 [3].

    Args:
      key: consumed.
      sizes: [C] numbers of samples, C >= 3.

    Raises:
      ValueError: fewer than three clients.
    """
    if sizes.shape[0] < 3:
        raise ValueError(f"three probes need three clients, got {sizes.shape[0]}")
    largest, smallest = jnp.argmax(sizes), jnp.argmin(sizes)
    # All equal: the first is both, and the last stands in for the smallest.
    smallest = jnp.where(smallest == largest, sizes.shape[0] - 1, smallest)
    rows = jnp.arange(sizes.shape[0])
    free = (rows != largest) & (rows != smallest)
    other = jax.random.categorical(key, jnp.where(free, 0.0, -jnp.inf))
    return jnp.stack([largest, smallest, other]).astype(jnp.int32)


def feature_map_ranks(maps: jax.Array) -> jax.Array:
    """Scores of convolution filters [U]: mean rank of their feature maps (HRank, CVPR 2020).

    Args:
      maps: [B, U, H, W].
    """
    return jnp.mean(jnp.linalg.matrix_rank(maps).astype(jnp.float32), axis=0)


def mean_scores(scores: Any, sizes: jax.Array) -> Any:
    """The probes' scores, leaves [J, U], averaged by their numbers of samples [J]: leaves [U]."""
    return weighted_mean(sizes, scores)


def score_distance(scores: Any, other: Any) -> jax.Array:
    """Euclidean distance [] of two rounds' scores, leaves [U]."""
    parts = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), scores, other)
    return jnp.sqrt(sum(jax.tree.leaves(parts)))


def first_minimum(distances: jax.Array, first: int | jax.Array) -> jax.Array:
    """When to begin dropping units: the first local minimum of [R] distances, int32 [].

    The round r >= max(first, 1) with distances[r - 1] >= distances[r] < distances[r + 1]: known a
    round later, to whose model training rolls back. -1: none yet.
    """
    before, here, after = distances[:-2], distances[1:-1], distances[2:]
    rounds = jnp.arange(1, distances.shape[0] - 1)
    found = (before >= here) & (here < after) & (rounds >= first)
    if rounds.shape[0] == 0:
        return jnp.int32(-1)
    return jnp.where(jnp.any(found), rounds[jnp.argmax(found)], -1).astype(jnp.int32)


def dropout_rates(
    sizes: jax.Array,
    probe_sizes: jax.Array,
    base_rate: float | jax.Array,
    *,
    smallest: float = 0.05,
) -> jax.Array:
    """How much each client drops: r_i = mean over probes j of 1 - n_j (1 - P) / n_i, [C].

    n_i (1 - r_i) is the same for all. Rates that are not positive become `smallest`.

    Args:
      sizes: [C] n_i; without samples the rate is `smallest`.
      probe_sizes: [J] n_j.
      base_rate: P in [0, 1); for example `fed.hessian_spectrum.base_rate`.
      smallest: see above.
    """
    kept = jnp.mean(probe_sizes * 1.0) * (1 - base_rate)
    rates = 1 - kept / jnp.where(sizes > 0, sizes, 1)
    return jnp.where((rates > 0) & (sizes > 0), rates, smallest)


def drop_probabilities(
    scores: jax.Array, rate: float | jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """p_u = r U exp(-s_u) / sum exp(-s), clipped to [0, 1]: units of low score are dropped more.

    Before clipping the mean is r. Scores that differ by much more than 1 (ranks of feature maps
    do) put all of it on few units, and clipping then leaves less than r.

    Args:
      scores: [U] of one layer.
      rate: [] r.
      temperature: divides the scores; the paper has 1.
    """
    return jnp.clip(rate * scores.shape[0] * jax.nn.softmax(-scores / temperature), 0.0, 1.0)


def draw_factors(key: jax.Array, scores: Any, rate: jax.Array, **options: Any) -> Any:
    """Factors on the units' outputs: 0 if dropped, 1 / (1 - p_u) otherwise; leaves [U].

    Args:
      key: consumed.
      scores: leaves [U].
      rate: [] the client's.
      **options: of `drop_probabilities`.
    """
    leaves, structure = jax.tree.flatten(scores)

    def draw(key: jax.Array, scores: jax.Array) -> jax.Array:
        dropped = drop_probabilities(scores, rate, **options)
        kept = jax.random.uniform(key, scores.shape) >= dropped
        return jnp.where(kept, 1 / jnp.where(dropped < 1, 1 - dropped, 1), 0.0)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, list(map(draw, keys, leaves)))


def kept_share(factors: Any) -> jax.Array:
    """The part [] of all units, in leaves [U], that a client keeps."""
    leaves = jax.tree.leaves(factors)
    kept = sum(jnp.sum(leaf > 0) for leaf in leaves)
    return kept / sum(leaf.size for leaf in leaves)
