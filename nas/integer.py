"""Spaces of bounded integers: genes of mixed cardinality, with operators for each leaf.

A space is a pytree of `Genes`; its genomes have the same structure, an int32 array [G] in the
place of each leaf (population: [P, G]). Ordered integers get simulated binary crossover (Deb
and Agrawal 1995) and polynomial mutation (Deb and Goyal 1996), names get uniform crossover
and another value at random. Deviations, which suit integers: results are rounded; a mutated
gene always changes, for small steps would be rounded away; a child is one of the two that
the crossover makes; values beyond the bounds are clipped to them. Letters: P population, G
genes of a leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from nas import genomes

Kind = Literal["ordinal", "categorical"]

Mutate = Callable[[jax.Array, jax.Array, genomes.Rate], jax.Array]
"""key, genes [G], rate -> genes [G]."""
Crossover = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""key, genes [G], genes [G] -> genes [G] of a child."""

_CROSS_BITS = 10  # of the 32 random bits of a gene; the mutation reads the others


@dataclasses.dataclass(frozen=True)
class Genes:
    """One leaf of a space: G integers, each within its own bounds; static and hashable.

    Attributes:
      low: smallest value of each gene.
      high: largest value of each gene, inclusive.
      kind: "ordinal", where near values are alike, or "categorical", where they are names.
      mutate: replaces the mutation of this leaf; must stay within the bounds.
      crossover: replaces the crossover of this leaf; must stay within the bounds.
      crossover_eta: of ordinal genes; the larger, the nearer a child stays to its parents.
      mutation_eta: of ordinal genes; the larger, the smaller the steps.

    Raises:
      ValueError: no genes, bounds that do not pair or are reversed, or an unknown kind.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    kind: Kind = "ordinal"
    mutate: Mutate | None = None
    crossover: Crossover | None = None
    crossover_eta: float = 15.0
    mutation_eta: float = 10.0

    def __post_init__(self) -> None:
        if not self.low or len(self.low) != len(self.high):
            raise ValueError(
                f"Genes has {len(self.low)} values of low and {len(self.high)} of high; expected "
                "as many of both, and at least one"
            )
        for gene, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if not -(2**30) <= low <= high < 2**30:
                raise ValueError(
                    f"gene {gene} has the bounds {low} to {high}; expected low <= high, and both "
                    "within 2 ** 30 of zero"
                )
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"unknown kind {self.kind!r}; expected one of {', '.join(get_args(Kind))}"
            )
        if self.crossover_eta < 0 or self.mutation_eta < 0:
            raise ValueError("crossover_eta and mutation_eta must not be negative")

    @property
    def num_genes(self) -> int:
        """G."""
        return len(self.low)

    @property
    def cardinality(self) -> tuple[int, ...]:
        """How many values each gene can take."""
        return tuple(high - low + 1 for low, high in zip(self.low, self.high, strict=True))


def genes(num: int, cardinality: int, *, low: int = 0, kind: Kind = "ordinal") -> Genes:
    """`num` genes alike, of the values low to low + cardinality - 1.

    Raises:
      ValueError: as `Genes`.
    """
    return Genes((low,) * num, (low + cardinality - 1,) * num, kind)


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
        return join([_sample(leaf, u) for leaf, u in zip(leaves, split(draws), strict=True)])

    def mutate(key: jax.Array, genome: genomes.Genome, rate: genomes.Rate) -> genomes.Genome:
        bits_key, own_key = jax.random.split(key)
        bits = split(jax.random.bits(bits_key, (num_genes,)) >> _CROSS_BITS)
        parts = jax.tree.leaves(genome)
        return join(
            [
                _mutate_bits(leaf, b, x, rate)
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
                _cross_bits(leaf, b, x, y)
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
                child = _cross_bits(leaf, jnp.concatenate([b[:half], b[: num - half]]), x, y)
            else:
                keys = jax.random.split(jax.random.fold_in(cross_key, number), num)
                child = jax.vmap(leaf.crossover)(keys, x, y)
            child = jnp.where(paired[:, None], child, x)
            if leaf.mutate is None:
                child = _mutate_bits(leaf, b >> _CROSS_BITS, child, rate)
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
        step = (draws[1] >> _CROSS_BITS)[:, None]
        changed = []
        for number, (leaf, here, x) in enumerate(zip(leaves, hit, parts, strict=True)):
            if leaf.mutate is None:
                moved = _move(leaf, _unit(step), x)
            else:
                keys = jax.random.split(jax.random.fold_in(own_key, number), num)
                own = leaf.mutate
                moved = jax.vmap(lambda k, x, own=own: own(k, x, 1.0))(keys, x)
            changed.append(jnp.where(here, moved, x))
        return join(changed)

    return genomes.Operators(
        num_genes,
        sample,
        mutate,
        crossover,
        vary,
        change,
        lambda population: check(space, population),
    )


def check(space: IntegerSpace, population: genomes.Genome) -> None:
    """Refuses genomes that are not of the space. On the host, for what a user brings.

    Raises:
      ValueError: another structure, shape or type, or a gene out of its bounds.
    """
    leaves = _leaves(space)
    if jax.tree.structure(population) != jax.tree.structure(space):
        raise ValueError(
            f"the genomes have the structure {jax.tree.structure(population)}; expected that of "
            f"the space, {jax.tree.structure(space)}"
        )
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


def _bounds(leaf: Genes) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(leaf.low, jnp.int32), jnp.asarray(leaf.high, jnp.int32)


def _broadcast(bound: jax.Array, like: jax.Array) -> jax.Array:
    return bound.reshape((1,) * (like.ndim - 1) + bound.shape)


def _sample(leaf: Genes, draws: jax.Array) -> jax.Array:
    low, high = (_broadcast(bound, draws) for bound in _bounds(leaf))
    return jnp.minimum(low + jnp.floor(draws * (high - low + 1)).astype(jnp.int32), high)


def _unit(bits: jax.Array) -> jax.Array:
    """The 22 bits of a mutation as a number in (0, 1)."""
    return (bits.astype(jnp.float32) + 0.5) * 2.0 ** -(32 - _CROSS_BITS)


def _cross_bits(leaf: Genes, bits: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """A child's genes, before mutation, from the low bits of a word for each gene."""
    if leaf.kind == "categorical":
        return jnp.where(bits & 1, first, second)
    # One bit: is the gene crossed at all; one: which of the two children; eight: how far.
    crossed, upper = (bits & 1) == 1, (bits & 2) == 2
    draw = ((bits >> 2) & 255).astype(jnp.float32) / 256 + 1 / 512
    low, high = (_broadcast(bound, first) for bound in _bounds(leaf))
    a, b = first.astype(jnp.float32), second.astype(jnp.float32)
    distance = jnp.abs(a - b)
    # Bounded as in Deb and Agrawal: the spread is drawn so that no child leaves the bounds.
    power = leaf.crossover_eta + 1
    room = jnp.minimum(jnp.minimum(first, second) - low, high - jnp.maximum(first, second))
    most = 1 + 2 * room / jnp.maximum(distance, 1)
    draw = draw * (2 - jnp.exp(-power * jnp.log(most)))
    side = jnp.where(draw < 1, 1 / power, -1 / power)
    spread = jnp.exp(side * jnp.log(jnp.minimum(draw, 2 - draw)))
    half = 0.5 * spread * (a - b)
    child = 0.5 * (a + b) + jnp.where(upper, half, -half)
    child = jnp.clip(jnp.round(child).astype(jnp.int32), low, high)
    return jnp.where(crossed, child, first)


def _mutate_bits(leaf: Genes, bits: jax.Array, values: jax.Array, rate: genomes.Rate) -> jax.Array:
    """Genes of which each changes with probability `rate`, from 22 bits each."""
    draw = _unit(bits)
    # Given that it is below the rate, the draw over the rate is uniform again.
    rate = jnp.asarray(rate, jnp.float32)
    moved = _move(leaf, draw / jnp.maximum(rate, 1e-30), values)
    return jnp.where(draw < rate, moved, values)


def _move(leaf: Genes, draw: jax.Array, values: jax.Array) -> jax.Array:
    """Genes that all take another value where there is one; `draw` in (0, 1) says which."""
    low, high = (_broadcast(bound, values) for bound in _bounds(leaf))
    draw = jnp.minimum(draw, 1 - 2.0**-24)
    span = high - low
    if leaf.kind == "categorical":
        other = low + jnp.minimum(jnp.floor(draw * span).astype(jnp.int32), span - 1)
        return jnp.where(span > 0, other + (other >= values), values)
    # Polynomial step in units of the range, in the direction that the draw falls in; at a
    # bound, the only direction there is.
    up = jnp.where(values == low, True, (draw >= 0.5) & (values < high))
    tail = jnp.where(draw < 0.5, 2 * draw, 2 * (1 - draw))
    length = 1 - jnp.exp(jnp.log(tail) / (leaf.mutation_eta + 1))
    step = jnp.maximum(jnp.round(length * span).astype(jnp.int32), 1)
    return jnp.clip(jnp.where(up, values + step, values - step), low, high)
