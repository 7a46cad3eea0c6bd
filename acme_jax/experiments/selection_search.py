"""The Pareto search over the supernet beside exhaustive evaluation and random search.

Measured by the hypervolume of error, size, latency and energy, with exact costs
(`acme_jax.fleet.REFERENCE_PROFILE`) and errors on the select split. A search of single layers
picks among hundreds of noisy errors, so its front owes something to luck; therefore every front,
the exhaustive one included, is in the end measured on test data as well. One reference point for
all: slightly beyond the worst uniform sub-network in every objective.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from acme_jax import cloud, concrete
from acme_jax.blocks import Params
from acme_jax.encoders import EncoderConfig
from acme_jax.experiments.experiment import Row
from acme_jax.experiments.study import Study
from acme_jax.fleet import REFERENCE_PROFILE
from nas import controls, nsga2, pareto
from nas.arch import Arch, ArchSpace
from nas.archive import Archive
from nas.cost import ModelDims
from nas.searcher import Searcher

EVALUATIONS = 256
"""Of one search in the space of single layers."""
UNIFORM_RETRIES = 8
"""In a space of 16 most children repeat a known one, so they are mutated again more often."""
CAPACITY = 256
"""Places of an archive."""
MARGIN = 1.01
"""The reference point, in units of the worst uniform sub-network."""

Measure = Callable[[Arch], np.ndarray]
"""Genomes [P] -> objectives [P, M] in the order of `cloud.OBJECTIVES`."""


class Evaluation(NamedTuple):
    """How sub-networks are judged while they are chosen."""

    measure: Measure
    grid: np.ndarray  # [16, M], the uniform sub-networks


def evaluation(study: Study) -> Evaluation:
    """Errors on the select split, exact costs."""
    context, params = study.context, study.stages.elastic
    inputs, labels = context.public.select_inputs, context.public.select_labels
    evaluate = _program(
        context.encoder, context.space, context.mesh, context.backbone_dims, context.eval_batch
    )

    def measure(archs: Arch) -> np.ndarray:
        return np.asarray(evaluate(params, inputs, labels, archs), np.float64)

    grid = concrete.grid(context.space)
    return Evaluation(measure, in_batches(measure, grid, context.config.search.population_size))


@functools.lru_cache(maxsize=4)
def _program(
    encoder: EncoderConfig, space: ArchSpace, mesh: Mesh, dims: ModelDims, batch_size: int
) -> Callable[[Params, Array, Array, Arch], Array]:
    @jax.jit
    def evaluate(params: Params, inputs: Array, labels: Array, archs: Arch) -> Array:
        measure = cloud.make_evaluate(
            params,
            inputs,
            labels,
            encoder,
            space,
            mesh,
            dims=dims,
            profile=REFERENCE_PROFILE,
            size_limit=math.inf,
            batch_size=batch_size,
        )
        return measure(archs)[0]

    return evaluate


def in_batches(measure: Measure, archs: Arch, size: int) -> np.ndarray:
    """Objectives [P, M], measured so many at a time, so that one program serves any P."""
    genomes = jax.tree.map(np.asarray, archs)
    count = len(genomes.depth)
    rows = np.arange(count + -count % size) % count
    parts = [
        measure(jax.tree.map(lambda leaf, part=part: leaf[part], genomes))
        for part in rows.reshape(-1, size)
    ]
    return np.concatenate(parts)[:count]


def reference_point(grid: np.ndarray) -> np.ndarray:
    """The reference [M] of every hypervolume, from the uniform sub-networks' objectives."""
    reference: np.ndarray = MARGIN * grid.max(axis=0)
    return reference


def volume(objectives: np.ndarray, reference: np.ndarray) -> float:
    """Hypervolume, a part of the box from 0 to the reference; of any number of rows up to CAPACITY.

    Shares of a box instead of a product of units, which float32 might not hold.
    """
    rows = np.full((CAPACITY, objectives.shape[1]), np.nan, np.float32)
    rows[: len(objectives)] = objectives / reference
    return float(_volume(rows, np.ones(len(reference), np.float32)))


_volume = jax.jit(pareto.hypervolume)


@functools.lru_cache(maxsize=16)
def make_searcher(space: ArchSpace, name: str, population: int, capacity: int) -> Searcher:
    """By name: "random", "nsga2", or "nsga2_grid", which begins like the run's search."""
    make = controls.random_search if name == "random" else nsga2.nsga2
    options: dict[str, Any] = {}
    if name == "nsga2" and not space.per_layer:
        options["num_retries"] = UNIFORM_RETRIES
    if name == "nsga2_grid":
        grid = jax.tree.map(np.asarray, concrete.grid(space))
        room = min(population // 2, len(grid.depth))
        chosen = np.linspace(0, len(grid.depth) - 1, room).round().astype(int)
        options["initial"] = jax.tree.map(lambda leaf: leaf[chosen], grid)
    return make(
        space,
        population_size=population,
        archive_capacity=capacity,
        track_hypervolume=False,
        **options,
    )


class Found(NamedTuple):
    """What a search in the space of single layers found."""

    evaluations: list[int]  # after each generation
    fronts: list[np.ndarray]  # [P, M] after each generation
    genomes: Arch  # [P] of the last front


def per_layer(study: Study, judged: Evaluation) -> dict[str, Found]:
    """Searches at equal evaluations, by the names of `make_searcher`, and two of no search.

    "random_grid" is random search with the uniform sub-networks added, for their evaluations;
    "uniform" is those alone: exhaustive evaluation of the paper's space.
    """
    population = study.config.search.population_size
    found = {}
    for name in ("nsga2_grid", "nsga2", "random"):
        steps = _steps(study.context.space, name, population)
        archives = list(_generations(study.key(f"selection {name}"), steps, judged, population))
        last = archives[-1]
        found[name] = Found(
            [population * (number + 1) for number in range(len(archives))],
            [np.asarray(archive.objectives[archive.valid], np.float64) for archive in archives],
            jax.tree.map(lambda leaf, keep=last.valid: leaf[keep], last.genomes),
        )
        study.context.session.say(f"{name}: {found[name].evaluations[-1]} sub-networks evaluated")
    grid = jax.tree.map(np.asarray, concrete.grid(study.context.space))
    random, number = found["random"], len(judged.grid)
    found["random_grid"] = Found(
        [evaluations + number for evaluations in random.evaluations],
        [
            front[_best(front)]
            for front in (np.concatenate([f, judged.grid]) for f in random.fronts)
        ],
        _take(
            jax.tree.map(lambda *leaves: np.concatenate(leaves), random.genomes, grid),
            _best(_join(random.fronts[-1], judged.grid)),
        ),
    )
    best = _best(judged.grid)
    found["uniform"] = Found([number], [judged.grid[best]], _take(grid, best))
    return found


def per_layer_rows(
    found: dict[str, Found], grid: np.ndarray, test_error: Callable[[Arch], np.ndarray]
) -> list[Row]:
    """Hypervolumes by evaluations, as parts of that of the exhaustive uniform grid.

    Args:
      found: from `per_layer`.
      grid: objectives of the uniform sub-networks [16, M].
      test_error: of genomes [P] -> [P]; of fronts that are final.
    """
    whole, reference = volume(grid, reference_point(grid)), reference_point(grid)
    tested = {
        name: np.column_stack([test_error(each.genomes), each.fronts[-1][:, 1:]])
        for name, each in found.items()
    }
    test_reference = reference_point(tested["uniform"])
    # Costs reach further than the exhaustive front's own, whatever it left out.
    test_reference[1:] = reference[1:]
    test_whole = volume(tested["uniform"], test_reference)
    rows: list[Row] = []
    for name, each in found.items():
        rows += [
            {
                "kind": "per_layer",
                "searcher": name,
                "evaluations": number,
                "front": len(front),
                "share": volume(front, reference) / whole,
            }
            for number, front in zip(each.evaluations, each.fronts, strict=True)
        ]
        rows[-1]["test_share"] = volume(tested[name], test_reference) / test_whole
    return rows


def _generations(
    key: Array, steps: Searcher, judged: Evaluation, population: int
) -> Iterator[Archive]:
    """The archive after each generation, as NumPy; the search of `nas.searcher.search`."""
    reference = jnp.asarray(reference_point(judged.grid), jnp.float32)
    state = steps.init(jax.random.fold_in(key, 0), len(cloud.OBJECTIVES), reference)
    for number in range(-(-EVALUATIONS // population)):
        children = steps.ask(jax.random.fold_in(key, number + 1), state)
        state, _ = steps.tell(state, children, jnp.asarray(judged.measure(children), jnp.float32))
        yield jax.tree.map(np.asarray, state.archive)


@functools.lru_cache(maxsize=16)
def _steps(space: ArchSpace, name: str, population: int) -> Searcher:
    """A compiled searcher, by the names of `make_searcher`."""
    searcher = make_searcher(space, name, population, CAPACITY)
    init = jax.jit(searcher.init, static_argnums=1)
    if name == "nsga2":
        return Searcher(init, jax.jit(searcher.ask), jax.jit(searcher.tell))
    # Who begins elsewhere asks alike, and all keep what they find alike: fewer programs.
    shared = _steps(space, "nsga2", population)
    if name == "random":
        return Searcher(init, jax.jit(searcher.ask), shared.tell)
    return shared._replace(init=init)


def _join(front: np.ndarray, grid: np.ndarray) -> np.ndarray:
    return np.concatenate([front, grid])


def _best(objectives: np.ndarray) -> np.ndarray:
    """Which rows are not dominated, [P]."""
    no_worse = np.all(objectives[:, None] <= objectives[None], axis=-1)
    better = np.any(objectives[:, None] < objectives[None], axis=-1)
    return np.logical_not(np.any(no_worse & better, axis=0))


def _take(genomes: Arch, rows: np.ndarray) -> Arch:
    taken: Arch = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], genomes)
    return taken
