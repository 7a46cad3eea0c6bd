"""Aggregation against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fed import aggregate

RNG = np.random.default_rng(0)
TREE = {
    "a": jnp.asarray(RNG.normal(size=(5, 3, 2)), jnp.float32),
    "b": [jnp.asarray(RNG.normal(size=5), jnp.float32)],
}
WEIGHTS = np.array([3.0, 0.0, 1.0, 2.0, 4.0], np.float32)


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def assert_trees_close(result, expected, rtol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), result, expected
    )


def test_weighted_mean():
    expected = jax.tree.map(lambda x: np.average(x, axis=0, weights=WEIGHTS), wide(TREE))
    assert_trees_close(jax.jit(aggregate.weighted_mean)(jnp.asarray(WEIGHTS), TREE), expected)


def test_weighted_mean_of_equal_clients_is_the_client():
    same = jax.tree.map(lambda x: jnp.repeat(x[:1], 5, axis=0), TREE)
    result = aggregate.weighted_mean(jnp.asarray(WEIGHTS), same)
    assert_trees_close(result, jax.tree.map(lambda x: x[0], same))


def test_personalized_mean():
    weights = RNG.dirichlet(np.ones(5), 5)
    expected = jax.tree.map(lambda x: np.tensordot(weights, x, axes=1), wide(TREE))
    result = jax.jit(aggregate.personalized_mean)(jnp.asarray(weights, jnp.float32), TREE)
    assert_trees_close(result, expected, rtol=2e-6)


def test_identity_weights_give_everyone_its_own():
    result = aggregate.personalized_mean(jnp.eye(5), TREE)
    jax.tree.map(np.testing.assert_array_equal, result, TREE)


def test_uniform_weights_give_everyone_the_mean():
    result = aggregate.personalized_mean(jnp.full((5, 5), 0.2), TREE)
    mean = aggregate.weighted_mean(jnp.ones(5), TREE)
    assert_trees_close(result, jax.tree.map(lambda x: jnp.stack([x] * 5), mean))


def test_coverage_weighted_mean_equals_plain_loops():
    masks = jax.tree.map(lambda x: jnp.asarray(RNG.integers(0, 2, x.shape), jnp.float32), TREE)
    masks["a"] = masks["a"].at[:, 0, 0].set(0.0)  # held by nobody
    fallback = jax.tree.map(lambda x: jnp.full(x.shape[1:], 9.0), TREE)
    result = aggregate.coverage_weighted_mean(jnp.asarray(WEIGHTS), TREE, masks, fallback)
    values, held = wide(TREE["a"]), wide(masks["a"])
    for i in range(3):
        for j in range(2):
            total = sum(WEIGHTS[c] * held[c, i, j] for c in range(5))
            expected = (
                sum(WEIGHTS[c] * held[c, i, j] * values[c, i, j] for c in range(5)) / total
                if total > 0
                else 9.0
            )
            np.testing.assert_allclose(result["a"][i, j], expected, rtol=1e-5)
    assert result["a"][0, 0] == 9.0


def test_full_coverage_is_the_weighted_mean_and_hidden_values_do_not_matter():
    ones = jax.tree.map(jnp.ones_like, TREE)
    fallback = jax.tree.map(lambda x: x[0], TREE)
    result = aggregate.coverage_weighted_mean(jnp.asarray(WEIGHTS), TREE, ones, fallback)
    assert_trees_close(result, aggregate.weighted_mean(jnp.asarray(WEIGHTS), TREE))

    masks = jax.tree.map(lambda x: x.at[2].set(0.0), ones)
    spoilt = jax.tree.map(lambda x: x.at[2].set(jnp.nan), TREE)
    result = aggregate.coverage_weighted_mean(jnp.asarray(WEIGHTS), spoilt, masks, fallback)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result))


def test_robust_means_ignore_one_liar():
    liar = jax.tree.map(lambda x: x.at[3].set(1e6), TREE)
    ordered = jax.tree.map(lambda x: np.sort(np.asarray(x, np.float64), axis=0), liar)
    trimmed = aggregate.trimmed_mean(liar, num_trimmed=1)
    assert_trees_close(trimmed, jax.tree.map(lambda x: x[1:4].mean(axis=0), ordered))
    assert_trees_close(aggregate.median(liar), jax.tree.map(lambda x: x[2], ordered))


def test_dtypes():
    tree = {"half": jnp.ones((2, 3), jnp.bfloat16), "count": jnp.asarray([1, 4])}
    weights = jnp.asarray([1.0, 1.0])
    for result in (
        aggregate.weighted_mean(weights, tree),
        aggregate.median(tree),
        aggregate.trimmed_mean(tree, num_trimmed=0),
        aggregate.personalized_mean(weights[None] / 2, tree),
    ):
        assert result["half"].dtype == jnp.bfloat16 and result["count"].dtype == jnp.float32
        np.testing.assert_allclose(jnp.ravel(result["count"]), 2.5)


def test_errors():
    with pytest.raises(ValueError, match=r"\['a'\] of tree has shape \(5, 3, 2\).*4 clients"):
        aggregate.weighted_mean(jnp.ones(4), TREE)
    with pytest.raises(ValueError, match="4 clients"):
        aggregate.personalized_mean(jnp.ones((4, 4)), TREE)
    with pytest.raises(ValueError, match="use at most 2"):
        aggregate.trimmed_mean(TREE, num_trimmed=3)
