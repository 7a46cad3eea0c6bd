"""Ranks and orders from packed sorts, against NumPy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas import ordering

NUM = 37
_ranks, _order, _levels = map(jax.jit, (ordering.ranks, ordering.order, ordering.levels))
_keys = st.lists(
    st.integers(-3, 3) | st.sampled_from([-(2**31), 2**31 - 1]), min_size=NUM, max_size=NUM
)


@settings(deadline=None, max_examples=30)
@given(_keys, _keys)
def test_orders_match_lexsort_and_ranks_count_smaller_rows(first, second):
    expected = np.lexsort([second, first])
    keys = jnp.array(first, jnp.int32), jnp.array(second, jnp.int32)
    np.testing.assert_array_equal(_order(*keys), expected)
    pairs = list(zip(first, second, strict=True))
    smaller = [sum(other < pair for other in pairs) for pair in pairs]
    np.testing.assert_array_equal(_ranks(*keys), smaller)
    np.testing.assert_array_equal(expected[ordering.inverse(_order(*keys))], np.arange(NUM))


@settings(deadline=None, max_examples=30)
@given(_keys, st.lists(st.booleans(), min_size=NUM, max_size=NUM))
def test_levels_have_no_gaps(keys, mask):
    keys = [max(key, -(2**31) + 1) for key in keys]  # the least integer marks unmasked rows
    level, number = _levels(jnp.array(keys, jnp.int32), jnp.array(mask))
    kept = np.array(keys)[np.array(mask)]
    _, expected = np.unique(kept, return_inverse=True)
    np.testing.assert_array_equal(np.asarray(level)[np.array(mask)], expected)
    assert int(number) == len(set(kept.tolist()))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(width=32, allow_subnormal=False), min_size=NUM, max_size=NUM))
def test_sort_keys_order_as_the_floats_do(values):
    values = np.array(values, np.float32)
    np.testing.assert_array_equal(
        _order(ordering.sort_key(jnp.asarray(values))), np.argsort(values, kind="stable")
    )


@pytest.mark.parametrize("num", [1, 2, 7, 1024])
def test_shuffles_are_permutations_and_fair(num):
    draws = jax.random.bits(jax.random.key(0), (400, num))
    orders = np.asarray(jax.vmap(ordering.shuffle)(draws))
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(num), (400, 1)))
    np.testing.assert_allclose(orders.mean(), (num - 1) / 2)
    spread = max(num, 1) / np.sqrt(12 * 400)
    assert np.abs(orders.mean(axis=0) - (num - 1) / 2).max() < 5 * spread


def test_pack_is_undone_and_refuses_too_many_rows():
    first, second = jnp.arange(5, dtype=jnp.int32), jnp.array([4, 0, 2, 2, 1], jnp.int32)
    for given_, back in zip((first, second), ordering.unpack(ordering.pack(first, second), 5),
                            strict=True):  # fmt: skip
        np.testing.assert_array_equal(given_, back)
    with pytest.raises(ValueError, match="65536"):
        jax.eval_shape(ordering.order, jax.ShapeDtypeStruct((2**16 + 1,), jnp.int32))


def test_integers_and_half_floats_keep_their_order():
    large = jnp.asarray([2**24 + 1, 2**24, -5])
    np.testing.assert_array_equal(ordering.ranks(ordering.sort_key(large)), [2, 1, 0])
    half = jnp.asarray([0.5, -2.0, jnp.inf, 0.25], jnp.bfloat16)
    np.testing.assert_array_equal(ordering.ranks(ordering.sort_key(half)), [2, 0, 3, 1])
