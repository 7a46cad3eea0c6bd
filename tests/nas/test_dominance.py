"""Fronts and crowding of any input: duplicates, NaN, infinity, one row, none, one objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas import dominance, pareto

NUM = 9
_rank = jax.jit(dominance.non_dominated_rank)
_both = jax.jit(dominance.rank_and_crowding)
_crowding = jax.jit(dominance.crowding_distance)

# Few values, so that ties, duplicates and all kinds of bad ones are common.
_value = st.sampled_from([0.0, -0.0, 1.0, 2.0, 3.5, np.inf, -np.inf, np.nan])


def _rows(num_objectives):
    row = st.lists(_value, min_size=num_objectives, max_size=num_objectives)
    return st.lists(row, min_size=NUM, max_size=NUM).map(lambda rows: np.array(rows, np.float32))


_violation = st.lists(
    st.sampled_from([0.0, -1.0, 1.0, 2.0, np.inf, np.nan]), min_size=NUM, max_size=NUM
).map(lambda values: np.array(values, np.float32))


def _loop(objectives, violation):
    """Constraint-domination by its definition, front by front."""
    invalid = np.isnan(objectives).any(1) | np.isnan(violation)

    def beats(i, j):
        if invalid[i] or invalid[j]:
            return not invalid[i]
        if violation[i] > 0 or violation[j] > 0:
            return max(violation[i], 0) < max(violation[j], 0)
        a, b = objectives[i], objectives[j]
        return bool(np.all(a <= b) and np.any(a < b))

    rank, left, front = np.zeros(len(objectives), int), set(range(len(objectives))), 0
    while left:
        best = {i for i in left if not any(beats(j, i) for j in left - {i})} or set(left)
        for i in best:
            rank[i] = front
        left -= best
        front += 1
    return rank


@settings(deadline=None, max_examples=60)
@given(_rows(3), _violation)
def test_ranks_of_any_three_objectives(objectives, violation):
    invalid = np.isnan(objectives).any(1) | np.isnan(violation)
    rank = np.asarray(_rank(objectives, violation))
    np.testing.assert_array_equal(rank, _loop(objectives, violation))
    assert set(rank) == set(range(rank.max() + 1))
    if invalid.any() and not invalid.all():
        assert rank[invalid].min() > rank[~invalid].max()


@settings(deadline=None, max_examples=30)
@given(_rows(1), _violation)
def test_ranks_of_one_objective_are_dense(objectives, violation):
    np.testing.assert_array_equal(_rank(objectives, violation), _loop(objectives, violation))
    np.testing.assert_array_equal(_rank(objectives), _loop(objectives, np.zeros(NUM)))


@settings(deadline=None, max_examples=40)
@given(_rows(2), _violation)
def test_crowding_is_never_nan_and_shares_its_sorts(objectives, violation):
    rank, crowding = _both(objectives, violation)
    np.testing.assert_array_equal(rank, _rank(objectives, violation))
    np.testing.assert_array_equal(crowding, _crowding(objectives, rank))
    crowding = np.asarray(crowding)
    assert not np.isnan(crowding).any()
    assert np.all(crowding >= 0)
    for front in set(np.asarray(rank).tolist()):
        assert np.isposinf(crowding[np.asarray(rank) == front]).any()


def test_crowding_takes_any_numbers_for_fronts():
    objectives = jnp.asarray(np.random.default_rng(0).random((NUM, 2)), jnp.float32)
    rank = jnp.array([0, 1, 2] * 3)
    renamed = jnp.array([-5, 7, 10**6] * 3)
    np.testing.assert_array_equal(
        dominance.crowding_distance(objectives, rank), _crowding(objectives, renamed)
    )


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
def test_nothing_and_one_row(num_objectives):
    none, one = jnp.zeros((0, num_objectives)), jnp.ones((1, num_objectives))
    assert dominance.non_dominated_rank(none).shape == (0,)
    assert dominance.crowding_distance(none, jnp.zeros(0, jnp.int32)).shape == (0,)
    assert dominance.dominates(none, one).shape == (0, 1)
    rank, crowding = dominance.rank_and_crowding(one, jnp.array([3.0]))
    assert rank.tolist() == [0]
    assert np.isinf(crowding).all()
    with pytest.raises(ValueError, match="no candidates"):
        pareto.select(none, jnp.zeros(0), 1.0, rule="lowest_error")


def test_many_fronts_and_odd_sizes():
    """A chain: as many fronts as rows, more rows than a word has bits, none a multiple."""
    order = np.random.default_rng(0).permutation(77)
    chain = jnp.asarray(np.stack([order, order], axis=1), jnp.float32)
    np.testing.assert_array_equal(_rank(chain), order)
    np.testing.assert_array_equal(
        dominance.non_dominated_rank(chain, num_needed=10), np.minimum(order, 10)
    )
