"""Choosing from a Pareto set under a limit, by a named rule.

Shape letters: P candidates, M objectives, Q costs. Traceable with static shapes, `vmap` over
limits; a fleet with several limits for each device has `nas.fleet`. `nas.pareto` offers these
names too.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from nas.ordering import sort_key

__all__ = ["Rule", "Selection", "front_grid", "score", "select"]

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


def score(
    objectives: jax.Array,
    costs: jax.Array,
    *,
    rule: Rule,
    error_column: int = 0,
    ideal: jax.Array | None = None,
    nadir: jax.Array | None = None,
    num_divisions: int = 10,
    sigma: float = 1e-6,
) -> jax.Array:
    """What a rule minimises: [P], infinite where a candidate is never chosen.

    The part of `select` that no limit changes, so that many limits share it.

    Args:
      objectives: [P, M]; rows with NaN or infinity are never chosen.
      costs: [P, Q]; the same holds for them. "trade_off" adds the mean of the costs, each
        min-max normalised over all valid candidates, to the error; other rules ignore them.
      rule: one of `Rule`, described at `select`.
      error_column: the objective that is 1 - accuracy.
      ideal: [M]; None: the best values of the valid candidates.
      nadir: [M]; None: their worst values.
      num_divisions: of the grid; read by "paper" only.
      sigma: of the grid; read by "paper" only.

    Raises:
      ValueError: an unknown rule, or no candidates at all (P = 0).
    """
    if rule not in get_args(Rule):
        raise ValueError(f"unknown rule {rule!r}; expected one of {', '.join(get_args(Rule))}")
    if objectives.shape[0] == 0:
        raise ValueError("there are no candidates to choose from (P = 0); expected at least one")
    valid = jnp.all(jnp.isfinite(objectives), axis=1) & jnp.all(jnp.isfinite(costs), axis=1)
    masked = jnp.where(valid[:, None], objectives, jnp.nan)
    ideal = jnp.nanmin(masked, axis=0) if ideal is None else ideal
    nadir = jnp.nanmax(masked, axis=0) if nadir is None else nadir

    value = objectives[:, error_column]
    if rule == "paper":
        valid &= front_grid(
            masked, ideal=ideal, nadir=nadir, num_divisions=num_divisions, sigma=sigma
        )
    elif rule == "trade_off":
        costs = jnp.where(valid[:, None], costs, jnp.nan)
        scaled = _normalise(costs, jnp.nanmin(costs, axis=0), jnp.nanmax(costs, axis=0))
        value += jnp.mean(scaled, axis=1)
    elif rule == "nearest_ideal":
        value = jnp.sum(jnp.square(_normalise(masked, ideal, nadir)), axis=1)
    return jnp.where(valid, value, jnp.inf)


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
      ValueError: an unknown rule, or no candidates at all (P = 0).
    """
    costs = jnp.stack([constraint, objectives[:, energy_column]], axis=1)
    values = score(
        objectives,
        costs,
        rule=rule,
        error_column=error_column,
        ideal=ideal,
        nadir=nadir,
        num_divisions=num_divisions,
        sigma=sigma,
    )
    values = jnp.where(constraint <= limit, values, jnp.inf)
    feasible = jnp.any(values < jnp.inf)
    index = jnp.argmin(values).astype(jnp.int32)
    return Selection(jnp.where(feasible, index, objectives.shape[0]), feasible)


def _normalise(values: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """(values - low) / (high - low) by column; [P, M] with [M] limits."""
    low, high = jnp.asarray(low)[None, :], jnp.asarray(high)[None, :]
    span = high - low
    return (values - low) / jnp.where(span > 0, span, 1)
