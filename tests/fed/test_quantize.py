"""Codes of few bits: exact zeros, order, error bounds, and the same in jit, vmap and eager."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fed import quantize
from fed.quantize import Codes

SIZE = 12  # one shape, so that every example runs the same programs
ROUNDING = 5e-5
BITS = st.integers(quantize.MIN_BITS, quantize.MAX_BITS)
importances = hnp.arrays(
    np.float32,
    SIZE,
    elements=st.just(0.0)
    | st.floats(2**-120, 2**100, width=32, allow_subnormal=False)
    | st.floats(-30.0, 3.0).map(lambda power: float(np.float32(10.0**power))),
)
features = hnp.arrays(np.float32, SIZE, elements=st.floats(-1e4, 1e4, width=32))

encode, decode, error = (
    jax.jit(function, static_argnums=1)
    for function in (quantize.log_encode, quantize.log_decode, quantize.log_error)
)
linear_encode, linear_decode = (
    jax.jit(function, static_argnums=1)
    for function in (quantize.linear_encode, quantize.linear_decode)
)


def coded(values, bits):
    """Codes, and what they are read as, in float64."""
    codes = encode(jnp.asarray(values), bits)
    return codes, np.asarray(decode(codes, bits), np.float64)


@settings(max_examples=60, deadline=None)
@given(importances, BITS)
def test_zero_order_and_error(values, bits):
    codes, read = coded(values, bits)
    numbers = np.asarray(codes.codes)
    assert numbers.dtype == np.uint8 and numbers.max() < 2**bits
    np.testing.assert_array_equal(numbers == 0, values == 0)
    np.testing.assert_array_equal(read == 0, values == 0)
    order = np.argsort(values, kind="stable")
    assert (np.diff(numbers[order].astype(int)) >= 0).all()
    assert (np.diff(read[order]) >= 0).all()
    bound = float(error(codes, bits)) + ROUNDING
    assert (np.abs(read - values) <= bound * values.astype(np.float64)).all()


@settings(max_examples=50, deadline=None)
@given(importances.filter(lambda values: values.any()), BITS)
def test_the_bound_is_that_of_the_nearest_of_equal_steps_of_the_logarithm(values, bits):
    codes, read = coded(values, bits)
    logs = np.log(values[values > 0].astype(np.float64))
    step = np.ptp(logs) / (2**bits - 2)
    np.testing.assert_allclose(
        float(error(codes, bits)), np.expm1(step / 2), rtol=1e-3, atol=ROUNDING
    )
    # The ends of the range are hit, and nothing is further away than half a step.
    off = np.abs(np.log(read[values > 0]) - logs)
    assert off[logs.argmin()] < ROUNDING and off[logs.argmax()] < ROUNDING
    assert off.max() <= step / 2 + ROUNDING


def test_ten_orders_of_magnitude_in_eight_and_in_four_bits():
    values = np.geomspace(1e-11, 1e-1, 500).astype(np.float32)
    for bits, largest in ((8, 0.0464), (4, 1.28)):
        _, read = coded(values, bits)
        relative = np.abs(read - values) / values
        assert 0.9 * largest < relative.max() < largest


@settings(max_examples=60, deadline=None)
@given(features, BITS)
def test_linear_codes_are_off_by_half_a_step_and_keep_order(values, bits):
    codes = linear_encode(jnp.asarray(values), bits)
    read = np.asarray(linear_decode(codes, bits), np.float64)
    assert np.asarray(codes.codes).max() < 2**bits
    half = np.ptp(values.astype(np.float64)) / (2**bits - 1) / 2
    assert np.abs(read - values).max() <= half + 2e-6 * np.abs(values).max()
    assert (np.diff(read[np.argsort(values, kind="stable")]) >= 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e-3])
def test_what_has_no_code_spoils_the_scale(bad):
    values = jnp.asarray([0.0, 0.5, bad, 2.0], jnp.float32)
    codes = quantize.log_encode(values, 8)
    assert not np.isfinite([codes.low, codes.high]).all()
    if bad != -1e-3:
        codes = quantize.linear_encode(values, 8)
        assert not np.isfinite([codes.low, codes.high]).all()


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [3e-7, 0.0, 3e-7]])
def test_without_a_range_values_come_back(values):
    values = np.asarray(values, np.float32)
    codes, read = coded(values, 4)
    assert np.isfinite([codes.low, codes.high]).all()
    np.testing.assert_allclose(read, values, rtol=ROUNDING)
    codes = linear_encode(jnp.full(3, 1.5), 4)
    np.testing.assert_array_equal(linear_decode(codes, 4), np.full(3, 1.5, np.float32))


def test_jit_vmap_eager_and_traced_bits_agree():
    rng = np.random.default_rng(0)
    rows = (10.0 ** rng.uniform(-10, 0, (4, SIZE))).astype(np.float32)
    rows[:, 3] = 0.0
    bits = (8, 4, 2, quantize.EXACT_BITS)
    mapped = jax.jit(jax.vmap(quantize.log_round_trip))(rows, jnp.asarray(bits, jnp.int32))
    for row, each, found in zip(rows, bits, np.asarray(mapped), strict=True):
        eager = np.asarray(quantize.log_round_trip(jnp.asarray(row), each))
        np.testing.assert_allclose(found, eager, rtol=2e-6)
        if each == quantize.EXACT_BITS:
            np.testing.assert_array_equal(found, row)
        else:
            compiled = encode(jnp.asarray(row), each)
            by_hand = quantize.log_encode(jnp.asarray(row), each)
            np.testing.assert_array_equal(compiled.codes, by_hand.codes)


@pytest.mark.parametrize("bits", [1, 9, 32])
def test_other_bits_are_refused(bits):
    one = jnp.ones(2)
    for function in (quantize.log_encode, quantize.linear_encode):
        with pytest.raises(ValueError, match=f"codes have from 2 to 8 bits, got {bits}"):
            function(one, bits)
    with pytest.raises(ValueError, match="codes have"):
        quantize.log_decode(Codes(jnp.zeros(2, jnp.uint8), jnp.zeros(()), jnp.ones(())), bits)
