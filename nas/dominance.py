"""Dominance between minimised objectives: fronts and crowding.

Shape letters: P rows, M objectives. Everything is traceable with static shapes. A row that
holds a NaN is invalid and ranks behind every other; infinities are compared as numbers.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from nas import ordering

_WORD_BITS = 32


def dominates(first: jax.Array, second: jax.Array) -> jax.Array:
    """Whether rows [P, M] of `first` dominate rows [Q, M] of `second`: bool [P, Q].

    To dominate is to be no worse in every objective and better in one; NaN never does.
    """
    shape = (first.shape[0], second.shape[0])
    no_worse, better = jnp.ones(shape, bool), jnp.zeros(shape, bool)
    for a, b in zip(first.T, second.T, strict=True):
        no_worse &= a[:, None] <= b[None, :]
        better |= a[:, None] < b[None, :]
    return no_worse & better


def non_dominated_rank(
    objectives: jax.Array, violation: jax.Array | None = None, *, num_needed: int | None = None
) -> jax.Array:
    """Front of each row: 0 is Pareto-optimal, 1 is so once front 0 is removed, and so on.

    Constraint-domination (Deb et al. 2002, section VI): first the feasible rows, ranked by
    dominance; then the infeasible ones, by violation alone; last the rows with NaN.
    Duplicates share a rank. O(M P^2), once, and a bit-packed pass for each front.

    Args:
      objectives: [P, M].
      violation: [P], positive where a row is infeasible; None: all rows are feasible.
      num_needed: stop peeling fronts when so many rows have a rank; the feasible rows that
        are left then share the next one. None ranks every row, as does a single objective.

    Returns:
      int32 [P], without gaps.
    """
    return _fronts(objectives, _column_ranks(objectives), violation, num_needed)


def rank_and_crowding(
    objectives: jax.Array, violation: jax.Array | None = None, *, num_needed: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """`non_dominated_rank` and `crowding_distance` of the same rows, sharing their sorts."""
    columns = _column_ranks(objectives)
    rank = _fronts(objectives, columns, violation, num_needed)
    return rank, _crowding(objectives, columns, rank)


def _column_ranks(objectives: jax.Array) -> list[jax.Array]:
    """For each objective, how many rows are better: integers compare faster than floats."""
    return [ordering.ranks(ordering.sort_key(column)) for column in objectives.T]


def _fronts(
    objectives: jax.Array,
    columns: list[jax.Array],
    violation: jax.Array | None,
    num_needed: int | None,
) -> jax.Array:
    num_rows, num_objectives = objectives.shape
    if num_rows == 0:
        return jnp.zeros((0,), jnp.int32)
    invalid = jnp.any(jnp.isnan(objectives), axis=1)
    feasible = ~invalid
    if violation is not None:
        invalid |= jnp.isnan(violation)
        feasible = (violation <= 0) & ~invalid
    if num_objectives == 1:
        front, num_fronts = ordering.levels(columns[0], feasible)
    else:
        front, num_fronts = _peel(columns, feasible, num_rows if num_needed is None else num_needed)
    if violation is None:
        return jnp.where(invalid, num_fronts, front)
    level, num_levels = ordering.levels(ordering.sort_key(violation), ~feasible & ~invalid)
    return jnp.where(feasible, front, num_fronts + jnp.where(invalid, num_levels, level))


def _peel(
    columns: list[jax.Array], valid: jax.Array, num_needed: int
) -> tuple[jax.Array, jax.Array]:
    """Fronts [P] of the valid rows and the number of fronts [], by repeated peeling."""
    num_rows = valid.shape[0]
    words = -(-num_rows // _WORD_BITS)
    padding = words * _WORD_BITS - num_rows
    bit = jnp.uint32(1) << jnp.arange(_WORD_BITS, dtype=jnp.uint32)

    def pack(flags: jax.Array) -> jax.Array:
        """Bool [P] -> uint32 [P / 32]: 32 times less memory to read per front."""
        flags = jnp.pad(flags, (0, padding)).reshape(words, _WORD_BITS)
        return jnp.sum(jnp.where(flags, bit[None, :], 0), axis=1, dtype=jnp.uint32)

    # A row dominates another if it is no worse in any objective and its ranks have a lower
    # sum: the sums of two rows of which one is nowhere worse are equal only if all ranks are.
    total = functools.reduce(jnp.add, columns)
    narrow = jnp.int16 if len(columns) * num_rows < 2**15 else jnp.int32
    dominator = jnp.ones((words, _WORD_BITS, num_rows), bool)
    for index, column in enumerate([total, *columns]):
        column = column.astype(narrow)
        filler = jnp.iinfo(narrow).max  # rows that pad the words dominate none
        rows = jnp.pad(column, (0, padding), constant_values=filler)
        rows, others = rows.reshape(words, _WORD_BITS, 1), column[None, None, :]
        dominator &= rows < others if index == 0 else rows <= others
    dominators = jnp.sum(jnp.where(dominator, bit[None, :, None], 0), axis=1, dtype=jnp.uint32)

    def more(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        left = carry[2]
        return jnp.any(left) & (jnp.sum(valid & ~left) < num_needed)

    def peel_front(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        number, rank, left = carry
        dominated = jnp.any((dominators & pack(left)[:, None]) != 0, axis=0)
        # Rows that are left keep the number of the next front, should peeling stop here.
        return number + 1, jnp.where(left & dominated, number + 1, rank), left & dominated

    zero = jnp.zeros((), jnp.int32)
    start = (zero, jnp.zeros((num_rows,), jnp.int32), valid)
    number, rank, left = jax.lax.while_loop(more, peel_front, start)
    return rank, number + jnp.any(left)


def crowding_distance(objectives: jax.Array, rank: jax.Array) -> jax.Array:
    """How alone each row is in its front: [P], infinite at both ends of every objective.

    The sum over objectives of the gap between a row's two neighbours, over the front's
    range (Deb et al. 2002, section III-B). Of equal values, the one of lower index comes
    first; a range of zero adds nothing.

    Args:
      objectives: [P, M].
      rank: int32 [P], from `non_dominated_rank`.
    """
    return _crowding(objectives, _column_ranks(objectives), ordering.ranks(rank))


def _crowding(objectives: jax.Array, columns: list[jax.Array], rank: jax.Array) -> jax.Array:
    """Crowding distances, from any numbers of the fronts that are below P."""
    num_rows = objectives.shape[0]
    if num_rows == 0:
        return jnp.zeros((0,), objectives.dtype)
    # The same sequence of fronts, whichever objective sorts the rows within them.
    fronts = jax.lax.sort(rank, is_stable=False)
    first = jnp.searchsorted(fronts, fronts)
    last = jnp.searchsorted(fronts, fronts, side="right") - 1
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    is_end = (rows == first) | (rows == last)
    distance = jnp.zeros((num_rows,), objectives.dtype)
    for column, column_rank in zip(objectives.T, columns, strict=True):
        by_value = ordering.order_of_ranks(column_rank)
        packed = ordering.pack(rank, ordering.inverse(by_value))
        place = ordering.unpack(jax.lax.sort(packed, is_stable=False), num_rows)[1]
        order = by_value[place]
        value = column[order]
        gap = jnp.roll(value, -1) - jnp.roll(value, 1)
        span = value[last] - value[first]
        share = jnp.where(span > 0, gap / jnp.where(span > 0, span, 1), 0)
        share = jnp.where(is_end, jnp.inf, jnp.nan_to_num(share, posinf=jnp.inf))
        distance = distance.at[order].add(share, unique_indices=True)
    return distance
