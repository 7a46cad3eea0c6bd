"""Measured latency: seconds of a block by its numbers of heads and neurons, interpolated.

A table holds what was measured on one machine with one model. Between the measured points
seconds are bilinear, so the table is differentiable in relaxed counts; outside them the
nearest edge answers, and `in_range` says so. Reading and writing files is the caller's
business. Shape letters: A and B points of the grid, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class LatencyTable(NamedTuple):
    """Measured seconds of one example, and the constants of the energy model.

    Build it with `latency_table`, which checks; a leading axis on every field makes a fleet to
    `vmap` over. Energy stays modelled: no power is measured.
    """

    head_counts: jax.Array  # [A] ascending
    neuron_counts: jax.Array  # [B] ascending
    block_s: jax.Array  # [A, B] seconds of one block
    base_s: float | jax.Array  # [] seconds of everything else: embedding, call
    idle_power_w: float | jax.Array
    energy_per_flop_j: float | jax.Array
    energy_per_byte_j: float | jax.Array


def latency_table(
    head_counts: ArrayLike,
    neuron_counts: ArrayLike,
    block_s: ArrayLike,
    base_s: float,
    *,
    idle_power_w: float,
    energy_per_flop_j: float,
    energy_per_byte_j: float,
) -> LatencyTable:
    """A checked table; on the host, not traceable.

    Args:
      head_counts: [A] measured numbers of heads, ascending.
      neuron_counts: [B] measured numbers of neurons, ascending.
      block_s: [A, B] seconds of a block with so many heads and neurons.
      base_s: seconds of a network without blocks.
      idle_power_w: of the energy model, as the next two; see `cost.energy_j`.
      energy_per_flop_j: joules.
      energy_per_byte_j: joules.

    Raises:
      ValueError: counts that are not ascending and positive, a block_s of another shape, or
        seconds or constants that are negative or not finite.
    """
    counts = {"head_counts": np.asarray(head_counts), "neuron_counts": np.asarray(neuron_counts)}
    for name, grid in counts.items():
        if grid.ndim != 1 or not grid.size or grid[0] <= 0 or not np.all(np.diff(grid) > 0):
            raise ValueError(
                f"{name} is {grid.tolist()}; expected positive counts in strictly ascending "
                "order, at least one"
            )
    shape = tuple(grid.size for grid in counts.values())
    if np.shape(block_s) != shape:
        raise ValueError(
            f"block_s has shape {np.shape(block_s)}; expected {shape}: one entry for each of "
            "head_counts and neuron_counts"
        )
    numbers = {
        "block_s": block_s,
        "base_s": base_s,
        "idle_power_w": idle_power_w,
        "energy_per_flop_j": energy_per_flop_j,
        "energy_per_byte_j": energy_per_byte_j,
    }
    for name, value in numbers.items():
        values = np.asarray(value, np.float64)
        bad = values[~(np.isfinite(values) & (values >= 0))]
        if bad.size:
            raise ValueError(
                f"{name} holds {bad.flat[0]}; expected finite numbers that are not negative. "
                "Measure again"
            )
    dtype = jnp.result_type(float)
    return LatencyTable(
        *(jnp.asarray(grid, dtype) for grid in counts.values()),
        *(jnp.asarray(value, dtype) for value in numbers.values()),
    )


def scaled(table: LatencyTable, factor: float | jax.Array) -> LatencyTable:
    """The table of a device that takes `factor` times as long for everything."""
    return table._replace(block_s=table.block_s * factor, base_s=table.base_s * factor)


def grid_weights(counts: jax.Array, grid: jax.Array) -> jax.Array:
    """Weights [L, A] of the grid's points in a linear interpolation at `counts` [L].

    Each row adds up to 1. Counts outside the grid read its nearest end, with gradient 0; at a
    point of the grid the derivative is that of the piece above it, at the last of that below.

    Args:
      counts: [L] heads or neurons, integer or relaxed.
      grid: [A] ascending.
    """
    grid = jnp.asarray(grid)
    if grid.shape[0] == 1:
        return jnp.ones((counts.shape[0], 1), grid.dtype)
    at = counts.astype(jnp.result_type(grid, counts))
    inside = (at >= grid[0]) & (at <= grid[-1])
    # Not `clip`, whose gradient vanishes on the edge itself, where a full mask lies.
    at = jnp.where(inside, at, jax.lax.stop_gradient(jnp.clip(at, grid[0], grid[-1])))
    piece = jnp.sum(at[:, None] >= grid[None, 1:-1], axis=1)
    low, high = grid[piece], grid[piece + 1]
    upper = ((at - low) / (high - low))[:, None]
    points = jnp.arange(grid.shape[0], dtype=piece.dtype)[None]
    at_low, at_high = points == piece[:, None], points == piece[:, None] + 1
    return (1.0 - upper) * at_low + upper * at_high


def block_seconds(table: LatencyTable, heads: jax.Array, neurons: jax.Array) -> jax.Array:
    """Interpolated seconds [L] of blocks with `heads` [L] and `neurons` [L]."""
    by_head = grid_weights(heads, table.head_counts)
    by_neuron = grid_weights(neurons, table.neuron_counts)
    return jnp.sum((by_head @ table.block_s) * by_neuron, axis=1)


def in_range(table: LatencyTable, heads: jax.Array, neurons: jax.Array) -> jax.Array:
    """Whether each block [L] lies within the measured points; bool."""
    return (
        (heads >= table.head_counts[0])
        & (heads <= table.head_counts[-1])
        & (neurons >= table.neuron_counts[0])
        & (neurons <= table.neuron_counts[-1])
    )
