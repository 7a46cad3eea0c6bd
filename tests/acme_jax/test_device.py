"""Refinement against hand-written loops, and every method against the devices on their own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from acme_jax import device, header, header_slots
from acme_jax.config import RefineConfig
from acme_jax.device import DeviceState, EdgeState
from acme_jax.header_layout import HeaderDims
from acme_jax.importance_rounds import Downlink
from fed import similarity
from fed.clients import Batch, ClientData, replicate, stack_clients
from fed.simulate import run_round
from nas.cells import OPS

DIMS = HeaderDims(2, 2, embed_dim=5, channels=4, num_classes=3, blocks=1, num_layers=2)
CELL = ((0, OPS.index("sep1x1"), 1, OPS.index("identity")),)
GATES = header_slots.gate_positions(DIMS, CELL)  # where the cell's gates stand
NUM_GATES = len(GATES)
LENGTH = header_slots.num_points(DIMS) * DIMS.channels  # of the vectors that travel
CONFIG = RefineConfig(
    rounds=3,
    batch_size=4,
    learning_rate=0.05,
    momentum=0.5,
    weight_decay=1e-2,
    prune_per_round=3,
    smoothing=0.9,
)
ALGORITHM = device.refinement(DIMS, CONFIG)
SIZES = (7, 4, 10)
IDS = jnp.asarray([5, 2, 9])
KEY = jax.random.key(11)


def make_params(cell):
    rng = np.random.default_rng(0)
    params = header.init(jax.random.key(0), cell, DIMS)
    return jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params
    )


PARAMS = make_params(CELL)  # in compact form


def make_client(size, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, size).astype(np.int32)
    inputs = rng.normal(size=(size, 4, 5)).astype(np.float32)
    inputs[:, :, 0] += labels[:, None]
    return inputs, labels


CLIENTS = [make_client(size, seed) for seed, size in enumerate(SIZES)]
DATA = stack_clients(CLIENTS)
SKETCHES = jnp.asarray(np.random.default_rng(8).normal(size=(3, 6, 5)), jnp.float32)
MIXING = device.mixing_weights(SKETCHES, DATA.size, KEY, CONFIG)
ALONE = jnp.eye(3)


def init_one(prune=CONFIG.prune_per_round, params=PARAMS, cell=CELL):
    state = device.init_device(params, cell, DIMS, prune, CONFIG)
    return jax.tree.map(jnp.asarray, state)


def init(num, **options):
    return replicate(init_one(**options), num)


def spread(values):
    """Numbers of the cell's gates [G] at their places in a vector that travels."""
    return jnp.zeros(LENGTH).at[GATES].set(jnp.asarray(values, jnp.float32))


def gates_of(vectors):
    return np.asarray(vectors)[..., GATES]


def compact(params):
    return header_slots.from_slots(params, CELL, DIMS)


@jax.jit
def compiled_round(edge, states, data, ids, index):
    return run_round(
        ALGORITHM,
        edge,
        states,
        data,
        KEY,
        index,
        client_ids=ids,
        batch_size=CONFIG.batch_size,
        epochs=1,
    )


def run(weights, states, data=DATA, ids=IDS, num_rounds=3):
    """(edge, devices, [(personalised sets, masks, metrics) of each round])."""
    edge, history = ALGORITHM.server_init(weights), []
    for index in range(num_rounds):
        edge, states, metrics = compiled_round(edge, states, data, ids, jnp.int32(index))
        history.append((edge.personalized, states.mask, metrics.client))
    return edge, states, history


# The loop backend runs one device after the other on unpadded data; one program for all.
STEP = jax.jit(ALGORITHM.client_step)
PLAIN = ALGORITHM._replace(client_step=STEP)


def run_plainly(weights, states, data, ids, num_rounds=3):
    edge, history = PLAIN.server_init(weights), []
    for index in range(num_rounds):
        edge, states, metrics = run_round(
            PLAIN,
            edge,
            states,
            data,
            KEY,
            index,
            client_ids=ids,
            batch_size=CONFIG.batch_size,
            epochs=1,
            backend="loop",
        )
        history.append(metrics.client)
    return edge, states, history


def loss_fn(params, gates, mask, inputs, labels):
    logits = header.apply(params, CELL, DIMS, inputs, gates=gates, mask=mask)
    log_probs = jax.nn.log_softmax(logits)
    return -log_probs[jnp.arange(labels.shape[0]), labels].mean()


gradients = jax.jit(jax.grad(loss_fn, argnums=(0, 1)))


def train_by_hand(params, mask, inputs, labels, steps):
    """Full-batch SGD with momentum and L2 decay: (params, mean squared terms)."""
    momentum = jax.tree.map(lambda leaf: np.zeros_like(np.asarray(leaf)), params)
    terms = []
    for _ in range(steps):
        grads, gate_grad = gradients(params, jnp.ones(NUM_GATES), mask, inputs, labels)
        terms.append((np.asarray(mask, np.float64) * np.asarray(gate_grad)) ** 2)
        momentum = jax.tree.map(
            lambda m, g, p: CONFIG.momentum * m + g + CONFIG.weight_decay * p,
            momentum, grads, params,
        )  # fmt: skip
        params = jax.tree.map(lambda p, m: p - CONFIG.learning_rate * m, params, momentum)
    return params, np.mean(terms, axis=0)


def test_importance_set_is_the_plain_mean_of_squared_terms_over_the_steps():
    """Full batches, so that the order of the samples does not matter."""
    inputs, labels = CLIENTS[1]
    mask = np.ones(NUM_GATES, np.float32)
    mask[[1, 6]] = 0.0
    message = Downlink(jnp.zeros(LENGTH), jnp.int32(0))
    local = ALGORITHM.client_init(message, init_one()._replace(mask=spread(mask)), KEY)
    for _ in range(3):
        local, metrics = STEP(local, Batch(inputs, labels, jnp.ones(len(labels))))
    after, importance = ALGORITHM.client_final(message, local)
    params, expected = train_by_hand(PARAMS, mask, inputs, labels, 3)
    np.testing.assert_allclose(gates_of(importance), expected, rtol=1e-4, atol=1e-9)
    assert np.all(gates_of(importance)[[1, 6]] == 0)
    assert np.count_nonzero(importance) > NUM_GATES // 2
    tiny.assert_trees_close(compact(after.params), params, rtol=1e-4)
    assert set(metrics) == {"loss", "accuracy"}


def test_places_that_the_cell_does_not_use_stay_empty():
    state = run(MIXING.wasserstein, init(3))[1]
    params = jax.tree.map(lambda leaf: leaf[1], state.params)
    again = header_slots.to_slots(compact(params), CELL, DIMS)
    tiny.assert_trees_equal(jax.tree.map(np.asarray, params), again)
    np.testing.assert_array_equal(np.delete(state.mask, GATES, axis=1), 0.0)


def test_one_step_equals_finite_differences_of_the_gates():
    inputs, labels = CLIENTS[1]  # as many as a batch
    edge, _, _ = run(ALONE, init(3), num_rounds=1)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), PARAMS)
        wide = jnp.asarray(inputs.astype(np.float64))

        @jax.jit
        def losses(gates):
            return jax.lax.map(
                lambda g: loss_fn(params, g, jnp.ones(NUM_GATES), wide, jnp.asarray(labels)), gates
            )

        step = 1e-6 * jnp.eye(NUM_GATES)
        derivative = np.asarray(losses(1.0 + step) - losses(1.0 - step)) / 2e-6
    actual = gates_of(edge.personalized[1])
    np.testing.assert_allclose(actual, derivative**2, rtol=1e-3, atol=1e-9)


def test_fillers_of_a_short_batch_count_for_nothing():
    inputs, labels = CLIENTS[1]
    weight = jnp.asarray([1.0, 1.0, 1.0, 0.0])
    message = Downlink(jnp.zeros(LENGTH), jnp.int32(0))
    start = ALGORITHM.client_init(message, init_one(), KEY)
    local, metrics = STEP(start, Batch(jnp.asarray(inputs).at[3].set(99.0), labels, weight))
    after, importance = ALGORITHM.client_final(message, local)
    params, expected = train_by_hand(PARAMS, np.ones(NUM_GATES), inputs[:3], labels[:3], 1)
    np.testing.assert_allclose(gates_of(importance), expected, rtol=1e-4, atol=1e-9)
    tiny.assert_trees_close(compact(after.params), params, rtol=1e-4)
    logits = np.asarray(header.apply(PARAMS, CELL, DIMS, inputs[:3]))
    np.testing.assert_allclose(metrics["loss"], tiny.cross_entropy(logits, labels[:3]), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["accuracy"], np.mean(logits.argmax(axis=1) == labels[:3]), rtol=1e-6
    )


def prune_by_hand(scores, mask, num):
    mask = mask.copy()
    for _ in range(num):
        open_gates = np.flatnonzero(mask)
        mask[open_gates[np.argmin(scores[open_gates])]] = 0
    return mask


def test_receiving_smooths_and_prunes_exactly_n():
    rng = np.random.default_rng(3)
    receive = jax.jit(functools.partial(device.receive, config=CONFIG))
    state = init_one()
    mask, smoothed = np.ones(NUM_GATES), None
    for number in range(4):
        message = rng.random(NUM_GATES).astype(np.float32)
        state = receive(state, spread(message))
        if smoothed is None:
            smoothed = message.astype(np.float64)
        else:
            smoothed = (0.9 * smoothed + 0.1 * message) * mask
        np.testing.assert_allclose(gates_of(state.smoothed), smoothed, rtol=1e-5, atol=1e-7)
        mask = prune_by_hand(smoothed, mask, 3)
        np.testing.assert_array_equal(gates_of(state.mask), mask)
        assert int(state.rounds) == number + 1
        assert np.sum(gates_of(state.mask) == 0) == 3 * (number + 1)
    tiny.assert_trees_equal(state.params, init_one().params)


def test_ties_prune_no_more_than_n_and_pruned_gates_stay_pruned():
    receive = jax.jit(functools.partial(device.receive, config=CONFIG))
    first = receive(init_one(prune=5), spread(np.ones(NUM_GATES)))
    assert list(np.flatnonzero(gates_of(first.mask) == 0)) == [0, 1, 2, 3, 4]
    second = receive(first, spread(np.full(NUM_GATES, 100.0)))
    assert list(np.flatnonzero(gates_of(second.mask) == 0)) == list(range(10))


def test_nothing_to_prune_leaves_every_gate_open():
    _, states, _ = run(ALONE, init(3, prune=0))
    np.testing.assert_array_equal(gates_of(states.mask), 1.0)


def test_first_round_prunes_nothing_and_every_later_one_exactly_n():
    _, _, history = run(MIXING.wasserstein, init(3))
    for number, (_, mask, _) in enumerate(history):
        np.testing.assert_array_equal(np.sum(gates_of(mask) == 0, axis=1), 3 * number)


def test_devices_learn():
    _, _, history = run(MIXING.wasserstein, init(3, prune=1), num_rounds=15)
    losses = np.array([np.mean(metrics["loss"]) for _, _, metrics in history])
    assert losses[-1] < 0.9 * losses[0]


def test_identity_weights_are_every_device_alone():
    edge, states, _ = run(ALONE, init(3))
    for row in range(3):
        alone_edge, alone, _ = run_plainly(
            jnp.eye(1), init(1), stack_clients([CLIENTS[row]]), IDS[row : row + 1]
        )
        mine = jax.tree.map(lambda leaf, r=row: leaf[r : r + 1], states)
        np.testing.assert_array_equal(alone.mask, mine.mask)
        tiny.assert_trees_close(alone, mine, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            alone_edge.personalized[0], edge.personalized[row], rtol=1e-3, atol=1e-8
        )


def test_other_devices_reach_a_device_only_through_the_mixing_weights():
    changed = DATA._replace(inputs=DATA.inputs.at[2].multiply(3.0))
    for weights, independent in ((ALONE, True), (MIXING.avg, False)):
        before, after = (run(weights, init(3), data=data)[0] for data in (DATA, changed))
        same = np.array_equal(before.personalized[0], after.personalized[0])
        assert same == independent


def test_identical_devices_get_uniform_weights_and_wasserstein_equals_avg():
    data = stack_clients([CLIENTS[2]] * 3)
    sketches = jnp.broadcast_to(SKETCHES[:1], SKETCHES.shape)
    mixing = device.mixing_weights(sketches, data.size, KEY, CONFIG)
    for weights in (mixing.avg, mixing.js, mixing.wasserstein):
        np.testing.assert_allclose(weights, np.full((3, 3), 1 / 3), rtol=1e-6)
    np.testing.assert_array_equal(mixing.distance, 0.0)
    np.testing.assert_array_equal(mixing.similarity, 1.0)
    first, second = (run(w, init(3), data=data) for w in (mixing.avg, mixing.wasserstein))
    tiny.assert_trees_close(first, second, rtol=1e-5)
    np.testing.assert_array_equal(first[1].mask, second[1].mask)


@pytest.mark.parametrize("method", ["flat", "per_dimension", "sliced"])
def test_mixing_weights_follow_the_configured_distance(method):
    config = dataclasses.replace(CONFIG, similarity=method, temperature=0.3)
    found = device.mixing_weights(SKETCHES, DATA.size, KEY, config)
    distance = similarity.pairwise_wasserstein(SKETCHES, method=method, key=KEY)
    np.testing.assert_allclose(found.distance, distance, rtol=1e-6)
    score = np.exp(1 / (1 + np.asarray(distance, np.float64)) / 0.3)
    expected = score / score.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.wasserstein, expected, rtol=1e-5)
    expected = np.tile(np.array(SIZES) / sum(SIZES), (3, 1))
    np.testing.assert_allclose(found.avg, expected, rtol=1e-6)
    for weights in (found.js, found.wasserstein):
        np.testing.assert_allclose(np.sum(weights, axis=1), 1.0, rtol=1e-6)
        assert np.ptp(weights) > 1e-3
    assert not np.allclose(found.js, found.wasserstein, rtol=1e-2)


def test_personalised_set_is_the_weighted_sum_of_the_updates():
    weights = MIXING.wasserstein
    mixed, _, _ = run(weights, init(3), num_rounds=1)
    plain, _, _ = run(jnp.eye(3), init(3), num_rounds=1)
    expected = np.asarray(weights, np.float64) @ np.asarray(plain.personalized, np.float64)
    np.testing.assert_allclose(mixed.personalized, expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(mixed.rounds, 1)


def test_whole_refinement_equals_the_plain_loop_with_ragged_devices():
    edge, states, history = run(MIXING.wasserstein, init(3))
    plain_edge, plain, metrics = run_plainly(MIXING.wasserstein, init(3), DATA, IDS)
    for (_, _, mine), wanted in zip(history, metrics, strict=True):
        tiny.assert_trees_close(mine, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(states.mask, plain.mask)
    tiny.assert_trees_close(states, plain, rtol=1e-4, atol=1e-5)
    tiny.assert_trees_close(edge, plain_edge, rtol=1e-3, atol=1e-8)


METHODS = ("no_pruning", "alone", "avg", "js", "wasserstein")


def matrix(method):
    return ALONE if method in ("no_pruning", "alone") else getattr(MIXING, method)


def block_diagonal(matrices):
    return jax.scipy.linalg.block_diag(*matrices)


def test_all_methods_in_one_cohort_equal_each_method_alone():
    """Equal ids on purpose: a device draws the same batches under every method."""
    count, num = len(METHODS), len(SIZES)
    states = [init(num, prune=0 if method == "no_pruning" else 3) for method in METHODS]
    edge, together, _ = run(
        block_diagonal([matrix(method) for method in METHODS]),
        jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *states),
        data=ClientData(*(jnp.concatenate([leaf] * count) for leaf in DATA)),
        ids=jnp.tile(IDS, count),
    )
    masks = set()
    for place, method in enumerate(METHODS):
        rows = slice(place * num, (place + 1) * num)
        one_edge, alone, _ = run(matrix(method), states[place])
        mine = jax.tree.map(lambda leaf, r=rows: leaf[r], together)
        np.testing.assert_array_equal(mine.mask, alone.mask)
        tiny.assert_trees_close(mine, alone, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            edge.personalized[rows], one_edge.personalized, rtol=1e-4, atol=1e-9
        )
        masks.add(np.asarray(mine.mask).tobytes())
    assert len(masks) > 2  # methods do prune differently


def test_one_program_serves_devices_with_different_cells():
    """As the edges choose different headers; the cell is part of a device's state."""
    other = ((1, OPS.index("sep3x3"), 0, OPS.index("maxpool3")),)
    kinds = [init(3), init(3, params=make_params(other), cell=other)]
    order = [0, 1, 0, 1, 1]  # as many as there are methods, for the program is the same
    edge, together, _ = run(
        block_diagonal([MIXING.avg] * 5),
        jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(kinds[kind] for kind in order)),
        data=ClientData(*(jnp.concatenate([leaf] * 5) for leaf in DATA)),
        ids=jnp.tile(IDS, 5),
    )
    alone = [run(MIXING.avg, start)[:2] for start in kinds]
    for place, kind in enumerate(order):
        rows = slice(3 * place, 3 * place + 3)
        mine = jax.tree.map(lambda leaf, r=rows: leaf[r], together)
        np.testing.assert_array_equal(mine.mask, alone[kind][1].mask)
        tiny.assert_trees_close(mine, alone[kind][1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            edge.personalized[rows], alone[kind][0].personalized, rtol=1e-4, atol=1e-9
        )


def test_weights_never_travel():
    """What goes up is one vector of G numbers; what comes down, that and a round number."""
    edge = ALGORITHM.server_init(MIXING.avg)
    message = jax.eval_shape(ALGORITHM.server_message, edge, jnp.int32(0))
    assert isinstance(message, Downlink)
    assert [(leaf.shape, leaf.dtype) for leaf in message] == [
        ((LENGTH,), jnp.float32),
        ((), jnp.int32),
    ]
    local = jax.eval_shape(ALGORITHM.client_init, message, init_one(), KEY)
    kept, update = jax.eval_shape(ALGORITHM.client_final, message, local)
    assert isinstance(kept, DeviceState)
    assert isinstance(update, jax.ShapeDtypeStruct)  # a single leaf
    assert (update.shape, update.dtype) == ((LENGTH,), jnp.float32)
    updates = jnp.zeros((3, LENGTH))
    after, _ = jax.eval_shape(
        ALGORITHM.server_update, edge, updates, DATA.size, jnp.arange(DATA.size.shape[0])
    )
    assert isinstance(after, EdgeState)
    assert [leaf.shape for leaf in after] == [(3, 3), (3, LENGTH), (3,)]


def test_the_update_is_zero_where_there_is_no_gate():
    edge, _, _ = run(MIXING.avg, init(3), num_rounds=1)
    np.testing.assert_array_equal(np.delete(edge.personalized, GATES, axis=1), 0.0)
    assert np.count_nonzero(gates_of(edge.personalized)) > NUM_GATES


def test_accuracy_reads_a_devices_own_samples_through_its_own_mask():
    rng = np.random.default_rng(6)
    params = [
        jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), PARAMS) for _ in SIZES
    ]
    params = jax.tree.map(lambda *leaves: np.stack(leaves).astype(np.float32), *params)
    rows = [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(3)]
    masks = (rng.random((3, NUM_GATES)) < 0.6).astype(np.float32)
    states = [
        init_one(params=row)._replace(mask=spread(mask))
        for row, mask in zip(rows, masks, strict=True)
    ]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    evaluate = jax.jit(lambda s: device.evaluate(s, DATA, DIMS))
    actual = evaluate(states)
    apply = jax.jit(lambda p, m, x: header.apply(p, CELL, DIMS, x, mask=m))
    for row, (inputs, labels) in enumerate(CLIENTS):
        expected = np.mean(np.argmax(apply(rows[row], masks[row], inputs), axis=1) == labels)
        np.testing.assert_allclose(actual[row], expected, rtol=1e-6)
    assert not np.array_equal(actual, evaluate(states._replace(mask=init(3).mask)))


def test_linear_header_is_scored_and_trained_on_real_samples_only():
    linear = header.init_linear(jax.random.key(4), 5, 3)
    actual = jax.jit(device.evaluate_linear)(replicate(linear, 3), DATA)
    for row, (inputs, labels) in enumerate(CLIENTS):
        logits = np.asarray(header.apply_linear(linear, inputs))
        np.testing.assert_allclose(actual[row], np.mean(logits.argmax(1) == labels), rtol=1e-6)
    inputs, labels = CLIENTS[1]
    batch = Batch(
        jnp.concatenate([inputs, 9 * inputs[:1]]),
        jnp.concatenate([labels, labels[:1]]),
        jnp.asarray([1.0, 1.0, 1.0, 1.0, 0.0]),
    )
    loss, metrics = device.linear_loss(linear, batch, KEY)
    expected = tiny.cross_entropy(header.apply_linear(linear, inputs), labels)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["loss"] == loss


def test_optimizer_decays_weights_before_the_momentum():
    sgd = device.optimizer(CONFIG)
    params, grads = {"w": jnp.asarray([2.0, -1.0])}, {"w": jnp.asarray([0.5, 0.25])}
    state, weights, trace = sgd.init(params), np.array([2.0, -1.0]), 0.0
    for _ in range(3):
        updates, state = sgd.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        trace = 0.5 * trace + np.array([0.5, 0.25]) + 1e-2 * weights
        weights = weights - 0.05 * trace
    np.testing.assert_allclose(params["w"], weights, rtol=1e-6)
