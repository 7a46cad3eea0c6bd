"""Leave-one-out kernel density estimates: known values, plain loops, monotony."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from sklearn.neighbors import KernelDensity

from fed import kde, kde_fit

fit = jax.jit(
    kde_fit.fit,
    static_argnames=("learn_weights", "shared", "min_sigma", "max_steps", "rows_at_once"),
)
log_density = jax.jit(kde.log_density)
outlier_score = jax.jit(kde.outlier_score)
squared_distances = jax.jit(kde.squared_distances)

FOUR = jnp.asarray([[-1.0], [-0.2], [0.6], [1.4]])
VARIANTS = {
    "adaptive": {},
    "weights": {"learn_weights": True},
    "shared": {"shared": True},
    "shared weights": {"learn_weights": True, "shared": True},
}


def draw(num_points, num_dims, seed=0):
    return np.random.default_rng(seed).normal(size=(num_points, num_dims))


def plain(points, sigma, **options):
    """An estimate of one bandwidth."""
    return fit(points, initial_sigma=sigma, min_sigma=1e-6, max_steps=0, **options)


def padded(points, more):
    """The points with rubbish behind them, and their mask."""
    points = np.asarray(points, np.float32)
    rubbish = np.full((more, points.shape[1]), np.nan, np.float32)
    return jnp.asarray(np.concatenate([points, rubbish])), jnp.arange(len(points) + more) < len(
        points
    )


def em_reference(points, variance, weight, learn_weights, shared):
    """One step of the modified EM as plain loops in float64."""
    num_points, num_dims = points.shape
    joint = np.zeros((num_points, num_points))
    for i in range(num_points):
        for j in range(num_points):
            if i != j:
                normal = scipy.stats.multivariate_normal(points[j], variance[j] * np.eye(num_dims))
                joint[i, j] = weight[j] * normal.pdf(points[i])
    explained = joint.sum(axis=1)
    part = joint / explained[:, None]
    moment, mass = np.zeros(num_points), part.sum(axis=0)
    for j in range(num_points):
        for i in range(num_points):
            moment[j] += part[i, j] * ((points[i] - points[j]) ** 2).sum()
    if shared:
        new = np.full(num_points, moment.sum() / (num_dims * mass.sum()))
    else:
        new = moment / (num_dims * mass)
    return new, mass / num_points if learn_weights else weight, np.log(explained)


@pytest.mark.parametrize(
    ("sigma", "likelihood", "leave_one_out"), [(0.5, -1.2641, -2.5295), (0.1, -0.0026, -31.656)]
)
def test_known_values(sigma, likelihood, leave_one_out):
    """The likelihood rises as bandwidths shrink, the leave-one-out likelihood collapses."""
    fitted = plain(FOUR, sigma)
    assert float(log_density(fitted.kde, FOUR).mean()) == pytest.approx(likelihood, abs=6e-5)
    assert float(fitted.likelihood) == pytest.approx(leave_one_out, abs=6e-4)


@pytest.mark.parametrize("sigma", [0.3, 3.0])
def test_density_of_one_bandwidth_equals_scikit_learn(sigma):
    points, queries = draw(40, 3), 2 * draw(50, 3, seed=1)
    expected = KernelDensity(bandwidth=sigma, rtol=0, atol=0).fit(points).score_samples(queries)
    fitted = plain(*padded(points, 7)[:1], sigma, mask=padded(points, 7)[1])
    np.testing.assert_allclose(log_density(fitted.kde, queries), expected, rtol=2e-6)
    others = [
        KernelDensity(bandwidth=sigma, rtol=0, atol=0)
        .fit(np.delete(points, i, axis=0))
        .score_samples(points[i : i + 1])[0]
        + np.log(39 / 40)  # the weights are not rescaled
        for i in range(40)
    ]
    np.testing.assert_allclose(-outlier_score(fitted.kde)[:40], others, rtol=2e-6)
    assert float(fitted.likelihood) == pytest.approx(np.mean(others), rel=2e-6)


def test_density_of_many_bandwidths_and_weights_equals_scipy():
    rng = np.random.default_rng(2)
    points, queries = draw(6, 2), draw(9, 2, seed=1)
    sigmas, weights = rng.uniform(0.2, 2, 6), rng.dirichlet(np.ones(6))
    normals = [
        scipy.stats.multivariate_normal(p, s**2 * np.eye(2))
        for p, s in zip(points, sigmas, strict=True)
    ]
    expected = sum(w * n.pdf(queries) for w, n in zip(weights, normals, strict=True))
    kernels = kde.Kernels(jnp.asarray(sigmas**2), jnp.asarray(weights))
    estimate = kde.Kde(jnp.asarray(points), jnp.ones(6, bool), kernels)
    np.testing.assert_allclose(np.exp(log_density(estimate, queries)), expected, rtol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_em_step_equals_plain_loops(name):
    options = {"learn_weights": False, "shared": False, **VARIANTS[name]}
    rng, points = np.random.default_rng(3), draw(8, 3)
    variance = np.full(8, 0.5) if options["shared"] else rng.uniform(0.2, 1.0, 8)
    weight = rng.dirichlet(np.ones(8))
    expected = em_reference(points, variance, weight, **options)
    given, mask = padded(points, 3)
    given = jnp.where(mask[:, None], given, 5.0)
    kernels = kde.Kernels(*(jnp.asarray(np.pad(x, (0, 3))) for x in (variance, weight)))
    kernels = kernels._replace(variance=kernels.variance.at[8:].set(1.0))
    squared = squared_distances(given, given)
    step = jax.jit(partial(kde_fit.em_step, num_dims=3, **options))
    new, explained = step(kernels, squared, mask)
    for value, wanted in zip((*new, explained), expected, strict=True):
        np.testing.assert_allclose(value[:8], wanted, rtol=1e-5)
    np.testing.assert_array_equal(new.weight[8:], 0)
    np.testing.assert_array_equal(explained[8:], -np.inf)


@pytest.mark.parametrize("name", VARIANTS)
def test_em_never_lowers_the_likelihood(name):
    """Four devices at once, of different sizes; the last one holds every point twice."""
    sizes = np.asarray([60, 60, 35, 60])
    points = np.stack([draw(60, 2, seed) for seed in range(4)])
    points[3, 30:] = points[3, :30]
    with jax.enable_x64(True):
        mask = jnp.arange(60)[None, :] < sizes[:, None]
        points = jnp.where(mask[..., None], points, 1e3)
        squared = jax.vmap(kde.squared_distances)(points, points)
        step = jax.vmap(partial(kde_fit.em_step, num_dims=2, min_variance=1e-4, **VARIANTS[name]))

        def body(kernels, _):
            kernels, explained = step(kernels, squared, mask)
            return kernels, jax.vmap(kde.mean_over_points)(explained, mask)

        start = jax.vmap(lambda m: kde.uniform_kernels(m, 0.1, jnp.float64))(mask)
        _, likelihoods = jax.jit(lambda k: jax.lax.scan(body, k, length=201))(start)
        steps = np.diff(np.asarray(likelihoods), axis=0)
    assert steps.shape == (200, 4) and steps.min() >= -1e-9
    assert np.all(steps.sum(axis=0) > 0.01)


@pytest.mark.parametrize("learn_weights", [False, True])
def test_em_stops_where_the_gradient_vanishes(learn_weights):
    """Derivatives know nothing of responsibilities; weights go through a softmax."""
    with jax.enable_x64(True):
        points = jnp.asarray(draw(12, 2))
        squared, mask = squared_distances(points, points), jnp.ones(12, bool)
        fitted = fit(
            points,
            learn_weights=learn_weights,
            initial_sigma=0.5,
            min_sigma=1e-6,
            max_steps=3000,
            tolerance=1e-15,
        )

        def likelihood(logs, scores):
            kernels = kde.Kernels(jnp.exp(logs), jax.nn.softmax(scores))
            return kde.mean_over_points(kde.leave_one_out(kernels, squared, mask, num_dims=2), mask)

        variance, weight = fitted.kde.kernels
        at = jnp.log(variance), jnp.log(jnp.maximum(weight, 1e-200))
        value, (by_variance, by_weight) = jax.jit(jax.value_and_grad(likelihood, (0, 1)))(*at)
        assert float(value) == pytest.approx(float(fitted.likelihood), abs=1e-9)
        assert np.abs(by_variance).max() < 1e-4
        if learn_weights:
            assert np.abs(by_weight).max() < 1e-4
        else:
            assert np.abs(by_weight).max() > 1e-3


def test_learned_weights_prune_by_themselves():
    """The paper's check: 34 to 41 of 60 kernels above 0.01 / N after EM has run long."""
    points = jnp.asarray(np.stack([draw(60, 2, seed) for seed in range(4)]))
    options = {"learn_weights": True, "max_steps": 200, "tolerance": 0.0}
    fitted = jax.jit(jax.vmap(partial(kde_fit.fit, **options)))(points)
    pruned = jax.vmap(kde_fit.prune)(fitted.kde.kernels, fitted.kde.mask)
    kept = np.asarray((pruned.weight > 0).sum(axis=1))
    assert kept.min() >= 30 and kept.max() <= 42 and 33 <= kept.mean() <= 42
    np.testing.assert_allclose(pruned.weight.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(pruned.weight > 0, fitted.kde.kernels.weight >= 0.01 / 60)
    density = jax.jit(jax.vmap(kde.log_density))
    before, after = (
        density(fitted.kde._replace(kernels=k), points) for k in (fitted.kde.kernels, pruned)
    )
    np.testing.assert_allclose(before, after, atol=0.05)


def test_devices_together_padded_and_in_parts_equal_single_ones():
    sizes = (17, 30, 2)
    devices = [padded(draw(size, 3, seed), 33 - size) for seed, size in enumerate(sizes)]
    points, mask = (jnp.stack(x) for x in zip(*devices, strict=True))
    options = {"learn_weights": True, "initial_sigma": 0.5, "max_steps": 12}
    together, in_parts = (
        jax.jit(jax.vmap(partial(kde_fit.fit, rows_at_once=rows, **options)))(points, mask)
        for rows in (None, 7)
    )
    chex.assert_trees_all_close(together, in_parts, rtol=2e-4, atol=1e-6)
    for row, size in enumerate(sizes):
        alone = fit(points[row, :size], **options)
        np.testing.assert_allclose(together.likelihood[row], alone.likelihood, rtol=1e-5)
        assert together.num_steps[row] == alone.num_steps
        kernels = jax.tree.map(lambda x, r=row: x[r], together.kde.kernels)
        for found, expected in zip(kernels, alone.kde.kernels, strict=True):
            np.testing.assert_allclose(found[:size], expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(kernels.weight[size:], 0)


def test_duplicates_stop_at_the_floor():
    points = jnp.asarray(np.repeat(draw(20, 2), 2, axis=0), jnp.float32)
    fitted = fit(points, min_sigma=0.05, max_steps=200, tolerance=0.0)
    np.testing.assert_allclose(fitted.kde.kernels.variance, 0.05**2, rtol=1e-6)
    # Its twin alone, 1 / 40 of the weight, at distance 0.
    assert float(fitted.likelihood) == pytest.approx(
        -np.log(40) - np.log(2 * np.pi * 0.05**2), abs=0.05
    )


@pytest.mark.parametrize("learn_weights", [False, True])
def test_devices_with_hardly_any_points(learn_weights):
    points = jnp.asarray(draw(4, 2), jnp.float32)
    masks = jnp.arange(4)[None, :] < jnp.arange(3)[:, None]

    @jax.jit
    @jax.vmap
    def run(mask):
        fitted = kde_fit.fit(points, mask, learn_weights=learn_weights)
        return fitted, kde.log_density(fitted.kde, points), kde.outlier_score(fitted.kde)

    fitted, density, scores = run(masks)
    assert fitted.likelihood[0] == fitted.likelihood[1] == -np.inf
    # Two points are each other's only explanation, with sigma^2 = distance^2 / D.
    expected = float(((points[0] - points[1]) ** 2).sum() / 2)
    np.testing.assert_allclose(fitted.kde.kernels.variance[2, :2], expected, rtol=1e-5)
    assert not np.isnan(density).any()
    assert np.all(np.isneginf(density[0])) and np.isfinite(density[1]).all()
    assert scores[1, 0] == np.inf and np.all(np.isneginf(scores[1, 1:]))


def test_kernel_far_from_everything_keeps_a_finite_bandwidth():
    """Its responsibilities are exp(-1e6); their ratio is still exact."""
    points = jnp.asarray([[0.0], [0.1], [200.0]])
    kernels = kde.uniform_kernels(jnp.ones(3, bool), 0.1, jnp.float32)
    squared = squared_distances(points, points)
    step = jax.jit(kde_fit.em_step, static_argnames=("num_dims", "learn_weights"))
    new, _ = step(kernels, squared, jnp.ones(3, bool), num_dims=1)
    assert float(new.variance[2]) == pytest.approx(199.9**2, rel=1e-3)
    silent = kernels._replace(weight=jnp.asarray([0.5, 0.5, 0.0]))
    new, _ = step(silent, squared, jnp.ones(3, bool), num_dims=1, learn_weights=True)
    assert float(new.variance[2]) == pytest.approx(0.01) and new.weight[2] == 0


def test_scores_find_outliers_and_quality_falls_with_noise():
    rng = np.random.default_rng(5)
    clean = rng.normal(size=(200, 4)) @ np.diag([1, 1, 0.3, 0.3])
    bad = np.arange(200) < 40
    noisy = np.where(bad[:, None], rng.uniform(-4, 4, (200, 4)), clean)
    both = jax.jit(jax.vmap(kde_fit.fit))(jnp.asarray(np.stack([clean, noisy]), jnp.float32))
    scores = np.asarray(outlier_score(jax.tree.map(lambda x: x[1], both.kde)))
    better = scipy.stats.mannwhitneyu(scores[bad], scores[~bad]).statistic / (40 * 160)
    assert better > 0.95  # area under the ROC curve
    quality = jax.jit(jax.vmap(kde.data_quality))(both.kde)
    assert quality[0] > quality[1] + 0.1


def test_quality_is_minus_the_entropy_of_a_gaussian():
    points = jnp.asarray(1.5 * draw(1000, 2), jnp.float32)

    @jax.jit
    def measure(points):
        start = kde.scott_sigma(points)
        return kde.data_quality(kde_fit.fit(points, initial_sigma=start, max_steps=0).kde)

    quality = measure(points)
    assert float(quality) == pytest.approx(
        -(0.5 * np.log(2 * np.pi * np.e) + np.log(1.5)), abs=0.05
    )


def test_samples_have_the_mixture_s_moments():
    kernels = kde.Kernels(jnp.asarray([0.01, 1.0, 4.0]), jnp.asarray([0.7, 0.3, 0.0]))
    points = jnp.asarray([[0.0, 1.0], [3.0, -1.0], [100.0, 100.0]])
    estimate = kde.Kde(points, jnp.ones(3, bool), kernels)
    drawn = np.asarray(
        jax.jit(partial(kde.sample, num_samples=20_000))(jax.random.key(0), estimate)
    )
    np.testing.assert_allclose(drawn.mean(axis=0), [0.9, 0.4], atol=0.04)
    within, between = 0.7 * 0.01 + 0.3, 0.21 * np.asarray([9, 4])
    np.testing.assert_allclose(drawn.var(axis=0), within + between, rtol=0.03)


def test_scott_equals_scipy():
    points = draw(50, 1)
    reference = scipy.stats.gaussian_kde(points.T)
    given, mask = padded(points, 4)
    assert float(jax.jit(kde.scott_sigma)(given, mask)) == pytest.approx(
        float(np.sqrt(reference.covariance[0, 0])), rel=1e-5
    )


def test_errors():
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        kde_fit.fit(jnp.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="mask has shape"):
        kde_fit.fit(FOUR, jnp.ones(3, bool))
    with pytest.raises(ValueError, match="duplicates"):
        kde_fit.fit(FOUR, min_sigma=0.0)
    with pytest.raises(ValueError, match="rows_at_once"):
        kde_fit.fit(FOUR, rows_at_once=0)
