"""Other ways to NSGA-II's survival, kept to show what the way of `nas.nsga2` saves.

All give the same survivors, but for ties and for constraints, which they leave out. Used by
`bench_search_speed.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nas import pareto
from nas.searcher import SearchState
from nas.survival import Pool, Survival

Survive = Callable[[SearchState, Pool], Survival]


def float_dominance(population_size: int, *, packed: bool) -> Survive:
    """Floats compared twice per objective; fronts peeled off a matrix of bits or of bools."""

    def survive(state: SearchState, pool: Pool) -> Survival:
        del state
        invalid = pool.repeated | ~jnp.all(jnp.isfinite(pool.objectives), axis=1)
        dominated_by = pareto.dominates(pool.objectives, pool.objectives)
        rank = _peel(dominated_by, ~invalid, population_size, packed=packed)
        return _by_crowding(pool.objectives, rank)

    return survive


def many_operand_sorts(population_size: int) -> Survive:
    """Ranks as in `nas.nsga2`, but rows sorted by several keys at once, rows carried along."""

    def survive(state: SearchState, pool: Pool) -> Survival:
        del state
        invalid = pool.repeated | ~jnp.all(jnp.isfinite(pool.objectives), axis=1)
        ranked = jnp.where(invalid[:, None], jnp.nan, pool.objectives)
        rank = pareto.non_dominated_rank(ranked, num_needed=population_size)
        return _by_crowding(ranked, rank)

    return survive


def _peel(dominates: jax.Array, valid: jax.Array, num_needed: int, *, packed: bool) -> jax.Array:
    num_rows = valid.shape[0]
    bit = jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)

    def pack(flags: jax.Array) -> jax.Array:
        words = flags.reshape(-1, 32, *flags.shape[1:])
        weights = bit.reshape(1, 32, *(1,) * (flags.ndim - 1))
        return jnp.sum(jnp.where(words, weights, 0), axis=1, dtype=jnp.uint32)

    packed_rows = pack(dominates) if packed else None

    def more(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(carry[2]) & (jnp.sum(valid & ~carry[2]) < num_needed)

    def front(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        number, rank, left = carry
        if packed_rows is None:
            beaten = jnp.any(dominates & left[:, None], axis=0)
        else:
            beaten = jnp.any((packed_rows & pack(left)[:, None]) != 0, axis=0)
        return number + 1, jnp.where(left & beaten, number + 1, rank), left & beaten

    start = (jnp.zeros((), jnp.int32), jnp.zeros((num_rows,), jnp.int32), valid)
    number, rank, left = jax.lax.while_loop(more, front, start)
    return jnp.where(valid, rank, number + jnp.any(left))


def _by_crowding(objectives: jax.Array, rank: jax.Array) -> Survival:
    rows = jnp.arange(rank.size, dtype=jnp.int32)
    distance = jnp.zeros(rank.shape)
    for column in objectives.T:
        fronts, _, order = jax.lax.sort((rank, pareto.sort_key(column), rows), num_keys=2)
        value = column[order]
        change = fronts[1:] != fronts[:-1]
        edge = jnp.ones((1,), bool)
        is_first, is_last = jnp.concatenate([edge, change]), jnp.concatenate([change, edge])
        first = jax.lax.cummax(jnp.where(is_first, rows, 0))
        last = jax.lax.cummin(jnp.where(is_last, rows, rows.size - 1), reverse=True)
        span = value[last] - value[first]
        gap = (jnp.roll(value, -1) - jnp.roll(value, 1)) / jnp.where(span > 0, span, 1)
        share = jnp.where(is_first | is_last, jnp.inf, jnp.where(span > 0, gap, 0))
        distance = distance.at[order].add(share)
    order = jax.lax.sort((rank, pareto.sort_key(-distance), rows), num_keys=3)[2]
    return Survival(order, rank)
