"""First-order importance of parts of a network, their order, and pruning by budget.

Shape letters: G gates, L layers, H heads, F neurons. Pure functions of arrays; where values
and gradients come from is the caller's business.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ImportanceOrder(NamedTuple):
    """Permutations that sort each layer's parts by falling importance, int32."""

    heads: jax.Array  # [L, H]
    neurons: jax.Array  # [L, F]


def taylor_importance(
    value: jax.Array, grad: jax.Array, axis: int | tuple[int, ...] | None = None
) -> jax.Array:
    """First-order estimate |sum value * grad| of the loss change when a part is removed.

    Of one batch; sum the results over batches. (Michel et al. 2019 for heads, whose value
    is a gate of 1; Molchanov et al. 2017 for neurons, whose parts are weights to be summed
    before the absolute value.)

    Args:
      value: any shape.
      grad: gradient of the loss, of the same shape.
      axis: axes that make up one part, summed inside the absolute value; None: every
        element is a part.
    """
    product = value * grad
    return jnp.abs(product if axis is None else product.sum(axis))


def gate_importance(gate: jax.Array, grad: jax.Array) -> jax.Array:
    """Squared first-order importance (gate * grad)^2 of one batch (Molchanov et al. 2019).

    A pruned gate is 0 and so is its importance. ACME averages this over the batches of a
    round; its code averages running sums, which weighs the first batch most, and we do not.
    """
    return jnp.square(gate * grad)


def rank_descending(scores: jax.Array) -> jax.Array:
    """Permutation, along the last axis, from the highest score to the lowest, int32.

    Ties keep their order and NaN comes last.
    """
    return jnp.argsort(-scores, axis=-1, stable=True).astype(jnp.int32)


def importance_order(head_scores: jax.Array, neuron_scores: jax.Array) -> ImportanceOrder:
    """The order of heads [L, H] and neurons [L, F] within each layer, most important first."""
    return ImportanceOrder(rank_descending(head_scores), rank_descending(neuron_scores))


def prune_lowest(scores: jax.Array, mask: jax.Array, num: int | jax.Array) -> jax.Array:
    """Set exactly `num` further gates to zero: those with the lowest scores.

    The original code compares with a threshold, so that ties prune more than asked; here
    ties go by index, lower first, and NaN scores are pruned last.

    Args:
      scores: [G].
      mask: [G], nonzero where a gate is still open.
      num: how many; may be traced. Capped so that one gate stays open.

    Returns:
      The new mask [G], of the same dtype.
    """
    closed = mask == 0
    order = jnp.lexsort((scores, closed))
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype))
    num_open = jnp.sum(~closed)
    num = jnp.clip(num, 0, jnp.maximum(num_open - 1, 0))
    return jnp.where(place < num, jnp.zeros_like(mask), mask)
