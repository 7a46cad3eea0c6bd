"""Controller: a NumPy reference of the policy, caps, normalisation, gradients, REINFORCE."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas import cells, controller
from nas.cells import OPS, Cell, CellSpace


def reference_log_prob(params, static):
    """The policy of ENAS, block by block, in float64."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    size = p["lstm_hidden"].shape[0]
    hidden, memory = np.zeros(size), np.zeros(size)
    anchors, keys = [], []
    total = 0.0

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def lstm(token):
        nonlocal hidden, memory
        gates = token @ p["lstm_input"] + hidden @ p["lstm_hidden"] + p["lstm_bias"]
        i, f, o, g = np.split(gates, 4)
        memory = sigmoid(f) * memory + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(memory)

    def log_softmax(x):
        return x - np.log(np.exp(x).sum())

    for _ in range(2):
        lstm(p["embedding"][0])
        anchors.append(np.zeros(size))
        keys.append(hidden @ p["attention_key"])
    for x, op_x, y, op_y in static:
        token = p["embedding"][0]
        for node in (x, y):
            lstm(token)
            scores = np.tanh(np.stack(keys) + hidden @ p["attention_query"]) @ p["attention_vector"]
            total += log_softmax(1.10 * np.tanh(scores / 5))[node]
            token = anchors[node]
        for op in (op_x, op_y):
            lstm(token)
            scores = hidden @ p["op_kernel"] + p["op_bias"]
            offset = np.array([0.25, 0.25, -0.25, -0.25, -0.25, -0.25])
            total += log_softmax(0.44 * np.tanh(scores / 5) + offset)[op]
            token = p["embedding"][op + 1]
        lstm(token)
        anchors.append(hidden)
        keys.append(hidden @ p["attention_key"])
    return total


def scaled(params, factor):
    return jax.tree.map(lambda leaf: leaf * factor, params)


@pytest.fixture(scope="module")
def params():
    return controller.init_params(jax.random.key(0), hidden_size=12)


def test_initial_values():
    params = controller.init_params(jax.random.key(1))
    assert params["embedding"].shape == (7, 100)
    np.testing.assert_array_equal(params["op_bias"], [10, 10, 0, 0, 0, 0])
    weights = np.concatenate([np.ravel(v) for n, v in params.items() if n != "op_bias"])
    assert -0.1 <= weights.min() < -0.099 and 0.099 < weights.max() <= 0.1


def test_log_prob_matches_the_float64_reference(params):
    big = scaled(params, 8.0)  # far from the linear range
    log_prob = jax.jit(controller.log_prob)
    for seed in range(8):
        cell = cells.sample(jax.random.key(seed), CellSpace(3))
        expected = reference_log_prob(big, cells.to_static(cell))
        np.testing.assert_allclose(log_prob(big, cell), expected, rtol=2e-5)


def test_sample_reports_its_own_log_prob_and_entropy(params):
    space = CellSpace(5)  # more nodes than operations
    big = scaled(params, 5.0)
    keys = jax.random.split(jax.random.key(2), 64)
    drawn, log_probs, entropies = jax.jit(jax.vmap(lambda key: controller.sample(key, big, space)))(
        keys
    )
    assert bool(jax.vmap(cells.is_valid)(drawn).all())
    replayed = jax.vmap(lambda cell: controller.log_prob(big, cell))(drawn)
    np.testing.assert_allclose(log_probs, replayed, rtol=1e-5)
    assert np.isfinite(entropies).all()
    # the mean surprise is the entropy
    assert abs(float(entropies.mean() + log_probs.mean())) < 0.4


def test_one_block_probabilities_sum_to_one(params):
    genes = jnp.asarray(list(itertools.product(range(2), range(6), range(2), range(6))), jnp.int32)
    every = Cell(genes[:, None, 0::2], genes[:, None, 1::2])
    log_probs = jax.vmap(lambda cell: controller.log_prob(scaled(params, 6.0), cell))(every)
    np.testing.assert_allclose(np.exp(log_probs).sum(), 1.0, rtol=1e-5)


@pytest.mark.parametrize("op", range(6))
def test_operation_probability_is_capped_even_for_extreme_weights(params, op):
    extreme = {**params, "op_bias": 1e6 * (2.0 * jax.nn.one_hot(op, len(OPS)) - 1.0)}
    genes = jnp.asarray(list(itertools.product(range(2), range(6), range(2))), jnp.int32)
    inputs = genes[:, None, 0::2]
    ops = jnp.stack([jnp.full(len(genes), op), genes[:, 1]], axis=-1)[:, None]
    log_probs = jax.vmap(lambda cell: controller.log_prob(extreme, cell))(Cell(inputs, ops))
    probability = float(np.exp(log_probs).sum())
    np.testing.assert_allclose(probability, 0.413 if op < 2 else 0.277, atol=5e-4)


def test_gradient_matches_finite_differences(params):
    cell = cells.from_static(((0, 1, 1, 4), (2, 3, 0, 0)))
    grads = jax.grad(controller.log_prob)(params, cell)
    rng = np.random.default_rng(0)
    for name, leaf in params.items():
        direction = rng.standard_normal(leaf.shape)
        step = 1e-5
        shifted = [
            reference_log_prob(
                {**params, name: np.asarray(leaf, np.float64) + sign * step * direction},
                cells.to_static(cell),
            )
            for sign in (1, -1)
        ]
        numeric = (shifted[0] - shifted[1]) / (2 * step)
        np.testing.assert_allclose(
            (np.asarray(grads[name]) * direction).sum(), numeric, rtol=2e-3, atol=2e-6
        )


def test_baseline_moves_before_use_and_starts_at_the_first_reward():
    learner = controller.reinforce(CellSpace(1), hidden_size=8, entropy_weight=0.0)
    state = learner.init(jax.random.key(0))
    cell = learner.sample(jax.random.key(1), state)
    update = jax.jit(learner.update)
    state, info = update(state, cell, 40.0)
    assert float(state.baseline) == 40.0 and float(info.advantage) == 0.0
    state, info = update(state, cell, 50.0)
    np.testing.assert_allclose(state.baseline, 40.1, rtol=1e-6)
    np.testing.assert_allclose(info.advantage, 9.9, rtol=1e-5)
    np.testing.assert_allclose(info.loss, -info.log_prob * info.advantage, rtol=1e-6)
    assert int(state.step) == 2


def test_reinforce_raises_the_probability_of_a_rewarded_operation():
    space, target = CellSpace(1), 4
    learner = controller.reinforce(space, hidden_size=16, learning_rate=1e-2)

    def step(state, key):
        cell = learner.sample(key, state)
        reward = 10.0 * (cell.ops == target).mean()
        return learner.update(state, cell, reward)[0], None

    def share(state):
        keys = jax.random.split(jax.random.key(9), 1000)
        return float((jax.vmap(lambda k: learner.sample(k, state).ops)(keys) == target).mean())

    start = learner.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 600)
    end, _ = jax.jit(lambda state: jax.lax.scan(step, state, keys))(start)
    assert share(start) < 0.17
    assert share(end) > 0.22  # the cap is 0.277
