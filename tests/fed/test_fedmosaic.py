"""FedMosaic: rounds of clients of different width, what travels, who listens to whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from two_tasks import CLASSES, D_IN, make_data

from fed import clients, co_lora, gradient_sketch, simulate
from fed.algorithms.fedmosaic import Adapters, MosaicUpdate, fedmosaic, start_clients
from fed.clients import Batch
from fed.traffic import Ledger

RANK, HIDDEN, SCALE = 3, 8, 2.0
WIDTHS = (8, 5, 8, 4)
IDS = jnp.asarray([5, 1, 8, 2])
KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
BODY, HEAD, SKETCHED, READ = (
    jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for shape in ((D_IN, HIDDEN), (HIDDEN, CLASSES), (D_IN, 5), (5, CLASSES))
)
SHAPE = (2, D_IN)  # of a sketch
CORES = {"body": co_lora.zero_core(RANK), "head": co_lora.zero_core(RANK)}


def logits(adapters, inputs):
    bases, held = adapters.fixed

    def add(name, values):
        beta = co_lora.gate_value(adapters.private[name], values)
        own, shared = adapters.local[name], adapters.shared[name]
        return co_lora.apply(bases[name], own, shared, beta, values, SCALE)

    hidden = jnp.tanh(inputs @ BODY + add("body", inputs)) * held[None]
    return hidden @ HEAD + add("head", hidden)


def loss_fn(adapters, batch, key):
    del key
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(adapters, batch.inputs), batch.labels
    )
    loss = (losses * batch.weight).sum() / jnp.maximum(batch.weight.sum(), 1)
    return loss, {"loss": loss}


def task_vector(batch):
    return gradient_sketch.task_vector(
        batch.inputs,
        batch.inputs @ SKETCHED,
        READ,
        jnp.zeros(CLASSES),
        batch.labels,
        batch.weight,
        between=gradient_sketch.relu,
        rows=SHAPE[0],
    )


@jax.jit
def client_states():
    """Clients of four widths; bases are not aligned here."""
    held = (jnp.arange(HIDDEN)[None] < jnp.asarray(WIDTHS)[:, None]).astype(jnp.float32)
    ends = jnp.ones(D_IN), jnp.ones(CLASSES)

    def own(held):
        make = functools.partial(co_lora.init_basis, rank=RANK)
        return {"body": make(KEY, ends[0], held), "head": make(KEY, held, ends[1])}

    cores = clients.replicate(CORES, 4)
    gates = {"body": jnp.zeros((4, D_IN)), "head": jnp.zeros((4, HIDDEN))}
    adapters = Adapters(cores, cores, gates, (jax.vmap(own)(held), held))
    return start_clients(adapters, SHAPE, 4)


DATA = make_data()
ALGORITHM = fedmosaic(loss_fn, optax.adam(0.03), task_vector)
QUIET = fedmosaic(loss_fn, optax.adam(0.03), task_vector, noise=0.0)
STATES = client_states()
SERVER = ALGORITHM.server_init(CORES, SHAPE, 4)


@functools.partial(jax.jit, static_argnums=(0, 2))
def run(algorithm, data, chunk_size):
    """Four rounds of eight epochs in full batches."""
    return simulate.run_rounds(
        algorithm,
        SERVER,
        STATES,
        data,
        KEY,
        num_rounds=4,
        client_ids=IDS,
        batch_size=30,
        epochs=8,
        chunk_size=chunk_size,
    )


@functools.lru_cache
def trained():
    return run(ALGORITHM, DATA, 4)


def test_clients_learn_and_what_is_frozen_stays():
    server, states, metrics = trained()
    loss = np.asarray(metrics.client["loss"])
    assert (loss[-1] < 0.8 * loss[0]).all()
    jax.tree.map(np.testing.assert_array_equal, states.adapters.fixed, STATES.adapters.fixed)
    for name in CORES:
        assert np.abs(states.adapters.local[name].p).max(axis=(1, 2)).min() > 1e-2
        assert np.abs(states.adapters.private[name]).max(axis=1).min() > 1e-3
    # Units that a client lacks are never read.
    gates = np.asarray(states.adapters.private["head"])
    for row, width in enumerate(WIDTHS):
        np.testing.assert_array_equal(gates[row, width:], 0)
    jax.tree.map(np.testing.assert_array_equal, server.received, states.adapters.local)


def test_the_answer_is_the_mean_of_the_others_by_relevance():
    server, _, metrics = trained()
    sketches = np.asarray(server.sketches, np.float64)
    columns = sketches / np.linalg.norm(sketches, axis=1, keepdims=True)
    weights = np.exp(np.einsum("ird,jrd->ij", columns, columns) / D_IN / 0.5)
    np.fill_diagonal(weights, 0)
    weights /= weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(metrics.server["relevance"][-1], weights, atol=1e-5)

    def check(found, received):
        expected = np.einsum("kj,j...->k...", weights, np.asarray(received))
        np.testing.assert_allclose(found, expected, atol=1e-5)

    jax.tree.map(check, server.personalized, server.received)


def test_vmapped_clients_are_single_clients():
    """All widths run in one program, in a chunk of 4 or in chunks of 1."""
    single = run(ALGORITHM, DATA, 1)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=2e-5), trained()[:2], single[:2]
    )


def test_identical_clients_listen_to_all_others_equally():
    server, _, metrics = run(QUIET, make_data(equal=True), 4)
    expected = np.broadcast_to((1 - np.eye(4)) / 3, (4, 4, 4))
    np.testing.assert_allclose(metrics.server["relevance"], expected, atol=1e-5)
    np.testing.assert_allclose(server.sketches, server.sketches[:1].repeat(4, 0), atol=1e-5)


def test_the_first_message_is_the_clients_own_start():
    message = ALGORITHM.server_message(SERVER, 2)
    jax.tree.map(np.testing.assert_array_equal, message, CORES)


def batches(number):
    inputs = jax.random.normal(KEY, (number, 6, D_IN))
    labels = jax.random.randint(KEY, (number, 6), 0, CLASSES)
    return [Batch(inputs[i], labels[i], jnp.ones(6)) for i in range(number)]


def test_task_vectors_are_taken_averaged_smoothed_and_sent_with_noise():
    algorithm = fedmosaic(loss_fn, optax.sgd(0.1), task_vector, every=2, decay=0.25, noise=1e-2)
    state = clients.take_row(STATES, 1)
    step, given = jax.jit(algorithm.client_step), batches(5)
    vectors = [np.asarray(jax.jit(task_vector)(batch)) for batch in given]
    expected = [np.mean([vectors[i] for i in (0, 2, 4)], axis=0)]
    expected.append(0.25 * expected[0] + 0.75 * vectors[1])
    sent = []
    for number, used in enumerate(([0, 1, 2, 3, 4], [1, 0])):
        running = algorithm.client_init(CORES, state, jax.random.fold_in(KEY, number))
        for place in used:
            running, _ = step(running, given[place])
        state, update = algorithm.client_final(CORES, running)
        np.testing.assert_allclose(state.sketch, expected[number], atol=1e-6)
        assert state.rounds == number + 1
        sent.append(np.asarray(update.sketch - state.sketch))
    noise = np.stack(sent)
    assert 0.5e-2 < noise.std() < 1.5e-2
    assert np.abs(noise[0] - noise[1]).min() > 1e-5


def test_updates_that_did_not_arrive_leave_their_rows():
    updates = MosaicUpdate(
        jax.tree.map(lambda x: jax.random.normal(KEY, (4, *x.shape)), CORES),
        jax.random.normal(KEY, (4, *SHAPE)).at[3].set(jnp.nan),
    )
    # Row 2 comes twice, late first; row 0's update is lost, row 3 sends nothing.
    rows, weights = jnp.asarray([2, 1, 2, 0]), jnp.asarray([3.0, 1.0, 2.0, 0.0])
    new, metrics = jax.jit(ALGORITHM.server_update)(SERVER, updates, weights, rows)
    np.testing.assert_array_equal(new.heard, [False, True, True, False])
    for found, sent in zip(
        jax.tree.leaves(new.received), jax.tree.leaves(updates.local), strict=True
    ):
        expected = np.stack([0 * sent[0], sent[1], sent[2], 0 * sent[0]])
        np.testing.assert_array_equal(found, expected)
    relevance = np.asarray(metrics["relevance"])
    np.testing.assert_array_equal(relevance[:, [0, 3]], np.zeros((4, 2)))
    np.testing.assert_array_equal(relevance[[1, 2]], [[0, 0, 1, 0], [0, 1, 0, 0]])


def test_bytes_of_the_paper_s_setting():
    """Rank 128, 7 modules in 4 blocks: 462,336 floats, 1.85 MB each way, and the sketch."""
    cores = [[co_lora.zero_core(128)] * 7] * 4
    algorithm = fedmosaic(loss_fn, optax.sgd(1.0), task_vector)
    server = algorithm.server_init(cores, SHAPE, 2)
    empty = Adapters(*[clients.replicate(cores, 2)] * 2, (), ())
    state = clients.take_row(start_clients(empty, SHAPE, 2), 0)
    message = algorithm.server_message(server, 0)
    update = algorithm.client_final(message, algorithm.client_init(message, state, KEY))[1]
    ledger = Ledger()
    for direction, payload in (("up", update), ("down", message)):
        encoded = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(payload))
        ledger.record("cores", encoded, tier="edge-device", direction=direction, round=0)
    assert ledger.total(direction="down") == 4 * (128**2 + 128) * 28 == 4 * 462_336
    assert ledger.total(direction="up") == 4 * (462_336 + SHAPE[0] * SHAPE[1])


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"decay": 1.0}, {"noise": -1.0}, {"temperature": 0.0}]
)
def test_errors(options):
    with pytest.raises(ValueError, match="every must be at least 1, decay in"):
        fedmosaic(loss_fn, optax.sgd(1.0), task_vector, **options)
