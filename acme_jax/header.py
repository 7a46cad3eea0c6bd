"""The cell header on a backbone's tokens, in two forms with the same arithmetic.

* The search supernet (`init_shared`, `apply_shared`) holds weights for every operation on every
  node; the cell is a traced argument and `lax.switch` runs only the chosen operations. Loop over
  cells with `lax.scan` or `lax.map`: `vmap` would compute every branch.
* The chosen header (`extract` or `init`, then `apply`) holds the used weights only; the cell is
  static. Its gates can be pruned.

Structure (ENAS micro search; ACME, ICDCS 2025, header generation): a 1 x 1 stem with norm, then
one cell stacked `num_layers` times with weights of its own in each layer, whose inputs are the
outputs of the two layers before (at first both the stem), then ReLU, global average pool and
a linear classifier. Deviations: LayerNorm over channels instead of BatchNorm; loose ends have one
[C, C] matrix for each node, so that a node's weights do not move when other nodes come and go;
no channel dropout.

Gate points, C channels each, in the order of the flat gate vector [G]: the stem; then for each
layer, both norms of every separable convolution in block order (x before y), and the layer's
output. Layers are stacked leaves [L, ...]; the supernet scans over them, the chosen header
unrolls them, which runs faster and compiles as fast at these depths.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from acme_jax import header_ops, header_slots
from acme_jax.blocks import Params
from acme_jax.header_layout import (
    KERNEL_SIZES,
    LARGEST_KERNEL,
    GateLayout,
    GatePoint,
    HeaderDims,
    check_cell,
    gate_layout,
    num_flops,
    num_gates,
    num_params,
    slot_genes,
    weighted_slots,
)
from nas import cells
from nas.cells import Cell, StaticCell

__all__ = [
    "GateLayout",
    "GatePoint",
    "HeaderDims",
    "apply",
    "apply_linear",
    "apply_shared",
    "extract",
    "gate_layout",
    "gather",
    "init",
    "init_linear",
    "init_shared",
    "num_flops",
    "num_gates",
    "num_params",
]


def init_shared(key: jax.Array, dims: HeaderDims) -> Params:
    """Draws the search supernet's weights.

    Operation leaves lead with [L, S, N, 3]: layer, slot (2 * block + side), input node and
    separable convolution, in the order of `KERNEL_SIZES`; all kernels are stored
    5 x 5 and masked to their size. Nodes that a block cannot read keep unused weights. Both make
    all slots alike, so that one piece of program serves them.
    """
    frame_key, op_key = jax.random.split(key)
    num_nodes = dims.blocks + 2
    leading = (dims.num_layers, 2 * dims.blocks, num_nodes, len(KERNEL_SIZES))
    ops = header_ops.init_sep(op_key, leading, LARGEST_KERNEL, dims.channels)
    return {"ops": ops, **_init_frame(frame_key, dims, num_nodes)}


def apply_shared(params: Params, cell: Cell, dims: HeaderDims, features: jax.Array) -> jax.Array:
    """Logits [B, num_classes] of the supernet with a traced cell; features [B, T, D]."""
    return header_slots.apply(gather(params, cell, dims), cell, dims, features)


def gather(shared: Params, cell: Cell, dims: HeaderDims) -> Params:
    """The weights that a traced cell uses, in the uniform form of `acme_jax.header_slots`."""
    nodes, codes = cell.inputs.reshape(-1), cell.ops.reshape(-1)  # [S] each
    which = jnp.argmax(jnp.asarray(list(KERNEL_SIZES))[None] == codes[:, None], axis=1)
    slots = jnp.arange(2 * dims.blocks)
    ops = {name: leaf[:, slots, nodes, which] for name, leaf in shared["ops"].items()}
    return {**shared, "ops": ops}


def extract(shared: Params, cell: StaticCell, dims: HeaderDims) -> Params:
    """The chosen header's weights out of the supernet's; unused ones are left behind."""
    genes, codes = slot_genes(cell), list(KERNEL_SIZES)
    ops = {}
    for slot, op in weighted_slots(check_cell(cell, dims)):
        place = (slice(None), slot, genes[slot][0], codes.index(op))
        leaves = {name: leaf[place] for name, leaf in shared["ops"].items()}
        size = KERNEL_SIZES[op]
        start = (LARGEST_KERNEL - size) // 2
        inner = slice(start, start + size)
        ops[str(slot)] = {**leaves, "depthwise": leaves["depthwise"][:, :, inner, inner]}
    loose = np.asarray(cells.static_loose_ends(cell))
    kernel = shared["loose"]["kernel"][:, loose]
    return {**shared, "ops": ops, "loose": {**shared["loose"], "kernel": kernel}}


def init(key: jax.Array, cell: StaticCell, dims: HeaderDims) -> Params:
    """Draws a chosen header's weights from scratch, with the structure of `extract`."""
    slots = weighted_slots(check_cell(cell, dims))
    key, *op_keys = jax.random.split(key, 1 + len(slots))
    ops = {
        str(slot): header_ops.init_sep(part, (dims.num_layers,), KERNEL_SIZES[op], dims.channels)
        for part, (slot, op) in zip(op_keys, slots, strict=True)
    }
    return {"ops": ops, **_init_frame(key, dims, len(cells.static_loose_ends(cell)))}


def apply(
    params: Params,
    cell: StaticCell,
    dims: HeaderDims,
    features: jax.Array,
    *,
    gates: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Logits [B, num_classes] of a chosen header.

    Args:
      params: from `extract` or `init`.
      cell: the chosen cell (static).
      dims: sizes (static).
      features: [B, T, D], T = grid_height * grid_width row-major tokens.
      gates: [G] multiplies each gated channel after its norm; ones when None. A gate's
        importance is the gradient here.
      mask: [G] 0/1; a zero prunes the channel: it emits zero, leaves the norm's statistics and
        gives its gate a zero gradient. Ones when None.

    Raises:
      ValueError: sizes that do not fit `dims` or the cell.
    """
    slots, genes = dict(weighted_slots(check_cell(cell, dims))), slot_genes(cell)
    loose = cells.static_loose_ends(cell)
    points = _gate_points(dims, cell, gates, mask)
    stem = header_ops.stem(params["stem"], dims, features, points[0][0], points[1][0])
    # [2, L, points of a layer, C]: gates, then masks
    layers = points[:, 1:].reshape(2, dims.num_layers, -1, dims.channels)

    def layer(carry: Any, step: Any) -> tuple[Any, None]:
        weights, gate, keep = step
        nodes, point = list(carry), 0
        for block in range(dims.blocks):
            sides = []
            for slot in (2 * block, 2 * block + 1):
                node, op = genes[slot]
                if slot in slots:
                    span = slice(point, point + 2)
                    op_weights = weights["ops"][str(slot)]
                    sides.append(header_ops.sep(op_weights, nodes[node], gate[span], keep[span]))
                    point += 2
                else:
                    sides.append(header_ops.apply_plain(op, nodes[node]))
            nodes.append(sides[0] + sides[1])
        frame = weights["loose"]
        mixed = [jax.nn.relu(nodes[n]) @ frame["kernel"][i] for i, n in enumerate(loose)]
        output = header_ops.norm(frame["norm"], sum(mixed[1:], mixed[0]), gate[-1], keep[-1])
        return (nodes[1], output), None

    stacked = {"ops": params["ops"], "loose": params["loose"]}
    (_, last), _ = lax.scan(layer, (stem, stem), (stacked, layers[0], layers[1]), unroll=True)
    return header_ops.classify(params["classifier"], last)


def init_linear(key: jax.Array, embed_dim: int, num_classes: int) -> Params:
    """Weights of the linear baseline header: norm [D] and classifier [D, num_classes]."""
    return {
        "norm": header_ops.init_norm((embed_dim,)),
        "classifier": _init_classifier(jax.random.normal(key, (embed_dim, num_classes))),
    }


def apply_linear(params: Params, features: jax.Array) -> jax.Array:
    """Logits [B, num_classes]: LayerNorm, mean over tokens, linear; features [B, T, D]."""
    ones = jnp.ones(features.shape[-1])
    pooled = header_ops.norm(params["norm"], features, ones, ones).mean(axis=1)
    return header_ops.linear(params["classifier"], pooled)


def _gate_points(
    dims: HeaderDims, cell: StaticCell, gates: jax.Array | None, mask: jax.Array | None
) -> jax.Array:
    """[2, G / C, C]: gates, then masks."""
    ones = jnp.ones(num_gates(dims, cell))
    both = [ones if values is None else values for values in (gates, mask)]
    for name, values in zip(("gates", "mask"), both, strict=True):
        if values.shape != ones.shape:
            raise ValueError(
                f"{name} has shape {values.shape}; this cell has {ones.shape[0]} gates"
            )
    return jnp.stack(both).reshape(2, -1, dims.channels)


def _init_frame(key: jax.Array, dims: HeaderDims, num_loose: int) -> Params:
    """Stem, loose-end matrices and classifier: all but the operations."""
    size, layers = dims.channels, dims.num_layers
    stem, loose, classifier = header_ops.normals(
        key, (dims.embed_dim, size), (layers, num_loose, size, size), (size, dims.num_classes)
    )
    return {
        "stem": {
            "kernel": stem / math.sqrt(dims.embed_dim),
            "norm": header_ops.init_norm((size,)),
        },
        "loose": {
            "kernel": header_ops.near_identity(loose),
            "norm": header_ops.init_norm((layers, size)),
        },
        "classifier": _init_classifier(classifier),
    }


def _init_classifier(noise: jax.Array) -> Params:
    size, num_classes = noise.shape
    return {"kernel": noise / math.sqrt(size), "bias": jnp.zeros(num_classes)}
