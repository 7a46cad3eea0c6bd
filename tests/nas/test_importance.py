"""Importance and pruning of nas.importance against finite differences and plain loops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas import importance


def test_taylor_importance_is_the_first_order_change_of_the_loss():
    weights = jnp.array([[0.3, -0.2], [0.5, 0.1], [-0.4, 0.7]])

    def loss(gates):
        return jnp.sum(jnp.tanh(weights * gates[None, :] @ jnp.array([1.0, 2.0])) ** 2)

    gates = jnp.ones(2)
    scores = importance.taylor_importance(gates, jax.grad(loss)(gates))
    step = 1e-3
    for gate in range(2):
        up, down = (float(loss(gates.at[gate].add(s))) for s in (step, -step))
        np.testing.assert_allclose(scores[gate], abs(up - down) / (2 * step), rtol=2e-3)


def test_taylor_importance_sums_inside_the_absolute_value():
    value, grad = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 1.0], [-1.0, 1.0]])
    np.testing.assert_allclose(importance.taylor_importance(value, grad, axis=0), [2.0, 6.0])
    np.testing.assert_allclose(importance.taylor_importance(value, grad), [[1, 2], [3, 4]])


def test_gate_importance_is_squared_and_zero_for_pruned_gates():
    scores = importance.gate_importance(jnp.array([1.0, 0.0, 0.5]), jnp.array([-3.0, 9.0, 2.0]))
    np.testing.assert_allclose(scores, [9.0, 0.0, 1.0])


def test_order_is_a_stable_descending_permutation_of_each_layer():
    scores = jnp.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 5.0, jnp.nan]])
    order = importance.importance_order(scores, scores[:, :2])
    np.testing.assert_array_equal(order.heads, [[1, 2, 3, 0], [2, 0, 1, 3]])
    np.testing.assert_array_equal(order.neurons, [[1, 0], [0, 1]])
    assert order.heads.dtype == jnp.int32


@pytest.mark.parametrize("seed", range(5))
def test_prune_lowest_matches_a_loop_and_prunes_exactly_num(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, 40).astype(np.float32)  # many ties
    mask = (rng.random(40) < 0.7).astype(np.float32)
    for num in (0, 1, 7):
        expected = mask.copy()
        for _ in range(num):
            open_gates = [g for g in range(40) if expected[g] == 1]
            expected[min(open_gates, key=lambda g: (scores[g], g))] = 0
        pruned = importance.prune_lowest(jnp.asarray(scores), jnp.asarray(mask), num)
        np.testing.assert_array_equal(pruned, expected)
        assert float(mask.sum() - pruned.sum()) == num


def test_pruning_leaves_one_gate_open_and_keeps_the_dtype():
    mask = jnp.array([1, 0, 1, 1], jnp.int32)
    pruned = importance.prune_lowest(jnp.array([1.0, 0.0, jnp.nan, 2.0]), mask, 99)
    np.testing.assert_array_equal(pruned, [0, 0, 1, 0])  # NaN goes last
    assert pruned.dtype == mask.dtype
    empty = jnp.zeros(4)
    np.testing.assert_array_equal(importance.prune_lowest(jnp.ones(4), empty, 2), empty)


def test_prune_lowest_traces_num_and_vmaps():
    chex.clear_trace_counter()
    prune = jax.jit(chex.assert_max_traces(importance.prune_lowest, n=1))
    scores, mask = jnp.arange(6.0), jnp.ones(6)
    for num in (1, 2, 3):
        assert int(prune(scores, mask, jnp.int32(num)).sum()) == 6 - num
    many = jax.vmap(importance.prune_lowest)(
        jnp.stack([scores, -scores]), jnp.ones((2, 6)), jnp.array([1, 2])
    )
    np.testing.assert_array_equal(many, [[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
