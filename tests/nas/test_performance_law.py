"""The Performance Law: recovery, SciPy's optimum, its spread, and the trap of its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import least_squares

from nas import performance_law

DEPTHS, WIDTHS = (4, 8, 12, 16, 24, 32), (25, 50, 75, 100)  # the paper's 24 points
X = np.array([(n, d) for n in DEPTHS for d in WIDTHS], np.float64)
QUERIES = np.random.default_rng(1).uniform((3, 20), (40, 120), (30, 2))
LAW = performance_law.performance_law()
FIT, PREDICT = jax.jit(LAW.fit), jax.jit(LAW.predict)


def _law(theta, x):
    """The formula as written, float64; theta holds weights, exponents and the intercept."""
    weights, exponents, intercept = np.split(theta, [x.shape[1], 2 * x.shape[1]])
    terms = -1 / (2 * x**exponents) - exponents * np.log(x)
    return terms @ weights + intercept[0]


@pytest.mark.parametrize("seed", range(5))
def test_known_parameters_are_recovered_in_predictions(seed):
    rng = np.random.default_rng(seed)
    theta = np.concatenate(
        [-rng.uniform(0.01, 1, 2), rng.uniform(0.05, 2.5, 2), rng.normal(size=1)]
    )
    params = FIT(X, _law(theta, X))
    np.testing.assert_allclose(PREDICT(params, QUERIES).mean, _law(theta, QUERIES), atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_noisy_fit_and_spread_are_those_of_scipy(seed):
    rng = np.random.default_rng(seed)
    y = _law(np.array([-0.1, -0.2, 0.6, 0.8, 0.1]), X) + 0.02 * rng.normal(size=24)

    def reference(start):
        return least_squares(
            lambda theta: _law(theta, X) - y, start, max_nfev=5000, x_scale="jac",
            bounds=([-np.inf, -np.inf, 0.001, 0.001, -np.inf], [np.inf, np.inf, 10, 10, np.inf]),
        )  # fmt: skip

    params = FIT(X, y)
    ours = np.concatenate([params.weights, params.exponents, params.intercept[None]])
    starts = [np.array([-1, -1, a, b, 0.0]) for a in (0.1, 1.0) for b in (0.1, 1.0)]
    found = [reference(start) for start in starts]
    lowest = min(2 * result.cost for result in found)
    cost = float(np.sum(np.square(PREDICT(params, X).mean - y)))
    assert cost <= lowest * 1.001
    np.testing.assert_allclose(params.sigma, np.sqrt(cost / 19), rtol=1e-3)

    matrix, rows = (
        np.stack(
            [(_law(ours + step, x) - _law(ours - step, x)) / 2e-5 for step in 1e-5 * np.eye(5)]
        )
        for x in (X, QUERIES)
    )
    covariance = np.linalg.pinv(matrix @ matrix.T, rcond=1e-14, hermitian=True)
    leverage = np.einsum("iq,ij,jq->q", rows, covariance, rows)
    expected = params.sigma * np.sqrt(1 + leverage)
    np.testing.assert_allclose(PREDICT(params, QUERIES).spread, expected, rtol=0.02)


def test_data_of_one_size_make_rank_five_of_six_and_a_ratio_of_seven_thousand():
    x = np.column_stack([X, np.full(24, 1e6)])
    ones = jnp.ones(3)
    matrix = performance_law.jacobian(ones, ones, jnp.asarray(x), free=(True, True, False))
    assert matrix.shape == (24, 6)
    result = performance_law.identifiability(matrix)
    assert int(result.rank) == 5
    np.testing.assert_allclose(result.singular_ratio, 7316, rtol=0.01)
    # Without the data term the rank is full, and the ratio still 3,278.
    fixed = performance_law.identifiability(
        performance_law.jacobian(ones[:2], ones[:2], jnp.asarray(X), free=(True, True))
    )
    assert int(fixed.rank) == 5
    np.testing.assert_allclose(fixed.singular_ratio, 3278, rtol=0.01)


def test_different_parameters_make_equal_predictions():
    """Trap 1: a tenth of noise in the third digit moves parameters far, predictions little."""
    y = _law(np.array([-0.1, -0.2, 0.3, 0.3, 0.1]), X)
    noisy = y + 1e-3 * np.random.default_rng(0).normal(size=24)
    first, second = FIT(X, y), FIT(X, noisy)
    moved = np.max(np.abs(first.weights / second.weights - 1))
    difference = np.max(np.abs(PREDICT(first, X).mean - PREDICT(second, X).mean))
    assert moved > 0.05
    assert difference < 2e-3


def test_jacobian_is_the_derivative_of_the_law():
    weights, exponents, intercept = jnp.array([-0.3, 0.5]), jnp.array([0.4, 1.5]), jnp.array(0.2)
    by_weight, by_exponent, by_intercept = jax.jacobian(
        performance_law.evaluate, argnums=(0, 1, 2)
    )(weights, exponents, intercept, jnp.asarray(X))
    expected = np.concatenate([by_weight, by_exponent, by_intercept[:, None]], axis=1)
    ours = performance_law.jacobian(weights, exponents, jnp.asarray(X), free=(True, True))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    theta = np.array([-0.3, 0.5, 0.4, 1.5, 0.2])
    value = performance_law.evaluate(weights, exponents, intercept, jnp.asarray(X))
    np.testing.assert_allclose(value, _law(theta, X), rtol=1e-5)


@pytest.mark.parametrize("data_weight", [None, 1.0])
def test_the_data_term_is_recovered_too(data_weight):
    data = np.random.default_rng(2).uniform(1e3, 1e5, 24)
    x = np.column_stack([X, data])
    theta = np.array([-0.5, -0.3, 1.0, 0.7, 0.4, 0.3, 2.0])
    law = performance_law.performance_law(3, weights=(None, None, data_weight))
    params = jax.jit(law.fit)(x, _law(theta, x))
    if data_weight is not None:
        assert float(params.weights[2]) == data_weight
        assert params.root.shape == (6, 6)
    np.testing.assert_allclose(law.predict(params, x).mean, _law(theta, x), atol=1e-4)


def test_masked_and_impossible_points_do_not_exist():
    y = _law(np.array([-0.1, -0.2, 0.6, 0.8, 0.1]), X)
    x, noisy = X.copy(), y + 0.01 * np.random.default_rng(0).normal(size=24)
    keep = np.ones(24, bool)
    keep[[2, 5, 7]] = False
    expected = PREDICT(FIT(X[keep], noisy[keep]), QUERIES)
    x[2, 0], x[5, 1] = 0.0, -1.0
    mask = np.ones(24, bool)
    mask[7] = False
    ours = PREDICT(FIT(x, noisy, mask), QUERIES)
    np.testing.assert_allclose(ours.mean, expected.mean, atol=1e-4)
    np.testing.assert_allclose(ours.spread, expected.spread, rtol=0.02)


def test_zero_width_is_not_predicted():
    params = FIT(X, _law(np.array([-0.1, -0.2, 0.6, 0.8, 0.1]), X))
    prediction = LAW.predict(params, np.array([[4.0, 0.0], [0.0, 25.0], [4.0, 25.0]]))
    np.testing.assert_array_equal(np.isnan(prediction.mean), [True, True, False])
    np.testing.assert_array_equal(np.isinf(prediction.spread), [True, True, False])


def test_few_constant_or_no_points():
    y = _law(np.array([-0.1, -0.2, 0.6, 0.8, 0.1]), X)
    few = FIT(X, y, np.arange(24) < 5)  # as many as parameters
    assert np.all(np.isfinite(PREDICT(few, X).mean)) and np.all(np.isinf(PREDICT(few, X).spread))
    flat = PREDICT(FIT(X, np.full(24, 0.7)), QUERIES)
    np.testing.assert_allclose(flat.mean, np.full(30, 0.7), atol=1e-5)
    np.testing.assert_allclose(flat.spread, np.zeros(30), atol=1e-5)
    none = PREDICT(FIT(X, np.full(24, np.nan)), QUERIES)
    assert np.all(np.isnan(none.mean))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        performance_law.performance_law(0)
    with pytest.raises(ValueError, match="expected 2 entries"):
        performance_law.performance_law(2, weights=(None,))
    with pytest.raises(ValueError, match=r"expected \[Q, 2\]"):
        LAW.fit(np.ones((5, 3)), np.ones(5))
