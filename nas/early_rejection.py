"""Early rejection: a searcher that has children judged by a surrogate before evaluation.

Any `Searcher` can be wrapped. `ask` lets it make several times more children than are
evaluated; a surrogate, fitted to what was told so far, predicts their error; their costs are
known anyway; and the promising ones, or those not clearly dominated, are evaluated. The
surrogate's order and intervals are compared with each told generation before it learns from
it; `mean_quality` of the state reports that, so that a useless surrogate is seen to be one.

The idea is that of pre-selection in surrogate-assisted evolution (Jin, "Surrogate-assisted
evolutionary computation", Swarm and Evolutionary Computation 2011). Shape letters: P
population, M objectives, C memory, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from nas import genomes, ordering, pareto
from nas.searcher import Searcher, SearchInfo, SearchState
from nas.surrogate import Params, Prediction, Surrogate
from nas.validation import Quality, assess

Rule = Literal["promising", "dominated"]

LEVELS = (0.5, 0.9)
"""Levels of the intervals whose coverage is reported."""


class RejectionMemory(NamedTuple):
    """The `memory` of a wrapped searcher's `SearchState`; the other fields stay the searcher's."""

    inner: Any  # what the wrapped searcher itself remembers
    genomes: genomes.Genome  # [C, ...] evaluated ones, a ring
    errors: jax.Array  # [C]; NaN in empty places and of failed evaluations
    num_told: jax.Array  # [] int32
    params: Params  # the surrogate fitted to the genomes and errors
    quality: Quality  # of the predictions for the last generation told; NaN at first
    quality_sum: Quality  # over all generations, where defined
    num_judged: Quality  # int32, over how many


def mean_quality(state: SearchState) -> Quality:
    """The surrogate's quality, averaged over the generations it was judged on; NaN if none.

    Every generation is judged by the fit to earlier ones alone, on the children that were
    evaluated; these are preselected and alike, so the order of all children is easier.
    """
    memory: RejectionMemory = state.memory
    return jax.tree.map(jnp.divide, memory.quality_sum, memory.num_judged)


def with_early_rejection(
    searcher: Searcher,
    surrogate: Surrogate,
    features: Callable[[genomes.Genome], jax.Array],
    costs: Callable[[genomes.Genome], jax.Array],
    *,
    factor: int = 4,
    capacity: int = 256,
    rule: Rule = "promising",
    margin: float = 0.0,
    min_points: int | None = None,
    min_correlation: float = -1.0,
    violation: Callable[[genomes.Genome], jax.Array] | None = None,
) -> Searcher:
    """The searcher, with its children preselected by a surrogate; itself a `Searcher`.

    The error is objective 0. Rules, among the `factor` P children:
      "promising": the P that stand best in a non-dominated sort, with crowding, of
        (predicted error - margin * spread, costs) together with the population.
      "dominated": the first P in the order asked that no feasible member of the population
        dominates even at predicted error - margin * spread; then, if they are too few, the
        rest by rule "promising".
    Children that repeat the memory or an earlier child come last under both. Nothing is
    rejected before `min_points` are told, or while the last judged rank correlation
    (Kendall) is below `min_correlation`: the wrapped searcher's own children are evaluated.

    Cost per generation: `factor` calls of the searcher's `ask`, and one fit to C points.

    Args:
      searcher: for instance from `nas.nsga2.nsga2`.
      surrogate: of the error, for instance from `nas.surrogate.polynomial`.
      features: one genome -> [D]; a traceable function.
      costs: one genome -> [M - 1], exactly the objectives after the error.
      factor: children made for each one evaluated; 1 evaluates all.
      capacity: C, evaluated genomes remembered, at least P; the oldest go first.
      rule: one of `Rule`.
      margin: spreads below the predicted error at which a child is judged; not negative.
      min_points: None: one population.
      min_correlation: from -1 (never mind) to 1.
      violation: one genome -> [], positive where a constraint known in advance is broken;
        children are then ranked by constraint-domination.

    Raises:
      ValueError: an unknown rule, or a number out of range; from `init`, a memory smaller
        than the population; from `ask`, costs that do not fit the objectives.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"unknown rule {rule!r}; expected one of {', '.join(get_args(Rule))}")
    if factor < 1 or capacity < 1 or margin < 0 or not -1 <= min_correlation <= 1:
        raise ValueError(
            f"factor ({factor}) and capacity ({capacity}) must be at least 1, margin ({margin}) "
            f"not negative, and min_correlation ({min_correlation}) from -1 to 1"
        )

    def fit(memory: genomes.Genome, errors: jax.Array) -> Params:
        return surrogate.fit(jax.vmap(features)(memory), errors)

    def predict(params: Params, population: genomes.Genome) -> Prediction:
        return surrogate.predict(params, jax.vmap(features)(population))

    def unwrap(state: SearchState) -> SearchState:
        return state._replace(memory=state.memory.inner)

    def init(
        key: jax.Array, num_objectives: int, reference: jax.Array | None = None
    ) -> SearchState:
        inner = searcher.init(key, num_objectives, reference)
        population_size = _size(inner.population)
        if capacity < population_size:
            raise ValueError(
                f"the memory holds {capacity} genomes; expected at least a population of "
                f"{population_size}: raise capacity"
            )
        filler = genomes.take(inner.population, jnp.zeros((capacity,), jnp.int32))
        errors = jnp.full((capacity,), jnp.nan, jnp.zeros(()).dtype)
        params = fit(filler, errors)
        nothing = assess(predict(params, filler), errors, LEVELS)
        memory = RejectionMemory(
            inner=inner.memory,
            genomes=filler,
            errors=errors,
            num_told=jnp.zeros((), jnp.int32),
            params=params,
            quality=jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), nothing),
            quality_sum=jax.tree.map(jnp.zeros_like, nothing),
            num_judged=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.int32), nothing),
        )
        return inner._replace(memory=memory)

    def ask(key: jax.Array, state: SearchState) -> genomes.Genome:
        """The children to evaluate, in the order the wrapped searcher made them."""
        memory: RejectionMemory = state.memory
        made = jax.vmap(searcher.ask, (0, None))(jax.random.split(key, factor), unwrap(state))
        size = jax.tree.leaves(made)[0].shape[1]
        made = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), made)
        # The filler of empty places is not evaluated yet, so it repeats nothing.
        real = jnp.arange(capacity + _size(made), dtype=jnp.int32)
        real = (real < memory.num_told) | (real >= capacity)
        everyone = genomes.concatenate(memory.genomes, made)
        repeated = genomes.duplicates((everyone, real.astype(jnp.int32)))[capacity:]
        order = ordering.order(repeated.astype(jnp.int32), *judge(state, made, size))
        ready = memory.num_told >= (size if min_points is None else min_points)
        ready &= ~(memory.quality.kendall_tau < min_correlation)  # a NaN does not stop it
        rows = jnp.arange(size, dtype=jnp.int32)
        return genomes.take(made, jnp.where(ready, jnp.sort(order[:size]), rows))

    def judge(state: SearchState, made: genomes.Genome, size: int) -> tuple[jax.Array, jax.Array]:
        """Whether each child is rejected, 0 or 1, and its place in the order of preference."""
        prediction = predict(state.memory.params, made)
        # An infinite spread says that nothing is known: hoping for anything would accept all.
        slack = jnp.where(jnp.isfinite(prediction.spread), margin * prediction.spread, 0)
        hopeful = prediction.mean - slack
        known = jax.vmap(costs)(made)
        num_known = state.objectives.shape[1] - 1
        if known.shape[1:] != (num_known,):
            raise ValueError(
                f"costs returned shape {known.shape[1:]} for a genome; expected ({num_known},), "
                "the objectives after the error"
            )
        dtype = state.objectives.dtype
        expected = jnp.concatenate([hopeful[:, None], known], axis=1, dtype=dtype)
        excess = jnp.zeros(hopeful.shape) if violation is None else jax.vmap(violation)(made)
        values = jnp.concatenate([state.objectives, expected])
        excess = jnp.concatenate([state.violation, excess.astype(state.violation.dtype)])
        num_parents = state.violation.size
        rank, crowding = pareto.rank_and_crowding(values, excess, num_needed=num_parents + size)
        order = ordering.order(rank, ordering.sort_key(-crowding))
        place = ordering.inverse(order)[num_parents:]
        if rule == "promising":
            return jnp.zeros_like(place), place
        feasible = jnp.where(state.violation[:, None] <= 0, state.objectives, jnp.nan)
        rejected = jnp.any(pareto.dominates(feasible, expected), axis=0)
        rejected |= excess[num_parents:] > 0
        rows = jnp.arange(place.size, dtype=jnp.int32)
        return rejected.astype(jnp.int32), jnp.where(rejected, place, rows)

    def tell(
        state: SearchState,
        told: genomes.Genome,
        objectives: jax.Array,
        violation: jax.Array | None = None,
    ) -> tuple[SearchState, SearchInfo]:
        """The wrapped searcher's `tell`; then the surrogate is judged, and learns."""
        memory: RejectionMemory = state.memory
        inner, info = searcher.tell(unwrap(state), told, objectives, violation)
        errors = objectives[:, 0].astype(memory.errors.dtype)
        errors = jnp.where(jnp.isfinite(errors), errors, jnp.nan)
        quality = assess(predict(memory.params, told), errors, LEVELS)
        defined = jax.tree.map(lambda leaf: ~jnp.isnan(leaf), quality)
        place = (memory.num_told + jnp.arange(errors.size, dtype=jnp.int32)) % capacity
        known = jax.tree.map(lambda old, new: old.at[place].set(new), memory.genomes, told)
        known_errors = memory.errors.at[place].set(errors)
        gained = jax.tree.map(lambda new, flag: jnp.where(flag, new, 0), quality, defined)
        memory = RejectionMemory(
            inner=inner.memory,
            genomes=known,
            errors=known_errors,
            num_told=memory.num_told + errors.size,
            params=fit(known, known_errors),
            quality=quality,
            quality_sum=jax.tree.map(jnp.add, memory.quality_sum, gained),
            num_judged=jax.tree.map(jnp.add, memory.num_judged, defined),
        )
        return inner._replace(memory=memory), info

    return Searcher(init, ask, tell)


def _size(population: genomes.Genome) -> int:
    return jax.tree.leaves(population)[0].shape[0]
