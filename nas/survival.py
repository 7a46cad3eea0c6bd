"""Survival of the best of parents and children: the `tell` that elitist searchers share.

A searcher brings only its rule, from the objectives of a pool to an order. Shape letters: P
population, N = 2 P pool, M objectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nas import archive as archives
from nas import genomes, pareto
from nas.searcher import SearchInfo, SearchState


class Pool(NamedTuple):
    """The population and its children, N rows, from which the next population is chosen."""

    objectives: jax.Array  # [N, M]
    violation: jax.Array  # [N]
    repeated: jax.Array  # [N] bool: an equal genome stands earlier

    @property
    def usable(self) -> jax.Array:
        """Rows [N] that may compete: finite, and the first of equal genomes."""
        return jnp.all(jnp.isfinite(self.objectives), axis=1) & ~self.repeated

    @property
    def ranked(self) -> jax.Array:
        """Objectives [N, M] with NaN in the rows that are not usable, so that they rank last."""
        return jnp.where(self.usable[:, None], self.objectives, jnp.nan)


class Survival(NamedTuple):
    """Who survives."""

    order: jax.Array  # [>= P] int32, rows of the pool, best first; the first P survive
    rank: jax.Array  # [N] int32, fronts of the pool
    memory: Any = ()  # of the next `SearchState`


def elitist_tell(
    survive: Callable[[SearchState, Pool], Survival], *, track_hypervolume: bool = True
) -> Callable[..., tuple[SearchState, SearchInfo]]:
    """The `tell` of a searcher whose next population is the best of parents and children.

    Args:
      survive: the searcher's own rule.
      track_hypervolume: False saves its O(P^(M-1)) per generation; NaN is reported then.
    """

    def tell(
        state: SearchState,
        told: genomes.Genome,
        objectives: jax.Array,
        violation: jax.Array | None = None,
    ) -> tuple[SearchState, SearchInfo]:
        """The best of the population and the evaluated genomes survive."""
        if objectives.shape != state.objectives.shape:
            raise ValueError(
                f"tell got objectives of shape {objectives.shape}; expected [P, M] = "
                f"{state.objectives.shape}, a row for each genome that was asked for"
            )
        num_rows = objectives.shape[0]
        objectives = objectives.astype(state.objectives.dtype)
        if violation is None:
            violation = jnp.zeros((num_rows,))
        if violation.shape != (num_rows,):
            raise ValueError(
                f"tell got violation of shape {violation.shape}; expected ({num_rows},), one "
                "number for each genome"
            )
        violation = violation.astype(state.violation.dtype)
        # At first the state is not evaluated yet: let the told ones stand in for it.
        starting = state.generation == 0
        merged = genomes.concatenate(genomes.where(starting, told, state.population), told)
        values = jnp.concatenate([jnp.where(starting, objectives, state.objectives), objectives])
        excess = jnp.concatenate([jnp.where(starting, violation, state.violation), violation])
        survival = survive(state, Pool(values, excess, genomes.duplicates(merged)))
        best = survival.order[:num_rows]

        worst = jnp.max(jnp.where(jnp.isfinite(objectives), objectives, -jnp.inf), axis=0)
        worst = jnp.where(jnp.isfinite(worst), worst, jnp.nan)
        new_state = SearchState(
            population=genomes.take(merged, best),
            objectives=values[best],
            violation=excess[best],
            generation=state.generation + 1,
            reference=jnp.where(jnp.isnan(state.reference), worst, state.reference),
            archive=archives.insert(state.archive, told, objectives, violation),
            memory=survival.memory,
        )
        feasible = new_state.violation <= 0
        volume = jnp.asarray(jnp.nan, values.dtype)
        if track_hypervolume:
            points = jnp.where(feasible[:, None], new_state.objectives, jnp.nan)
            volume = pareto.hypervolume(points, new_state.reference)
        info = SearchInfo(survival.rank[best], jnp.sum(feasible, dtype=jnp.int32), volume)
        return new_state, info

    return tell
