"""Integer genomes in general: the operators a searcher needs, and finding duplicates.

A genome is any pytree of int32 arrays; a population adds a leading [P] to every leaf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nas import arch, ordering

Genome = Any
"""A pytree of int32 arrays, or a population of them with a leading [P]."""
Rate = jax.Array | float
_Split = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


class Operators(NamedTuple):
    """What a searcher needs to know about a space; give your own for other genomes.

    Equal solutions must have equal genomes, so operators return canonical ones. The last three
    may be left out. `vary` and `change` work on whole populations, so that a space can draw
    its random bits at once, which is what most of the time of breeding goes to.
    """

    num_genes: int
    sample: Callable[[jax.Array, int], Genome]  # key, P -> population [P]
    mutate: Callable[[jax.Array, Genome, Rate], Genome]  # key, one genome, rate
    crossover: Callable[[jax.Array, Genome, Genome], Genome]  # key, two genomes -> one child
    vary: Callable[[jax.Array, Genome, Genome, jax.Array, Rate], Genome] | None = None
    """key, parents [P], parents [P], whether to cross [P], rate -> mutated children [P].

    The second half of the rows has the parents of the first half the other way round."""
    change: Callable[[jax.Array, Genome], Genome] | None = None
    """key, population [P] -> the same with one gene of each genome changed."""
    check: Callable[[Genome], None] | None = None
    """Population, on the host: ValueError if a genome is not of the space."""


def arch_operators(space: arch.ArchSpace) -> Operators:
    """The operators of the sub-networks of an elastic Transformer."""
    return Operators(
        num_genes=space.num_genes,
        sample=lambda key, num: arch.sample(key, space, num),
        mutate=lambda key, genome, rate: arch.mutate(key, space, genome, rate),
        crossover=lambda key, first, second: arch.crossover(key, space, first, second),
        check=lambda population: _check_arch(space, population),
    )


def _check_arch(space: arch.ArchSpace, population: arch.Arch) -> None:
    for name, values, choices in (
        ("depth", population.depth, space.depth_choices),
        ("heads", population.heads, space.head_choices),
        ("neurons", population.neurons, space.neuron_choices),
    ):
        wrong = np.setdiff1d(np.asarray(values), choices)
        if wrong.size:
            raise ValueError(
                f"a genome has {name} {wrong[0]}, which the space does not offer; expected one "
                f"of {choices}"
            )
    rows, per_layer = np.shape(population.depth), (space.num_layers,)
    for name, values in (("heads", population.heads), ("neurons", population.neurons)):
        if np.shape(values) != rows + per_layer:
            raise ValueError(
                f"the genomes' {name} have shape {np.shape(values)}; expected {rows + per_layer}, "
                "one for each layer of each genome"
            )
    canonical = jax.vmap(lambda genome: arch.canonical(space, genome))(population)
    if any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(population, canonical,
                                                                  strict=True)):  # fmt: skip
        raise ValueError(
            "a genome is not canonical, so that it would not be recognised as a repetition; pass "
            "the genomes through arch.canonical under jax.vmap"
        )


def vary(
    key: jax.Array,
    operators: Operators,
    first: Genome,
    second: Genome,
    paired: jax.Array,
    rate: Rate,
) -> Genome:
    """Children [P]: crossed where `paired` [P], else copies of `first`; then mutated."""
    if operators.vary is not None:
        return operators.vary(key, first, second, paired, rate)
    cross_key, mutate_key = jax.random.split(key)
    crossed = jax.vmap(operators.crossover)(
        jax.random.split(cross_key, paired.shape[0]), first, second
    )
    return _mutate(mutate_key, operators, where(paired, crossed, first), rate)


def replace_duplicates(
    key: jax.Array,
    operators: Operators,
    children: Genome,
    known: Genome,
    *,
    rate: Rate,
    num_retries: int,
) -> Genome:
    """Children [P] of which those that repeat a known genome or each other are changed again.

    Up to `num_retries` rounds; what still repeats then, in a space that is nearly used up, is
    left as it is. Later children give way to earlier ones.
    """
    num_known = jax.tree.leaves(known)[0].shape[0]

    def more(carry: tuple[jax.Array, Genome, jax.Array]) -> jax.Array:
        return (carry[0] < num_retries) & carry[2]

    def again(carry: tuple[jax.Array, Genome, jax.Array]) -> tuple[jax.Array, Genome, jax.Array]:
        number, children, _ = carry
        repeated = duplicates(concatenate(known, children))[num_known:]
        number_key = jax.random.fold_in(key, number)
        if operators.change is not None:
            changed = operators.change(number_key, children)
        else:
            changed = _mutate(number_key, operators, children, rate)
        return number + 1, where(repeated, changed, children), jnp.any(repeated)

    start = (jnp.zeros((), jnp.int32), children, jnp.array(True))
    return jax.lax.while_loop(more, again, start)[1]


def _mutate(key: jax.Array, operators: Operators, population: Genome, rate: Rate) -> Genome:
    keys = jax.random.split(key, jax.tree.leaves(population)[0].shape[0])
    return jax.vmap(lambda k, genome: operators.mutate(k, genome, rate))(keys, population)


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
    """Whether an equal genome stands earlier in the population: bool [P]. Exact.

    O(P log P): genomes are sorted by a 32-bit hash and neighbours compared in full. Should
    different genomes share a hash, which is rare, the classes are split gene by gene.
    """
    leaves = jax.tree.leaves(population)
    num_rows = leaves[0].shape[0]
    genes = jnp.concatenate([leaf.reshape(num_rows, -1) for leaf in leaves], axis=1)
    num_genes = genes.shape[1]
    # Constants of a linear hash; fixed, hence a seed of their own.
    odd = np.random.default_rng(0).integers(2**31, size=num_genes, dtype=np.uint32) * 2 + 1
    hashes = jnp.sum(genes.astype(jnp.uint32) * jnp.asarray(odd)[None, :], axis=1)

    def compare(rank: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The order of the rows, and whether row and predecessor are of one class / equal."""
        order = ordering.order_of_ranks(rank)
        ordered, classes = genes[order], rank[order]
        equal = jnp.all(ordered[1:] == ordered[:-1], axis=1)
        return order, classes[1:] == classes[:-1], equal

    def collides(carry: _Split) -> jax.Array:
        _, _, _, together, equal = carry
        return jnp.any(together & ~equal)

    def split(carry: _Split) -> _Split:
        gene, rank = carry[:2]
        column = jax.lax.dynamic_index_in_dim(genes, gene, axis=1, keepdims=False)
        rank = ordering.ranks(rank, column)
        return gene + 1, rank, *compare(rank)

    rank = ordering.ranks(hashes)
    start = (jnp.zeros((), jnp.int32), rank, *compare(rank))
    _, _, order, _, equal = jax.lax.while_loop(collides, split, start)
    first = jnp.zeros((1,), bool)
    repeated = jnp.concatenate([first, equal])
    return repeated[ordering.inverse(order)]
