"""Left-out predictions against plain loops, coverage against SciPy's quantiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from nas import surrogate, validation
from nas.surrogate import Prediction

RNG = np.random.default_rng(0)
X = RNG.normal(size=(14, 2))
Y = X[:, 0] - 2 * X[:, 1] + 0.3 * RNG.normal(size=14)
MODEL = surrogate.polynomial(1)
REFIT = jax.jit(lambda x, y, queries: MODEL.predict(MODEL.fit(x, y), queries))


def _loop(left_out):
    """Predictions by explicit refits; left_out[i] are the rows not used for row i."""
    rows = [REFIT(X[~out], Y[~out], X[[i]]) for i, out in enumerate(left_out)]
    return [np.array([getattr(row, name)[0] for row in rows]) for name in Prediction._fields]


def test_leave_one_out_is_the_plain_loop():
    ours = jax.jit(lambda x, y: validation.leave_one_out(MODEL, x, y))(X, Y)
    for value, expected in zip(ours, _loop(np.eye(14, dtype=bool)), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-4)


def test_k_fold_is_the_plain_loop():
    fold = np.arange(14) % 4
    ours = jax.jit(lambda x, y: validation.k_fold(MODEL, x, y, fold, 4))(X, Y)
    for value, expected in zip(ours, _loop(fold[None, :] == fold[:, None]), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-4)


def test_a_left_out_target_does_not_touch_its_own_prediction():
    left_out = jax.jit(lambda y: validation.leave_one_out(MODEL, X, y).mean[3])
    changed = Y.copy()
    changed[3] = 100.0
    assert float(left_out(changed)) == float(left_out(Y))


def test_masked_points_teach_nothing():
    mask = np.arange(14) < 10
    left_out = jax.jit(lambda x, y, mask: validation.leave_one_out(MODEL, x, y, mask).mean)
    ours = left_out(X, np.where(mask, Y, 1e3), mask)[:10]
    expected = left_out(X[:10], Y[:10], mask[:10])
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


def test_coverage_counts_within_gaussian_intervals():
    levels = (0.5, 0.8, 0.95)
    mean, spread, y = RNG.normal(size=50), RNG.uniform(0.5, 2, 50), RNG.normal(size=50)
    mask = np.arange(50) < 40
    ours = validation.coverage(Prediction(jnp.asarray(mean), jnp.asarray(spread)), y, levels, mask)
    expected = []
    for level in levels:
        low, high = stats.norm.interval(level, mean, spread)
        expected.append(np.mean(((low <= y) & (y <= high))[mask]))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_a_linear_surrogate_of_linear_data_is_calibrated():
    """Intervals of fits to 400 data sets cover new targets as often as they say."""

    def one(key):
        x_key, noise_key = jax.random.split(key)
        x = jax.random.normal(x_key, (31, 2))
        y = x @ jnp.array([1.0, -2.0]) + 0.1 * jax.random.normal(noise_key, (31,))
        new = MODEL.predict(MODEL.fit(x[:-1], y[:-1]), x[-1:])
        return new.mean[0], new.spread[0], y[-1]

    mean, spread, y = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 400))
    covered = validation.coverage(Prediction(mean, spread), y, (0.5, 0.8, 0.95))
    # Four standard errors of a share of 400, and a little for Gaussian instead of t quantiles.
    np.testing.assert_allclose(covered, [0.5, 0.8, 0.95], atol=0.1)


def test_assess_is_numpy():
    mean, y = RNG.normal(size=20), RNG.normal(size=20)
    quality = validation.assess(Prediction(jnp.asarray(mean), jnp.full(20, 0.1)), y)
    np.testing.assert_allclose(quality.rmse, np.sqrt(np.mean((y - mean) ** 2)), rtol=1e-5)
    np.testing.assert_allclose(quality.mean_absolute_error, np.mean(abs(y - mean)), rtol=1e-5)
    np.testing.assert_allclose(quality.worst_error, np.max(abs(y - mean)), rtol=1e-5)
    np.testing.assert_allclose(quality.kendall_tau, stats.kendalltau(mean, y).statistic, atol=1e-6)
    error = np.mean(np.abs(np.asarray(quality.coverage) - validation.LEVELS))
    np.testing.assert_allclose(quality.calibration_error, error, rtol=1e-5)


def test_nothing_to_compare_is_nan_and_unknown_spread_covers():
    nothing = validation.assess(Prediction(jnp.full(3, jnp.nan), jnp.ones(3)), np.ones(3))
    assert all(np.all(np.isnan(value)) for value in nothing)
    unknown = Prediction(jnp.zeros(3), jnp.full(3, jnp.inf))
    np.testing.assert_array_equal(validation.coverage(unknown, np.ones(3), (0.5,)), [1.0])


def test_bootstrap_spreads_like_the_formula_of_least_squares():
    x = RNG.normal(size=(60, 1))
    y = 2 * x[:, 0] + 0.5 * RNG.normal(size=60)
    model = surrogate.polynomial(1, penalty=1e-6)
    queries = np.array([[0.0], [2.0]])
    means = jax.jit(
        lambda key: validation.bootstrap_means(key, model, x, y, queries, num_samples=300)
    )(jax.random.key(0))
    design, new = np.column_stack([np.ones(60), x]), np.column_stack([np.ones(2), queries])
    inverse = np.linalg.inv(design.T @ design)
    residual = y - design @ inverse @ design.T @ y
    expected = np.sqrt(np.sum(residual**2) / 58 * np.einsum("qi,ij,qj->q", new, inverse, new))
    assert means.shape == (300, 2)
    np.testing.assert_allclose(np.std(means, axis=0), expected, rtol=0.3)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        validation.k_fold(MODEL, X, Y, np.zeros(14, int), 1)
    with pytest.raises(ValueError, match="one for each"):
        validation.k_fold(MODEL, X, Y, np.zeros(3, int), 2)
    prediction = Prediction(jnp.zeros(3), jnp.ones(3))
    with pytest.raises(ValueError, match="between 0 and 1"):
        validation.coverage(prediction, np.zeros(3), (1.0,))
