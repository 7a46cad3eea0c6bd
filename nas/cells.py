"""The header's cell space: genome, sampling, validity, counting.

A cell is a small directed graph of B blocks (ENAS, Pham et al. 2018, micro search; ACME,
ICDCS 2025). Nodes 0 and 1 are the cell's two inputs; block b makes node b + 2 from two
earlier nodes, `op_x(x) + op_y(y)`. Nodes that no block reads are the loose ends; the cell's
output combines them.

Two forms of the same genome: `Cell` (int32 arrays, traceable, for searching) and
`StaticCell` (nested tuples, hashable, for compiling one chosen cell).
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

OPS = ("sep3x3", "sep5x5", "avgpool3", "maxpool3", "sep1x1", "identity")
"""Names of the operations, in the order of their codes."""

StaticCell = tuple[tuple[int, int, int, int], ...]
"""`(x, op_x, y, op_y)` for each block: hashable, so usable as a jit static argument."""


@dataclasses.dataclass(frozen=True)
class CellSpace:
    """All cells of `num_blocks` blocks.

    Raises:
      ValueError: `num_blocks` is not positive.
    """

    num_blocks: int

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ValueError(
                f"CellSpace.num_blocks must be at least 1, got {self.num_blocks}; "
                "a cell without blocks has no output"
            )

    @property
    def num_nodes(self) -> int:
        """Nodes of a cell: its two inputs and one for each block."""
        return self.num_blocks + 2


class Cell(NamedTuple):
    """A cell genome; several cells add leading axes."""

    inputs: jax.Array  # [B, 2] int32, the node that each side of a block reads
    ops: jax.Array  # [B, 2] int32, the code in OPS of each side's operation


def num_cells(space: CellSpace) -> int:
    """Number of genomes, `prod_b ((b + 2) * 6) ** 2` (ACME; ENAS section 2.3).

    Genomes are counted, not graphs: swapping a block's two sides gives another genome of the
    same graph.
    """
    return math.prod(((b + 2) * len(OPS)) ** 2 for b in range(space.num_blocks))


def sample(key: jax.Array, space: CellSpace) -> Cell:
    """Draws one cell uniformly from the space; traceable, and `vmap` over keys for many."""
    input_key, op_key = jax.random.split(key)
    shape = (space.num_blocks, 2)
    num_inputs = jnp.arange(2, space.num_nodes)[:, None]
    return Cell(
        inputs=jax.random.randint(input_key, shape, 0, num_inputs),
        ops=jax.random.randint(op_key, shape, 0, len(OPS)),
    )


def is_valid(cell: Cell) -> jax.Array:
    """Whether each block reads only earlier nodes and known operations; bool [], traceable."""
    num_inputs = jnp.arange(cell.inputs.shape[0])[:, None] + 2
    inputs_valid = (cell.inputs >= 0) & (cell.inputs < num_inputs)
    ops_valid = (cell.ops >= 0) & (cell.ops < len(OPS))
    return (inputs_valid & ops_valid).all()


def validate(cell: StaticCell) -> None:
    """Checks a static cell.

    Raises:
      ValueError: no blocks, a block of another length, a node that does not exist yet, or an
        unknown operation.
    """
    if not cell:
        raise ValueError("the cell has no blocks; give at least one (x, op_x, y, op_y)")
    for index, block in enumerate(cell):
        if len(block) != 4:
            raise ValueError(f"block {index} is {block}; expected four integers (x, op_x, y, op_y)")
        for node, op in (block[:2], block[2:]):
            if not 0 <= node < index + 2:
                raise ValueError(
                    f"block {index} reads node {node}; it can read nodes 0 to {index + 1}"
                )
            if not 0 <= op < len(OPS):
                raise ValueError(
                    f"block {index} has operation {op}; expected 0 to {len(OPS) - 1} "
                    f"({', '.join(OPS)})"
                )


def loose_ends(cell: Cell) -> jax.Array:
    """Marks the nodes that no block reads: float32 0/1, [B + 2], traceable.

    As in ENAS the cell's own inputs count too, so that every node reaches the output: a cell
    that ignores an input passes it on. The last block is always a loose end.
    """
    num_nodes = cell.inputs.shape[0] + 2
    used = jnp.zeros(num_nodes, jnp.float32).at[cell.inputs.reshape(-1)].max(1.0)
    return 1.0 - used


def static_loose_ends(cell: StaticCell) -> tuple[int, ...]:
    """Indices of the loose ends of a static cell, ascending (see `loose_ends`)."""
    used = {node for block in cell for node in (block[0], block[2])}
    return tuple(node for node in range(len(cell) + 2) if node not in used)


def to_static(cell: Cell) -> StaticCell:
    """Concrete `Cell` to its hashable form (host only)."""
    inputs, ops = np.asarray(cell.inputs), np.asarray(cell.ops)
    return tuple(
        (int(x), int(op_x), int(y), int(op_y))
        for (x, y), (op_x, op_y) in zip(inputs, ops, strict=True)
    )


def from_static(cell: StaticCell) -> Cell:
    """Inverse of `to_static`.

    Raises:
      ValueError: the cell is invalid (see `validate`).
    """
    validate(cell)
    genes = np.asarray(cell, np.int32)  # [B, 4]
    return Cell(inputs=jnp.asarray(genes[:, 0::2]), ops=jnp.asarray(genes[:, 1::2]))


def describe(cell: StaticCell) -> str:
    """One readable line, for example `n2 = sep3x3(n0) + identity(n1)`."""
    return "; ".join(
        f"n{index + 2} = {OPS[op_x]}(n{x}) + {OPS[op_y]}(n{y})"
        for index, (x, op_x, y, op_y) in enumerate(cell)
    )
