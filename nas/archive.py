"""An archive of every non-dominated feasible solution met so far, of bounded capacity.

Because it does not depend on a budget, one archive serves all: `nas.pareto.select` chooses
from it under each limit. Shape letters: A capacity, P population, M objectives.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nas import genomes, ordering, pareto


class Archive(NamedTuple):
    """Non-dominated feasible solutions; the used places come first, the oldest before all."""

    genomes: genomes.Genome  # [A, ...]
    objectives: jax.Array  # [A, M]; NaN in empty places
    valid: jax.Array  # [A] bool


def empty(population: genomes.Genome, capacity: int, num_objectives: int) -> Archive:
    """An empty archive for genomes like those of `population`."""
    return Archive(
        genomes=jax.tree.map(
            lambda leaf: jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype), population
        ),
        objectives=jnp.full((capacity, num_objectives), jnp.nan, jnp.zeros(()).dtype),
        valid=jnp.zeros((capacity,), bool),
    )


def insert(
    archive: Archive, population: genomes.Genome, objectives: jax.Array, violation: jax.Array
) -> Archive:
    """The archive after meeting a population [P].

    Infeasible rows, rows with NaN or infinity, repeated genomes and dominated rows are
    dropped. When more remain than there are places, the least crowded stay (by one look at
    the crowding distance; ties by age), so that the result is deterministic.

    Args:
      archive: the archive.
      population: genomes with a leading [P].
      objectives: [P, M], minimised.
      violation: [P], positive where infeasible.
    """
    capacity = archive.valid.shape[0]
    if capacity == 0:
        return archive
    merged = genomes.concatenate(archive.genomes, population)
    values = jnp.concatenate([archive.objectives, objectives])
    usable = (violation <= 0) & jnp.all(jnp.isfinite(objectives), axis=1)
    usable = jnp.concatenate([archive.valid, usable])
    values = jnp.where(usable[:, None], values, jnp.nan)
    keep = usable & (pareto.non_dominated_rank(values, num_needed=1) == 0)
    # Of two equal usable genomes the later goes; equal genomes may differ in usability when
    # an evaluation is noisy, hence the flag in the comparison.
    keep &= ~genomes.duplicates((merged, usable.astype(jnp.int32)))

    crowding = pareto.crowding_distance(values, jnp.where(keep, 0, 1))
    lonely = ordering.order(ordering.sort_key(jnp.where(keep, -crowding, jnp.nan)))
    chosen = (ordering.inverse(lonely) < capacity) & keep
    index = ordering.order_of_ranks(jnp.where(chosen, 0, 1))[:capacity]
    valid = chosen[index]
    return Archive(
        genomes=genomes.take(merged, index),
        objectives=jnp.where(valid[:, None], values[index], jnp.nan),
        valid=valid,
    )
