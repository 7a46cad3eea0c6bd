"""Rounds: hand computation, plain loops, padding, chunks, devices, cohorts, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fed import aggregate, clients, errors, simulate
from fed.algorithm import FedAlgorithm
from fed.algorithms.fedavg import fedavg
from fed.algorithms.local import local

SIZES = (7, 12, 3, 9, 5)
NUM_CLIENTS = len(SIZES)
DIMS = 4
IDS = jnp.asarray([11, 3, 8, 0, 25])
LEARNING_RATE = 0.1


def make_data(seed=0):
    rng = np.random.default_rng(seed)
    pairs = []
    for size in SIZES:
        inputs = rng.normal(size=(size, DIMS)).astype(np.float32)
        pairs.append((inputs, (inputs[:, 0] + 0.3 * inputs[:, 1] > 0).astype(np.int32)))
    return clients.stack_clients(pairs)


def squared_loss(params, batch, key):
    """Weighted mean square error with a little input noise, so that the keys matter."""
    noise = 0.01 * jax.random.normal(key, batch.inputs.shape)
    return plain_loss(params, batch._replace(inputs=batch.inputs + noise), key)


def plain_loss(params, batch, key):
    del key
    errors = batch.inputs @ params["w"] + params["b"] - batch.labels
    loss = (batch.weight * errors**2).sum() / batch.weight.sum()
    return loss, {"loss": loss}


DATA = make_data()
PARAMS = {"w": jnp.asarray([0.1, -0.2, 0.3, 0.0]), "b": jnp.float32(0.05)}
KEY = jax.random.key(7)
FEDAVG = fedavg(squared_loss, optax.sgd(LEARNING_RATE, momentum=0.9))
LOCAL = local(squared_loss, optax.sgd(LEARNING_RATE, momentum=0.9))


run_clients = jax.jit(
    simulate.run_clients, static_argnums=0, static_argnames=("batch_size", "epochs", "chunk_size")
)


def run(data=DATA, ids=IDS, chunk_size=1):
    """The clients' models after local training from PARAMS, and their metrics."""
    messages = clients.replicate(PARAMS, data.size.shape[0])
    options = {"batch_size": 4, "epochs": 2, "chunk_size": chunk_size}
    _, updates, metrics = run_clients(FEDAVG, messages, (), data, KEY, 2, client_ids=ids, **options)
    return updates, metrics


def assert_close(a, b, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=atol), a, b)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_fedavg_round_equals_hand_computation():
    """Full batches, one step: the weighted mean of each client's gradient step."""
    algorithm = fedavg(plain_loss, optax.sgd(LEARNING_RATE))
    server, states, metrics = simulate.run_round(
        algorithm, PARAMS, (), DATA, KEY, 0, client_ids=IDS, batch_size=16, epochs=1
    )
    models, losses = [], []
    for row, size in enumerate(SIZES):
        x = np.asarray(DATA.inputs[row, :size], np.float64)
        y = np.asarray(DATA.labels[row, :size], np.float64)
        residual = x @ np.asarray(PARAMS["w"], np.float64) + float(PARAMS["b"]) - y
        losses.append((residual**2).mean())
        w = np.asarray(PARAMS["w"]) - LEARNING_RATE * 2 * x.T @ residual / size
        b = float(PARAMS["b"]) - LEARNING_RATE * 2 * residual.mean()
        models.append(np.append(w, b))
    expected = np.average(models, axis=0, weights=SIZES)
    np.testing.assert_allclose(np.append(server["w"], server["b"]), expected, atol=1e-6)
    np.testing.assert_allclose(metrics.client["loss"], losses, rtol=1e-5)
    assert states == ()


@pytest.mark.parametrize(
    ("algorithm", "schedule"),
    [(FEDAVG, {"epochs": 2}), (FEDAVG, {"num_steps": 4}), (LOCAL, {"epochs": 1})],
    ids=["fedavg-epochs", "fedavg-steps", "local-epochs"],
)
def test_mapped_round_equals_plain_loop(algorithm, schedule):
    states = clients.replicate(PARAMS, NUM_CLIENTS) if algorithm is LOCAL else ()
    round_ = functools.partial(
        simulate.run_round,
        algorithm,
        algorithm.server_init(PARAMS),
        states,
        DATA,
        KEY,
        3,
        client_ids=IDS,
        batch_size=4,
        **schedule,
    )
    loop = round_(backend="loop")
    assert_close(jax.jit(round_)(), loop)


def test_a_client_without_samples_takes_no_step():
    empty = 2
    states = clients.replicate(PARAMS, NUM_CLIENTS)
    data = DATA._replace(size=DATA.size.at[empty].set(0))
    round_ = functools.partial(
        simulate.run_round, LOCAL, (), states, data, KEY, 3, client_ids=IDS, batch_size=4, epochs=1
    )
    _, after, metrics = jax.jit(round_)()
    assert_equal(clients.take_row(after, empty), PARAMS)
    assert metrics.client["loss"][empty] == 0 and int(metrics.counts.arrived) == NUM_CLIENTS - 1
    assert_close(((), after, metrics), round_(backend="loop"))


def test_padding_changes_nothing():
    more = 11
    padded = clients.ClientData(
        jnp.pad(DATA.inputs, ((0, 0), (0, more), (0, 0)), constant_values=jnp.nan),
        jnp.pad(DATA.labels, ((0, 0), (0, more)), constant_values=99),
        DATA.size,
    )
    assert_equal(run(), run(padded))


@pytest.mark.parametrize("chunk_size", [2, NUM_CLIENTS])
def test_chunk_size_does_not_matter(chunk_size):
    assert_close(run(chunk_size=1), run(chunk_size=chunk_size), atol=1e-6)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_number_of_devices_does_not_matter():
    """Five clients on two devices: the sixth is an inert copy."""
    results = []
    for num_devices in (None, 2):
        mesh = num_devices and jax.sharding.Mesh(jax.devices()[:num_devices], "clients")
        function = jax.jit(
            functools.partial(
                simulate.run_rounds,
                FEDAVG,
                num_rounds=2,
                batch_size=4,
                num_steps=3,
                mesh=mesh,
            )
        )
        results.append(function(PARAMS, (), DATA, KEY, client_ids=IDS))
    assert_equal(*results)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_fewer_clients_than_devices():
    mesh = jax.sharding.Mesh(jax.devices()[:2], "clients")
    data = jax.tree.map(lambda leaf: leaf[:1], DATA)
    messages = clients.replicate(PARAMS, 1)
    options = {"client_ids": IDS[:1], "batch_size": 4, "epochs": 2}
    call = jax.jit(functools.partial(simulate.run_clients, FEDAVG, mesh=mesh, **options))
    _, updates, _ = call(messages, (), data, KEY, 2)
    assert_close(updates, jax.tree.map(lambda leaf: leaf[:1], run()[0]))


def test_result_does_not_depend_on_who_else_takes_part():
    whole = run()
    rows = jnp.asarray([3, 1])
    some = run(jax.tree.map(lambda leaf: leaf[rows], DATA), IDS[rows])
    assert_equal(some, jax.tree.map(lambda leaf: leaf[rows], whole))


def test_rounds_and_ids_draw_different_numbers():
    updates, _ = run()
    other, _ = run(ids=IDS + 1)
    assert not np.allclose(updates["w"], other["w"], atol=1e-6)


def test_rounds_equal_single_rounds_and_can_be_continued():
    options = {"client_ids": IDS, "batch_size": 4, "epochs": 1}
    start = clients.replicate(PARAMS, NUM_CLIENTS)
    run_rounds = jax.jit(functools.partial(simulate.run_rounds, LOCAL, num_rounds=2, **options))
    _, half, _ = run_rounds((), start, DATA, KEY, first_round=0)
    _, whole, metrics = run_rounds((), half, DATA, KEY, first_round=2)
    run_round = jax.jit(functools.partial(simulate.run_round, LOCAL, **options))
    states = start
    for index in range(4):
        _, states, single = run_round((), states, DATA, KEY, index)
        if index >= 2:
            later = jax.tree.map(lambda leaf, i=index - 2: leaf[i], metrics.client)
            assert_close(single.client, later)
    assert_close(states, whole)


def test_training_helps():
    _, _, metrics = simulate.run_rounds(
        FEDAVG, PARAMS, (), DATA, KEY, num_rounds=8, client_ids=IDS, batch_size=4, epochs=1
    )
    losses = metrics.client["loss"].mean(axis=1)
    assert losses.shape == (8,) and losses[-1] < 0.6 * losses[0]


def test_one_trace_for_all_rounds():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(server, states, round_index):
        return simulate.run_round(
            FEDAVG, server, states, DATA, KEY, round_index, client_ids=IDS, batch_size=4, epochs=1
        )

    server, states = PARAMS, ()
    for index in range(3):
        server, states, _ = step(server, states, index)


def importance_algorithm(weights):
    """Clients send the mean square of their inputs, the server answers with W @ those."""

    def client_step(state, batch):
        squares = (batch.weight[:, None] * batch.inputs**2).sum(axis=0)
        total, count = state
        return (total + squares, count + batch.weight.sum()), {}

    def client_final(message, state):
        mean = state[0] / state[1]
        return {"own": mean, "received": message}, mean

    return FedAlgorithm(
        server_init=lambda sets: sets,
        server_message=lambda sets, row: sets[row],
        client_init=lambda message, state, key: (jnp.zeros(DIMS), jnp.zeros(())),
        client_step=client_step,
        client_final=client_final,
        server_update=lambda sets, updates, *_: (
            aggregate.personalized_mean(weights, updates),
            {"spread": updates.std()},
        ),
    )


def personalised_rounds(weights):
    state = {"own": jnp.zeros((NUM_CLIENTS, DIMS)), "received": jnp.zeros((NUM_CLIENTS, DIMS))}
    return simulate.run_rounds(
        importance_algorithm(weights),
        jnp.zeros((NUM_CLIENTS, DIMS)),
        state,
        DATA,
        KEY,
        num_rounds=2,
        client_ids=IDS,
        batch_size=4,
        epochs=1,
    )


def own_importance():
    return np.stack(
        [
            (np.asarray(DATA.inputs[row, :size], np.float64) ** 2).mean(axis=0)
            for row, size in enumerate(SIZES)
        ]
    )


def test_messages_differ_by_client():
    weights = np.random.default_rng(0).dirichlet(np.ones(NUM_CLIENTS), NUM_CLIENTS)
    server, states, metrics = personalised_rounds(jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(states["own"], own_importance(), rtol=1e-5)
    np.testing.assert_allclose(server, weights @ own_importance(), rtol=1e-5)
    np.testing.assert_allclose(states["received"], server, rtol=1e-5)  # of the round before
    assert metrics.server["spread"].shape == (2,)


def test_identity_weights_return_each_client_its_own():
    server, states, _ = personalised_rounds(jnp.eye(NUM_CLIENTS))
    np.testing.assert_array_equal(server, states["own"])


def test_loop_names_client_and_step():
    def client_step(state, batch):
        if float(batch.labels.max()) >= 0 and int(state) == 1:
            raise FloatingPointError("loss is not finite")
        return state + 1, {}

    broken = FEDAVG._replace(
        client_init=lambda message, state, key: jnp.int32(0), client_step=client_step
    )
    with pytest.raises(errors.ClientError, match="client 11 failed in step 1: loss is not"):
        simulate.run_round(
            broken, PARAMS, (), DATA, KEY, 0, client_ids=IDS, batch_size=4, epochs=1, backend="loop"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"client_ids": IDS[:3]}, "client_ids has shape"),
        ({"client_ids": jnp.zeros(NUM_CLIENTS, int)}, "must be distinct"),
        ({"messages": {"w": jnp.zeros((2, 3))}}, r"messages\['w'\] has shape \(2, 3\)"),
        ({"client_states": jnp.zeros(())}, "client_states has shape"),
        ({"key": jnp.zeros(2, jnp.uint32)}, "jax.random.key"),
        ({"epochs": 1}, "num_steps or epochs"),
        ({"num_steps": None}, "num_steps or epochs"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"data": DATA._replace(labels=DATA.labels[:, :2])}, "same \\[C, N\\]"),
        ({"data": DATA._replace(size=DATA.size[:2])}, "the 2 clients"),
        (
            {
                "algorithm": FEDAVG._replace(
                    client_step=lambda state, batch: (state._replace(params=()), {})
                )
            },
            "keep the structure",
        ),
        (
            {
                "algorithm": FEDAVG._replace(
                    client_step=lambda state, batch: (
                        state._replace(params=jax.tree.map(lambda x: x > 0, state.params)),
                        {},
                    )
                )
            },
            "keep shapes and dtypes",
        ),
    ],
)
def test_errors(change, message):
    arguments = {
        "algorithm": FEDAVG,
        "messages": clients.replicate(PARAMS, NUM_CLIENTS),
        "client_states": (),
        "data": DATA,
        "key": KEY,
        "round_index": 0,
        "client_ids": IDS,
        "batch_size": 4,
        "num_steps": 2,
    }
    with pytest.raises(ValueError, match=message):
        simulate.run_clients(**{**arguments, **change})


def test_unknown_backend():
    with pytest.raises(ValueError, match="'map' or 'loop'"):
        simulate.run_round(
            FEDAVG, PARAMS, (), DATA, KEY, 0, client_ids=IDS, batch_size=4, epochs=1, backend="gpu"
        )
