"""Combining what the clients send: trees whose leaves have a leading client axis [C].

Sums run over the clients one after the other or as one matrix product of fixed shape, never
over shards, so the result does not depend on how the clients were laid out on devices.
Floating leaves keep their dtype and are summed in at least float32; integer leaves become
float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def weighted_mean(weights: jax.Array, tree: Any) -> Any:
    """Mean over clients, weights normalised to sum 1 (FedAvg, McMahan et al. 2017).

    Args:
      weights: [C], not negative, with a positive sum (otherwise the result is NaN).
      tree: leaves [C, ...].

    Returns:
      The tree with leaves [...].

    Raises:
      ValueError: a leaf whose leading axis differs from that of the weights.
    """
    _check_leaves(tree, weights.shape[0], "tree")
    normalised = (weights / weights.sum()).astype(jnp.float32)
    total = _sum_over_clients(normalised, tree)
    return jax.tree.map(lambda mean, leaf: mean.astype(_mean_dtype(leaf)), total, tree)


def personalized_mean(weights: jax.Array, tree: Any) -> Any:
    """Every client its own mean: W @ stack on every leaf (ACME, ICDCS 2025).

    Args:
      weights: [C, C], used as they are; row k says how much client k listens to each. A
        rectangular [K, C] gives K means.
      tree: leaves [C, ...].

    Returns:
      The tree with leaves [K, ...].

    Raises:
      ValueError: a leaf whose leading axis differs from the weights' last axis.
    """
    _check_leaves(tree, weights.shape[-1], "tree")

    def mean(leaf: jax.Array) -> jax.Array:
        dtype = _sum_dtype(leaf)
        product = jnp.tensordot(
            weights.astype(dtype), leaf.astype(dtype), axes=1, precision="highest"
        )
        return product.astype(_mean_dtype(leaf))

    return jax.tree.map(mean, tree)


def coverage_weighted_mean(weights: jax.Array, tree: Any, masks: Any, fallback: Any) -> Any:
    """Weighted mean of each entry over the clients that hold it (HeteroFL, Diao et al. 2021).

    Args:
      weights: [C], not negative.
      tree: leaves [C, ...]; entries outside a client's mask are ignored.
      masks: the same tree with leaves [C, ...] of the same shapes; nonzero where held.
      fallback: the same tree with leaves [...]: the values of entries that nobody holds.

    Raises:
      ValueError: leaves whose leading axis differs from that of the weights.
    """
    for name, part in (("tree", tree), ("masks", masks)):
        _check_leaves(part, weights.shape[0], name)
    held = jax.tree.map(lambda mask: (mask != 0).astype(jnp.float32), masks)
    kept = jax.tree.map(lambda leaf, mask: jnp.where(mask != 0, leaf, 0), tree, masks)
    total = _sum_over_clients(weights, kept)
    cover = _sum_over_clients(weights, held)

    def divide(total: jax.Array, cover: jax.Array, other: jax.Array, leaf: jax.Array) -> jax.Array:
        mean = total / jnp.where(cover > 0, cover, 1.0)
        return jnp.where(cover > 0, mean, other).astype(_mean_dtype(leaf))

    return jax.tree.map(divide, total, cover, fallback, tree)


def trimmed_mean(tree: Any, *, num_trimmed: int) -> Any:
    """Mean of each entry without its extremes (Yin et al. 2018).

    Args:
      tree: leaves [C, ...].
      num_trimmed: how many of the largest and of the smallest values are dropped.

    Returns:
      The tree with leaves [...].

    Raises:
      ValueError: nothing would remain.
    """

    def mean(leaf: jax.Array) -> jax.Array:
        num_clients = leaf.shape[0]
        if not 0 <= 2 * num_trimmed < num_clients:
            raise ValueError(
                f"dropping {num_trimmed} values at each end leaves none of {num_clients} "
                f"clients; use at most {(num_clients - 1) // 2}"
            )
        kept = jnp.sort(leaf, axis=0)[num_trimmed : num_clients - num_trimmed]
        return kept.astype(_sum_dtype(leaf)).mean(axis=0).astype(_mean_dtype(leaf))

    return jax.tree.map(mean, tree)


def median(tree: Any) -> Any:
    """Median of each entry over the clients (Yin et al. 2018): leaves [C, ...] -> [...]."""
    return jax.tree.map(
        lambda leaf: jnp.median(leaf.astype(_sum_dtype(leaf)), axis=0).astype(_mean_dtype(leaf)),
        tree,
    )


def _sum_over_clients(weights: jax.Array, tree: Any) -> Any:
    """sum_c weights[c] * leaf[c], one client after the other."""

    def add(client: jax.Array, total: Any) -> Any:
        return jax.tree.map(
            lambda sum_, leaf: sum_ + weights[client].astype(sum_.dtype) * leaf[client], total, tree
        )

    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], _sum_dtype(leaf)), tree)
    return jax.lax.fori_loop(0, weights.shape[0], add, start)


def _mean_dtype(leaf: jax.Array) -> jnp.dtype:
    return leaf.dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.dtype(jnp.float32)


def _sum_dtype(leaf: jax.Array) -> jnp.dtype:
    return jnp.promote_types(_mean_dtype(leaf), jnp.float32)


def _check_leaves(tree: Any, num_clients: int, name: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != num_clients:
            raise ValueError(
                f"leaf {jax.tree_util.keystr(path) or '(root)'} of {name} has shape "
                f"{jnp.shape(leaf)}; the leading axis must be the {num_clients} clients of the "
                "weights"
            )
