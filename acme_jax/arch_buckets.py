"""Sub-networks that share one dense program: bucket shapes, slicing to them, and back.

A bucket's shape is the smallest that holds all of its members. What they have in common is
dense; a block that only some keep is skipped for the others, and a narrower member is masked
inside. Shape letters: B batch, L layers, C clients, H heads, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from acme_jax import encoders, slicing
from acme_jax.blocks import Block, Params
from acme_jax.encoders import EncoderConfig
from acme_jax.slicing import kept_blocks
from nas.arch import Arch, keep_mask
from nas.cost import ModelDims


class Shape(NamedTuple):
    """A bucket's static shape, and what its members have in common."""

    layers: tuple[int, ...]  # blocks that any member keeps, ascending
    heads: tuple[int, ...]  # of each of those, the most that any member keeps
    neurons: tuple[int, ...]
    kept_by_all: tuple[bool, ...]  # every member keeps this block
    one_width: tuple[bool, ...]  # those that keep it have equal heads and neurons


def common_shape(archs: Sequence[Arch]) -> Shape:
    """The smallest shape that holds every one of some concrete genomes."""
    kept = [set(kept_blocks(arch)) for arch in archs]
    layers = tuple(sorted(set().union(*kept)))
    holders = [[arch for arch, own in zip(archs, kept, strict=True) if i in own] for i in layers]

    def sizes(layer: int, holding: list[Arch]) -> set[tuple[int, int]]:
        return {(int(arch.heads[layer]), int(arch.neurons[layer])) for arch in holding}

    found = [sizes(layer, holding) for layer, holding in zip(layers, holders, strict=True)]
    return Shape(
        layers,
        tuple(max(heads for heads, _ in pairs) for pairs in found),
        tuple(max(neurons for _, neurons in pairs) for pairs in found),
        tuple(len(holding) == len(archs) for holding in holders),
        tuple(len(pairs) == 1 for pairs in found),
    )


def assign_shapes(
    archs: Sequence[Arch], dims: ModelDims, max_buckets: int | None = None
) -> list[Shape]:
    """A bucket shape for every client.

    Equal genomes share a bucket. While there are more than `max_buckets`, the two whose union
    adds the least work are joined; work counts every member's kept blocks at the union's
    widths. Each bucket is a program to compile, each join wastes work on masks.

    Args:
      archs: the clients' concrete genomes, canonical or not.
      dims: sizes of the full network.
      max_buckets: None: one for each distinct genome.

    Returns:
      The shape of each client's bucket, in order; equal shapes are one bucket.

    Raises:
      ValueError: `max_buckets` below 1, or no clients.
    """
    if not archs or (max_buckets is not None and max_buckets < 1):
        raise ValueError(
            f"need at least one client and one bucket, got {len(archs)} and {max_buckets}"
        )
    groups: dict[Shape, list[int]] = {}
    for client, arch in enumerate(archs):
        groups.setdefault(common_shape([arch]), []).append(client)
    members = list(groups.values())

    def work(clients: list[int]) -> float:
        own = [archs[client] for client in clients]
        return sum(_work(common_shape(own), arch, dims) for arch in own)

    costs = [work(group) for group in members]
    joined: dict[tuple[int, ...], float] = {}  # a pair's work, by its clients
    while max_buckets is not None and len(members) > max_buckets:
        best, added = (0, 1), np.inf
        for i, first in enumerate(members):
            for j in range(i + 1, len(members)):
                together = tuple(first + members[j])
                if together not in joined:
                    joined[together] = work(list(together))
                if (extra := joined[together] - costs[i] - costs[j]) < added:
                    best, added = (i, j), extra
        i, j = best
        members[i] = members[i] + members.pop(j)
        costs.pop(j)
        costs[i] = joined[tuple(members[i])]
    shapes = {
        client: common_shape([archs[member] for member in group])
        for group in members
        for client in group
    }
    return [shapes[client] for client in range(len(archs))]


def _work(shape: Shape, arch: Arch, dims: ModelDims) -> float:
    """Multiply-adds a token of one member's kept blocks at a bucket's widths."""
    kept = set(kept_blocks(arch))
    per_head = 4 * dims.embed_dim * dims.head_size + 2 * dims.num_tokens * dims.head_size
    return sum(
        float(heads * per_head + neurons * 2 * dims.embed_dim)
        for layer, heads, neurons in zip(shape.layers, shape.heads, shape.neurons, strict=True)
        if layer in kept
    )


def slice_blocks(params: Params, shape: Shape) -> Params:
    """Parameters at a bucket's shape; `blocks` becomes a list of dense blocks."""
    return slicing.slice_blocks(params, shape.layers, shape.heads, shape.neurons)


def _run_block(
    block: Block, weights: Params, masks: tuple[Array | None, ...], keys: Array | None, x: Array
) -> Array:
    return jnp.asarray(block.apply({"params": weights}, x, *masks, key_mask=keys))


def put_back(params: Params, sliced: Params, shape: Shape) -> Params:
    """The full parameters with a slice of them replaced: inverse of `slice_blocks`."""
    stacked = params["blocks"]
    for layer, block in zip(shape.layers, sliced["blocks"], strict=True):

        def replace(leaf: Array, part: Array, layer: int = layer) -> Array:
            return lax.dynamic_update_slice(leaf, part[None], (layer, *([0] * part.ndim)))

        stacked = jax.tree.map(replace, stacked, block)
    return {**sliced, "blocks": stacked}


def apply_sliced(
    sliced: Params, inputs: Array, config: EncoderConfig, shape: Shape, arch: Arch
) -> Array:
    """Logits [B, classes] of one member of a bucket.

    A block that this member lacks is skipped, not masked, unless clients are vmapped.

    Args:
      sliced: from `slice_blocks`.
      inputs: images [B, height, width, channels] or token ids [B, T].
      config: of the full network.
      shape: of the bucket.
      arch: of the member; may be traced.
    """
    sliced, keys = encoders.cast(sliced, config), encoders.key_mask(inputs, config)
    x = encoders.embed(sliced, inputs, config)
    keep = keep_mask(config.num_layers, arch.depth) > 0
    for place, weights in enumerate(sliced["blocks"]):
        layer, heads, neurons = (part[place] for part in shape[:3])
        block = encoders.make_block(config, heads, neurons)
        masks: tuple[Array, ...] = ()
        if not shape.one_width[place]:
            masks = (
                (jnp.arange(heads) < arch.heads[layer]).astype(x.dtype),
                (jnp.arange(neurons) < arch.neurons[layer]).astype(x.dtype),
            )
        run = partial(_run_block, block, weights, masks, keys)
        x = run(x) if shape.kept_by_all[place] else lax.cond(keep[layer], run, lambda x: x, x)
    return encoders.classify(sliced, x, inputs, config)
