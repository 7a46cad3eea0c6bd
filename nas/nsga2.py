"""NSGA-II over integer genomes.

Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", IEEE TEC 2002,
with its constraint-domination. Added here: equal genomes are ranked last and children that
repeat one are mutated again, since integer spaces are full of repetitions; and an archive
of all non-dominated feasible solutions. Shape letters: P population, M objectives.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nas import archive as archives
from nas import genomes, pareto
from nas.arch import ArchSpace
from nas.searcher import (
    Evaluate,
    Evaluation,
    Searcher,
    SearchInfo,
    SearchResult,
    SearchState,
    init_state,
    run,
    search,
)

__all__ = [
    "Evaluate",
    "Evaluation",
    "SearchInfo",
    "SearchResult",
    "SearchState",
    "Searcher",
    "init_state",
    "nsga2",
    "run",
    "search",
]


def nsga2(
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
    """NSGA-II as a `Searcher`.

    Args:
      space: where to search; or `Operators`, for genomes of another kind.
      population_size: P.
      mutation_rate: chance of each gene to change; None: 1 / num_genes.
      crossover_rate: chance of a child to have two parents.
      num_retries: how often children that repeat a known genome are mutated again.
      archive_capacity: places in the archive; 0: none is kept.
      initial: genomes that begin the first population; the rest is sampled.
      track_hypervolume: False saves its O(P^(M-1)) per generation; NaN is reported then.

    Raises:
      ValueError: a size or rate out of range, or more initial genomes than places.
    """
    if population_size < 2:
        raise ValueError(f"population_size must be at least 2, got {population_size}")
    if archive_capacity < 0 or num_retries < 0:
        raise ValueError("archive_capacity and num_retries must not be negative")
    operators = genomes.arch_operators(space) if isinstance(space, ArchSpace) else space
    rate = 1.0 / operators.num_genes if mutation_rate is None else mutation_rate
    if not (0.0 <= rate <= 1.0 and 0.0 <= crossover_rate <= 1.0):
        raise ValueError(
            f"mutation_rate ({rate}) and crossover_rate ({crossover_rate}) must be in [0, 1]"
        )
    num_initial = 0 if initial is None else jax.tree.leaves(initial)[0].shape[0]
    if num_initial > population_size:
        raise ValueError(
            f"{num_initial} initial genomes do not fit a population of {population_size}; "
            "raise population_size or give fewer"
        )

    def init(
        key: jax.Array, num_objectives: int, reference: jax.Array | None = None
    ) -> SearchState:
        population = operators.sample(key, population_size)
        if initial is not None:
            sampled = jax.tree.map(lambda leaf: leaf[num_initial:], population)
            population = genomes.concatenate(initial, sampled)
        dtype = jnp.zeros(()).dtype  # explicit, or the state would change its weak type
        unset = jnp.full((num_objectives,), jnp.nan, dtype)
        return SearchState(
            population=population,
            objectives=jnp.full((population_size, num_objectives), jnp.nan, dtype),
            violation=jnp.full((population_size,), jnp.nan, dtype),
            generation=jnp.zeros((), jnp.int32),
            reference=unset if reference is None else jnp.asarray(reference, dtype),
            archive=archives.empty(population, archive_capacity, num_objectives),
        )

    def vary(key: jax.Array, population: genomes.Genome) -> genomes.Genome:
        keys = jax.random.split(key, population_size)
        return jax.vmap(lambda k, genome: operators.mutate(k, genome, rate))(keys, population)

    def ask(key: jax.Array, state: SearchState) -> genomes.Genome:
        """Children of the population; at first the population itself."""
        parent_key, cross_key, pair_key, mutate_key = jax.random.split(key, 4)
        # Binary tournaments: the population stands best first, so the lower index wins.
        entrants = jax.random.randint(parent_key, (2, 2, population_size), 0, population_size)
        winners = jnp.min(entrants, axis=0)
        first, second = (genomes.take(state.population, index) for index in winners)
        keys = jax.random.split(cross_key, population_size)
        crossed = jax.vmap(operators.crossover)(keys, first, second)
        paired = jax.random.bernoulli(pair_key, crossover_rate, (population_size,))
        children = genomes.where(paired, crossed, first)

        def attempt(number: jax.Array, children: genomes.Genome) -> genomes.Genome:
            """Mutates every child at first, then those that repeat a known genome."""
            known = genomes.concatenate(state.population, children)
            again = genomes.duplicates(known)[population_size:] | (number == 0)
            varied = vary(jax.random.fold_in(mutate_key, number), children)
            return genomes.where(again, varied, children)

        children = jax.lax.fori_loop(0, 1 + num_retries, attempt, children)
        return genomes.where(state.generation == 0, state.population, children)

    def tell(
        state: SearchState,
        told: genomes.Genome,
        objectives: jax.Array,
        violation: jax.Array | None = None,
    ) -> tuple[SearchState, SearchInfo]:
        """The best of the population and the evaluated genomes survive."""
        objectives = objectives.astype(state.objectives.dtype)
        if violation is None:
            violation = jnp.zeros((population_size,))
        violation = violation.astype(state.violation.dtype)
        # At first the state is not evaluated yet: let the told ones stand in for it.
        starting = state.generation == 0
        merged = genomes.concatenate(genomes.where(starting, told, state.population), told)
        values = jnp.concatenate([jnp.where(starting, objectives, state.objectives), objectives])
        excess = jnp.concatenate([jnp.where(starting, violation, state.violation), violation])

        repeated = genomes.duplicates(merged)
        ranked = jnp.where(repeated[:, None], jnp.nan, values)
        rank = pareto.non_dominated_rank(ranked, excess, num_needed=population_size)
        crowding = pareto.crowding_distance(ranked, rank)
        rows = jnp.arange(2 * population_size, dtype=jnp.int32)
        order = jax.lax.sort((rank, pareto.sort_key(-crowding), rows), num_keys=3)[2]
        best = order[:population_size]

        worst = jnp.max(jnp.where(jnp.isfinite(objectives), objectives, -jnp.inf), axis=0)
        worst = jnp.where(jnp.isfinite(worst), worst, jnp.nan)
        new_state = SearchState(
            population=genomes.take(merged, best),
            objectives=values[best],
            violation=excess[best],
            generation=state.generation + 1,
            reference=jnp.where(jnp.isnan(state.reference), worst, state.reference),
            archive=archives.insert(state.archive, told, objectives, violation),
        )
        feasible = new_state.violation <= 0
        volume = jnp.asarray(jnp.nan, values.dtype)
        if track_hypervolume:
            points = jnp.where(feasible[:, None], new_state.objectives, jnp.nan)
            volume = pareto.hypervolume(points, new_state.reference)
        return new_state, SearchInfo(rank[best], jnp.sum(feasible, dtype=jnp.int32), volume)

    return Searcher(init, ask, tell)
