"""Rounds with absent and late clients: hand computation, plain loop, layouts, guards, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fed import clients, simulate
from fed.aggregate import weighted_mean
from fed.algorithm import FedAlgorithm
from fed.participation import Participation, everyone

KEY = jax.random.key(7)
SIZES = (7, 12, 3, 9, 5)
IDS = jnp.asarray([11, 3, 8, 0, 25])
NUM_CLIENTS, DIMS, LEARNING_RATE = len(SIZES), 3, 0.1
SECONDS = jnp.asarray([1.0, 9.0, 2.0, 3.0, 8.0])  # the second and the last are late for 5 s
NUM_ROUNDS = 12


def make_data():
    rng = np.random.default_rng(0)
    return clients.stack_clients(
        [
            (rng.normal(size=(size, DIMS)).astype(np.float32), rng.integers(0, 2, size))
            for size in SIZES
        ]
    )


def averaging():
    """FedAvg of linear regression; clients count their rounds, and their update is NaN at rest.

    The update is the mean of the parameters over the steps.
    """

    def client_step(state, batch):
        error = batch.weight * (batch.inputs @ state["params"] - batch.labels)
        gradient = 2 * error @ batch.inputs / batch.weight.sum()
        params = state["params"] - LEARNING_RATE * gradient
        after = {
            **state,
            "params": params,
            "sum": state["sum"] + params,
            "steps": state["steps"] + 1,
        }
        return after, {"loss": (error**2).sum() / batch.weight.sum()}

    def client_final(message, state):
        return {"rounds": state["rounds"] + 1, "seen": message}, state["sum"] / state["steps"]

    return FedAlgorithm(
        server_init=lambda params: params,
        server_message=lambda params, row: params,
        client_init=lambda message, state, key: {
            "params": message,
            "sum": jnp.zeros(DIMS),
            "steps": jnp.float32(0.0),
            "rounds": state["rounds"],
        },
        client_step=client_step,
        client_final=client_final,
        server_update=lambda params, updates, weights, rows: (
            weighted_mean(weights, updates),
            {"total": weights.sum(), "rows": rows},
        ),
    )


ALGORITHM = averaging()
DATA = make_data()
PARAMS = jnp.asarray([0.1, -0.2, 0.3])
STATES = {
    "rounds": jnp.zeros(NUM_CLIENTS, jnp.int32),
    "seen": jnp.full((NUM_CLIENTS, DIMS), -1.0),
}
FULL_BATCHES = {"client_ids": IDS, "batch_size": 16, "epochs": 1}
PARTIAL = Participation(num_sampled=3, dropout=0.4, deadline_s=5.0, late="next_round")
LATE_IS_LOST = Participation(num_sampled=3, dropout=0.4, deadline_s=5.0)


def start(participation):
    if participation.late == "drop":
        return PARAMS
    return simulate.with_late(ALGORITHM, PARAMS, STATES, participation.num_sampled or NUM_CLIENTS)


@functools.cache
def run(participation, **options):
    """NUM_ROUNDS rounds as one program."""
    function = functools.partial(
        simulate.run_rounds,
        ALGORITHM,
        num_rounds=NUM_ROUNDS,
        participation=participation,
        **FULL_BATCHES,
        **options,
    )
    return jax.jit(function)(start(participation), STATES, DATA, KEY, seconds=SECONDS)


def update_by_hand(params, row):
    size = SIZES[row]
    x = np.asarray(DATA.inputs[row, :size], np.float64)
    y = np.asarray(DATA.labels[row, :size], np.float64)
    return params - LEARNING_RATE * 2 * x.T @ (x @ params - y) / size


def rounds_by_hand(participation, roles):
    """Plain FedAvg: (parameters after each round, clients' rounds, clients' last message)."""
    params, waiting, history = np.asarray(PARAMS, np.float64), [], []
    rounds, seen = np.zeros(NUM_CLIENTS), np.full((NUM_CLIENTS, DIMS), -1.0)
    for index in range(NUM_ROUNDS):
        heard, waiting = waiting, []
        for row, dropped, late in zip(*(np.asarray(part[index]) for part in roles), strict=True):
            if dropped:
                continue
            rounds[row] += 1
            seen[row] = params
            update = (update_by_hand(params, row), SIZES[row])
            if not late:
                heard.append(update)
            elif participation.late == "next_round":
                waiting.append(update)
        if heard:
            updates, weights = zip(*heard, strict=True)
            params = np.average(updates, axis=0, weights=weights)
        history.append(params)
    return history, rounds, seen


@pytest.mark.parametrize("participation", [PARTIAL, LATE_IS_LOST], ids=["next_round", "drop"])
def test_rounds_equal_hand_computation(participation):
    """Sampled, dropped and late clients, rounds without arrivals; batches larger than clients."""
    server, states, metrics = run(participation)
    params, rounds, seen = rounds_by_hand(participation, metrics.roles)
    found = server.state if participation.late == "next_round" else server
    np.testing.assert_allclose(found, params[-1], atol=1e-5)
    np.testing.assert_array_equal(states["rounds"], rounds)
    np.testing.assert_allclose(states["seen"], seen, atol=1e-5)
    assert np.ptp(rounds) > 0
    sampled, arrived, dropped, late = (np.asarray(count) for count in metrics.counts)
    np.testing.assert_array_equal(sampled, 3)
    np.testing.assert_array_equal(arrived + dropped + late, 3)
    assert arrived.min() == 0 and dropped.max() > 0 and late.max() > 0  # all of it occurs
    idle = np.asarray(metrics.roles.dropped)
    np.testing.assert_array_equal(np.asarray(metrics.client["loss"])[idle], 0.0)
    assert np.all(np.asarray(metrics.client["loss"])[~idle] > 0)


def test_late_updates_matter():
    assert not np.allclose(run(PARTIAL)[0].state, run(LATE_IS_LOST)[0], atol=1e-3)


def test_late_clients_are_those_beyond_the_deadline():
    rows, dropped, late = (np.asarray(part) for part in run(PARTIAL)[2].roles)
    np.testing.assert_array_equal(late, ~dropped & (np.asarray(SECONDS)[rows] > 5.0))


def test_late_rows_come_first():
    _, _, metrics = run(PARTIAL)
    rows = np.asarray(metrics.roles.rows)
    heard = np.flatnonzero(metrics.server["total"])  # metrics are 0 where nothing arrived
    later = heard[heard > 0]
    assert len(later) > NUM_ROUNDS // 2
    np.testing.assert_array_equal(metrics.server["rows"][later, :3], rows[later - 1])
    np.testing.assert_array_equal(metrics.server["rows"][heard, 3:], rows[heard])


def assert_same_rounds(one, other):
    """The same fates exactly; a program of another layout may round differently."""
    chex.assert_trees_all_equal(one[2].roles, other[2].roles)
    chex.assert_trees_all_close(one, other, atol=1e-6)


def test_chunks_do_not_matter():
    assert_same_rounds(run(PARTIAL), run(PARTIAL, chunk_size=3))


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_devices_do_not_matter():
    """Three clients on two devices."""
    mesh = jax.sharding.Mesh(jax.devices()[:2], "clients")
    assert_same_rounds(run(PARTIAL), run(PARTIAL, mesh=mesh))


def test_single_rounds_and_the_plain_loop_equal_the_scan():
    server, states, metrics = run(PARTIAL)
    loop_server, loop_states = start(PARTIAL), STATES
    algorithm = ALGORITHM._replace(client_step=jax.jit(ALGORITHM.client_step))
    for index in range(NUM_ROUNDS):
        loop_server, loop_states, single = simulate.run_round(
            algorithm,
            loop_server,
            loop_states,
            DATA,
            KEY,
            index,
            participation=PARTIAL,
            seconds=SECONDS,
            backend="loop",
            **FULL_BATCHES,
        )
        chex.assert_trees_all_close(
            single, jax.tree.map(lambda leaf, i=index: leaf[i], metrics), atol=1e-5
        )
    chex.assert_trees_all_close((loop_server, loop_states), (server, states), atol=1e-5)


def test_one_trace_for_all_rounds():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(server, states, round_index):
        return simulate.run_round(
            ALGORITHM,
            server,
            states,
            DATA,
            KEY,
            round_index,
            participation=PARTIAL,
            seconds=SECONDS,
            **FULL_BATCHES,
        )

    server, states = start(PARTIAL), STATES
    for index in range(3):
        server, states, _ = step(server, states, index)


@functools.partial(jax.jit, static_argnames=("participation", "late"))
def one_round(server, states, data, seconds, weights, *, participation, late=False):
    return simulate.run_round(
        ALGORITHM,
        simulate.with_late(ALGORITHM, server, states, NUM_CLIENTS) if late else server,
        states,
        data,
        KEY,
        0,
        participation=participation,
        seconds=seconds,
        weights=weights,
        **FULL_BATCHES,
    )


def test_an_empty_round_leaves_the_server_as_it_is():
    everyone_late = Participation(deadline_s=0.5)
    server, states, metrics = one_round(
        PARAMS, STATES, DATA, SECONDS, None, participation=everyone_late
    )
    np.testing.assert_array_equal(server, PARAMS)
    np.testing.assert_array_equal(states["rounds"], 1)  # their work is done all the same
    assert [int(count) for count in metrics.counts] == [5, 0, 0, 5]
    assert float(metrics.server["total"]) == 0.0
    later = Participation(deadline_s=0.5, late="next_round")
    held, _, _ = one_round(PARAMS, STATES, DATA, SECONDS, None, participation=later, late=True)
    np.testing.assert_array_equal(held.state, PARAMS)
    np.testing.assert_array_equal(held.late.weights, SIZES)


def test_an_empty_round_divides_by_nothing():
    """The loop backend computes step by step, so that every NaN is seen."""
    with jax.debug_nans(True):
        server, _, _ = simulate.run_round(
            ALGORITHM,
            PARAMS,
            STATES,
            DATA,
            KEY,
            0,
            participation=Participation(deadline_s=0.5),
            seconds=SECONDS,
            backend="loop",
            **FULL_BATCHES,
        )
    np.testing.assert_array_equal(server, PARAMS)


def test_a_client_without_samples_sends_nothing():
    """Its update is NaN, and a weight that the caller gives it must not count either."""
    data = DATA._replace(size=DATA.size.at[3].set(0))
    weights = jnp.asarray([1.0, 2.0, 3.0, 4.0, 5.0])
    server, _, metrics = one_round(
        PARAMS, STATES, data, None, weights, participation=Participation()
    )
    others = [0, 1, 2, 4]
    start = np.asarray(PARAMS, np.float64)
    expected = np.average(
        [update_by_hand(start, row) for row in others], axis=0, weights=weights[jnp.asarray(others)]
    )
    np.testing.assert_allclose(server, expected, atol=1e-6)
    assert [int(count) for count in metrics.counts] == [5, 4, 0, 0]


def test_everyone_always_in_time_is_the_round_without_participation():
    expected = one_round(PARAMS, STATES, DATA, None, None, participation=None)
    found = one_round(PARAMS, STATES, DATA, None, None, participation=Participation())
    chex.assert_trees_all_close(found, expected, atol=1e-6)
    assert [int(count) for count in expected[2].counts] == [5, 5, 0, 0]
    chex.assert_trees_all_equal(expected[2].roles, everyone(NUM_CLIENTS))


HELD = simulate.with_late(ALGORITHM, PARAMS, STATES, 2)
DEADLINE = Participation(deadline_s=5.0)
NEXT_ROUND = Participation(deadline_s=5.0, late="next_round")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"participation": Participation(num_sampled=6)}, "num_sampled is 6, but there are 5"),
        ({"participation": DEADLINE}, "deadline_s is 5.0 and seconds are not given"),
        ({"participation": Participation(), "seconds": SECONDS}, "deadline_s is None and seconds"),
        ({"participation": DEADLINE, "seconds": SECONDS[:2]}, r"seconds has shape \(2,\)"),
        ({"seconds": SECONDS}, "no effect without participation"),
        ({"weights": jnp.ones(3)}, r"weights has shape \(3,\)"),
        ({"participation": NEXT_ROUND, "seconds": SECONDS}, "fed.simulate.with_late"),
        ({"server_state": HELD}, "give server_state.state"),
        (
            {"participation": NEXT_ROUND, "seconds": SECONDS, "server_state": HELD},
            "2 late updates, but a round has 5",
        ),
        (
            {"participation": Participation(num_sampled=2), "client_ids": jnp.zeros(5, int)},
            "must be distinct",
        ),
        (
            {
                "participation": Participation(),
                "algorithm": ALGORITHM._replace(client_final=lambda message, state: ((), message)),
            },
            "client_final must return a client state like",
        ),
        (
            {"participation": Participation(deadline_s=0.5), "seconds": SECONDS},
            "the fastest client needs 1.0 s, so no update would ever arrive",
        ),
    ],
)
def test_bad_rounds(change, message):
    arguments = {
        "algorithm": ALGORITHM,
        "server_state": PARAMS,
        "client_states": STATES,
        "data": DATA,
        "key": KEY,
        "num_rounds": 1,
        **FULL_BATCHES,
    }
    with pytest.raises(ValueError, match=message):
        simulate.run_rounds(**{**arguments, **change})
