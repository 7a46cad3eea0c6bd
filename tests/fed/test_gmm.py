"""Mixtures against scikit-learn and SciPy, masks, padding, degenerate classes."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from fed import gmm
from fed.clients import take_row

K, D = 3, 4


def draw(rng, size, apart=3.0):
    """Samples of three overlapping groups of different shapes."""
    means = apart * rng.normal(size=(K, D))
    group = rng.choice(K, size, p=[0.5, 0.3, 0.2])
    spread = rng.uniform(0.3, 1.5, (K, D))
    return (means[group] + spread[group] * rng.normal(size=(size, D))).astype(np.float32)


SAMPLES = draw(np.random.default_rng(0), 150)
ALL = jnp.ones(len(SAMPLES))
seed = jax.jit(functools.partial(gmm.seed, num_components=K))
fit = jax.jit(gmm.fit)


def reference(start, samples, max_iterations, tolerance):
    model = GaussianMixture(
        K,
        covariance_type="diag",
        reg_covar=1e-5,
        tol=tolerance,
        max_iter=max_iterations,
        means_init=np.asarray(start.means, np.float64),
        precisions_init=1 / np.asarray(start.variances, np.float64),
        weights_init=np.full(K, 1 / K),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(samples.astype(np.float64))


@pytest.mark.parametrize("max_iterations", [1, 5, 200])
@pytest.mark.parametrize("key", [0, 1])
def test_equals_scikit_learn(max_iterations, key):
    start = seed(jax.random.key(key), SAMPLES, ALL)
    ours = fit(start, SAMPLES, ALL, max_iterations=max_iterations)
    model = reference(start, SAMPLES, max_iterations, 1e-3)
    assert int(ours.num_iterations) == model.n_iter_
    assert bool(ours.converged) == model.converged_
    np.testing.assert_allclose(ours.mixture.weights, model.weights_, atol=1e-4)
    np.testing.assert_allclose(ours.mixture.means, model.means_, atol=1e-3)
    np.testing.assert_allclose(ours.mixture.variances, model.covariances_, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(ours.log_likelihood, model.lower_bound_, rtol=1e-5)
    likelihoods = gmm.log_likelihoods(ours.mixture, SAMPLES)
    np.testing.assert_allclose(likelihoods, model.score_samples(SAMPLES), rtol=1e-3, atol=2e-3)


def test_density_equals_scipy_far_from_zero():
    rng = np.random.default_rng(1)
    weights, means = np.asarray([0.2, 0.8]), 1e3 + rng.normal(size=(2, D)) * 1e-2
    variances = rng.uniform(0.5, 2, (2, D)) * 1e-4
    mixture = gmm.Mixture(*(jnp.asarray(x, jnp.float32) for x in (weights, means, variances)))
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), mixture)
    samples = (exact.means[0] + rng.normal(size=(20, D)) * 1e-2).astype(np.float32)
    parts = [
        np.log(w) + scipy.stats.multivariate_normal(m, np.diag(v)).logpdf(samples)
        for w, m, v in zip(*exact, strict=True)
    ]
    expected = np.logaddexp(*parts)
    np.testing.assert_allclose(gmm.log_likelihoods(mixture, samples), expected, rtol=1e-4)


def test_every_step_gains_likelihood():
    start = seed(jax.random.key(3), SAMPLES, ALL)
    values = [
        float(fit(start, SAMPLES, ALL, max_iterations=n, tolerance=0.0).log_likelihood)
        for n in (1, 2, 3, 5, 8)
    ]
    assert (np.diff(values) > 0).all()


def test_seeds_are_spread_samples():
    clusters = np.repeat(np.eye(3, dtype=np.float32) * 100, 20, axis=0)[:, :3]
    for key in range(5):
        means = np.asarray(seed(jax.random.key(key), clusters, jnp.ones(60)).means)
        assert sorted(means.argmax(axis=1).tolist()) == [0, 1, 2]
    start = seed(jax.random.key(0), SAMPLES, ALL)
    assert all((mean == SAMPLES).all(axis=1).any() for mean in np.asarray(start.means))
    np.testing.assert_allclose(start.variances[1], SAMPLES.var(axis=0) + 1e-5, rtol=1e-4)


def test_masked_samples_and_padding_change_nothing():
    mask = np.arange(150) % 3 > 0
    padded = np.where(mask[:, None], SAMPLES, np.float32(np.nan))
    key = jax.random.key(4)
    short = fit(seed(key, SAMPLES[:100], ALL[:100]), SAMPLES[:100], ALL[:100])
    long = fit(seed(key, SAMPLES, jnp.arange(150) < 100), SAMPLES, jnp.arange(150) < 100)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), short, long)
    start = seed(key, padded, mask)
    masked = fit(start, padded, mask)
    alone = reference(start, SAMPLES[mask], 200, 1e-3)
    np.testing.assert_allclose(masked.mixture.means, alone.means_, atol=1e-3)
    np.testing.assert_allclose(masked.log_likelihood, alone.lower_bound_, rtol=1e-5)


@functools.lru_cache(maxsize=1)
def sketches():
    """Three clients: few classes, one class, all in one sample each; the last two are equal."""
    rng = np.random.default_rng(5)
    features = rng.normal(size=(4, 40, D)).astype(np.float32)
    labels = np.stack([rng.integers(2, size=40), np.full(40, 3), *[np.arange(40) % 5] * 2])
    features[3] = features[2]
    sizes = np.asarray([40, 25, 3, 3])

    def one(features, labels, size):
        return gmm.fit_classes(jax.random.key(6), features, labels, size, num_classes=5)

    return features, labels, sizes, jax.jit(jax.vmap(one))(features, labels, sizes)


def test_classes_are_fitted_by_themselves():
    features, labels, sizes, sketch = sketches()
    for client, label in ((0, 0), (0, 1), (1, 3)):
        own = features[client, : sizes[client]][labels[client, : sizes[client]] == label]
        mixture = take_row(take_row(sketch.mixtures, client), label)
        mean = np.asarray(mixture.weights) @ np.asarray(mixture.means)
        np.testing.assert_allclose(mean, own.mean(axis=0), atol=1e-4)
        second = np.asarray(mixture.variances) - 1e-5 + np.asarray(mixture.means) ** 2
        np.testing.assert_allclose(mixture.weights @ second, (own**2).mean(axis=0), atol=1e-3)
        assert sketch.counts[client, label] == len(own)
    own = [row[:size] for row, size in zip(labels, sizes, strict=True)]
    counts = [np.bincount(row, minlength=5) for row in own]
    np.testing.assert_array_equal(sketch.counts, counts)


def test_absent_and_tiny_classes_stay_finite():
    features, _, _, sketch = sketches()
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(sketch))
    np.testing.assert_allclose(sketch.mixtures.weights.sum(axis=2), 1, rtol=1e-5)
    single = take_row(take_row(sketch.mixtures, 2), 1)  # one sample
    np.testing.assert_allclose(single.means, np.tile(features[2, 1], (3, 1)), atol=1e-4)
    np.testing.assert_allclose(single.variances, 1e-5, atol=1e-8)


def test_equal_data_give_equal_sketches():
    *_, sketch = sketches()
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf[2], leaf[3]), sketch)


def test_errors():
    with pytest.raises(ValueError, match=r"\[N, D\] and \[N\]"):
        gmm.seed(jax.random.key(0), SAMPLES[0], ALL, num_components=2)
    with pytest.raises(ValueError, match=r"\[N, D\] and \[N\]"):
        gmm.fit(None, SAMPLES, ALL[1:])
