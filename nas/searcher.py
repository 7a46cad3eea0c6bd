"""What a search algorithm is, and the loops that run one: a whole search in one program.

A `Searcher` is a record of three pure functions. Call `ask` and `tell` yourself when fitness
comes from outside jit, or give `search` a traceable `evaluate`. Shape letters: P population,
M objectives, G generations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nas import archive as archives
from nas import genomes, stopping

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
    memory: Any = ()  # a pytree of arrays: what this searcher alone remembers


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


class History(NamedTuple):
    """What a search went through; NaN after it stopped."""

    hypervolume: jax.Array  # [G] of the feasible population
    archive_hypervolume: jax.Array  # [G] as measured by `track`
    num_generations: jax.Array  # [] int32, those that were run


class SearchResult(NamedTuple):
    """The outcome of a search of at most G generations."""

    population: genomes.Genome  # [P, ...], best first
    objectives: jax.Array  # [P, M]
    violation: jax.Array  # [P]
    hypervolume: jax.Array  # [G], of the feasible population; NaN after a stop
    archive: archives.Archive
    state: SearchState  # to go on from, with `run`
    archive_hypervolume: jax.Array  # [G]; NaN after a stop, or when not tracked
    num_generations: jax.Array  # [] int32, those that were run


def init_state(
    key: jax.Array, searcher: Searcher, evaluate: Evaluate, *, reference: jax.Array | None = None
) -> SearchState:
    """The state before the first generation; `evaluate` is only asked for its shapes.

    Takes the same `key` as `run`, which folds in other numbers.

    Raises:
      ValueError: `evaluate` does not return objectives [P, M] and violation [P].
    """
    shapes = jax.eval_shape(lambda k: searcher.init(k, 1).population, key)
    objectives, violation = jax.eval_shape(lambda genome: _split(evaluate(genome)), shapes)
    num_rows = jax.tree.leaves(shapes)[0].shape[0]
    whole = len(objectives.shape) == 2 and objectives.shape[0] == num_rows
    if not whole or violation.shape != (num_rows,):
        raise ValueError(
            f"evaluate returned objectives of shape {objectives.shape} and violation of shape "
            f"{violation.shape} for {num_rows} genomes; expected [P, M] (one objective: "
            "[P, 1]) and [P]"
        )
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
        return _generation(key, state, searcher, evaluate)

    return jax.lax.scan(generation, state, None, length=num_generations)


def run_until(
    key: jax.Array,
    state: SearchState,
    searcher: Searcher,
    evaluate: Evaluate,
    *,
    num_generations: int,
    stop: stopping.StoppingRule = stopping.NEVER,
    track: stopping.Measure | None = None,
    stop_state: stopping.StopState | None = None,
) -> tuple[SearchState, History, stopping.StopState]:
    """Like `run`, but measures the archive after each generation and may stop early.

    One while loop, so a stop saves the time of the generations that are left (under `vmap`,
    once the last of the searches has stopped). The generations are those of `run`.

    Args:
      key: that of the whole search, as in `run`.
      state: from `init_state`, or of an earlier segment.
      searcher: for instance from `nsga2`; it must keep an archive.
      evaluate: traceable.
      num_generations: G, at most so many.
      stop: the rule.
      track: how to measure the archive; None: `stopping.exact()`, O(A^3) in 4 objectives.
      stop_state: what an earlier segment returned; None: this is the first.

    Raises:
      ValueError: a searcher without an archive.
    """
    if state.archive.valid.shape[0] == 0:
        raise ValueError(
            "this searcher keeps no archive to measure; give it an archive_capacity above 0, "
            "or leave `stop` and `track` out"
        )
    measure = stopping.exact() if track is None else track
    blank = jnp.full((num_generations,), jnp.nan, state.objectives.dtype)
    history = History(blank, blank, jnp.zeros((), jnp.int32))
    Carry = tuple[SearchState, History, stopping.StopState]

    def proceed(carry: Carry) -> jax.Array:
        _, history, watch = carry
        return (history.num_generations < num_generations) & ~watch.stopped

    def generation(carry: Carry) -> Carry:
        state, history, watch = carry
        state, volume = _generation(key, state, searcher, evaluate)
        archived = measure(state.archive.objectives, state.reference)
        row = history.num_generations
        history = History(
            history.hypervolume.at[row].set(volume),
            history.archive_hypervolume.at[row].set(archived),
            row + 1,
        )
        return state, history, stopping.update(stop, watch, archived)

    start = stopping.init() if stop_state is None else stop_state
    return jax.lax.while_loop(proceed, generation, (state, history, start))


def search(
    key: jax.Array,
    searcher: Searcher,
    evaluate: Evaluate,
    *,
    num_generations: int,
    reference: jax.Array | None = None,
    stop: stopping.StoppingRule | None = None,
    track: stopping.Measure | None = None,
) -> SearchResult:
    """A whole search in one program; jit a function that closes over all but the key.

    Args:
      key: consumed.
      searcher: for instance from `nsga2`.
      evaluate: traceable; genomes [P] -> objectives [P, M], all minimised, or (objectives,
        violation [P]), positive where a constraint is broken.
      num_generations: G, populations evaluated, the first one included; with `stop`, the
        most that are.
      reference: [M] of the hypervolume; None: the worst values of the first population.
      stop: ends the search when its archive has ceased to grow; None: never.
      track: how to measure the archive after each generation; None: not at all, or by
        `stopping.exact()` when there is a `stop`.

    Raises:
      ValueError: as of `init_state`, and of `run_until` when `stop` or `track` is given.
    """
    state = init_state(key, searcher, evaluate, reference=reference)
    if stop is None and track is None:
        state, volumes = run(key, state, searcher, evaluate, num_generations=num_generations)
        untracked = jnp.full_like(volumes, jnp.nan)
        history = History(volumes, untracked, jnp.asarray(num_generations, jnp.int32))
    else:
        state, history, _ = run_until(
            key,
            state,
            searcher,
            evaluate,
            num_generations=num_generations,
            stop=stopping.NEVER if stop is None else stop,
            track=track,
        )
    return SearchResult(
        population=state.population,
        objectives=state.objectives,
        violation=state.violation,
        hypervolume=history.hypervolume,
        archive=state.archive,
        state=state,
        archive_hypervolume=history.archive_hypervolume,
        num_generations=history.num_generations,
    )


def _generation(
    key: jax.Array, state: SearchState, searcher: Searcher, evaluate: Evaluate
) -> tuple[SearchState, jax.Array]:
    """One generation: the new state and the hypervolume of its population."""
    children = searcher.ask(jax.random.fold_in(key, state.generation + 1), state)
    state, info = searcher.tell(state, children, *_split(evaluate(children)))
    return state, info.hypervolume


def _split(result: Evaluation) -> tuple[jax.Array, jax.Array]:
    """Objectives and violation of either kind of evaluation."""
    if isinstance(result, tuple):
        return result
    return result, jnp.zeros(result.shape[:1], result.dtype)
