"""Pareto sets of minimised objectives: dominance, rank, crowding, grid and selection.

Shape letters: P candidates, M objectives. Everything is traceable with static shapes. A row
that holds a NaN is invalid: it ranks behind every other row and is never selected.
`hypervolume` lives in its own module and is offered here too.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from nas import ordering
from nas.hypervolume import hypervolume
from nas.ordering import sort_key

__all__ = [
    "Rule",
    "Selection",
    "crowding_distance",
    "dominates",
    "front_grid",
    "hypervolume",
    "non_dominated_rank",
    "rank_and_crowding",
    "select",
    "sort_key",
]

Rule = Literal["paper", "trade_off", "nearest_ideal", "lowest_error"]

_WORD_BITS = 32


class Selection(NamedTuple):
    """A choice among P candidates."""

    index: jax.Array  # type: ignore[assignment]  # [] int32; P, which no row has, if infeasible
    feasible: jax.Array  # [] bool: whether the rule found anything to choose


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
        are left then share the next one. None ranks every row.

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
    num_rows = objectives.shape[0]
    invalid = jnp.any(jnp.isnan(objectives), axis=1)
    if violation is None:
        front, num_fronts = _peel(columns, ~invalid, num_needed or num_rows)
        return jnp.where(invalid, num_fronts, front)
    invalid |= jnp.isnan(violation)
    feasible = (violation <= 0) & ~invalid
    front, num_fronts = _peel(columns, feasible, num_needed or num_rows)

    # Dense ranks of the violations: the other rows sort first and count as level 0.
    key = ordering.sort_key(violation)
    lowest = jnp.iinfo(key.dtype).min
    key = jnp.where(feasible | invalid, lowest, key)
    ordered = jax.lax.sort(key, is_stable=False)
    previous = jnp.concatenate([jnp.full((1,), lowest, key.dtype), ordered[:-1]])
    levels = jnp.cumsum(ordered > previous, dtype=jnp.int32)
    level = levels[jnp.searchsorted(ordered, key)]
    behind = num_fronts + jnp.where(invalid, levels[-1], level - 1)
    return jnp.where(feasible, front, behind)


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


def front_grid(
    objectives: jax.Array,
    *,
    ideal: jax.Array,
    nadir: jax.Array,
    num_divisions: int,
    sigma: float = 1e-6,
) -> jax.Array:
    """The Pareto Front Grid: whether each row [P] represents its cell.

    Between `ideal` and `nadir` every objective is cut into `num_divisions` intervals; each
    occupied cell is represented by its row nearest to `ideal`, the lower index winning ties.
    Rows outside the grid represent nothing.

    From ACME (ICDCS 2025), for minimised objectives throughout: the original code negates
    one of them, gets negative intervals for the others and loses the rows at the border.
    Objectives are normalised by nadir - ideal first, so that units do not matter.

    Args:
      objectives: [P, M].
      ideal: [M], best values.
      nadir: [M], worst values; where it equals `ideal`, that objective is taken as it is.
      num_divisions: K, intervals along each objective.
      sigma: margin at both ends, as a part of the range.

    Raises:
      ValueError: more than 2^31 cells.
    """
    num_rows, num_objectives = objectives.shape
    if num_divisions**num_objectives >= 2**31:
        raise ValueError(
            f"{num_divisions} divisions of {num_objectives} objectives make too many cells; "
            "use fewer divisions, so that divisions ** objectives stays below 2 ** 31"
        )
    scaled = _normalise(objectives, ideal, nadir)
    cell = jnp.ceil((scaled + sigma) / ((1 + 2 * sigma) / num_divisions))
    inside = jnp.all((cell >= 1) & (cell <= num_divisions), axis=1)
    cell = jnp.where(inside[:, None], cell, 1).astype(jnp.int32) - 1
    strides = num_divisions ** jnp.arange(num_objectives, dtype=jnp.int32)
    number = jnp.where(inside, jnp.sum(cell * strides[None, :], axis=1), -1)
    distance = jnp.sum(jnp.square(scaled), axis=1)
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    number, _, order = jax.lax.sort((number, sort_key(distance), rows), num_keys=2)
    previous = jnp.concatenate([jnp.full((1,), -1, jnp.int32), number[:-1]])
    return jnp.zeros((num_rows,), bool).at[order].set(number != previous)


def select(
    objectives: jax.Array,
    constraint: jax.Array,
    limit: float | jax.Array,
    *,
    rule: Rule,
    error_column: int = 0,
    energy_column: int = -1,
    ideal: jax.Array | None = None,
    nadir: jax.Array | None = None,
    num_divisions: int = 10,
    sigma: float = 1e-6,
) -> Selection:
    """The best candidate whose constraint value is within the limit.

    Rules (the first is ACME's, the others filter before they choose):
      "paper": the representatives of the Pareto Front Grid of all candidates, then those of
        them within the limit, then the lowest error. A cell whose representative is too
        large is lost, so that better candidates within the limit can be missed.
      "trade_off": the highest accuracy - (constraint + energy) / 2, where constraint and
        energy are min-max normalised over all valid candidates, feasible or not.
      "nearest_ideal": the shortest Euclidean distance to `ideal`, normalised as in the grid.
      "lowest_error": the lowest error.
    Ties go to the lower index. To serve many limits, `vmap` over `limit`.

    Args:
      objectives: [P, M]; rows with NaN or infinity (empty places of an archive) are left out.
      constraint: [P], for instance bytes.
      limit: [], in the same unit; a value equal to it is feasible.
      rule: one of `Rule`.
      error_column: the objective that is 1 - accuracy.
      energy_column: the objective that is energy; read by "trade_off" only.
      ideal: [M]; None: the best values of the valid candidates.
      nadir: [M]; None: their worst values.
      num_divisions: of the grid; read by "paper" only.
      sigma: of the grid; read by "paper" only.

    Returns:
      A `Selection`; when nothing is left to choose, `feasible` is False and `index` is P,
      which NumPy refuses as an index.

    Raises:
      ValueError: an unknown rule.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"unknown rule {rule!r}; expected one of {', '.join(get_args(Rule))}")
    num_rows = objectives.shape[0]
    valid = jnp.all(jnp.isfinite(objectives), axis=1) & jnp.isfinite(constraint)
    masked = jnp.where(valid[:, None], objectives, jnp.nan)
    best, worst = jnp.nanmin(masked, axis=0), jnp.nanmax(masked, axis=0)
    ideal = best if ideal is None else ideal
    nadir = worst if nadir is None else nadir

    eligible = valid & (constraint <= limit)
    score = objectives[:, error_column]
    if rule == "paper":
        eligible &= front_grid(
            masked, ideal=ideal, nadir=nadir, num_divisions=num_divisions, sigma=sigma
        )
    elif rule == "trade_off":
        size = jnp.where(valid, constraint, jnp.nan)[:, None]
        size = _normalise(size, jnp.nanmin(size, axis=0), jnp.nanmax(size, axis=0))[:, 0]
        energy = _normalise(masked, best, worst)[:, energy_column]
        score += 0.5 * (size + energy)
    elif rule == "nearest_ideal":
        score = jnp.sum(jnp.square(_normalise(masked, ideal, nadir)), axis=1)
    feasible = jnp.any(eligible)
    index = jnp.argmin(jnp.where(eligible, score, jnp.inf)).astype(jnp.int32)
    return Selection(jnp.where(feasible, index, num_rows), feasible)


def _normalise(values: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """(values - low) / (high - low) by column; [P, M] with [M] limits."""
    low, high = jnp.asarray(low)[None, :], jnp.asarray(high)[None, :]
    span = high - low
    return (values - low) / jnp.where(span > 0, span, 1)
