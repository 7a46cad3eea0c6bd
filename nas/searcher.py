"""What a search algorithm is, and the loop that runs one: a whole search in one `lax.scan`.

A `Searcher` is a record of three pure functions. Call `ask` and `tell` yourself when fitness
comes from outside jit, or give `search` a traceable `evaluate`. Shape letters: P population,
M objectives, G generations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nas import archive as archives
from nas import genomes

Evaluation = jax.Array | tuple[jax.Array, jax.Array]
"""Objectives [P, M], or (objectives, violation [P], positive where infeasible)."""
Evaluate = Callable[[genomes.Genome], Evaluation]


class SearchState(NamedTuple):
    """All that the next generation depends on, so all that a checkpoint needs."""

    population: genomes.Genome  # [P, ...], best first
    objectives: jax.Array  # [P, M]; NaN before the first `tell`
    violation: jax.Array  # [P]
    generation: jax.Array  # [] int32, populations told so far
    reference: jax.Array  # [M] of the hypervolume; NaN: to be set by the first `tell`
    archive: archives.Archive


class SearchInfo(NamedTuple):
    """Diagnostics of one generation."""

    rank: jax.Array  # [P] int32; duplicates and rows with NaN rank last
    num_feasible: jax.Array  # [] int32
    hypervolume: jax.Array  # [] of the feasible population; NaN when it is not tracked


class Searcher(NamedTuple):
    """A search algorithm as a record of pure functions; close over it, do not pass it to jit.

    init: (key, num_objectives, reference=None) -> SearchState
    ask: (key, SearchState) -> genomes [P] to evaluate
    tell: (SearchState, genomes, objectives, violation=None) -> (SearchState, SearchInfo)
    """

    init: Callable[..., SearchState]
    ask: Callable[[jax.Array, SearchState], genomes.Genome]
    tell: Callable[..., tuple[SearchState, SearchInfo]]


class SearchResult(NamedTuple):
    """The outcome of a search of G generations."""

    population: genomes.Genome  # [P, ...], best first
    objectives: jax.Array  # [P, M]
    violation: jax.Array  # [P]
    hypervolume: jax.Array  # [G], of the feasible population after each generation
    archive: archives.Archive
    state: SearchState  # to go on from, with `run`


def init_state(
    key: jax.Array, searcher: Searcher, evaluate: Evaluate, *, reference: jax.Array | None = None
) -> SearchState:
    """The state before the first generation; `evaluate` is only asked for its shapes.

    Takes the same `key` as `run`, which folds in other numbers.
    """
    shapes = jax.eval_shape(lambda k: searcher.init(k, 1).population, key)
    objectives, _ = jax.eval_shape(lambda genome: _split(evaluate(genome)), shapes)
    return searcher.init(jax.random.fold_in(key, 0), objectives.shape[1], reference)


def run(
    key: jax.Array,
    state: SearchState,
    searcher: Searcher,
    evaluate: Evaluate,
    *,
    num_generations: int,
) -> tuple[SearchState, jax.Array]:
    """Further generations in one scan: the new state and the hypervolume of each [G].

    Generation g draws from fold_in(key, g + 1) and g stands in the state, so a search run
    in segments, all with one key, is the same search; checkpoint the state in between.
    """

    def generation(state: SearchState, _: None) -> tuple[SearchState, jax.Array]:
        children = searcher.ask(jax.random.fold_in(key, state.generation + 1), state)
        state, info = searcher.tell(state, children, *_split(evaluate(children)))
        return state, info.hypervolume

    return jax.lax.scan(generation, state, None, length=num_generations)


def search(
    key: jax.Array,
    searcher: Searcher,
    evaluate: Evaluate,
    *,
    num_generations: int,
    reference: jax.Array | None = None,
) -> SearchResult:
    """A whole search in one scan; jit a function that closes over all but the key.

    Args:
      key: consumed.
      searcher: for instance from `nsga2`.
      evaluate: traceable; genomes [P] -> objectives [P, M], all minimised, or (objectives,
        violation [P]), positive where a constraint is broken.
      num_generations: G, populations evaluated, the first one included.
      reference: [M] of the hypervolume; None: the worst values of the first population.
    """
    state = init_state(key, searcher, evaluate, reference=reference)
    state, volumes = run(key, state, searcher, evaluate, num_generations=num_generations)
    return SearchResult(
        state.population, state.objectives, state.violation, volumes, state.archive, state
    )


def _split(result: Evaluation) -> tuple[jax.Array, jax.Array]:
    """Objectives and violation of either kind of evaluation."""
    if isinstance(result, tuple):
        return result
    return result, jnp.zeros((result.shape[0],), result.dtype)
