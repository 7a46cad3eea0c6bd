"""Searches of the 16 uniform sub-networks, whose objectives are known: they read a table.

So there can be many of them, and their hypervolume is that of a mean search. (In a run the search
begins with these sub-networks and has nothing to find among them.)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax import concrete
from acme_jax.experiments.experiment import Row
from acme_jax.experiments.selection_search import make_searcher, reference_point, volume
from acme_jax.experiments.study import Study
from nas import nsga2, stopping
from nas.arch import Arch, ArchSpace

POPULATION, GENERATIONS, SEARCHES = 8, 6, 100
"""Of every search, and how many there are."""


def uniform_rows(study: Study, grid: np.ndarray) -> list[Row]:
    """Searches of the 16 uniform sub-networks, as a part of the hypervolume of all of them.

    Args:
      study: for the space and the keys.
      grid: objectives of all of them [16, M].
    """
    space = dataclasses.replace(study.context.space, per_layer=False)
    reference = reference_point(grid)
    whole = volume(grid, reference)
    keys = jax.random.split(study.key("selection uniform"), SEARCHES)
    rows: list[Row] = []
    for name in ("nsga2", "random"):
        found = _program(space, name)(keys, jnp.asarray(grid / reference, jnp.float32))
        shares = np.asarray(found, np.float64) / whole  # [keys, generations]
        rows += [
            {
                "kind": "uniform",
                "searcher": name,
                "evaluations": POPULATION * (generation + 1),
                "share": float(share.mean()),
                "share_low": float(np.quantile(share, 0.05)),
                "reached": float((share >= 0.99).mean()),
                "searches": SEARCHES,
            }
            for generation, share in enumerate(shares.T)
        ]
    return rows


@functools.lru_cache(maxsize=4)
def _program(space: ArchSpace, name: str) -> Callable[[Array, Array], Array]:
    """Hypervolumes [keys, generations] of whole searches that look objectives up in a table."""
    searcher = make_searcher(space, name, POPULATION, POPULATION * GENERATIONS)
    grid = jax.tree.map(np.asarray, concrete.grid(space))

    @jax.jit
    def run(keys: Array, table: Array) -> Array:
        def look_up(archs: Arch) -> Array:
            same = jnp.asarray(grid.depth)[None] == archs.depth[:, None]
            same &= jnp.asarray(grid.heads[:, 0])[None] == archs.heads[:, :1]
            same &= jnp.asarray(grid.neurons[:, 0])[None] == archs.neurons[:, :1]
            return table[jnp.argmax(same, axis=1)]

        def one(key: Array) -> Array:
            return nsga2.search(
                key,
                searcher,
                look_up,
                num_generations=GENERATIONS,
                reference=jnp.ones(table.shape[1]),
                track=stopping.exact(),
            ).archive_hypervolume

        return jax.vmap(one)(keys)

    return run
