"""What a header looks like without computing it: sizes, gate points, parameters, FLOPs.

Host functions on static values; their names are also in `acme_jax.header`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from acme_jax.config import ConfigError
from nas import cells
from nas.cells import OPS, StaticCell

KERNEL_SIZES = {OPS.index("sep1x1"): 1, OPS.index("sep3x3"): 3, OPS.index("sep5x5"): 5}
"""Operation code -> depthwise kernel size, for the operations that have weights."""

LARGEST_KERNEL = max(KERNEL_SIZES.values())


@dataclasses.dataclass(frozen=True)
class HeaderDims:
    """Static sizes of a header.

    Raises:
      ConfigError: a size is not positive.
    """

    grid_height: int
    grid_width: int
    embed_dim: int
    channels: int
    num_classes: int
    blocks: int
    num_layers: int
    """Stacked cells: repeats + 2."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(
                    f"HeaderDims.{field.name} must be positive, got {getattr(self, field.name)}"
                )


class GatePoint(NamedTuple):
    """One run of C gates in the flat gate vector: `gates[start:stop]`."""

    name: str
    start: int
    stop: int


GateLayout = tuple[GatePoint, ...]


def gate_layout(dims: HeaderDims, cell: StaticCell) -> GateLayout:
    """Name and range of every gate point, covering 0..G without gaps."""
    names = ["stem"]
    for layer in range(dims.num_layers):
        for slot, op in weighted_slots(cell):
            side = f"layer{layer}.block{slot // 2}.{'xy'[slot % 2]}.{OPS[op]}"
            names += [f"{side}.first", f"{side}.second"]
        names.append(f"layer{layer}.output")
    size = dims.channels
    return tuple(GatePoint(name, i * size, (i + 1) * size) for i, name in enumerate(names))


def num_gates(dims: HeaderDims, cell: StaticCell) -> int:
    """G, the length of the flat gate vector."""
    return dims.channels * (1 + dims.num_layers * (2 * len(weighted_slots(cell)) + 1))


def slot_genes(cell: StaticCell) -> tuple[tuple[int, int], ...]:
    """(input node, operation) of every slot; slot = 2 * block + side."""
    return tuple(pair for block in cell for pair in (block[:2], block[2:]))


def weighted_slots(cell: StaticCell) -> tuple[tuple[int, int], ...]:
    """(slot, operation) of the separable convolutions."""
    return tuple((s, op) for s, (_, op) in enumerate(slot_genes(cell)) if op in KERNEL_SIZES)


def check_cell(cell: StaticCell, dims: HeaderDims) -> StaticCell:
    """Returns the cell.

    Raises:
      ValueError: it is invalid or has another number of blocks than `dims`.
    """
    cells.validate(cell)
    if len(cell) != dims.blocks:
        raise ValueError(f"the cell has {len(cell)} blocks; HeaderDims says {dims.blocks}")
    return cell


def num_params(dims: HeaderDims, cell: StaticCell, mask: npt.ArrayLike | None = None) -> int:
    """Parameters of the chosen header.

    Args:
      dims: sizes.
      cell: the chosen cell.
      mask: [G] 0/1; with it, only what is left after removing pruned channels, rows and columns
        of the tensors that touch them included. A sum of several producers keeps a channel that
        any of them keeps, so the count is what a dense export really needs.

    Raises:
      ValueError: an invalid cell, or a mask of another length.
    """
    return int(sum(piece.params for piece in _pieces(dims, cell, mask)))


def max_num_params(dims: HeaderDims) -> int:
    """Parameters of the largest header of these sizes: all 5 x 5, no block's output reused."""
    largest = OPS.index("sep5x5")
    return num_params(dims, ((0, largest, 1, largest),) * dims.blocks)


def num_flops(dims: HeaderDims, cell: StaticCell, mask: npt.ArrayLike | None = None) -> int:
    """Forward FLOPs for one example, multiply-add = 2; arguments and errors as `num_params`.

    Counts matrix products and depthwise taps (padding included); norms, pools, activations and
    sums are left out.
    """
    return int(sum(piece.flops for piece in _pieces(dims, cell, mask)))


class _Piece(NamedTuple):
    params: int
    flops: int


def _pieces(dims: HeaderDims, cell: StaticCell, mask: npt.ArrayLike | None) -> Iterator[_Piece]:
    """Every tensor's share, following which channels [C] each node still carries."""
    total = num_gates(dims, check_cell(cell, dims))
    active = np.ones(total, bool) if mask is None else np.asarray(mask) > 0.5
    if active.shape != (total,):
        raise ValueError(f"mask has shape {active.shape}; this cell has {total} gates")
    points = iter(active.reshape(-1, dims.channels))
    tokens = dims.grid_height * dims.grid_width

    def matrix(rows: int, columns: int) -> _Piece:
        return _Piece(rows * columns, 2 * tokens * rows * columns)

    def norm(size: int) -> _Piece:
        return _Piece(2 * size, 0)

    older = newer = next(points)
    yield matrix(dims.embed_dim, older.sum())
    yield norm(older.sum())
    for _ in range(dims.num_layers):
        nodes = [older, newer]
        for block in cell:
            carried = np.zeros(dims.channels, bool)
            for node, op in (block[:2], block[2:]):
                channels = nodes[node]
                for _ in range(2 if op in KERNEL_SIZES else 0):
                    output = next(points)
                    yield matrix(KERNEL_SIZES[op] ** 2, channels.sum())
                    yield matrix(channels.sum(), output.sum())
                    yield norm(output.sum())
                    channels = output
                carried = carried | channels
            nodes.append(carried)
        output = next(points)
        for node in cells.static_loose_ends(cell):
            yield matrix(nodes[node].sum(), output.sum())
        yield norm(output.sum())
        older, newer = newer, output
    weights = newer.sum() * dims.num_classes
    yield _Piece(weights + dims.num_classes, 2 * weights)
