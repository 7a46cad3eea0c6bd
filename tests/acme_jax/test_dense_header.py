"""The header without its pruned channels computes what the masked one does, at the counted size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import IDENTITY, MAX, PLAIN, SEP1, SEP3, SEP5, WEIGHTED, make_header

from acme_jax import dense_header, header
from acme_jax.header_layout import HeaderDims, num_gates, num_params
from nas.cells import OPS

DIMS = HeaderDims(
    grid_height=2, grid_width=3, embed_dim=5, channels=4, num_classes=3, blocks=2, num_layers=2
)
CELLS = (
    WEIGHTED,
    PLAIN,
    ((1, SEP1, 0, SEP3), (2, SEP5, 2, MAX)),
    ((0, SEP3, 0, SEP3), (0, IDENTITY, 0, IDENTITY)),  # the newer input is a loose end
)
FEATURES = np.random.default_rng(1).normal(size=(3, 6, 5)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=1)
def masked(params, cell, mask):
    return header.apply(params, cell, DIMS, jnp.asarray(FEATURES), mask=mask)


def check(cell, mask):
    mask, weights = np.asarray(mask, np.float32), make_header(DIMS, cell)
    kept = dense_header.kept_channels(DIMS, cell, mask)
    dense = dense_header.prune(jax.tree.map(np.asarray, weights), cell, DIMS, kept)
    assert tiny.count(dense) == num_params(DIMS, cell, mask)
    np.testing.assert_array_equal(dense_header.to_mask(DIMS, kept), mask)
    # In float64, because a norm of few, nearly equal channels enlarges rounding.
    with jax.enable_x64(True):
        wide, sliced = tiny.to_float64(weights), tiny.to_float64(dense)
        features = jnp.asarray(FEATURES, jnp.float64)
        outputs = dense_header.apply(sliced, cell, DIMS, kept, features)
        expected = header.apply(wide, cell, DIMS, features, mask=jnp.asarray(mask, jnp.float64))
        assert outputs.dtype == jnp.float64
        np.testing.assert_allclose(outputs, expected, rtol=1e-12, atol=1e-12)
    return dense


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kept", [0.0, 0.15, 0.6, 1.0])
def test_equals_the_masked_header_at_the_counted_size(cell, kept):
    check(cell, np.random.default_rng(7).random(num_gates(DIMS, cell)) < kept)


@pytest.mark.parametrize("cell", CELLS[:3:2])
def test_each_gate_point_may_lose_all_its_channels(cell):
    size, total = DIMS.channels, num_gates(DIMS, cell)
    rng = np.random.default_rng(3)
    for start in range(0, total, size):
        mask = rng.random(total) < 0.7
        mask[start : start + size] = False
        check(cell, mask)


@st.composite
def cells_and_masks(draw):
    blocks = []
    for index in range(DIMS.blocks):
        node, op = st.integers(0, index + 1), st.integers(0, len(OPS) - 1)
        blocks.append((draw(node), draw(op), draw(node), draw(op)))
    cell = tuple(blocks)
    gates = num_gates(DIMS, cell)
    return cell, draw(st.lists(st.booleans(), min_size=gates, max_size=gates))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(cells_and_masks())
def test_random_cells_and_masks(case):
    check(*case)


def test_nothing_of_a_pruned_channel_is_left():
    mask = np.ones(num_gates(DIMS, WEIGHTED), bool)
    mask[1] = False  # of the stem
    dense = check(WEIGHTED, mask)
    assert dense["stem"]["kernel"].shape == (5, 3)
    first = dense["layers"][0]["ops"]["0"]["first"]
    assert first["depthwise"].shape == (3, 3, 3)
    assert first["pointwise"].shape == (3, 4)


def test_gradients_are_those_of_the_masked_header():
    mask = (np.arange(num_gates(DIMS, WEIGHTED)) % 3 > 0).astype(np.float32)
    kept = dense_header.kept_channels(DIMS, WEIGHTED, mask)
    weights = make_header(DIMS, WEIGHTED)

    @jax.jit
    def dense(params):
        return (dense_header.apply(params, WEIGHTED, DIMS, kept, jnp.asarray(FEATURES)) ** 2).sum()

    found = jax.grad(dense)(dense_header.prune(weights, WEIGHTED, DIMS, kept))
    full = jax.grad(lambda params: (masked(params, WEIGHTED, mask) ** 2).sum())(weights)
    expected = dense_header.prune(full, WEIGHTED, DIMS, kept)
    tiny.assert_trees_close(found, expected, atol=1e-4, rtol=1e-4)


def test_shapes_are_those_of_prune():
    kept = dense_header.kept_channels(DIMS, WEIGHTED, np.arange(num_gates(DIMS, WEIGHTED)) % 2)
    dense = dense_header.prune(make_header(DIMS, WEIGHTED), WEIGHTED, DIMS, kept)
    expected = dense_header.shapes(WEIGHTED, DIMS, kept)
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, expected)


def test_bad_input():
    kept = dense_header.kept_channels(DIMS, PLAIN, np.ones(num_gates(DIMS, PLAIN)))
    with pytest.raises(ValueError, match=r"mask has shape \(3,\); this cell has \d+ gates"):
        dense_header.kept_channels(DIMS, PLAIN, np.ones(3))
    with pytest.raises(ValueError, match=r"kept channels of 3 gate points; this cell has \d+"):
        dense_header.layout(DIMS, WEIGHTED, kept)
    for channels in ((1, 0), (0, 0), (0, 4)):
        with pytest.raises(ValueError, match=r"gate point 0 keeps channels .* from 0 to 3"):
            dense_header.layout(DIMS, PLAIN, (channels, *kept[1:]))
    dense = dense_header.prune(make_header(DIMS, PLAIN), PLAIN, DIMS, kept)
    with pytest.raises(ValueError, match=r"features have shape .* expected \[B, 6, 5\]"):
        dense_header.apply(dense, PLAIN, DIMS, kept, jnp.zeros((1, 7, 5)))
