"""The searched header in comparisons: finding a cell, and training it like any other header.

`acme_jax.edge.search_header` finds the cell. It is then trained from random weights under the
schedule that the hand-made headers have, so that nothing but the header differs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax import Array

from acme_jax import edge, header, header_slots
from acme_jax.blocks import Params
from acme_jax.config import HeaderConfig
from acme_jax.experiments.header_runs import Predict
from acme_jax.experiments.study import EdgeData
from acme_jax.header_layout import HeaderDims
from nas import cells
from nas.cells import Cell, StaticCell


def find_cell(key: Array, data: EdgeData, dims: HeaderDims, config: HeaderConfig) -> StaticCell:
    """The cell that the edge's search would choose; its final training is left out."""
    short = dataclasses.replace(config, final_epochs=1)
    return edge.search_header(key, *data, dims, short).cell


def start(key: Array, cell: StaticCell, dims: HeaderDims) -> Params:
    """Random weights of a cell's header in the uniform form, as the search draws them."""
    return _start(key, cells.from_static(cell), dims)


@functools.partial(jax.jit, static_argnums=2)
def _start(key: Array, cell: Cell, dims: HeaderDims) -> Params:
    return header.gather(header.init_shared(key, dims), cell, dims)


@functools.lru_cache(maxsize=16)
def predictor(dims: HeaderDims) -> Predict:
    """For `header_runs.train`: the choice is a `Cell`, so one program serves all cells."""

    def predict(params: Params, choice: Any, tokens: Array) -> Array:
        return header_slots.apply(params, choice, dims, tokens)

    return predict


def describe(cell: StaticCell, dims: HeaderDims) -> dict[str, Any]:
    """What a row says about the header."""
    return {
        "cell": cells.describe(cell),
        "params": header.num_params(dims, cell),
        "flops": header.num_flops(dims, cell),
    }


def to_list(cell: Cell) -> list[list[int]]:
    """A concrete cell for JSON."""
    return [list(block) for block in cells.to_static(cell)]


def from_list(blocks: list[list[int]]) -> StaticCell:
    """Inverse of `to_list`."""
    return tuple((x, op_x, y, op_y) for x, op_x, y, op_y in blocks)
