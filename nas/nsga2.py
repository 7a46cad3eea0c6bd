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
from nas import genomes, ordering, pareto
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
from nas.survival import Pool, Survival, elitist_tell

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
      mutation_rate: chance of each gene to change; None: 0.5 / num_genes, half of what is
        usual for numbers, because an integer that mutates never stays as it was.
      crossover_rate: chance of a child to have two parents.
      num_retries: how often children that repeat a known genome are mutated again.
      archive_capacity: places in the archive; 0: none is kept.
      initial: genomes that begin the first population; the rest is sampled.
      track_hypervolume: False saves its O(P^(M-1)) per generation; NaN is reported then.

    Raises:
      ValueError: a size or rate out of range, more initial genomes than places, or initial
        genomes that are not of the space.
    """
    if population_size < 2:
        raise ValueError(f"population_size must be at least 2, got {population_size}")
    if archive_capacity < 0 or num_retries < 0:
        raise ValueError("archive_capacity and num_retries must not be negative")
    if not isinstance(space, ArchSpace | genomes.Operators):
        raise ValueError(
            f"space is a {type(space).__name__}; expected an ArchSpace or Operators, for Genes "
            "and pytrees of them integer.integer_operators(space)"
        )
    operators = genomes.arch_operators(space) if isinstance(space, ArchSpace) else space
    rate = 0.5 / operators.num_genes if mutation_rate is None else mutation_rate
    if not (0.0 <= rate <= 1.0 and 0.0 <= crossover_rate <= 1.0):
        raise ValueError(
            f"mutation_rate ({rate}) and crossover_rate ({crossover_rate}) must be in [0, 1]"
        )
    odd = population_size % 2
    num_pairs = (population_size + odd) // 2
    num_initial = 0 if initial is None else jax.tree.leaves(initial)[0].shape[0]
    if num_initial > population_size:
        raise ValueError(
            f"{num_initial} initial genomes do not fit a population of {population_size}; "
            "raise population_size or give fewer"
        )
    if initial is not None and operators.check is not None and not _is_traced(initial):
        operators.check(initial)

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

    def ask(key: jax.Array, state: SearchState) -> genomes.Genome:
        """Children of the population; at first the population itself."""
        parent_key, pair_key, vary_key, retry_key = jax.random.split(key, 4)
        # Binary tournaments: the population stands best first, so the lower index wins.
        # Everybody enters as often, which drifts less than entrants drawn one by one.
        draws = jax.random.bits(parent_key, (2, population_size + odd))
        entrants = jnp.stack([ordering.shuffle(row) for row in draws])
        entrants = jnp.minimum(entrants, population_size - 1)
        mothers, fathers = jnp.min(entrants.reshape(2, 2, num_pairs), axis=1)
        # Every pair has two children, which share out the genes of both parents.
        first, second = (
            genomes.take(state.population, jnp.concatenate(both)[:population_size])
            for both in ((mothers, fathers), (fathers, mothers))
        )
        paired = jax.random.bernoulli(pair_key, crossover_rate, (num_pairs,))
        paired = jnp.concatenate([paired, paired])[:population_size]
        children = genomes.vary(vary_key, operators, first, second, paired, rate)
        children = genomes.replace_duplicates(
            retry_key, operators, children, state.population, rate=rate, num_retries=num_retries
        )
        return genomes.where(state.generation == 0, state.population, children)

    def survive(state: SearchState, pool: Pool) -> Survival:
        finite = jnp.all(jnp.isfinite(pool.objectives), axis=1)
        unfit = pool.repeated | ~finite
        ranked = jnp.where(unfit[:, None], jnp.nan, pool.objectives)
        rank, crowding = pareto.rank_and_crowding(
            ranked, pool.violation, num_needed=population_size
        )
        # Should unfit rows be needed, then duplicates before failures.
        level = jnp.where(finite, 0, 1)
        lonely_first = ordering.order(ordering.sort_key(-crowding))
        order = lonely_first[ordering.order_of_ranks((rank + level)[lonely_first])]
        return Survival(order, rank)

    return Searcher(init, ask, elitist_tell(survive, track_hypervolume=track_hypervolume))


def _is_traced(tree: genomes.Genome) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
