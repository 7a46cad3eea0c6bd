"""A chosen header whose pruned channels are really gone: what a device stores and runs.

Refinement prunes by a mask, so that all devices of an edge share one program; here every tensor
loses the rows, columns and channels of the pruned gates. The outputs equal the masked header's,
because a pruned channel emits zero and leaves its norm's statistics, and the size is what
`header_layout.num_params(dims, cell, mask)` counts (both tested). A block adds two producers that
may have kept different channels: it carries the union, and a static index map brings each there.

Parameters, n channels where C were (a point may keep none):
  stem: kernel [D, n], norm: scale [n] and bias [n].
  layers: one dictionary for each of the L stacked cells
    ops: slot -> first and second: depthwise [k, k, n_in], pointwise [n_in, n], scale [n], bias [n]
    loose: node -> kernel [n_node, n]
    norm: scale [n], bias [n]
  classifier: kernel [n, num_classes], bias [num_classes]
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

from acme_jax import header, header_ops
from acme_jax.blocks import Params
from acme_jax.header_layout import (
    KERNEL_SIZES,
    HeaderDims,
    check_cell,
    num_gates,
    slot_genes,
)
from nas import cells
from nas.cells import StaticCell

Channels = tuple[int, ...]
"""Kept channels, ascending, numbered as in the unpruned header."""

Kept = tuple[Channels, ...]
"""The kept channels of every gate point, in the order of `header_layout.gate_layout`; hashable."""

HALVES = ("first", "second")
"""The two repetitions of a separable convolution."""


class Layer(NamedTuple):
    """Which channels flow where in one stacked cell; all static."""

    nodes: tuple[Channels, ...]
    """Of every node: the two inputs, then each block's sum."""
    slots: dict[int, tuple[Channels, Channels, Channels]]
    """Weighted slot -> channels of its input, after its first norm, after its second."""
    output: Channels


def kept_channels(dims: HeaderDims, cell: StaticCell, mask: npt.ArrayLike) -> Kept:
    """The kept channels that a gate mask [G] of zeros and ones says.

    Raises:
      ValueError: an invalid cell, or a mask of another length.
    """
    total, active = num_gates(dims, check_cell(cell, dims)), np.asarray(mask) > 0.5
    if active.shape != (total,):
        raise ValueError(f"mask has shape {active.shape}; this cell has {total} gates")
    points = active.reshape(-1, dims.channels)
    return tuple(tuple(int(i) for i in np.flatnonzero(point)) for point in points)


def to_mask(dims: HeaderDims, kept: Kept) -> np.ndarray:
    """Inverse of `kept_channels`: float32 [G]."""
    mask = np.zeros((len(kept), dims.channels), np.float32)
    for point, channels in enumerate(kept):
        mask[point, list(channels)] = 1.0
    return mask.reshape(-1)


@functools.lru_cache(maxsize=256)
def layout(dims: HeaderDims, cell: StaticCell, kept: Kept) -> tuple[Channels, tuple[Layer, ...]]:
    """The stem's channels and every layer's flow.

    Raises:
      ValueError: an invalid cell, or channels that are not those of its gate points.
    """
    size, expected = dims.channels, num_gates(dims, check_cell(cell, dims)) // dims.channels
    if len(kept) != expected:
        raise ValueError(f"kept channels of {len(kept)} gate points; this cell has {expected}")
    for point, channels in enumerate(kept):
        if list(channels) != sorted({i for i in channels if 0 <= i < size}):
            raise ValueError(
                f"gate point {point} keeps channels {list(channels)}; expected ascending, "
                f"distinct numbers from 0 to {size - 1}"
            )
    points, layers = iter(kept), []
    older = newer = stem = next(points)
    for _ in range(dims.num_layers):
        nodes, slots = [older, newer], {}
        for block in range(dims.blocks):
            carried: set[int] = set()
            for slot in (2 * block, 2 * block + 1):
                node, op = slot_genes(cell)[slot]
                channels = nodes[node]
                if op in KERNEL_SIZES:
                    slots[slot] = (channels, next(points), next(points))
                    channels = slots[slot][2]
                carried |= set(channels)
            nodes.append(tuple(sorted(carried)))
        older, newer = newer, next(points)
        layers.append(Layer(tuple(nodes), slots, newer))
    return stem, tuple(layers)


def prune(params: Params, cell: StaticCell, dims: HeaderDims, kept: Kept) -> Params:
    """The dense weights out of the compact ones (`header.extract`, `header_slots.from_slots`).

    Args:
      params: NumPy leaves give NumPy leaves.
      cell: the chosen cell.
      dims: sizes.
      kept: from `kept_channels`.

    Raises:
      ValueError: as `layout`.
    """
    stem, layers = layout(dims, cell, kept)
    last = _index(layers[-1].output)
    dense = []
    for place, layer in enumerate(layers):
        output, ops = _index(layer.output), {}
        for slot, channels in layer.slots.items():
            weights = {name: leaf[place] for name, leaf in params["ops"][str(slot)].items()}
            ops[str(slot)] = {
                name: _prune_half(
                    {key: leaf[half] for key, leaf in weights.items()},
                    _index(channels[half]),
                    _index(channels[half + 1]),
                )
                for half, name in enumerate(HALVES)
            }
        kernels = params["loose"]["kernel"][place]
        loose = {
            str(node): kernels[index][_index(layer.nodes[node])][:, output]
            for index, node in enumerate(cells.static_loose_ends(cell))
        }
        norm = {name: leaf[place][output] for name, leaf in params["loose"]["norm"].items()}
        dense.append({"ops": ops, "loose": loose, "norm": norm})
    return {
        "stem": {
            "kernel": params["stem"]["kernel"][:, _index(stem)],
            "norm": {name: leaf[_index(stem)] for name, leaf in params["stem"]["norm"].items()},
        },
        "layers": dense,
        "classifier": {
            "kernel": params["classifier"]["kernel"][last],
            "bias": params["classifier"]["bias"],
        },
    }


def shapes(cell: StaticCell, dims: HeaderDims, kept: Kept) -> Params:
    """The tree that `prune` gives, as `jax.ShapeDtypeStruct`s; arguments and errors likewise."""

    def make() -> Params:
        full = header.init(jax.random.key(0), cell, dims)
        return prune(full, cell, dims, kept)

    result: Params = jax.eval_shape(make)
    return result


def apply(params: Params, cell: StaticCell, dims: HeaderDims, kept: Kept, features: Array) -> Array:
    """Logits [B, num_classes], equal to `header.apply` with the mask.

    Args:
      params: from `prune`.
      cell: the chosen cell (static).
      dims: sizes of the unpruned header (static).
      kept: from `kept_channels` (static).
      features: [B, T, D], T = grid_height * grid_width row-major tokens.

    Raises:
      ValueError: as `layout`, or features that do not fit `dims`.
    """
    stem, layers = layout(dims, cell, kept)
    if features.shape[1:] != (dims.grid_height * dims.grid_width, dims.embed_dim):
        raise ValueError(
            f"features have shape {features.shape}; expected [B, "
            f"{dims.grid_height * dims.grid_width}, {dims.embed_dim}]"
        )
    hidden = header_ops.norm(
        params["stem"]["norm"], features @ params["stem"]["kernel"], *_ones(stem)
    )
    grid = hidden.reshape(features.shape[0], dims.grid_height, dims.grid_width, len(stem))
    older = newer = grid
    for weights, layer in zip(params["layers"], layers, strict=True):
        older, newer = newer, _apply_layer(weights, cell, layer, older, newer)
    return header_ops.classify(params["classifier"], newer)


def _apply_layer(
    weights: Params, cell: StaticCell, layer: Layer, older: Array, newer: Array
) -> Array:
    nodes, genes = [older, newer], slot_genes(cell)
    for block in range(len(cell)):
        sides = []
        for slot in (2 * block, 2 * block + 1):
            node, op = genes[slot]
            channels, side = layer.nodes[node], nodes[node]
            if slot in layer.slots:
                side = _apply_sep(weights["ops"][str(slot)], side, layer.slots[slot])
                channels = layer.slots[slot][2]
            else:
                side = header_ops.apply_plain(op, side)
            sides.append(_spread(side, channels, layer.nodes[block + 2]))
        nodes.append(sides[0] + sides[1])
    mixed = [
        jax.nn.relu(nodes[node]) @ weights["loose"][str(node)]
        for node in cells.static_loose_ends(cell)
    ]
    return header_ops.norm(weights["norm"], sum(mixed[1:], mixed[0]), *_ones(layer.output))


def _apply_sep(weights: Params, grid: Array, channels: tuple[Channels, ...]) -> Array:
    for name, inputs, output in zip(HALVES, channels[:2], channels[1:], strict=True):
        half = weights[name]
        if inputs:
            active = jax.nn.relu(grid)
            hidden = header_ops.depthwise(half["depthwise"], active) @ half["pointwise"]
        else:  # a norm of nothing still emits its bias
            hidden = jnp.zeros((*grid.shape[:-1], len(output)), grid.dtype)
        grid = header_ops.norm(half, hidden, *_ones(output))
    return grid


def _spread(grid: Array, channels: Channels, union: Channels) -> Array:
    """Brings a producer's channels [..., n] to their places among a sum's [..., m]; else zero."""
    if channels == union:
        return grid
    blank = jnp.zeros((*grid.shape[:-1], 1), grid.dtype)
    return jnp.concatenate([grid, blank], axis=-1)[..., source_channels(channels, union)]


def source_channels(channels: Channels, union: Channels) -> np.ndarray:
    """For each of the union's channels its place among `channels`, or their number if absent."""
    place = {channel: index for index, channel in enumerate(channels)}
    return np.array([place.get(channel, len(channels)) for channel in union], np.int32)


def _ones(channels: Channels) -> tuple[Array, Array]:
    """Gate and mask of a norm over kept channels only."""
    return jnp.ones(len(channels)), jnp.ones(len(channels))


def _index(channels: Channels) -> np.ndarray:
    return np.asarray(channels, np.int32)


def _prune_half(half: Params, inputs: np.ndarray, outputs: np.ndarray) -> Params:
    return {
        "depthwise": half["depthwise"][:, :, inputs],
        "pointwise": half["pointwise"][inputs][:, outputs],
        "scale": half["scale"][outputs],
        "bias": half["bias"][outputs],
    }
