"""FedProx, Ditto, HeteroFL and FedRolex against FedAvg, local training and float64 by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fed import clients, simulate
from fed.algorithms.ditto import ditto
from fed.algorithms.fedavg import fedavg
from fed.algorithms.fedprox import fedprox, proximal
from fed.algorithms.fedrolex import RolexState, RolexUpdate, fedrolex
from fed.algorithms.heterofl import heterofl, rows_of, window
from fed.algorithms.local import local

SIZES = (7, 12, 4, 9)
NUM_CLIENTS, DIMS, UNITS = len(SIZES), 3, 5
CAPACITIES = np.array([2, 5, 3, 3])
RATE = 0.1
IDS = jnp.asarray([4, 1, 9, 2])
KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
DATA = clients.stack_clients(
    [(RNG.normal(size=(n, DIMS)).astype(np.float32), RNG.integers(0, 2, n)) for n in SIZES]
)
PARAMS = {
    "w1": jnp.asarray(RNG.normal(size=(DIMS, UNITS)), jnp.float32),
    "b1": jnp.asarray(RNG.normal(size=UNITS), jnp.float32),
    "w2": jnp.asarray(RNG.normal(size=UNITS), jnp.float32),
    "b2": jnp.float32(0.3),
}
STACKED = clients.replicate(PARAMS, NUM_CLIENTS)
SGD = optax.sgd(RATE, momentum=0.9)


def loss_fn(params, batch, key):
    """Mean square error of a layer of ReLU units, with noise, so that the keys matter."""
    inputs = batch.inputs + 0.1 * jax.random.normal(key, batch.inputs.shape)
    return plain_loss(params, batch._replace(inputs=inputs), key)


def plain_loss(params, batch, key):
    del key
    hidden = jax.nn.relu(batch.inputs @ params["w1"] + params["b1"][None])
    errors = hidden @ params["w2"] + params["b2"] - batch.labels
    loss = (batch.weight * errors**2).sum() / batch.weight.sum()
    return loss, {"loss": loss}


def run(algorithm, server, states=(), num_rounds=2, **options):
    """Server state, client states and clients' metrics after some rounds."""
    options = {"client_ids": IDS, "batch_size": 4, "epochs": 2, **options}
    call = functools.partial(simulate.run_rounds, algorithm, num_rounds=num_rounds, **options)
    server, states, metrics = jax.jit(call)(server, states, DATA, KEY)
    return server, states, metrics.client


# Each is one program, whatever its strength.
run_fedprox = jax.jit(lambda mu: run(fedprox(loss_fn, SGD, mu), PARAMS))
run_ditto = jax.jit(lambda lam: run(ditto(loss_fn, SGD, lam), PARAMS, STACKED))


@functools.cache
def run_known(name):
    """What the controls are compared with."""
    if name == "local":
        return run(local(loss_fn, SGD), (), STACKED)
    if name == "fedavg":
        return run(fedavg(loss_fn, SGD), PARAMS)
    return run(heterofl(loss_fn, SGD, static_mask), PARAMS)


def assert_close(first, second, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=atol), first, second)


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


# By hand: one full-batch step of one client in float64, on really smaller matrices.


def gradient(w, x, y):
    before = x @ w["w1"] + w["b1"]
    hidden = np.maximum(before, 0)
    errors = 2 * (hidden @ w["w2"] + w["b2"] - y) / len(y)
    back = errors[:, None] * w["w2"] * (before > 0)
    return {
        "w1": x.T @ back,
        "b1": back.sum(axis=0),
        "w2": hidden.T @ errors,
        "b2": errors.sum(),
    }


def wide(tree):
    return {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}


def samples(client):
    size = SIZES[client]
    return np.asarray(DATA.inputs[client, :size], np.float64), np.asarray(
        DATA.labels[client, :size], np.float64
    )


def units_of(w, units):
    return {"w1": w["w1"][:, units], "b1": w["b1"][units], "w2": w["w2"][units], "b2": w["b2"]}


def submodel_round(w, chosen):
    """The round's new model, where client k trains the hidden units chosen[k] as a small net."""
    total, cover = ({name: np.zeros_like(leaf) for name, leaf in w.items()} for _ in range(2))
    for client, units in enumerate(chosen):
        own = units_of(w, units)
        grads = gradient(own, *samples(client))
        for name in w:
            place = (..., units) if w[name].ndim else ()
            total[name][place] += SIZES[client] * (own[name] - RATE * grads[name])
            cover[name][place] += SIZES[client]
    return {n: np.where(cover[n] > 0, total[n] / np.maximum(cover[n], 1), w[n]) for n in w}


FULL_BATCH = {"batch_size": 16, "epochs": 1}


def unit_mask(units):
    """Mask tree of some hidden units [UNITS]."""
    return {
        "w1": jnp.broadcast_to(units[None], (DIMS, UNITS)),
        "b1": units,
        "w2": units,
        "b2": jnp.float32(1.0),
    }


def static_mask(row):
    return unit_mask(window(UNITS, jnp.asarray(CAPACITIES)[row]))


def rolling_mask(row, round_index):
    return unit_mask(window(UNITS, jnp.asarray(CAPACITIES)[row], round_index))


# FedProx


def test_fedprox_without_its_term_is_fedavg():
    assert_close(run_fedprox(0.0), run_known("fedavg"))


def test_fedprox_round_equals_float64():
    """Two full-batch steps, because in the first one the distance is 0."""
    mu = 0.7
    found, _, _ = run(
        fedprox(plain_loss, optax.sgd(RATE), mu), PARAMS, num_rounds=1, batch_size=16, epochs=2
    )
    start, models = wide(PARAMS), []
    for client in range(NUM_CLIENTS):
        w = start
        for _ in range(2):
            grads = gradient(w, *samples(client))
            w = {n: w[n] - RATE * (grads[n] + mu * (w[n] - start[n])) for n in w}
        models.append(w)
    expected = {n: np.average([m[n] for m in models], axis=0, weights=SIZES) for n in start}
    assert_close(found, expected, atol=1e-5)


def test_the_term_stays_out_of_the_metrics():
    metrics = proximal(plain_loss, 5.0, clients.take_row(STACKED, 0))
    far = jax.tree.map(lambda leaf: leaf + 1.0, PARAMS)
    batch = clients.Batch(DATA.inputs[0], DATA.labels[0], jnp.ones(DATA.labels.shape[1]))
    loss, reported = metrics(far, batch, KEY)
    plain, _ = plain_loss(far, batch, KEY)
    count = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    np.testing.assert_allclose(loss, plain + 2.5 * count, rtol=1e-6)
    np.testing.assert_allclose(reported["loss"], plain, rtol=1e-6)


# Ditto


def test_ditto_without_its_term_is_local_training_beside_fedavg():
    server, personal, metrics = run_ditto(0.0)
    shared, _, shared_metrics = run_known("fedavg")
    _, alone, alone_metrics = run_known("local")
    assert_close((server, metrics.shared), (shared, shared_metrics))
    assert_close((personal, metrics.personal), (alone, alone_metrics))


def test_ditto_never_changes_the_shared_model():
    server, personal, _ = run_ditto(1.5)
    assert_close(server, run_known("fedavg")[0])
    assert not np.allclose(personal["w1"], run_known("local")[1]["w1"], atol=1e-3)


def test_ditto_step_equals_float64():
    """One full-batch step from a personal model that is not the shared one; its own rate."""
    lam, own_rate = 0.8, 0.05
    personal = jax.tree.map(lambda leaf: leaf + 0.5, STACKED)
    algorithm = ditto(plain_loss, optax.sgd(RATE), lam, personal_optimizer=optax.sgd(own_rate))
    _, found, _ = run(algorithm, PARAMS, personal, num_rounds=1, **FULL_BATCH)
    anchor = wide(PARAMS)
    for client in range(NUM_CLIENTS):
        v = wide(clients.take_row(personal, client))
        grads = gradient(v, *samples(client))
        expected = {n: v[n] - own_rate * (grads[n] + lam * (v[n] - anchor[n])) for n in v}
        assert_close(clients.take_row(found, client), expected, atol=1e-5)


# HeteroFL


def test_heterofl_with_everything_held_is_fedavg():
    ones = jax.tree.map(lambda leaf: jnp.ones((NUM_CLIENTS, *leaf.shape)), PARAMS)
    assert_close(run(heterofl(loss_fn, SGD, rows_of(ones)), PARAMS), run_known("fedavg"))


def test_heterofl_round_equals_small_networks_in_float64():
    algorithm = heterofl(plain_loss, optax.sgd(RATE), static_mask)
    found, _, _ = run(algorithm, PARAMS, num_rounds=1, **FULL_BATCH)
    chosen = [np.arange(count) for count in CAPACITIES]
    assert_close(found, submodel_round(wide(PARAMS), chosen), atol=1e-5)


def test_what_nobody_holds_does_not_change():
    algorithm = heterofl(plain_loss, SGD, lambda row: unit_mask(window(UNITS, 1 + row // 2)))
    server, _, _ = run(algorithm, PARAMS, num_rounds=1)
    for name in ("w1", "b1", "w2"):
        np.testing.assert_array_equal(server[name][..., 2:], PARAMS[name][..., 2:])
        assert not np.allclose(server[name][..., :2], PARAMS[name][..., :2], atol=1e-4)


def test_a_client_sends_nothing_that_it_does_not_hold():
    """Also under an optimiser with momentum, decay and adaptive steps."""
    algorithm = heterofl(loss_fn, optax.adamw(0.01, weight_decay=0.1), static_mask)
    call = functools.partial(simulate.run_clients, algorithm, batch_size=4, epochs=2)
    rows = jnp.arange(NUM_CLIENTS)
    _, updates, _ = jax.jit(call)(rows, (), DATA, KEY, 0, client_ids=IDS, server_state=PARAMS)
    for client, count in enumerate(CAPACITIES):
        for name in ("w1", "b1", "w2"):
            assert not np.any(updates[name][client, ..., count:])
            assert np.all(updates[name][client, ..., :count])


def test_weight_zero_does_not_count():
    algorithm = heterofl(loss_fn, SGD, static_mask)
    updates = jax.tree.map(lambda leaf: leaf + jnp.nan, STACKED)
    updates = jax.tree.map(lambda leaf: leaf.at[0].set(1.0), updates)
    updates = jax.tree.map(lambda leaf: leaf.at[1:].set(9.0), updates)
    weights = jnp.asarray([2.0, 0.0, 0.0, 0.0])
    server, _ = algorithm.server_update(PARAMS, updates, weights, jnp.arange(NUM_CLIENTS))
    np.testing.assert_array_equal(server["b1"][:2], 1.0)
    np.testing.assert_array_equal(server["b1"][2:], PARAMS["b1"][2:])


# FedRolex


def test_window_wraps_around_the_end():
    np.testing.assert_array_equal(window(5, 3), [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(window(5, 3, 3), [1, 0, 0, 1, 1])
    np.testing.assert_array_equal(window(5, 3, 8), window(5, 3, 3))
    np.testing.assert_array_equal(window(5, 5, 2), np.ones(5))


def test_fedrolex_rounds_equal_small_networks_in_float64():
    algorithm = fedrolex(plain_loss, optax.sgd(RATE), rolling_mask)
    found, _, _ = run(algorithm, algorithm.server_init(PARAMS), num_rounds=3, **FULL_BATCH)
    expected = wide(PARAMS)
    for index in range(3):
        chosen = [(index + np.arange(count)) % UNITS for count in CAPACITIES]
        expected = submodel_round(expected, chosen)
    assert int(found.round) == 3
    assert_close(found.params, expected, atol=1e-5)


def test_fedrolex_reaches_all_units_where_heterofl_does_not():
    """Windows of 2 of 5 units: 4 rounds."""

    @jax.jit
    def moved(roll):
        def mask_of(row, index):
            del row
            return unit_mask(window(UNITS, 2, roll * index))

        algorithm = fedrolex(plain_loss, SGD, mask_of)
        server, _, _ = run(algorithm, algorithm.server_init(PARAMS), num_rounds=UNITS - 1)
        return server.params["b1"] != PARAMS["b1"]

    np.testing.assert_array_equal(moved(1), np.ones(UNITS))
    np.testing.assert_array_equal(moved(0), [1, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("mask_of", "known"),
    [
        (lambda row, index: unit_mask(window(UNITS, UNITS, index)), "fedavg"),
        (lambda row, index: static_mask(row), "heterofl"),
    ],
    ids=["full-windows", "nothing-rolls"],
)
def test_fedrolex_without_rolling_is_heterofl(mask_of, known):
    algorithm = fedrolex(loss_fn, SGD, mask_of)
    server, _, metrics = run(algorithm, algorithm.server_init(PARAMS))
    assert_close((server.params, metrics), run_known(known)[::2])


def test_a_late_update_counts_where_its_own_round_had_its_window():
    algorithm = fedrolex(loss_fn, SGD, lambda row, index: unit_mask(window(UNITS, 1, index)))
    state = RolexState(PARAMS, jnp.int32(3))
    rows, weights = jnp.asarray([0, 1]), jnp.ones(2)
    updates = RolexUpdate(
        jax.tree.map(lambda leaf: leaf[:2] * 0 + 7.0, STACKED), jnp.asarray([2, 3])
    )
    server, _ = algorithm.server_update(state, updates, weights, rows)
    np.testing.assert_array_equal(server.params["b1"] == 7.0, [0, 0, 1, 1, 0])
    np.testing.assert_array_equal(server.params["b1"][:2], PARAMS["b1"][:2])
    assert int(server.round) == 4


# All of them


def test_one_trace_serves_all_rounds():
    chex.clear_trace_counter()
    algorithms = {
        "fedprox": (fedprox(plain_loss, SGD, 0.1), ()),
        "ditto": (ditto(plain_loss, SGD, 0.1), STACKED),
        "heterofl": (heterofl(plain_loss, SGD, static_mask), ()),
        "fedrolex": (fedrolex(plain_loss, SGD, rolling_mask), ()),
    }
    options = {"client_ids": IDS, "batch_size": 4, "epochs": 1}

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(carry, index):
        found = {
            name: simulate.run_round(algorithm, *carry[name], DATA, KEY, index, **options)
            for name, (algorithm, _) in algorithms.items()
        }
        losses = {name: metrics.client for name, (_, _, metrics) in found.items()}
        return {name: (server, states) for name, (server, states, _) in found.items()}, losses

    carry = {name: (a.server_init(PARAMS), states) for name, (a, states) in algorithms.items()}
    carry = jax.tree.map(jnp.asarray, carry)
    history = []
    for index in range(6):
        carry, losses = step(carry, index)
        history.append(losses)
    for first, last in zip(*map(jax.tree.leaves, (history[0], history[-1])), strict=True):
        assert last.mean() < 0.9 * first.mean()  # and training helps


def test_negative_strengths_are_refused():
    with pytest.raises(ValueError, match="mu must not be negative, got -1"):
        fedprox(loss_fn, SGD, -1.0)
    with pytest.raises(ValueError, match=r"lam must not be negative, got -0\.5"):
        ditto(loss_fn, SGD, -0.5)
