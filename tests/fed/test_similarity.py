"""Distances against SciPy and NumPy in float64; weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats

from fed import similarity

RNG = np.random.default_rng(0)
SAMPLES = (
    RNG.normal(size=(5, 40, 6)) * RNG.uniform(0.5, 2, (5, 1, 6)) + RNG.normal(size=(5, 1, 6))
).astype(np.float32)


def reference(values):
    """SciPy's distances between the rows of a [C, K] matrix."""
    rows = values.astype(np.float64)
    return np.array([[scipy.stats.wasserstein_distance(a, b) for b in rows] for a in rows])


def test_flat_equals_scipy():
    distance = jax.jit(similarity.pairwise_wasserstein, static_argnames="method")(
        SAMPLES, method="flat"
    )
    np.testing.assert_allclose(distance, reference(SAMPLES.reshape(5, -1)), atol=1e-6)
    assert distance.dtype == jnp.float32


def sorted_reference(samples, method):
    """Plain NumPy in float64: mean absolute differences of sorted values."""
    values = samples.astype(np.float64)
    if method == "flat":
        values = values.reshape(len(values), -1, 1)
    ordered = np.sort(values, axis=1)
    return np.stack([np.abs(ordered - own).mean(axis=(1, 2)) for own in ordered])


pairwise = jax.jit(similarity.pairwise_wasserstein, static_argnames="method")
pairwise_js = jax.jit(similarity.pairwise_js)


def unlike_clients(num_clients, num_samples, num_dims, seed=4):
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.5, 2, (num_clients, 1, num_dims))
    samples = rng.normal(size=(num_clients, num_samples, num_dims)) * spread
    return (samples + rng.normal(size=(num_clients, 1, num_dims))).astype(np.float32)


@pytest.mark.parametrize("scale, offset", [(1, 0), (1, 1e3), (1e-6, 0), (1e-6, 1e-2), (1e6, -1e7)])
def test_many_clients_equal_scipy_at_any_magnitude(scale, offset):
    samples = (scale * unlike_clients(19, 30, 7) + offset).astype(np.float32)
    flat = reference(samples.reshape(19, -1))
    np.testing.assert_allclose(pairwise(samples, method="flat"), flat, rtol=1e-6)
    expected = sorted_reference(samples, "per_dimension")
    np.testing.assert_allclose(pairwise(samples, method="per_dimension"), expected, rtol=1e-6)


@pytest.mark.parametrize("num_clients", [1, 15, 16, 17, 300])
def test_any_number_of_clients(num_clients):
    # Below 16 vectors run over coordinates; beyond 256 there are several tiles.
    samples = unlike_clients(num_clients, 5, 3)
    for method in ("flat", "per_dimension"):
        distance = np.asarray(pairwise(samples, method=method))
        np.testing.assert_allclose(distance, sorted_reference(samples, method), rtol=1e-6)
        np.testing.assert_array_equal(distance, distance.T)
        np.testing.assert_array_equal(np.diag(distance), 0)


def test_equal_steps_are_summed_without_drift():
    # The same number added again and again is always rounded the same way.
    samples = np.repeat(np.float32(0.1) * np.arange(17, dtype=np.float32), 60_000)
    samples = samples.reshape(17, 6_000, 10)
    values = samples[:, 0, 0].astype(np.float64)
    expected = np.abs(values[:, None] - values[None])
    np.testing.assert_allclose(pairwise(samples, method="flat"), expected, rtol=5e-7)


def test_order_of_samples_and_of_clients_does_not_matter():
    samples, rng = unlike_clients(19, 30, 7), np.random.default_rng(5)
    shuffled = rng.permuted(samples.reshape(19, -1), axis=1).reshape(samples.shape)
    np.testing.assert_array_equal(
        pairwise(shuffled, method="flat"), pairwise(samples, method="flat")
    )
    shuffled, clients = rng.permuted(samples, axis=1), rng.permutation(19)
    distance = np.asarray(pairwise(samples, method="per_dimension"))
    np.testing.assert_array_equal(pairwise(shuffled, method="per_dimension"), distance)
    np.testing.assert_allclose(
        pairwise(samples[clients], method="per_dimension"),
        distance[clients][:, clients],
        rtol=1e-6,
    )


@pytest.mark.parametrize("num_clients", [5, 19])
def test_vmap_over_edges_equals_a_loop(num_clients):
    edges = np.stack([unlike_clients(num_clients, 30, 7, seed) for seed in range(3)])

    def both(samples):
        distance = similarity.pairwise_wasserstein(samples, method="per_dimension")
        return distance, similarity.pairwise_js(samples)

    distances, divergences = jax.jit(jax.vmap(both))(edges)
    mapped = jax.jit(lambda e: jax.lax.map(both, e))(edges)
    for edge, samples in enumerate(edges):
        distance = pairwise(samples, method="per_dimension")
        divergence = pairwise_js(samples)
        for one, other in ((distances, divergences), mapped):
            np.testing.assert_allclose(one[edge], distance, rtol=1e-6)
            np.testing.assert_allclose(other[edge], divergence, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["flat", "per_dimension", "js", "edges"])
def test_memory_is_linear_in_the_input(kind):
    wasserstein = functools.partial(similarity.pairwise_wasserstein, method="per_dimension")
    function, shape = {
        "flat": (functools.partial(similarity.pairwise_wasserstein, method="flat"), (1024, 40, 32)),
        "per_dimension": (wasserstein, (1024, 40, 32)),
        "js": (similarity.pairwise_js, (1024, 32, 32)),
        "edges": (jax.vmap(wasserstein), (1000, 12, 32, 16)),
    }[kind]
    samples = jax.ShapeDtypeStruct(shape, jnp.float32)
    memory = jax.jit(function).lower(samples).compile().memory_analysis()
    # One value for each pair and coordinate would take 1000 times the input, 12 for the edges.
    assert memory.temp_size_in_bytes < 8 * (
        memory.argument_size_in_bytes + memory.output_size_in_bytes
    )


def test_flat_stays_accurate_on_many_values():
    samples = np.random.default_rng(1).normal(size=(3, 200, 768)).astype(np.float32)
    samples += np.arange(3, dtype=np.float32)[:, None, None] / 4
    distance = similarity.pairwise_wasserstein(samples, method="flat")
    np.testing.assert_allclose(distance, reference(samples.reshape(3, -1)), atol=1e-6)


def test_per_dimension_is_the_mean_of_marginals():
    expected = np.mean([reference(SAMPLES[:, :, d]) for d in range(6)], axis=0)
    distance = similarity.pairwise_wasserstein(SAMPLES, method="per_dimension")
    np.testing.assert_allclose(distance, expected, atol=1e-6)


def test_sliced_is_the_mean_of_projections():
    key = jax.random.key(1)
    directions = np.asarray(jax.random.normal(key, (6, 20)), np.float64)
    directions /= np.linalg.norm(directions, axis=0)
    projected = SAMPLES.astype(np.float64) @ directions
    expected = np.mean([reference(projected[:, :, p]) for p in range(20)], axis=0)
    distance = similarity.pairwise_wasserstein(
        SAMPLES, method="sliced", key=key, num_projections=20
    )
    np.testing.assert_allclose(distance, expected, atol=1e-5)


def test_per_dimension_sees_what_flat_forgets():
    swapped = np.stack([SAMPLES[0], SAMPLES[0][:, ::-1]])
    assert similarity.pairwise_wasserstein(swapped, method="flat")[0, 1] < 1e-7
    assert similarity.pairwise_wasserstein(swapped, method="per_dimension")[0, 1] > 0.1


@pytest.mark.parametrize("method", ["flat", "per_dimension", "sliced"])
def test_distances_are_a_metric(method):
    distance = np.asarray(
        similarity.pairwise_wasserstein(SAMPLES, method=method, key=jax.random.key(0))
    )
    np.testing.assert_array_equal(np.diag(distance), 0)
    np.testing.assert_allclose(distance, distance.T, rtol=1e-6)
    assert (distance[:, :, None] <= distance[:, None, :] + distance.T[None] + 1e-6).all()
    assert (distance[~np.eye(5, dtype=bool)] > 0).all()


def test_integer_sort_orders_like_floats():
    special = np.array(
        [0.0, -0.0, -1.5, 2.5, -np.inf, np.inf, 1e-45, -1e-45, 3e38, -3e38, -1.5000001], np.float32
    )
    values = np.concatenate([special, RNG.normal(size=50).astype(np.float32)])
    ordered = np.asarray(similarity._sorted(jnp.asarray(values)[None, :, None]))[0, :, 0]
    expected = np.sort(values)
    np.testing.assert_array_equal(ordered, expected)
    assert np.signbit(ordered[expected == 0]).tolist() == [True, False]


@pytest.mark.parametrize("num_clients", [3, 6])
def test_sorting_in_parts_changes_nothing(num_clients, monkeypatch):
    monkeypatch.setattr(similarity, "_LARGE", 1)
    values = unlike_clients(num_clients, 30, 7)
    np.testing.assert_array_equal(similarity._sorted(jnp.asarray(values)), np.sort(values, axis=1))


def test_sketch_is_hazen_s_quantile():
    levels = (np.arange(8) + 0.5) / 8
    expected = np.quantile(SAMPLES[0].astype(np.float64), levels, axis=0, method="hazen")
    np.testing.assert_allclose(similarity.quantile_sketch(SAMPLES[0], 8), expected, atol=1e-6)


def test_sketch_of_all_samples_is_the_sorted_sample():
    sketch = similarity.quantile_sketch(SAMPLES[0], 40)
    np.testing.assert_array_equal(sketch, np.sort(SAMPLES[0], axis=0))


@pytest.mark.parametrize("size", [1, 3, 39])
def test_sketch_ignores_padding(size):
    padded = SAMPLES[0].copy()
    padded[size:] = 7.0
    sketch = jax.jit(similarity.quantile_sketch, static_argnums=1)(padded, 8, size=size)
    np.testing.assert_allclose(
        sketch, similarity.quantile_sketch(SAMPLES[0][:size], 8), rtol=1e-6, atol=1e-6
    )


def test_sketches_approximate_the_distance():
    samples = np.random.default_rng(2).normal(size=(3, 400, 4)).astype(np.float32)
    samples += np.arange(3, dtype=np.float32)[:, None, None]
    sketches = jax.vmap(lambda s: similarity.quantile_sketch(s, 32))(samples)
    exact = similarity.pairwise_wasserstein(samples, method="per_dimension")
    rough = similarity.pairwise_wasserstein(sketches, method="per_dimension")
    np.testing.assert_allclose(rough, exact, rtol=0.03, atol=1e-6)


def js_reference(samples, num_bins):
    """Plain float64 loops, with SciPy's Jensen-Shannon distance squared."""
    num_clients, size, num_dims = samples.shape
    total = np.zeros((num_clients, num_clients))
    for d in range(num_dims):
        rows = np.sort(samples[:, :, d].astype(np.float64), axis=1)
        low = 1.5 * rows[:, :1] - 0.5 * rows[:, 1:2]
        high = 1.5 * rows[:, -1:] - 0.5 * rows[:, -2:-1]
        knots = np.concatenate([low, rows, high], axis=1)
        levels = np.concatenate([[0], (np.arange(size) + 0.5) / size, [1]])
        edges = np.linspace(knots.min(), knots.max(), num_bins + 1)
        masses = [np.diff(np.interp(edges, k, levels)) for k in knots]
        for i in range(num_clients):
            for j in range(num_clients):
                total[i, j] += scipy.spatial.distance.jensenshannon(masses[i], masses[j]) ** 2
    return total / num_dims


def test_js_equals_scipy():
    divergence = jax.jit(similarity.pairwise_js)(SAMPLES)
    np.testing.assert_allclose(divergence, js_reference(SAMPLES, 32), atol=2e-5)
    np.testing.assert_array_equal(np.diag(divergence), 0)


def test_js_of_many_clients_equals_scipy():
    samples = unlike_clients(17, 12, 2)
    divergence = np.asarray(pairwise_js(samples))
    np.testing.assert_allclose(divergence, js_reference(samples, 32), atol=2e-5)
    np.testing.assert_array_equal(divergence, divergence.T)
    np.testing.assert_array_equal(np.diag(divergence), 0)


def test_js_bounds_and_constant_dimensions():
    apart = np.stack([np.zeros((20, 2)), np.full((20, 2), 5.0)]).astype(np.float32)
    np.testing.assert_allclose(similarity.pairwise_js(apart)[0, 1], np.log(2), rtol=1e-5)
    same = np.ones((3, 20, 2), np.float32)
    np.testing.assert_array_equal(similarity.pairwise_js(same), np.zeros((3, 3)))


def test_js_of_sketches_approximates_that_of_samples():
    samples = np.random.default_rng(3).normal(size=(2, 1000, 3)).astype(np.float32)
    samples[1] += 1.0
    sketches = jax.vmap(lambda s: similarity.quantile_sketch(s, 64))(samples)
    pairwise_js = jax.jit(functools.partial(similarity.pairwise_js, num_bins=16))
    exact, rough = pairwise_js(samples)[0, 1], pairwise_js(sketches)[0, 1]
    # Two unit normals one apart: 0.112 nats.
    np.testing.assert_allclose([exact, rough], 0.112, atol=0.02)


def test_similarity_and_weights():
    distance = np.array([[0.0, 0.3, 1.0], [0.3, 0.0, 0.5], [1.0, 0.5, 0.0]])
    expected = np.exp(1 / (1 + distance) / 0.1)
    expected /= expected.sum(axis=1, keepdims=True)
    result = similarity.weights(jnp.asarray(distance, jnp.float32), temperature=0.1)
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    skewed = jnp.asarray(distance, jnp.float32).at[0, 1].set(0.9)
    score = similarity.similarity(skewed)
    np.testing.assert_array_equal(score, score.T)
    np.testing.assert_allclose(score[0, 1], np.sqrt(1 / 1.9 / 1.3), rtol=1e-6)


@pytest.mark.parametrize("num_clients", [5, 7])
def test_identical_clients_get_exactly_uniform_weights(num_clients):
    samples = np.repeat(SAMPLES[:1], num_clients, axis=0)
    distance = similarity.pairwise_wasserstein(samples, method="per_dimension")
    for temperature in (1.0, 0.02):
        result = similarity.weights(distance, temperature=temperature)
        np.testing.assert_array_equal(result, np.full_like(result, np.float32(1) / num_clients))


def test_errors():
    with pytest.raises(ValueError, match="unknown method"):
        similarity.pairwise_wasserstein(SAMPLES, method="energy")
    with pytest.raises(ValueError, match="give it a key"):
        similarity.pairwise_wasserstein(SAMPLES, method="sliced")
    with pytest.raises(ValueError, match=r"\[C, N, D\]"):
        similarity.pairwise_wasserstein(SAMPLES[0], method="flat")
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        similarity.quantile_sketch(SAMPLES, 4)
    with pytest.raises(ValueError, match="temperature must be positive"):
        similarity.weights(jnp.zeros((2, 2)), temperature=0.0)
