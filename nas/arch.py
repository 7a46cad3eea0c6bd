"""Sub-networks of an elastic Transformer: integer genomes and the masks they stand for.

Shape letters: L layers, H heads, F neurons, P population. After the heads and neurons of a
layer are sorted by importance, a sub-network keeps a prefix of each, so integers say all.

All functions but the host-side `uniform`, `grid` and `kept_layers` are traceable, and take
one genome: `vmap` over populations. The elastic Transformer is DynaBERT's (Hou et al.,
NeurIPS 2020), which ACME (ICDCS 2025) uses as its backbone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Arch(NamedTuple):
    """A genome, int32. A population adds a leading [P] to every field."""

    depth: jax.Array  # []   number of blocks kept
    heads: jax.Array  # [L]  heads kept in each block, a prefix
    neurons: jax.Array  # [L]  MLP neurons kept in each block, a prefix


class ArchMask(NamedTuple):
    """What a genome switches on; float32, 0 or 1 (relaxed masks lie in between)."""

    block: jax.Array  # [L]
    head: jax.Array  # [L, H]
    neuron: jax.Array  # [L, F]


@dataclasses.dataclass(frozen=True)
class ArchSpace:
    """The full Transformer and the choices allowed; static and hashable.

    Attributes:
      num_layers, num_heads, num_neurons: L, H and F of the full Transformer.
      depth_choices, head_choices, neuron_choices: allowed numbers of blocks, of heads and of
        neurons in a block, non-decreasing. Entries i of the last two make width i.
      per_layer: every block chooses its heads and neurons; False ties all blocks to one
        width, which is the paper's grid.

    Raises:
      ValueError: choices that are empty, unsorted or larger than the full Transformer.
    """

    num_layers: int
    num_heads: int
    num_neurons: int
    depth_choices: tuple[int, ...]
    head_choices: tuple[int, ...]
    neuron_choices: tuple[int, ...]
    per_layer: bool = True

    def __post_init__(self) -> None:
        for name, choices, limit in (
            ("depth_choices", self.depth_choices, self.num_layers),
            ("head_choices", self.head_choices, self.num_heads),
            ("neuron_choices", self.neuron_choices, self.num_neurons),
        ):
            if not choices or list(choices) != sorted(c for c in choices if 1 <= c <= limit):
                raise ValueError(
                    f"ArchSpace.{name} is {choices}; expected a non-empty, non-decreasing "
                    f"tuple of integers from 1 to {limit}"
                )
        if not self.per_layer:
            _ = self.widths  # raises when the two lists do not pair

    @classmethod
    def from_fractions(
        cls,
        num_layers: int,
        num_heads: int,
        num_neurons: int,
        fractions: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        per_layer: bool = True,
    ) -> ArchSpace:
        """The space whose choices are fractions of the full sizes.

        Halves round up (the original code rounds them to even) and nothing falls below 1, so
        entry i of every list is fraction i; entries may repeat in small networks.
        """
        sizes = (num_layers, num_heads, num_neurons)
        depths, heads, neurons = (
            tuple(round_fraction(size, x) for x in sorted(fractions)) for size in sizes
        )
        return cls(*sizes, depths, heads, neurons, per_layer)

    @property
    def num_genes(self) -> int:
        """Genes that vary independently: 1 + 2 L, or 2 in a tied space."""
        return 1 + 2 * self.num_layers if self.per_layer else 2

    @property
    def widths(self) -> tuple[tuple[int, int], ...]:
        """(heads, neurons) of each width, entry by entry.

        Raises:
          ValueError: the two lists of choices differ in length.
        """
        if len(self.head_choices) != len(self.neuron_choices):
            raise ValueError(
                f"a width needs as many head_choices ({len(self.head_choices)}) as "
                f"neuron_choices ({len(self.neuron_choices)}); give lists of equal length"
            )
        return tuple(zip(self.head_choices, self.neuron_choices, strict=True))


def round_fraction(full_size: int, fraction: float) -> int:
    """`fraction` of `full_size`, halves rounded up, at least 1."""
    return max(1, math.floor(full_size * fraction + 0.5))


def full(space: ArchSpace) -> Arch:
    """The full Transformer itself."""
    return Arch(
        depth=jnp.asarray(space.num_layers, jnp.int32),
        heads=jnp.full((space.num_layers,), space.num_heads, jnp.int32),
        neurons=jnp.full((space.num_layers,), space.num_neurons, jnp.int32),
    )


def uniform(space: ArchSpace, width: float, depth: float) -> Arch:
    """The sub-network of one width fraction (heads and neurons) and one depth fraction.

    Canonical. Runs on the host; not traceable in `width` and `depth`.

    Raises:
      ValueError: the rounded sizes are not among the choices of `space`.
    """
    blocks = round_fraction(space.num_layers, depth)
    heads = round_fraction(space.num_heads, width)
    neurons = round_fraction(space.num_neurons, width)
    for name, value in (("depth", blocks), ("head", heads), ("neuron", neurons)):
        choices = getattr(space, f"{name}_choices")
        if value not in choices:
            raise ValueError(
                f"width {width} and depth {depth} give a {name} choice of {value}, which the "
                f"space does not offer; expected one of {choices}"
            )
    return _uniform(space, blocks, heads, neurons)


def grid(space: ArchSpace) -> Arch:
    """Every uniform sub-network, depth-major: [num_depths * num_widths].

    Row d * num_widths + w has depth choice d and width choice w; the paper's 4 x 4 grid.

    Raises:
      ValueError: `space` has unequal numbers of head and neuron choices.
    """
    rows = [_uniform(space, d, h, n) for d in space.depth_choices for h, n in space.widths]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def _uniform(space: ArchSpace, blocks: int, heads: int, neurons: int) -> Arch:
    arch = Arch(
        depth=jnp.asarray(blocks, jnp.int32),
        heads=jnp.full((space.num_layers,), heads, jnp.int32),
        neurons=jnp.full((space.num_layers,), neurons, jnp.int32),
    )
    return canonical(space, arch)


def kept_layers(num_layers: int, fraction: float) -> tuple[int, ...]:
    """Blocks that DynaBERT's rule keeps: floor(i / fraction) for each of the kept ones.

    The last block goes first. `keep_mask` is the same rule for an integer depth; the two
    agree where `fraction` is depth / num_layers, not for a rounded one such as 0.67.

    Raises:
      ValueError: `fraction` outside (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"the depth fraction must be in (0, 1], got {fraction}")
    return tuple(math.floor(i / fraction) for i in range(round_fraction(num_layers, fraction)))


def keep_mask(num_layers: int, depth: jax.Array | np.integer) -> jax.Array:
    """Mask [L] of the blocks kept at an integer depth: block i iff i = floor(j L / depth).

    `depth` [] is an integer from 1 to L and may be traced; of a NumPy integer the mask is NumPy.
    """
    block = np.arange(num_layers, dtype=np.int32)  # NumPy, so that a concrete depth stays NumPy
    # The only j that can map to block i is ceil(i depth / L).
    candidate = (block * depth + num_layers - 1) // num_layers
    return (candidate * num_layers // depth == block).astype(jnp.float32)


def to_mask(space: ArchSpace, arch: Arch) -> ArchMask:
    """The masks of one genome. Head and neuron rows of dropped blocks follow their genes."""
    head = jnp.arange(space.num_heads, dtype=jnp.int32)[None, :] < arch.heads[:, None]
    neuron = jnp.arange(space.num_neurons, dtype=jnp.int32)[None, :] < arch.neurons[:, None]
    return ArchMask(
        block=keep_mask(space.num_layers, arch.depth),
        head=head.astype(jnp.float32),
        neuron=neuron.astype(jnp.float32),
    )


def canonical(space: ArchSpace, arch: Arch) -> Arch:
    """The one genome that stands for this network: equal networks get equal genomes.

    Genes of blocks that are not kept become the largest choice; in a tied space every gene
    follows block 0, which is always kept.
    """
    if not space.per_layer:
        shape = (space.num_layers,)
        tied = (jnp.broadcast_to(genes[:1], shape) for genes in (arch.heads, arch.neurons))
        return Arch(arch.depth, *tied)
    kept = keep_mask(space.num_layers, arch.depth) > 0
    return Arch(
        depth=arch.depth,
        heads=jnp.where(kept, arch.heads, space.head_choices[-1]),
        neurons=jnp.where(kept, arch.neurons, space.neuron_choices[-1]),
    )


def sample(key: jax.Array, space: ArchSpace, num: int) -> Arch:
    """`num` random genomes [P], every gene uniform over its distinct choices, canonical."""
    # One draw for all genes, because random primitives compile slowly.
    draws = jax.random.uniform(key, (num, 1 + 2 * space.num_layers))
    head_draws, neuron_draws = jnp.split(draws[:, 1:], 2, axis=1)
    depth = _draw(draws[:, 0], space.depth_choices)
    if space.per_layer:
        heads = _draw(head_draws, space.head_choices)
        neurons = _draw(neuron_draws, space.neuron_choices)
    else:
        width = _draw(head_draws, space.widths)
        heads, neurons = width[..., 0], width[..., 1]
    return jax.vmap(lambda arch: canonical(space, arch))(Arch(depth, heads, neurons))


def mutate(key: jax.Array, space: ArchSpace, arch: Arch, rate: float | jax.Array) -> Arch:
    """Each gene, with probability `rate`, becomes another of its choices; canonical.

    Genes of dropped blocks are reset afterwards, so the network may stay as it was.
    """
    draws = jax.random.uniform(key, (2, 1 + 2 * space.num_layers))
    head_draws, neuron_draws = jnp.split(draws[:, 1:], 2, axis=1)
    depth = _change(draws[:, :1], arch.depth[None], _distinct(space.depth_choices), rate)[0]
    if space.per_layer:
        heads = _change(head_draws, arch.heads, _distinct(space.head_choices), rate)
        neurons = _change(neuron_draws, arch.neurons, _distinct(space.neuron_choices), rate)
        return canonical(space, Arch(depth, heads, neurons))
    pairs = _distinct(space.widths)
    same = (pairs[:, 0] == arch.heads[0]) & (pairs[:, 1] == arch.neurons[0])
    indices = jnp.arange(len(pairs), dtype=jnp.int32)
    index = _change(head_draws[:, :1], jnp.argmax(same)[None], indices, rate)[0]
    return canonical(space, Arch(depth, pairs[index, :1], pairs[index, 1:]))


def crossover(key: jax.Array, space: ArchSpace, first: Arch, second: Arch) -> Arch:
    """Uniform crossover: each gene comes from either parent with equal chance; canonical."""
    take = jax.random.bernoulli(key, 0.5, (1 + 2 * space.num_layers,))
    head_take, neuron_take = jnp.split(take[1:], 2)
    if not space.per_layer:  # one coin for heads and neurons, so that a width stays a pair
        neuron_take = head_take
    child = Arch(
        depth=jnp.where(take[0], first.depth, second.depth),
        heads=jnp.where(head_take, first.heads, second.heads),
        neurons=jnp.where(neuron_take, first.neurons, second.neurons),
    )
    return canonical(space, child)


def _change(
    draws: jax.Array, genes: jax.Array, choices: jax.Array, rate: float | jax.Array
) -> jax.Array:
    """Genes [G] of which each becomes, with probability `rate`, a different choice.

    `draws` [2, G] are uniform in [0, 1): whether to change, and to which.
    """
    num = len(choices)
    if num == 1:
        return genes
    index = jnp.searchsorted(choices, genes, method="compare_all")
    changed = choices[(index + 1 + _below(draws[1], num - 1)) % num]
    return jnp.where(draws[0] < rate, changed, genes)


def _draw(draws: jax.Array, choices: Sequence[int] | Sequence[tuple[int, int]]) -> jax.Array:
    """The choices that uniform draws in [0, 1) stand for."""
    return (distinct := _distinct(choices))[_below(draws, len(distinct))]


def _below(draws: jax.Array, num: int) -> jax.Array:
    """Uniform draws in [0, 1) to uniform integers below `num`, int32."""
    return jnp.minimum(jnp.floor(draws * num).astype(jnp.int32), num - 1)


def _distinct(choices: Sequence[int] | Sequence[tuple[int, int]]) -> jax.Array:
    return jnp.asarray(np.unique(np.asarray(choices), axis=0), jnp.int32)
