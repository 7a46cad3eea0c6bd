"""Integer genomes in general: the operators a searcher needs, and finding duplicates.

A genome is any pytree of int32 arrays; a population adds a leading [P] to every leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nas import arch

Genome = Any
"""A pytree of int32 arrays, or a population of them with a leading [P]."""


class Operators(NamedTuple):
    """What a searcher needs to know about a space; give your own for other genomes.

    Equal solutions must have equal genomes, so operators return canonical ones.
    """

    num_genes: int
    sample: Callable[[jax.Array, int], Genome]  # key, P -> population [P]
    mutate: Callable[[jax.Array, Genome, jax.Array | float], Genome]  # key, one genome, rate
    crossover: Callable[[jax.Array, Genome, Genome], Genome]  # key, two genomes -> one child


def arch_operators(space: arch.ArchSpace) -> Operators:
    """The operators of the sub-networks of an elastic Transformer."""
    return Operators(
        num_genes=space.num_genes,
        sample=lambda key, num: arch.sample(key, space, num),
        mutate=lambda key, genome, rate: arch.mutate(key, space, genome, rate),
        crossover=lambda key, first, second: arch.crossover(key, space, first, second),
    )


def take(population: Genome, index: jax.Array) -> Genome:
    """The genomes at `index`."""
    return jax.tree.map(lambda leaf: leaf[index], population)


def concatenate(first: Genome, second: Genome) -> Genome:
    """Two populations, one after the other."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def where(condition: jax.Array, first: Genome, second: Genome) -> Genome:
    """Per genome, from `first` where `condition` ([P] or []) holds, else from `second`."""

    def pick(a: jax.Array, b: jax.Array) -> jax.Array:
        shape = condition.shape + (1,) * (a.ndim - condition.ndim)
        return jnp.where(condition.reshape(shape), a, b)

    return jax.tree.map(pick, first, second)


def duplicates(population: Genome) -> jax.Array:
    """Whether an equal genome stands earlier in the population: bool [P].

    O(P log P): genomes are sorted by a 64-bit hash and neighbours compared in full. A
    genome that differs is therefore never called a duplicate.
    """
    leaves = jax.tree.leaves(population)
    num_rows = leaves[0].shape[0]
    genes = jnp.concatenate([leaf.reshape(num_rows, -1) for leaf in leaves], axis=1)
    # Constants of a linear hash; fixed, hence a seed of their own.
    odd = (
        np.random.default_rng(0).integers(2**31, size=(2, genes.shape[1]), dtype=np.uint32) * 2 + 1
    )
    hashes = [jnp.sum(genes.astype(jnp.uint32) * row[None, :], axis=1) for row in jnp.asarray(odd)]
    rows = jnp.arange(num_rows, dtype=jnp.int32)
    order = jax.lax.sort((*hashes, rows), num_keys=3)[2]
    ordered = genes[order]
    repeated = jnp.all(ordered[1:] == ordered[:-1], axis=1)
    return jnp.zeros((num_rows,), bool).at[order[1:]].set(repeated)
