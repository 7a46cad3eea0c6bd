"""One leaf of an integer space: bounded genes, and how they cross and mutate.

Ordered integers get simulated binary crossover (Deb and Agrawal 1995) and polynomial mutation
(Deb and Goyal 1996), names get uniform crossover and another value at random. Deviations,
which suit integers: results are rounded; a mutated gene always changes, because small steps
would be rounded away; a child is one of the two that the crossover makes. Letters: P
population, G genes of a leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from nas import genomes

Kind = Literal["ordinal", "categorical"]

Mutate = Callable[[jax.Array, jax.Array, genomes.Rate], jax.Array]
"""key, genes [G], rate -> genes [G]."""
Crossover = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""key, genes [G], genes [G] -> genes [G] of a child."""

_LARGEST = 2**22  # ranges up to twice as large are exact in float32
CROSS_BITS = 10  # of the 32 random bits of a gene; the mutation reads the others


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
            if not -_LARGEST <= low <= high <= _LARGEST:
                raise ValueError(
                    f"gene {gene} has the bounds {low} to {high}; expected low <= high, and both "
                    f"within {_LARGEST} of zero"
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


def _bounds(leaf: Genes) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(leaf.low, jnp.int32), jnp.asarray(leaf.high, jnp.int32)


def _broadcast(bound: jax.Array, like: jax.Array) -> jax.Array:
    return bound.reshape((1,) * (like.ndim - 1) + bound.shape)


def sample(leaf: Genes, draws: jax.Array) -> jax.Array:
    """Genes [P, G], uniform over their values, from draws [P, G] in [0, 1)."""
    low, high = (_broadcast(bound, draws) for bound in _bounds(leaf))
    return jnp.minimum(low + jnp.floor(draws * (high - low + 1)).astype(jnp.int32), high)


def unit(bits: jax.Array) -> jax.Array:
    """The 22 bits of a mutation as a number in (0, 1)."""
    return (bits.astype(jnp.float32) + 0.5) * 2.0 ** -(32 - CROSS_BITS)


def cross_bits(leaf: Genes, bits: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """A child's genes [..., G], before mutation, from a word of bits for each; reads the low."""
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
    room = jnp.maximum(room, 0)  # out of bounds already: no room, and clipped below
    most = 1 + 2 * room / jnp.maximum(distance, 1)
    draw = draw * (2 - jnp.exp(-power * jnp.log(most)))
    side = jnp.where(draw < 1, 1 / power, -1 / power)
    spread = jnp.exp(side * jnp.log(jnp.minimum(draw, 2 - draw)))
    half = 0.5 * spread * (a - b)
    child = 0.5 * (a + b) + jnp.where(upper, half, -half)
    child = jnp.clip(jnp.round(child).astype(jnp.int32), low, high)
    return jnp.where(crossed, child, first)


def mutate_bits(leaf: Genes, bits: jax.Array, values: jax.Array, rate: genomes.Rate) -> jax.Array:
    """Genes of which each changes with probability `rate`, from 22 bits each."""
    draw = unit(bits)
    # Given that it is below the rate, the draw over the rate is uniform again.
    rate = jnp.asarray(rate, jnp.float32)
    moved = move(leaf, draw / jnp.maximum(rate, 1e-30), values)
    return jnp.where(draw < rate, moved, values)


def move(leaf: Genes, draw: jax.Array, values: jax.Array) -> jax.Array:
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
