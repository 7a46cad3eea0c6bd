"""NSGA-III over integer genomes: for four objectives or more, where crowding loses its sense.

Deb and Jain, "An Evolutionary Many-Objective Optimization Algorithm Using Reference-Point-
Based Nondominated Sorting Approach, Part I", IEEE TEC 2014; constraints as in Part II (Jain
and Deb, 2014). Only the survival differs from `nas.nsga2`, which lends the rest: variation,
duplicates and archive. Shape letters: P population, N = 2 P pool, M objectives, R directions.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nas import genomes, nsga2, ordering, pareto
from nas.arch import ArchSpace
from nas.searcher import Searcher, SearchState
from nas.survival import Pool, Survival, elitist_tell

_OFF_AXIS = 1e6  # inverse of the weight that finds the extreme point of an axis (1e-6)
_SMALLEST_INTERCEPT = 1e-3  # of the front's range; below it the hyperplane is taken to fail


class Memory(NamedTuple):
    """What normalisation remembers of feasible solutions; infinite until there are any."""

    ideal: jax.Array  # [M], the best value of each objective so far
    extremes: jax.Array  # [M, M], row j the point nearest to axis j so far


def reference_directions(num_objectives: int, divisions: int | tuple[int, int]) -> np.ndarray:
    """Directions spread evenly over the simplex (Das and Dennis 1998): float64 [R, M].

    Static NumPy. Rows are not negative and sum to 1. One layer with p divisions of each axis
    holds C(p + M - 1, M - 1) directions. Two layers, (outer, inner), are that of `outer` and
    that of `inner` shrunk half-way to the centre: with p < M a single layer has no direction
    inside the simplex (Deb and Jain 2014, section IV-B).

    Raises:
      ValueError: fewer than two objectives, or divisions below 1.
    """
    layers = divisions if isinstance(divisions, tuple) else (divisions,)
    if num_objectives < 2:
        raise ValueError(f"reference directions need 2 objectives or more, got {num_objectives}")
    if not 1 <= len(layers) <= 2 or min(layers) < 1:
        raise ValueError(
            f"divisions must be a positive integer or a pair of them, got {divisions!r}"
        )
    spread = [_lattice(num_objectives, number) for number in layers]
    if len(spread) == 2:
        spread[1] = 0.5 * spread[1] + 0.5 / num_objectives
    return np.unique(np.concatenate(spread).round(12), axis=0)


def most_divisions(num_objectives: int, population_size: int) -> int:
    """The largest single layer whose directions are no more than the population.

    Raises:
      ValueError: fewer than two objectives, or a population smaller than their number.
    """
    if not 2 <= num_objectives <= population_size:
        raise ValueError(
            f"no reference directions for {num_objectives} objectives and a population of "
            f"{population_size}; expected at least 2 objectives, and a population at least as "
            "large as their number"
        )
    divisions = 1
    while math.comb(divisions + num_objectives, num_objectives - 1) <= population_size:
        divisions += 1
    return divisions


def nsga3(
    space: ArchSpace | genomes.Operators,
    *,
    population_size: int,
    num_objectives: int,
    divisions: int | tuple[int, int] | None = None,
    mutation_rate: float | None = None,
    crossover_rate: float = 0.9,
    num_retries: int = 1,
    archive_capacity: int = 256,
    initial: genomes.Genome | None = None,
    track_hypervolume: bool = True,
) -> Searcher:
    """NSGA-III as a `Searcher`, to be used like `nas.nsga2.nsga2`.

    Differences from the paper: equal genomes and rows that are not finite rank last; all
    members of a niche are taken nearest first, not the first alone; ties between niches are
    broken by a stream that the generation's number fixes, since `tell` has no key; parents
    are chosen by tournaments that prefer better fronts and, within one, members of less
    crowded niches (in the manner of U-NSGA-III, Seada and Deb, IEEE TEC 2016), not at random.

    Args:
      space: where to search; or `Operators`, for genomes of another kind.
      population_size: P, at least the number of directions.
      num_objectives: M, at least 2; the directions depend on it.
      divisions: of `reference_directions`; None: the most of one layer that P allows.
      mutation_rate: as of `nsga2`, like all that follow.
      crossover_rate: chance of a child to have two parents.
      num_retries: how often children that repeat a known genome are mutated again.
      archive_capacity: places in the archive; 0: none is kept.
      initial: genomes that begin the first population; the rest is sampled.
      track_hypervolume: False saves its O(P^(M-1)) per generation; NaN is reported then.

    Raises:
      ValueError: as of `nsga2` and `reference_directions`; or more directions than members.
        `tell` raises it too, when M is not `num_objectives`.
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
    if divisions is None:
        divisions = most_divisions(num_objectives, population_size)
    directions = reference_directions(num_objectives, divisions)
    if len(directions) > population_size:
        raise ValueError(
            f"{len(directions)} reference directions need a population of as many, got "
            f"population_size {population_size}; raise it or give fewer divisions than {divisions}"
        )
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)

    def init(key: jax.Array, objectives: int, reference: jax.Array | None = None) -> SearchState:
        state = base.init(key, objectives, reference)
        unknown = jnp.full((num_objectives,), jnp.inf, state.objectives.dtype)
        extremes = jnp.full((num_objectives, num_objectives), jnp.inf, state.objectives.dtype)
        return state._replace(memory=Memory(unknown, extremes))

    def survive(state: SearchState, pool: Pool) -> Survival:
        if pool.objectives.shape[1] != num_objectives:
            raise ValueError(
                f"nsga3 was made for {num_objectives} objectives but was told "
                f"{pool.objectives.shape[1]}; set num_objectives to what evaluate returns"
            )
        rank = pareto.non_dominated_rank(pool.ranked, pool.violation, num_needed=population_size)
        feasible = pool.usable & (pool.violation <= 0)
        scaled, memory = normalise(state.memory, pool.objectives, rank, feasible)
        niche, distance = associate(scaled, jnp.asarray(unit, scaled.dtype))
        # A stream of its own: no key reaches `tell`, and genomes do not decide.
        draws = jax.random.bits(jax.random.fold_in(jax.random.key(0), state.generation), rank.shape)
        level = niche_level(niche, rank, distance)
        return Survival(ordering.order(rank, level, draws), rank, memory)

    return Searcher(init, base.ask, elitist_tell(survive, track_hypervolume=track_hypervolume))


def normalise(
    memory: Memory, objectives: jax.Array, rank: jax.Array, feasible: jax.Array
) -> tuple[jax.Array, Memory]:
    """Objectives [N, M] between the ideal point and the intercepts of the extreme points.

    Intercepts are those of the hyperplane through the M extreme points with the axes. Where
    it is degenerate, or cuts an axis at no useful place, the nadir of the first front takes
    its place (Blank, Deb and Roy, "Investigating the Normalization Procedure of NSGA-III",
    EMO 2019); an intercept beyond the worst feasible value is cut back to it. Unlike the
    paper's, extreme points are sought after scaling by the range of the first front, so that
    units do not matter.

    Args:
      memory: of the generations before.
      objectives: [N, M]; rows that are not finite come out as 0.
      rank: int32 [N], 0 for the first front.
      feasible: bool [N]; only such rows inform the normalisation.
    """
    first = feasible & (rank == 0)
    ideal = jnp.minimum(memory.ideal, _lowest(objectives, first))
    origin = jnp.where(jnp.isfinite(ideal), ideal, 0)
    span = _positive(-_lowest(-objectives, first) - origin, 1)

    candidates = jnp.concatenate([objectives, memory.extremes])
    eligible = jnp.concatenate([first, jnp.all(jnp.isfinite(memory.extremes), axis=1)])
    shifted = (candidates - origin[None, :]) / span[None, :]
    weights = jnp.where(jnp.eye(origin.size, dtype=bool), 1.0, _OFF_AXIS)
    achievement = jnp.max(shifted[:, None, :] * weights[None, :, :], axis=2)  # [N + M, M]
    nearest = jnp.argmin(jnp.where(eligible[:, None], achievement, jnp.inf), axis=0)
    extremes = jnp.where(jnp.any(eligible), candidates[nearest], jnp.inf)

    met = jnp.concatenate([feasible, eligible[feasible.size :]])
    worst = _positive((-_lowest(-candidates, met) - origin) / span, 1)
    intercepts = _intercepts((extremes - origin[None, :]) / span[None, :])
    scale = span * jnp.minimum(intercepts, worst)
    scaled = (objectives - origin[None, :]) / scale[None, :]
    finite = jnp.all(jnp.isfinite(scaled), axis=1, keepdims=True)
    return jnp.where(finite, scaled, 0), Memory(ideal, extremes)


def associate(scaled: jax.Array, directions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest direction of each row: its index, int32 [N], and the distance to it [N].

    Distance is perpendicular to the ray. Among rays from the origin the nearest one is that
    of the largest projection, which costs no cancellation.

    Args:
      scaled: normalised objectives [N, M].
      directions: [R, M], each of length 1.
    """
    along = jnp.matmul(scaled, directions.T, precision=jax.lax.Precision.HIGHEST)
    niche = jnp.argmax(along, axis=1).astype(jnp.int32)
    foot = jnp.max(along, axis=1)[:, None] * directions[niche]
    return niche, jnp.sqrt(jnp.sum(jnp.square(scaled - foot), axis=1))


def niche_level(niche: jax.Array, rank: jax.Array, distance: jax.Array) -> jax.Array:
    """How many members of its niche come before each row: int32 [N].

    Members of better fronts come first, then those nearer to the direction. The paper fills
    the next population by taking, again and again, a member of the niche with the lowest
    count; as a count rises by one with each choice, the rows of the last front are taken
    exactly in the order of these levels, and no loop is needed.

    Args:
      niche: int32 [N], from `associate`.
      rank: int32 [N], fronts.
      distance: [N], from `associate`.
    """
    order = ordering.order(niche, rank, ordering.sort_key(distance))
    ordered, row = niche[order], jnp.arange(niche.size, dtype=jnp.int32)
    begins = jnp.concatenate([jnp.ones((1,), bool), ordered[1:] != ordered[:-1]])
    start = jax.lax.cummax(jnp.where(begins, row, 0))
    return jnp.zeros(niche.shape, jnp.int32).at[order].set(row - start)


def _intercepts(extremes: jax.Array) -> jax.Array:
    """Where the hyperplane through the rows [M, M] cuts the axes [M]; 1 where it fails."""
    usable = jnp.all(jnp.isfinite(extremes))
    points = jnp.where(usable, extremes, jnp.eye(extremes.shape[0]))
    normal = jnp.linalg.solve(points, jnp.ones((points.shape[0], 1)))[:, 0]
    intercepts = 1 / normal
    residual = jnp.abs(jnp.sum(points * normal[None, :], axis=1) - 1)
    sound = jnp.all(jnp.isfinite(intercepts) & (intercepts > _SMALLEST_INTERCEPT))
    return jnp.where(sound & jnp.all(residual < 1e-3), intercepts, 1)


def _lowest(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The least of the masked rows, by column [M]; infinite without any."""
    return jnp.min(jnp.where(mask[:, None], values, jnp.inf), axis=0)


def _positive(values: jax.Array, default: float) -> jax.Array:
    """The values that are positive and finite, else `default`."""
    return jnp.where(jnp.isfinite(values) & (values > 0), values, default)


def _lattice(num_objectives: int, divisions: int) -> np.ndarray:
    """All vectors of M multiples of 1 / divisions that sum to 1, by stars and bars."""
    places = divisions + num_objectives - 1
    bars = np.array(list(itertools.combinations(range(places), num_objectives - 1)))
    edges = np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), places)
    return (np.diff(np.hstack(edges), axis=1) - 1) / divisions
