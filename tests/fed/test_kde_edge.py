"""What devices and edge exchange about densities: distances, groups, projection."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from fed import kde_device, kde_edge, similarity

pairwise_kde = jax.jit(kde_edge.pairwise_kde, static_argnames="method")


def draw(num_points, num_dims, seed=0):
    return np.random.default_rng(seed).normal(size=(num_points, num_dims))


def test_distances_equal_integrals():
    """Known mixtures in one dimension; the reference points come from their mean, or elsewhere."""
    means, sigma = np.asarray([-1.0, 0.0, 1.5]), 0.8
    densities = [scipy.stats.norm(m, sigma).pdf for m in means]

    def js(p, q):
        def term(x):
            mixture = (p(x) + q(x)) / 2
            return 0.5 * sum(f(x) * np.log(f(x) / mixture) for f in (p, q))

        return scipy.integrate.quad(term, -8, 8)[0]

    expected = np.asarray([[js(p, q) for q in densities] for p in densities])
    gap = np.subtract.outer(means, means) ** 2 / (2 * sigma**2)
    rng = np.random.default_rng(6)
    pooled = rng.normal(np.repeat(means, 7000), sigma)
    logpdf = scipy.stats.norm(means[:, None], sigma).logpdf
    given = jnp.asarray(logpdf(pooled))
    np.testing.assert_allclose(pairwise_kde(given), expected, atol=0.01)
    np.testing.assert_allclose(pairwise_kde(given, method="gap"), gap, rtol=0.04)
    wide = rng.normal(0, 2, 20_000)
    distance = pairwise_kde(
        jnp.asarray(logpdf(wide)), log_reference=scipy.stats.norm(0, 2).logpdf(wide)
    )
    np.testing.assert_allclose(distance, expected, atol=0.01)


@pytest.mark.parametrize("method", ["js", "gap"])
def test_distances_are_distances_and_make_weights(method):
    answers = (20 * draw(20, 50)).astype(np.float32)
    answers[3] = answers[7] + 2  # the same up to its integral
    answers[5], answers[6, :10] = -np.inf, -np.inf
    distance = np.asarray(pairwise_kde(answers, method=method))
    assert not np.isnan(distance).any() and distance.min() == 0
    np.testing.assert_array_equal(distance, distance.T)
    np.testing.assert_array_equal(np.diag(distance), 0)
    assert distance[3, 7] == pytest.approx(0, abs=1e-5)
    assert np.all(np.isinf(np.delete(distance[5], 5)))
    assert np.isfinite(np.delete(np.delete(distance, 5, 0), 5, 1)).all()
    weights = np.asarray(similarity.weights(distance, temperature=0.1))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    assert weights.min() >= 0 and np.all(np.delete(weights[:, 5], 5) < 1 / 20)


def test_devices_of_one_group_find_each_other():
    """Features of three groups in 32 dimensions; what travels are M numbers and one."""
    rng, groups = np.random.default_rng(7), np.arange(9) % 3
    centres = rng.normal(size=(3, 2, 32))
    sizes = rng.integers(40, 80, 9)
    features = np.full((9, 80, 32), np.nan, np.float32)
    for device, size in enumerate(sizes):
        chosen = centres[groups[device], rng.integers(0, 2, size)]
        features[device, :size] = chosen + 0.5 * rng.normal(size=(size, 32))
    public = centres.reshape(6, 32)[rng.integers(0, 6, 300)] + 0.5 * rng.normal(size=(300, 32))
    projection = kde_edge.make_projection(jax.random.key(1), jnp.asarray(public, jnp.float32), 8)
    references = kde_device.project(projection, jnp.asarray(public[:200], jnp.float32))
    masks = jnp.arange(80)[None, :] < sizes[:, None]
    traces = []

    @jax.jit
    def answer(features, masks):
        traces.append(None)
        device = partial(kde_device.report, projection, references, max_steps=20)
        return jax.vmap(device)(features, masks)[0]

    reports = answer(features, masks)
    answer(features + 1, masks)
    assert len(traces) == 1
    assert [leaf.shape for leaf in jax.tree.leaves(reports)] == [(9, 200), (9,)]
    assert reports.log_density[0].nbytes == 800
    same = groups[:, None] == groups[None, :]
    for method in ("js", "gap"):
        distance = np.asarray(pairwise_kde(reports.log_density, method=method))
        assert distance[same].max() < 0.7 * distance[~same].min()
        weights = np.asarray(similarity.weights(distance, temperature=0.02))
        assert (weights * same).sum(axis=1).min() > 0.9


def test_projection_is_orthonormal_and_standardises():
    features = jnp.asarray(3 + draw(500, 12) @ draw(12, 12, seed=1), jnp.float32)
    projection = kde_edge.make_projection(jax.random.key(2), features, 5)
    projected = kde_device.project(projection, features)
    np.testing.assert_allclose(projected.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(projected.std(axis=0), 1, rtol=1e-4)
    directions = projection.matrix / jnp.linalg.norm(projection.matrix, axis=0, keepdims=True)
    np.testing.assert_allclose(directions.T @ directions, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(kde_device.project(projection, features[3]), projected[3], atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="unknown method"):
        kde_edge.pairwise_kde(jnp.zeros((2, 3)), method="kl")
    with pytest.raises(ValueError, match=r"\[C, M\]"):
        kde_edge.pairwise_kde(jnp.zeros(3))
    with pytest.raises(ValueError, match="num_dims"):
        kde_edge.make_projection(jax.random.key(0), jnp.zeros((5, 3)), 4)
