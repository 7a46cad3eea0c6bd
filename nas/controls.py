"""Searchers to compare with: random search and plain evolution.

They share genomes, records and archive with `nas.nsga2`, so that at equal evaluations only
the choice of what to evaluate differs. Shape letters: P population, M objectives.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nas import genomes, nsga2, ordering, pareto
from nas.arch import ArchSpace
from nas.searcher import Searcher, SearchState
from nas.survival import Pool, Survival, elitist_tell

_AUGMENTATION = 0.05  # share of the plain sum, as in ParEGO


def random_search(
    space: ArchSpace | genomes.Operators,
    *,
    population_size: int,
    archive_capacity: int = 256,
    initial: genomes.Genome | None = None,
    track_hypervolume: bool = True,
) -> Searcher:
    """Random search as a `Searcher`: every generation samples P genomes anew.

    What is kept does not influence what is asked for: the archive as everywhere, and as the
    population the best P by NSGA-II's survival.

    Args:
      space: where to search; or `Operators`, for genomes of another kind.
      population_size: P.
      archive_capacity: places in the archive; 0: none is kept.
      initial: genomes that begin the first population; the rest is sampled.
      track_hypervolume: False saves its O(P^(M-1)) per generation; NaN is reported then.

    Raises:
      ValueError: as of `nsga2`.
    """
    base = nsga2.nsga2(
        space,
        population_size=population_size,
        archive_capacity=archive_capacity,
        initial=initial,
        track_hypervolume=track_hypervolume,
    )
    fresh = nsga2.nsga2(space, population_size=population_size, archive_capacity=0)

    def ask(key: jax.Array, state: SearchState) -> genomes.Genome:
        sampled = fresh.init(key, state.objectives.shape[1]).population
        return genomes.where(state.generation == 0, state.population, sampled)

    return Searcher(base.init, ask, base.tell)


def evolution(
    space: ArchSpace | genomes.Operators,
    *,
    population_size: int,
    mutation_rate: float | None = None,
    crossover_rate: float = 0.9,
    num_retries: int = 1,
    archive_capacity: int = 256,
    initial: genomes.Genome | None = None,
    track_hypervolume: bool = True,
) -> Searcher:
    """Plain (mu + lambda) evolution on random scalarisations as a `Searcher`.

    Parents are drawn at random and vary as in NSGA-II. Each generation then draws P weights
    from the simplex; of parents and children the best under each weight survive, by the
    augmented Tchebycheff distance to the ideal point (random weights: Ishibuchi and Murata,
    IEEE Trans. SMC-C 1998; the function: Knowles, "ParEGO", IEEE TEC 2006). Places that are
    left, because one row is the best under several weights, go by constraint-domination
    rank. Duplicates and rows that are not finite come last.

    Args:
      space: where to search; or `Operators`, for genomes of another kind.
      population_size: P, which is mu and lambda.
      mutation_rate: chance of each gene to change; None: 1 / (2 num_genes), as in `nsga2`.
      crossover_rate: chance of a child to have two parents.
      num_retries: how often children that repeat a known genome are mutated again.
      archive_capacity: places in the archive; 0: none is kept.
      initial: genomes that begin the first population; the rest is sampled.
      track_hypervolume: False saves its O(P^(M-1)) per generation; NaN is reported then.

    Raises:
      ValueError: as of `nsga2`.
    """
    base = nsga2.nsga2(
        space,
        population_size=population_size,
        mutation_rate=mutation_rate,
        crossover_rate=crossover_rate,
        num_retries=num_retries,
        archive_capacity=archive_capacity,
        initial=initial,
    )

    def ask(key: jax.Array, state: SearchState) -> genomes.Genome:
        # In random order, a tournament by position prefers nobody.
        shuffle_key, ask_key = jax.random.split(key)
        order = jax.random.permutation(shuffle_key, population_size)
        children = base.ask(
            ask_key, state._replace(population=genomes.take(state.population, order))
        )
        return genomes.where(state.generation == 0, state.population, children)

    def survive(state: SearchState, pool: Pool) -> Survival:
        rank = pareto.non_dominated_rank(pool.ranked, pool.violation, num_needed=population_size)
        feasible = pool.usable & (pool.violation <= 0)
        # A stream of its own: no key reaches `tell`.
        key = jax.random.fold_in(jax.random.key(0), state.generation)
        shares = jax.random.exponential(key, (population_size, pool.objectives.shape[1]))
        weights = shares / jnp.sum(shares, axis=1, keepdims=True)
        scores = tchebycheff(pool.objectives, feasible, weights)
        best = jnp.zeros(rank.shape, bool).at[jnp.argmin(scores, axis=0)].set(True)
        chosen = jnp.where(best & feasible, 0, 1)
        return Survival(ordering.order(chosen, rank), rank)

    return Searcher(base.init, ask, elitist_tell(survive, track_hypervolume=track_hypervolume))


def tchebycheff(objectives: jax.Array, feasible: jax.Array, weights: jax.Array) -> jax.Array:
    """Augmented Tchebycheff scores [N, W] of the rows under each weight; lower is better.

    max_m w_m f_m + 0.05 sum_m w_m f_m, where f runs from 0 to 1 over the feasible rows of
    each objective; infinite for the other rows.

    Args:
      objectives: [N, M].
      feasible: bool [N], rows that may be chosen; they are finite.
      weights: [W, M], not negative.
    """
    low = jnp.min(jnp.where(feasible[:, None], objectives, jnp.inf), axis=0)
    span = jnp.max(jnp.where(feasible[:, None], objectives, -jnp.inf), axis=0) - low
    scaled = (objectives - low[None, :]) / jnp.where(span > 0, span, 1)[None, :]
    largest = total = jnp.zeros((objectives.shape[0], weights.shape[0]), objectives.dtype)
    for values, weight in zip(scaled.T, weights.T, strict=True):
        weighted = values[:, None] * weight[None, :]
        largest, total = jnp.maximum(largest, weighted), total + weighted
    return jnp.where(feasible[:, None], largest + _AUGMENTATION * total, jnp.inf)
