"""Cell space: counting against enumeration, sampling, validity, loose ends by plain loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas import cells
from nas.cells import OPS, Cell, CellSpace


def enumerate_cells(num_blocks):
    blocks = [
        itertools.product(range(b + 2), range(len(OPS)), range(b + 2), range(len(OPS)))
        for b in range(num_blocks)
    ]
    return itertools.product(*blocks)


def test_num_cells_counts_the_enumeration():
    assert cells.num_cells(CellSpace(1)) == sum(1 for _ in enumerate_cells(1)) == 144
    assert cells.num_cells(CellSpace(2)) == 144 * 18**2 == sum(1 for _ in enumerate_cells(2))
    assert cells.num_cells(CellSpace(3)) == 144 * 18**2 * 24**2


def test_samples_are_valid_and_reach_every_choice():
    space = CellSpace(3)
    drawn = jax.jit(jax.vmap(lambda key: cells.sample(key, space)))(
        jax.random.split(jax.random.key(0), 2000)
    )
    assert drawn.inputs.shape == drawn.ops.shape == (2000, 3, 2)
    assert drawn.inputs.dtype == drawn.ops.dtype == jnp.int32
    assert bool(jax.vmap(cells.is_valid)(drawn).all())
    for block in range(3):
        counts = np.bincount(np.asarray(drawn.inputs[:, block]).ravel(), minlength=block + 2)
        np.testing.assert_allclose(counts / 4000, 1 / (block + 2), atol=0.04)
    np.testing.assert_allclose(np.bincount(np.asarray(drawn.ops).ravel()) / 12000, 1 / 6, atol=0.02)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ((2, 0, 0, 0), "reads node 2"),
        ((0, 0, -1, 0), "reads node -1"),
        ((0, 6, 0, 0), "operation 6"),
        ((0, 0, 0), "four integers"),
    ],
)
def test_bad_cells_are_refused(block, message):
    with pytest.raises(ValueError, match=message):
        cells.validate((block,))
    if len(block) == 4:
        x, op_x, y, op_y = block
        cell = Cell(jnp.asarray([[x, y]]), jnp.asarray([[op_x, op_y]]))
        assert not bool(cells.is_valid(cell))


def test_empty_cell_and_empty_space_are_refused():
    with pytest.raises(ValueError, match="no blocks"):
        cells.validate(())
    with pytest.raises(ValueError, match="at least 1"):
        CellSpace(0)


def test_loose_ends_match_a_plain_loop_and_the_static_form():
    space = CellSpace(4)
    for seed in range(20):
        cell = cells.sample(jax.random.key(seed), space)
        expected = np.ones(6)
        for node in np.asarray(cell.inputs).ravel():
            expected[node] = 0
        np.testing.assert_array_equal(jax.jit(cells.loose_ends)(cell), expected)
        static = cells.static_loose_ends(cells.to_static(cell))
        assert static == tuple(np.flatnonzero(expected))
        assert 5 in static  # the last block is never read


def test_static_form_round_trip_and_gene_order():
    static = ((0, 1, 1, 5), (2, 4, 0, 3))
    cell = cells.from_static(static)
    np.testing.assert_array_equal(cell.inputs, [[0, 1], [2, 0]])
    np.testing.assert_array_equal(cell.ops, [[1, 5], [4, 3]])
    assert cells.to_static(cell) == static
    assert cells.describe(static) == (
        "n2 = sep5x5(n0) + identity(n1); n3 = sep1x1(n2) + maxpool3(n0)"
    )
