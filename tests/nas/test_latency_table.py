"""Interpolation of nas.latency_table against SciPy, its edges, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from nas import latency_table

HEADS, NEURONS = [1, 2, 4], [16, 32, 48, 64]
BLOCK_S = np.random.default_rng(0).uniform(1e-5, 1e-4, (3, 4))
POWER = {"idle_power_w": 1.0, "energy_per_flop_j": 1e-10, "energy_per_byte_j": 1e-9}
TABLE = latency_table.latency_table(HEADS, NEURONS, BLOCK_S, 2e-5, **POWER)
NUM = 6
seconds = jax.jit(latency_table.block_seconds)
inside = jax.jit(latency_table.in_range)


def counts(low, high):
    number = st.one_of(st.integers(low, high), st.floats(low, high, width=32))
    return st.lists(number, min_size=NUM, max_size=NUM)


@settings(deadline=None, max_examples=60)
@given(counts(-3, 9), counts(-10, 90))
def test_bilinear_inside_and_the_nearest_edge_outside(heads, neurons):
    heads, neurons = np.array(heads, np.float32), np.array(neurons, np.float32)
    oracle = RegularGridInterpolator((HEADS, NEURONS), BLOCK_S)
    points = np.stack([np.clip(heads, 1, 4), np.clip(neurons, 16, 64)], axis=1)
    np.testing.assert_allclose(seconds(TABLE, heads, neurons), oracle(points), rtol=1e-5)
    expected = (heads >= 1) & (heads <= 4) & (neurons >= 16) & (neurons <= 64)
    np.testing.assert_array_equal(inside(TABLE, heads, neurons), expected)


def test_measured_points_are_returned_exactly():
    heads, neurons = (
        jnp.asarray(g.reshape(-1)) for g in np.meshgrid(HEADS, NEURONS, indexing="ij")
    )
    np.testing.assert_array_equal(
        seconds(TABLE, heads, neurons), BLOCK_S.astype(np.float32).reshape(-1)
    )


def test_gradient_is_that_of_the_piece_and_zero_outside():
    def total(heads, neurons):
        return latency_table.block_seconds(TABLE, heads, neurons).sum()

    heads = jnp.array([0.5, 1.0, 2.0, 3.0, 4.0, 4.5])
    slope = jax.grad(total)(heads, jnp.full(6, 32.0))
    first, second = np.diff(BLOCK_S[:, 1]) / [1, 2]
    np.testing.assert_allclose(slope, [0, first, second, second, second, 0], rtol=1e-4)


def test_one_point_along_an_axis_is_a_constant():
    table = latency_table.latency_table([4], [16, 64], [[1e-5, 3e-5]], 0.0, **POWER)
    found = latency_table.block_seconds(table, jnp.array([2, 4]), jnp.array([40, 40]))
    np.testing.assert_allclose(found, [2e-5, 2e-5], rtol=1e-6)
    assert latency_table.in_range(table, jnp.array([2, 4]), jnp.array([40, 40])).tolist() == [
        False,
        True,
    ]


def test_a_fleet_of_scaled_tables_vmaps():
    factors = jnp.array([0.5, 1.0, 2.0])
    fleet = jax.vmap(lambda factor: latency_table.scaled(TABLE, factor))(factors)
    heads, neurons = jnp.array([3]), jnp.array([20])
    found = jax.vmap(lambda table: latency_table.block_seconds(table, heads, neurons))(fleet)
    np.testing.assert_allclose(found[:, 0], factors * seconds(TABLE, heads, neurons)[0], rtol=1e-6)
    np.testing.assert_allclose(fleet.base_s, 2e-5 * factors, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_counts": [2, 1, 4]}, "head_counts is .* ascending"),
        ({"head_counts": [1, 1, 4]}, "head_counts is .* ascending"),
        ({"neuron_counts": [0, 32, 48, 64]}, "neuron_counts is .* positive"),
        ({"neuron_counts": []}, "at least one"),
        ({"block_s": BLOCK_S[:2]}, r"shape \(2, 4\); expected \(3, 4\)"),
        ({"block_s": BLOCK_S * -1.0}, "block_s holds -.* not negative"),
        ({"block_s": np.where(np.eye(3, 4) > 0, np.nan, BLOCK_S)}, "block_s holds nan"),
        ({"base_s": float("inf")}, "base_s holds inf"),
        ({"idle_power_w": -1.0}, "idle_power_w holds -1"),
    ],
)
def test_bad_tables_are_refused(change, message):
    good = {"head_counts": HEADS, "neuron_counts": NEURONS, "block_s": BLOCK_S, "base_s": 0.0}
    with pytest.raises(ValueError, match=message):
        latency_table.latency_table(**{**good, **POWER, **change})
