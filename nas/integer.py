"""Spaces of bounded integers: genes of mixed cardinality, with operators for each leaf.

A space is a pytree of `Genes`, or one alone; its genomes have the same structure, an int32
array [G] in the place of each leaf (population: [P, G]). A leaf is ordinal or categorical, or
brings operators of its own; see `nas.leaf`. Letters: P population, G genes of a leaf.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nas import genomes
from nas import leaf as leaf_ops
from nas.leaf import Crossover, Genes, Kind, Mutate, genes

__all__ = [
    "Crossover",
    "Genes",
    "IntegerSpace",
    "Kind",
    "Mutate",
    "check",
    "genes",
    "integer_operators",
]

IntegerSpace = Any
"""A pytree of `Genes`, or one alone."""


def integer_operators(space: IntegerSpace) -> genomes.Operators:
    """What a searcher needs, for a pytree of `Genes`.

    Raises:
      ValueError: a leaf that is not `Genes`, or no leaf at all.
    """
    leaves = _leaves(space)
    structure = jax.tree.structure(space)
    num_genes = sum(leaf.num_genes for leaf in leaves)
    ends = list(np.cumsum([leaf.num_genes for leaf in leaves])[:-1])

    def split(bits: jax.Array) -> list[jax.Array]:
        return jnp.split(bits, ends, axis=-1)

    def join(parts: list[jax.Array]) -> genomes.Genome:
        return jax.tree.unflatten(structure, parts)

    def sample(key: jax.Array, num: int) -> genomes.Genome:
        draws = jax.random.uniform(key, (num, num_genes))
        return join(
            [leaf_ops.sample(leaf, u) for leaf, u in zip(leaves, split(draws), strict=True)]
        )

    def mutate(key: jax.Array, genome: genomes.Genome, rate: genomes.Rate) -> genomes.Genome:
        bits_key, own_key = jax.random.split(key)
        bits = split(jax.random.bits(bits_key, (num_genes,)) >> leaf_ops.CROSS_BITS)
        parts = jax.tree.leaves(genome)
        return join(
            [
                leaf_ops.mutate_bits(leaf, b, x, rate)
                if leaf.mutate is None
                else leaf.mutate(jax.random.fold_in(own_key, number), x, rate)
                for number, (leaf, b, x) in enumerate(zip(leaves, bits, parts, strict=True))
            ]
        )

    def crossover(key: jax.Array, first: genomes.Genome, second: genomes.Genome) -> genomes.Genome:
        bits_key, own_key = jax.random.split(key)
        bits = split(jax.random.bits(bits_key, (num_genes,)))
        pairs = zip(leaves, bits, jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        return join(
            [
                leaf_ops.cross_bits(leaf, b, x, y)
                if leaf.crossover is None
                else leaf.crossover(jax.random.fold_in(own_key, number), x, y)
                for number, (leaf, b, x, y) in enumerate(pairs)
            ]
        )

    def vary(
        key: jax.Array,
        first: genomes.Genome,
        second: genomes.Genome,
        paired: jax.Array,
        rate: genomes.Rate,
    ) -> genomes.Genome:
        """Crossover and mutation from one word of random bits per gene."""
        num = paired.shape[0]
        bits_key, cross_key, mutate_key = jax.random.split(key, 3)
        bits = split(jax.random.bits(bits_key, (num, num_genes)))
        pairs = zip(leaves, bits, jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        children = []
        half = (num + 1) // 2
        for number, (leaf, b, x, y) in enumerate(pairs):
            if leaf.crossover is None:
                # The two children of a pair read the same bits, so that each takes what the
                # other leaves.
                child = leaf_ops.cross_bits(
                    leaf, jnp.concatenate([b[:half], b[: num - half]]), x, y
                )
            else:
                keys = jax.random.split(jax.random.fold_in(cross_key, number), num)
                child = jax.vmap(leaf.crossover)(keys, x, y)
            child = jnp.where(paired[:, None], child, x)
            if leaf.mutate is None:
                child = leaf_ops.mutate_bits(leaf, b >> leaf_ops.CROSS_BITS, child, rate)
            else:
                keys = jax.random.split(jax.random.fold_in(mutate_key, number), num)
                own = leaf.mutate
                child = jax.vmap(lambda k, x, own=own: own(k, x, rate))(keys, child)
            children.append(child)
        return join(children)

    def change(key: jax.Array, population: genomes.Genome) -> genomes.Genome:
        """One gene of each genome, chosen among those with a choice, takes another value."""
        parts = jax.tree.leaves(population)
        num = parts[0].shape[0]
        own_key, key = jax.random.split(key)
        draws = jax.random.bits(key, (2, num))
        free = np.flatnonzero(np.concatenate([leaf.cardinality for leaf in leaves]) > 1)
        if not free.size:
            return population
        chosen = jnp.asarray(free, jnp.int32)[(draws[0] % len(free)).astype(jnp.int32)]
        columns = jnp.arange(num_genes, dtype=jnp.int32)
        hit = split(chosen[:, None] == columns[None, :])
        step = (draws[1] >> leaf_ops.CROSS_BITS)[:, None]
        changed = []
        for number, (leaf, here, x) in enumerate(zip(leaves, hit, parts, strict=True)):
            if leaf.mutate is None:
                moved = leaf_ops.move(leaf, leaf_ops.unit(step), x)
            else:
                keys = jax.random.split(jax.random.fold_in(own_key, number), num)
                own = leaf.mutate
                moved = jax.vmap(lambda k, x, own=own: own(k, x, 1.0))(keys, x)
            changed.append(jnp.where(here, moved, x))
        return join(changed)

    refuse = functools.partial(check, space)
    return genomes.Operators(num_genes, sample, mutate, crossover, vary, change, refuse)


def check(space: IntegerSpace, population: genomes.Genome) -> None:
    """Refuses genomes that are not of the space. On the host, for what a user brings.

    Raises:
      ValueError: another structure, shape or type, or a gene out of its bounds.
    """
    leaves = _leaves(space)
    found, expected = str(jax.tree.structure(population)), str(jax.tree.structure(space))
    if found != expected:
        raise ValueError(f"the genomes have the structure {found}; expected {expected}")
    for leaf, values in zip(leaves, map(np.asarray, jax.tree.leaves(population)), strict=True):
        if values.shape[-1:] != (leaf.num_genes,) or not np.issubdtype(values.dtype, np.integer):
            raise ValueError(
                f"a leaf has shape {values.shape} and type {values.dtype}; expected integers "
                f"[..., {leaf.num_genes}]"
            )
        wrong = np.argwhere((values < np.array(leaf.low)) | (values > np.array(leaf.high)))
        if wrong.size:
            place = tuple(int(i) for i in wrong[0])
            raise ValueError(
                f"the gene at {place} is {values[place]}; expected {leaf.low[place[-1]]} to "
                f"{leaf.high[place[-1]]}; clip it or widen the space"
            )


def _leaves(space: IntegerSpace) -> list[Genes]:
    leaves = jax.tree.leaves(space)
    wrong = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Genes)]
    if wrong or not leaves:
        raise ValueError(f"an integer space is a pytree of Genes; found {wrong or 'no leaf'}")
    return leaves
