"""The polynomial ridge against scikit-learn and plain refits; features; bad points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from nas import arch, surrogate

RNG = np.random.default_rng(0)
X = RNG.uniform(1, 5, (20, 3))
Y = np.sin(X[:, 0]) + 0.3 * X[:, 1] * X[:, 2] + 0.05 * RNG.normal(size=20)
QUERIES = RNG.uniform(0, 6, (7, 3))

# Accuracy of the paper's linear header by (depth fraction, width fraction).
LINEAR = {
    (1.0, 1.0): 0.9207, (1.0, 0.75): 0.9060, (1.0, 0.5): 0.8677, (1.0, 0.25): 0.7054,
    (0.75, 1.0): 0.8955, (0.75, 0.75): 0.8723, (0.75, 0.5): 0.8075, (0.75, 0.25): 0.6206,
    (0.5, 1.0): 0.7921, (0.5, 0.75): 0.7337, (0.5, 0.5): 0.6401, (0.5, 0.25): 0.4236,
    (0.25, 1.0): 0.4381, (0.25, 0.75): 0.3990, (0.25, 0.5): 0.3375, (0.25, 0.25): 0.2262,
}  # fmt: skip


def _sklearn(degree, penalty):
    return make_pipeline(
        StandardScaler(), PolynomialFeatures(degree, include_bias=False), Ridge(penalty)
    )


@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize("penalty", [0.1, 10.0])
def test_predictions_are_those_of_scikit_learn(degree, penalty):
    model = surrogate.polynomial(degree, penalty=penalty)
    prediction = model.predict(model.fit(X, Y), QUERIES)
    expected = _sklearn(degree, penalty).fit(X, Y).predict(QUERIES)
    np.testing.assert_allclose(prediction.mean, expected, rtol=1e-3, atol=1e-3)
    assert bool(jnp.all(jnp.isfinite(prediction.spread) & (prediction.spread > 0)))


def test_leave_one_out_errors_are_those_of_refits_without_the_point():
    model = surrogate.polynomial(2, penalty=0.5)
    residuals = model.fit(X, Y).residuals
    design = make_pipeline(StandardScaler(), PolynomialFeatures(2, include_bias=False))
    design = design.fit_transform(X)  # standardised once: the hat matrix leaves that as it is
    for row in range(len(X)):
        others = np.arange(len(X)) != row
        left_out = Ridge(0.5).fit(design[others], Y[others]).predict(design[[row]])[0]
        np.testing.assert_allclose(residuals[row], Y[row] - left_out, rtol=2e-3, atol=1e-4)


def test_spread_without_penalty_is_the_prediction_error_of_least_squares():
    model = surrogate.polynomial(1, penalty=1e-6)
    prediction = model.predict(model.fit(X, Y), QUERIES)
    design = np.column_stack([np.ones(20), X])
    new = np.column_stack([np.ones(7), QUERIES])
    hat = design @ np.linalg.inv(design.T @ design) @ design.T
    residual = Y - hat @ Y
    variance = np.mean(residual**2 / (1 - np.diag(hat)))
    leverage = np.einsum("qi,ij,qj->q", new, np.linalg.inv(design.T @ design), new)
    np.testing.assert_allclose(prediction.spread, np.sqrt(variance * (1 + leverage)), rtol=1e-3)


def test_the_penalty_of_least_leave_one_out_error_is_chosen():
    given = (1e-4, 1e-2, 1.0, 100.0)
    chosen = surrogate.polynomial(2, penalty=given).fit(X, Y).penalty
    errors = {
        penalty: float(
            jnp.sum(jnp.square(surrogate.polynomial(2, penalty=penalty).fit(X, Y).residuals))
        )
        for penalty in given
    }
    np.testing.assert_allclose(chosen, min(errors, key=errors.get), rtol=1e-6)


def test_a_polynomial_without_noise_is_recovered():
    y = 1 + X[:, 0] - 2 * X[:, 1] * X[:, 2] + X[:, 0] ** 2
    model = surrogate.polynomial(2, penalty=1e-6)
    truth = 1 + QUERIES[:, 0] - 2 * QUERIES[:, 1] * QUERIES[:, 2] + QUERIES[:, 0] ** 2
    mean = model.predict(model.fit(X, y), QUERIES).mean
    np.testing.assert_allclose(mean, truth, atol=1e-4 * np.ptp(y))


def test_the_quadratic_of_the_paper_overrates_the_full_network():
    x, y = np.array(list(LINEAR)), np.array(list(LINEAR.values()))
    model = surrogate.polynomial(2, penalty=1e-6)
    corner = model.predict(model.fit(x, y), np.array([[1.0, 1.0]])).mean[0]
    m, w = x.T
    design = np.column_stack([np.ones(16), m, w, m**2, m * w, w**2])
    expected = np.linalg.lstsq(design, y)[0].sum()
    np.testing.assert_allclose(corner, expected, atol=1e-4)
    np.testing.assert_allclose(corner, 0.936, atol=5e-4)  # measured: 0.9207


def test_masked_points_and_points_that_are_not_finite_do_not_exist():
    model = surrogate.polynomial(2)
    fit = jax.jit(model.fit)
    x, y = np.pad(X, ((0, 4), (0, 0)), constant_values=9.0), np.pad(Y, (0, 4))
    mask = np.arange(24) < 20
    x[20], y[21] = np.nan, np.inf
    expected = model.predict(model.fit(X, Y), QUERIES)
    masked = model.predict(fit(x, y, mask), QUERIES)
    np.testing.assert_allclose(masked.mean, expected.mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(masked.spread, expected.spread, rtol=1e-3)
    mask[20:22] = True  # now only their values exclude them
    again = model.predict(fit(x, y, mask), QUERIES)
    np.testing.assert_array_equal(again.mean, masked.mean)


def test_vmapped_fits_are_separate_fits():
    model = surrogate.polynomial(1)
    masks = RNG.random((3, 20)) < 0.7

    def predicted(mask):
        return model.predict(model.fit(X, Y, mask), QUERIES).mean

    many = jax.jit(jax.vmap(predicted))(masks)
    for mask, mean in zip(masks, many, strict=True):
        np.testing.assert_allclose(mean, jax.jit(predicted)(mask), rtol=1e-3, atol=1e-4)


def test_fewer_points_than_monomials_still_predict():
    model = surrogate.polynomial(3)
    prediction = model.predict(model.fit(X[:5], Y[:5]), QUERIES)
    assert bool(jnp.all(jnp.isfinite(prediction.mean)))
    assert bool(jnp.all(prediction.spread > 0))


def test_one_point_predicts_itself_with_unknown_spread():
    model = surrogate.polynomial(2)
    prediction = model.predict(model.fit(X[:1], Y[:1]), QUERIES)
    np.testing.assert_allclose(prediction.mean, np.full(7, Y[0]), rtol=1e-6)
    assert bool(jnp.all(jnp.isinf(prediction.spread)))


@pytest.mark.parametrize("model", [surrogate.polynomial(2), surrogate.constant()])
def test_no_usable_point_predicts_nan(model):
    prediction = model.predict(model.fit(X, np.full(20, np.nan)), QUERIES)
    assert bool(jnp.all(jnp.isnan(prediction.mean)))


def test_constant_targets_and_constant_features_are_no_trouble():
    x = X.copy()
    x[:, 1] = 0.1
    model = surrogate.polynomial(2)
    prediction = model.predict(model.fit(x, np.full(20, 3.0)), QUERIES)
    np.testing.assert_allclose(prediction.mean, np.full(7, 3.0), rtol=1e-6)
    np.testing.assert_allclose(prediction.spread, np.zeros(7), atol=1e-6)
    expected = _sklearn(2, 0.1).fit(np.delete(x, 1, axis=1), Y)
    fixed = surrogate.polynomial(2, penalty=0.1)
    at = QUERIES.copy()
    at[:, 1] = 0.1
    mean = fixed.predict(fixed.fit(x, Y), at).mean
    np.testing.assert_allclose(
        mean, expected.predict(np.delete(at, 1, axis=1)), rtol=1e-3, atol=1e-3
    )


def test_the_constant_control_is_mean_and_deviation():
    model = surrogate.constant()
    prediction = model.predict(model.fit(X, Y), QUERIES)
    np.testing.assert_allclose(prediction.mean, np.full(7, Y.mean()), rtol=1e-5)
    expected = np.full(7, Y.std(ddof=1) * np.sqrt(1 + 1 / 20))
    np.testing.assert_allclose(prediction.spread, expected, rtol=1e-5)


def test_wrong_arguments_are_refused():
    for degree in (0, 4, 2.5):
        with pytest.raises(ValueError, match="degree must be 1, 2 or 3"):
            surrogate.polynomial(degree)
    for penalty in (0.0, -1.0, np.nan, []):
        with pytest.raises(ValueError, match="penalty must be positive"):
            surrogate.polynomial(2, penalty=penalty)
    model = surrogate.polynomial(1)
    with pytest.raises(ValueError, match="do not belong together"):
        model.fit(X, Y[:-1])
    with pytest.raises(ValueError, match="do not belong together"):
        model.fit(X[:, :0], Y)
    with pytest.raises(ValueError, match="mask has shape"):
        model.fit(X, Y, np.ones(3, bool))
    with pytest.raises(ValueError, match=r"expected \[Q, 3\]"):
        model.predict(model.fit(X, Y), X[:, :2])


def test_features_of_sub_networks():
    space = arch.ArchSpace.from_fractions(4, 4, 8)
    genome = arch.Arch(
        jnp.int32(2), jnp.array([1, 4, 2, 4], jnp.int32), jnp.array([8, 8, 4, 8], jnp.int32)
    )
    # Depth 2 of 4 keeps blocks 0 and 2.
    np.testing.assert_allclose(
        surrogate.gene_features(space, genome), [0.5, 0.25, 0, 0.5, 0, 1, 0, 0.5, 0]
    )
    # Half of head share and neuron share: block 0 has 0.625, block 2 has 0.5.
    np.testing.assert_allclose(surrogate.depth_and_width(space, genome), [2, 4 * 0.5625])
    np.testing.assert_allclose(surrogate.depth_and_width(space, arch.full(space)), [4, 4])
