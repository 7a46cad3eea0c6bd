"""Pareto sets of minimised objectives: dominance, rank, crowding, grid and selection.

Shape letters: P candidates, M objectives. Everything is traceable with static shapes. A row
that holds a NaN is invalid: it ranks behind every other row and is never selected.
Dominance and `hypervolume` live in modules of their own and are offered here too.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from nas.dominance import (
    crowding_distance,
    dominates,
    non_dominated_rank,
    rank_and_crowding,
)
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


class Selection(NamedTuple):
    """A choice among P candidates."""

    index: jax.Array  # type: ignore[assignment]  # [] int32; P, which no row has, if infeasible
    feasible: jax.Array  # [] bool: whether the rule found anything to choose


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
    if num_rows == 0:
        return Selection(jnp.zeros((), jnp.int32), jnp.zeros((), bool))
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
