"""Rank correlations against SciPy, with ties, masks and degenerate lists."""

import warnings

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nas import rank_correlation

KENDALL = jax.jit(rank_correlation.kendall_tau)
SPEARMAN = jax.jit(rank_correlation.spearman_rho)
PAIRS = ((KENDALL, stats.kendalltau), (SPEARMAN, stats.spearmanr))


def _reference(function, first, second):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant lists
        return function(first, second).statistic


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.booleans()), min_size=12,
             max_size=12)
)  # fmt: skip
def test_equal_to_scipy_with_ties_and_mask(rows):
    first, second, mask = (np.array(column) for column in zip(*rows, strict=True))
    for ours, reference in PAIRS:
        got = ours(first, second, mask)
        if mask.sum() < 2:
            assert np.isnan(got)
        else:
            expected = _reference(reference, first[mask], second[mask])
            np.testing.assert_allclose(got, expected, atol=1e-6)


def test_equal_to_scipy_on_many_rows():
    rng = np.random.default_rng(0)
    first = rng.normal(size=700)
    second = first + rng.normal(size=700)
    for ours, reference in PAIRS:
        np.testing.assert_allclose(ours(first, second), _reference(reference, first, second), 1e-4)


def test_order_alone_counts():
    first = np.array([1.0, 2.0, 3.0, 5.0])
    for ours, _ in PAIRS:
        assert float(ours(first, np.array([-np.inf, 0.0, 1e30, np.inf]))) == pytest.approx(1)
        assert float(ours(first, -(first**3))) == pytest.approx(-1)


def test_nan_rows_are_left_out_and_constants_have_no_order():
    first, second = np.array([3.0, 1.0, np.nan, 2.0]), np.array([3.0, 1.0, 0.0, 2.0])
    for ours, _ in PAIRS:
        assert float(ours(first, second)) == pytest.approx(1)
        assert np.isnan(ours(np.ones(4), second))
        assert np.isnan(ours(first[:1], second[:1]))


def test_wrong_shapes_are_refused():
    for function in (rank_correlation.kendall_tau, rank_correlation.spearman_rho):
        with pytest.raises(ValueError, match="do not belong together"):
            function(np.ones(3), np.ones(4))
        with pytest.raises(ValueError, match="do not belong together"):
            function(np.ones((2, 2)), np.ones((2, 2)))
