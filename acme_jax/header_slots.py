"""The cell header in a uniform form: one program for every cell.

A *slot* is one of the S = 2 B operations of a cell. Here every slot has room for the largest
separable convolution and every node for a loose-end matrix, so all cells have the same shapes
and the cell itself is a traced argument: the header search, and the refinement of all edges'
devices, compile once. `lax.switch` runs only the chosen operation; loop over cells or devices
with `lax.map` or `lax.scan`, because `vmap` would compute every branch.

Gate points in this form, C channels each: the stem; then for each layer both norms of every
slot, whether it has weights or not, and the layer's output. `gate_positions` says where the
gates of the compact form (`header.gate_layout`) stand among them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from acme_jax import header_ops
from acme_jax.blocks import Params
from acme_jax.header_layout import (
    KERNEL_SIZES,
    LARGEST_KERNEL,
    HeaderDims,
    check_cell,
    num_gates,
    weighted_slots,
)
from nas import cells
from nas.cells import OPS, Cell, StaticCell


def num_points(dims: HeaderDims) -> int:
    """Gate points of the uniform form; its gate vector has C times as many entries."""
    return 1 + dims.num_layers * (4 * dims.blocks + 1)


def gate_positions(dims: HeaderDims, cell: StaticCell) -> np.ndarray:
    """Where each compact gate stands in the uniform vector: int [G]."""
    points = [0]
    for layer in range(dims.num_layers):
        first = 1 + layer * (4 * dims.blocks + 1)
        for slot, _ in weighted_slots(check_cell(cell, dims)):
            points += [first + 2 * slot, first + 2 * slot + 1]
        points.append(first + 4 * dims.blocks)
    channels = np.arange(dims.channels)
    positions = (np.asarray(points)[:, None] * dims.channels + channels[None]).reshape(-1)
    assert positions.size == num_gates(dims, cell)
    return positions


def to_slots(params: Params, cell: StaticCell, dims: HeaderDims) -> Params:
    """Compact weights (`header.extract`, `header.init`) in the uniform form, as NumPy.

    Leaves lead with [L, S]; what the cell does not use is zero.
    """
    size, largest, slots = dims.channels, LARGEST_KERNEL, 2 * dims.blocks
    leading = (dims.num_layers, slots, 2)
    ops = {
        "depthwise": np.zeros((*leading, largest, largest, size), np.float32),
        "pointwise": np.zeros((*leading, size, size), np.float32),
        "scale": np.zeros((*leading, size), np.float32),
        "bias": np.zeros((*leading, size), np.float32),
    }
    for slot, op in weighted_slots(check_cell(cell, dims)):
        inner = _inner(KERNEL_SIZES[op])
        for name, leaf in params["ops"][str(slot)].items():
            place = (slice(None), slot, slice(None))
            ops[name][(*place, inner, inner) if name == "depthwise" else place] = leaf
    kernel = np.zeros((dims.num_layers, dims.blocks + 2, size, size), np.float32)
    kernel[:, list(cells.static_loose_ends(cell))] = params["loose"]["kernel"]
    rest = jax.tree.map(np.asarray, {k: v for k, v in params.items() if k != "ops"})
    return {**rest, "ops": ops, "loose": {**rest["loose"], "kernel": kernel}}


def from_slots(params: Params, cell: StaticCell, dims: HeaderDims) -> Params:
    """Inverse of `to_slots`: the compact weights, as NumPy."""
    params = jax.tree.map(np.asarray, params)
    ops = {}
    for slot, op in weighted_slots(check_cell(cell, dims)):
        inner = _inner(KERNEL_SIZES[op])
        leaves = {name: leaf[:, slot] for name, leaf in params["ops"].items()}
        ops[str(slot)] = {**leaves, "depthwise": leaves["depthwise"][:, :, inner, inner]}
    kernel = params["loose"]["kernel"][:, list(cells.static_loose_ends(cell))]
    return {**params, "ops": ops, "loose": {**params["loose"], "kernel": kernel}}


def apply(
    params: Params,
    cell: Cell,
    dims: HeaderDims,
    features: Array,
    *,
    gates: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """Logits [B, num_classes]; as `header.apply`, with a traced cell and the uniform form.

    Args:
      params: of `to_slots`, or gathered from a search supernet.
      cell: inputs [B, 2] and ops [B, 2], int32.
      dims: sizes (static).
      features: [B, T, D].
      gates: [G'] in the uniform layout; ones when None.
      mask: [G'] 0/1; ones when None. Where it is zero the channel is pruned.
    """
    slots = 2 * dims.blocks
    ones = jnp.ones(num_points(dims) * dims.channels)
    both = [ones if values is None else values for values in (gates, mask)]
    points = jnp.stack(both, axis=1).reshape(-1, dims.channels, 2)  # [points, C, gate/mask]
    points = jnp.moveaxis(points, 2, 1)  # [points, 2, C]
    stem = header_ops.stem(params["stem"], dims, features, points[0, 0], points[0, 1])
    layers = points[1:].reshape(dims.num_layers, 2 * slots + 1, 2, dims.channels)
    loose = cells.loose_ends(cell)  # [N]
    index = jnp.arange(slots)
    genes = (cell.inputs.reshape(-1), cell.ops.reshape(-1), index // 2 + 2)  # [S] each

    def run_slot(nodes: Array, step: Any) -> tuple[Array, None]:
        (node, op, target), weights, gate = step
        output = _switch(op, weights, nodes[node], gate)
        return nodes.at[target].add(output), None

    def layer(carry: Any, step: Any) -> tuple[Any, None]:
        weights, gate = step
        older, newer = carry
        blank = jnp.zeros((dims.blocks, *stem.shape))
        nodes = jnp.concatenate([older[None], newer[None], blank])  # [N, B, gh, gw, C]
        slot_gates = gate[:-1].reshape(slots, 2, 2, dims.channels)
        nodes, _ = lax.scan(run_slot, nodes, (genes, weights["ops"], slot_gates))
        active = jax.nn.relu(nodes) * loose[:, None, None, None, None]
        output = jnp.einsum("nbhwc,ncd->bhwd", active, weights["loose"]["kernel"])
        output = header_ops.norm(weights["loose"]["norm"], output, gate[-1, 0], gate[-1, 1])
        return (newer, output), None

    stacked = {"ops": params["ops"], "loose": params["loose"]}
    (_, last), _ = lax.scan(layer, (stem, stem), (stacked, layers))
    return header_ops.classify(params["classifier"], last)


@jax.checkpoint
def _switch(op: Array, weights: Params, inputs: Array, gates: Array) -> Array:
    """Runs one traced operation on [B, gh, gw, C]; gates [norm, gate/mask, C].

    Recomputed in the backward pass: otherwise every branch's residuals would be stored, filled
    with zeros, for each operation, which costs more than the operation. The separable
    convolutions share one branch, because compiling the branches bounds a short search.
    """
    codes = list(KERNEL_SIZES)
    reach = jnp.asarray([size // 2 for size in KERNEL_SIZES.values()])
    offset = jnp.abs(jnp.arange(LARGEST_KERNEL) - LARGEST_KERNEL // 2)

    def separable(grid: Array) -> Array:
        which = jnp.argmax(jnp.asarray(codes) == op)
        inside = jnp.maximum(offset[:, None], offset[None]) <= reach[which]
        kernel = weights["depthwise"] * inside[None, :, :, None]
        loaded = {**weights, "depthwise": kernel}
        return header_ops.sep(loaded, grid, gates[:, 0], gates[:, 1], unroll=False)

    plain = [code for code in range(len(OPS)) if code not in KERNEL_SIZES]
    branches: list[Callable[[Array], Array]] = [
        separable,
        *(functools.partial(header_ops.apply_plain, code) for code in plain),
    ]
    order = [0 if code in KERNEL_SIZES else 1 + plain.index(code) for code in range(len(OPS))]
    return lax.switch(jnp.asarray(order)[op], branches, inputs)


def _inner(size: int) -> slice:
    start = (LARGEST_KERNEL - size) // 2
    return slice(start, start + size)
