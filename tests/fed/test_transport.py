"""Transport against linear programming, SciPy and closed forms; clients' labelled data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from fed import gmm, transport
from fed.clients import take_row

sinkhorn = jax.jit(transport.sinkhorn)
distance = jax.jit(transport.mixture_wasserstein)


def exact_cost(cost, source, target):
    """The optimum of the linear programme, by SciPy's simplex."""
    cost, source, target = (np.asarray(x, np.float64) for x in (cost, source, target))
    rows, columns = cost.shape
    marginals = np.concatenate(
        [np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))]
    )
    masses = np.concatenate([source / source.sum(), target / target.sum()])
    return scipy.optimize.linprog(cost.reshape(-1), A_eq=marginals, b_eq=masses).fun


def problem(seed, shape=(5, 7)):
    """Squared distances of random points, or random costs; some places are empty."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(shape[0], 1, 3)) - rng.normal(size=(1, shape[1], 3))
    cost = (points**2).sum(axis=2) if seed % 2 else rng.random(shape)
    source, target = (rng.random(n) * (rng.random(n) < 0.7) for n in shape)
    source[0] += 0.1
    target[-1] += 0.1
    return tuple(x.astype(np.float32) for x in (cost, source, target))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_cost_is_just_above_the_exact_optimum(seed):
    cost, source, target = problem(seed)
    plan = np.asarray(sinkhorn(cost, source, target), np.float64)
    np.testing.assert_allclose(plan.sum(axis=1), source / source.sum(), atol=1e-6)
    np.testing.assert_allclose(plan.sum(axis=0), target / target.sum(), atol=1e-6)
    assert (plan >= 0).all()
    exact = exact_cost(cost, source, target)
    assert -1e-6 * cost.max() < (plan * cost).sum() - exact < 0.02 * cost.max()


def test_more_iterations_and_less_regularization_come_closer():
    gaps = []
    for regularization, num_iterations in ((0.1, 200), (0.02, 200), (0.004, 2000)):
        gap = 0.0
        for seed in range(10):
            cost, source, target = problem(seed)
            options = {"regularization": regularization, "num_iterations": num_iterations}
            plan = np.asarray(sinkhorn(cost, source, target, **options), np.float64)
            gap += ((plan * cost).sum() - exact_cost(cost, source, target)) / cost.max() / 10
        gaps.append(gap)
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2]
    assert gaps[2] < 2e-4


def test_masked_places_and_the_scale_of_costs_do_not_matter():
    cost, source, target = problem(3)
    source[1], target[2] = 0, 0
    plan = np.asarray(sinkhorn(cost, source, target))
    assert (plan[1] == 0).all() and (plan[:, 2] == 0).all()
    cost[1], cost[:, 2] = 1e6, 1e6
    np.testing.assert_array_equal(sinkhorn(cost, source, target), plan)
    np.testing.assert_allclose(sinkhorn(1024 * cost, 8 * source, target), plan, atol=1e-6)


def test_degenerate_histograms():
    zero = sinkhorn(np.zeros((2, 3), np.float32), np.ones(2), np.ones(3))
    np.testing.assert_allclose(zero, np.full((2, 3), 1 / 6), rtol=1e-5)
    single = sinkhorn(np.ones((1, 3), np.float32), np.ones(1), np.asarray([1.0, 2.0, 1.0]))
    np.testing.assert_allclose(single, [[0.25, 0.5, 0.25]], rtol=1e-5)


def test_on_a_line_it_is_the_wasserstein_distance():
    rng = np.random.default_rng(1)
    for _ in range(5):
        x, y, a, b = rng.normal(size=8), rng.normal(size=8), rng.random(8), rng.random(8)
        cost = np.abs(x[:, None] - y[None]).astype(np.float32)
        plan = sinkhorn(cost, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
        expected = scipy.stats.wasserstein_distance(x, y, a, b)
        assert (cost * plan).sum() == pytest.approx(expected, abs=0.02 * float(cost.max()))


def mixture(seed, num_components=3, dims=4):
    rng = np.random.default_rng(seed)
    values = (
        rng.dirichlet(np.ones(num_components)),
        rng.normal(size=(num_components, dims)),
        rng.uniform(0.1, 2, (num_components, dims)),
    )
    return gmm.Mixture(*(jnp.asarray(value, jnp.float32) for value in values))


def test_component_costs_are_wasserstein_distances_of_gaussians():
    first, second = mixture(0), mixture(1, 2)
    expected = np.zeros((3, 2))
    for i in range(3):
        for j in range(2):
            # Bures' formula with matrices; ours is its diagonal case.
            a, b = (np.diag(m.variances[k]) for m, k in ((first, i), (second, j)))
            root = np.sqrt(a)
            expected[i, j] = np.trace(a + b - 2 * np.sqrt(root @ b @ root))
            expected[i, j] += ((first.means[i] - second.means[j]) ** 2).sum()
    np.testing.assert_allclose(transport.component_costs(first, second), expected, rtol=1e-5)


def test_mixture_distance_equals_the_linear_programme():
    for seed in range(5):
        first, second = mixture(seed), mixture(seed + 100)
        cost = np.asarray(transport.component_costs(first, second))
        exact = np.sqrt(exact_cost(cost, np.asarray(first.weights), np.asarray(second.weights)))
        assert distance(first, second) == pytest.approx(exact, rel=0.01)
        assert distance(second, first) == pytest.approx(exact, rel=0.01)


def test_mixture_distance_of_single_gaussians_and_of_a_shift():
    first, second = mixture(0, 1), mixture(1, 1)
    expected = np.sqrt(transport.component_costs(first, second)[0, 0])
    np.testing.assert_allclose(distance(first, second), expected, rtol=1e-5)
    many = mixture(2)._replace(means=10 * mixture(2).means)
    shifted = many._replace(means=many.means + jnp.asarray([[3.0, 0.0, 4.0, 0.0]]))
    assert distance(many, shifted) == pytest.approx(5.0, rel=1e-3)
    assert distance(many, many) < 0.02 * distance(many, shifted)
    order = jnp.asarray([2, 0, 1])
    np.testing.assert_allclose(
        distance(many, take_row(shifted, order)), distance(many, shifted), rtol=1e-4
    )


@functools.lru_cache(maxsize=1)
def federation():
    """Clients 0 and 1: classes 0 and 1; 2: classes 2 and 3; 3: half and half; 4: as 0, renamed."""
    rng = np.random.default_rng(2)
    centers = 4 * rng.normal(size=(4, 6))
    kinds = [(0, 1), (0, 1), (2, 3), (0, 1, 2, 3), (0, 1)]
    labels = np.stack([np.resize(kind, 60) for kind in kinds])
    features = (centers[labels] + rng.normal(size=(5, 60, 6))).astype(np.float32)
    features[4], labels[4] = features[0], 3 - labels[0]

    def sketch(features, labels):
        return gmm.fit_classes(jax.random.key(0), features, labels, 60, num_classes=4)

    sketches = jax.jit(jax.vmap(sketch))(features, labels)
    return sketches, np.asarray(jax.jit(transport.client_distances)(sketches))


def test_client_distances_follow_the_data():
    _, result = federation()
    np.testing.assert_array_equal(result, result.T)
    assert (np.diag(result) < 0.01 * result.max()).all()
    assert result[0, 1] < 0.3 * result[0, 3] < 0.3 * result[0, 2]
    assert result[2, 3] < 0.8 * result[0, 2]
    # Labels are matched by their samples, not by name (each mixture was seeded differently).
    assert result[0, 4] < result[0, 1]


def test_client_distances_equal_linear_programmes():
    sketches, result = federation()
    for i, j in ((0, 2), (0, 3), (1, 2)):
        costs = np.zeros((4, 4))
        for a in range(4):
            for b in range(4):
                one, other = (
                    take_row(take_row(sketches.mixtures, client), label)
                    for client, label in ((i, a), (j, b))
                )
                between = np.asarray(transport.component_costs(one, other), np.float64)
                masses = (np.asarray(m.weights, np.float64) for m in (one, other))
                costs[a, b] = np.sqrt(exact_cost(between, *masses))
        exact = exact_cost(costs, *(np.asarray(sketches.counts[k]) for k in (i, j)))
        assert result[i, j] == pytest.approx(exact, rel=0.01)


def test_pairs_in_chunks_change_nothing():
    sketches, result = federation()
    few = jax.jit(functools.partial(transport.client_distances, chunk_size=4))(sketches)
    np.testing.assert_allclose(few, result, rtol=1e-5, atol=1e-3)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="rows and columns"):
        transport.sinkhorn(jnp.zeros((2, 3)), jnp.ones(3), jnp.ones(2))
