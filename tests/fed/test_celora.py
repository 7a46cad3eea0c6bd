"""CE-LoRA: gradients, mixing, traffic, and rounds on small models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from two_tasks import CLASSES, D_IN, make_data

from fed import cka, clients, gmm, simulate, transport, tri_matrix
from fed.algorithms.celora import celora, data_similarity, mixing_weights
from fed.algorithms.local import local
from fed.traffic import Ledger

RANK, HIDDEN = 3, 5
SCALE = 2.0
IDS = jnp.asarray([5, 1, 8, 2])
KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
FROZEN = {  # the backbone: two linear modules
    "first": RNG.normal(size=(D_IN, HIDDEN)).astype(np.float32),
    "second": RNG.normal(size=(HIDDEN, CLASSES)).astype(np.float32),
}


@functools.lru_cache
def adapters(start):
    keys = jax.random.split(jax.random.key(0), 2)
    init = functools.partial(tri_matrix.init, rank=RANK, start=start)
    return jax.jit(lambda: (init(keys[0], D_IN, HIDDEN), init(keys[1], HIDDEN, CLASSES)))()


def initial(start):
    first, second = adapters(start)
    return {"first": first, "second": second, "bias": jnp.zeros(CLASSES)}


def logits(params, inputs):
    hidden = inputs @ FROZEN["first"] + tri_matrix.apply(params["first"], inputs, SCALE)
    hidden = jnp.tanh(hidden)
    out = hidden @ FROZEN["second"] + tri_matrix.apply(params["second"], hidden, SCALE)
    return out + params["bias"][None]


def loss_fn(params, batch, key):
    del key
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, batch.inputs), batch.labels
    )
    loss = (losses * batch.weight).sum() / jnp.maximum(batch.weight.sum(), 1)
    return loss, {"loss": loss}


DATA = make_data()
ADAM = optax.adam(0.02)


ALL = celora(loss_fn, ADAM)
CORES = celora(loss_fn, ADAM, train="cores")


@functools.lru_cache
def rounds(algorithm):
    """A compiled program of four rounds of one algorithm, in full batches."""

    def run(server, states, data):
        return simulate.run_rounds(
            algorithm,
            server,
            states,
            data,
            KEY,
            num_rounds=4,
            client_ids=IDS,
            batch_size=30,
            epochs=8,
            chunk_size=4,
        )

    return jax.jit(run)


@functools.lru_cache
def trained(algorithm=ALL, start="trained_basis"):
    params = initial(start)
    data = jnp.eye(4) * 0.5 + 0.5
    return rounds(algorithm)(
        algorithm.server_init(params, data), clients.replicate(params, 4), DATA
    )


@jax.jit
def gradients(params):
    batch = clients.Batch(DATA.inputs[0], DATA.labels[0], jnp.ones(30))
    return jax.grad(loss_fn, has_aux=True)(params, batch, None)[0]


def test_public_code_s_start_cannot_move_c():
    start = gradients(initial("trained_basis"))
    for name in ("first", "second"):
        np.testing.assert_array_equal(start[name].c, np.zeros((RANK, RANK)))
        np.testing.assert_array_equal(start[name].a, np.zeros_like(start[name].a))
        assert np.abs(start[name].b).max() > 1e-5
    frozen = gradients(initial("frozen_basis"))
    for name in ("first", "second"):
        assert np.abs(frozen[name].c).max() > 1e-3
        np.testing.assert_array_equal(frozen[name].a, np.zeros_like(frozen[name].a))
        np.testing.assert_array_equal(frozen[name].b, np.zeros_like(frozen[name].b))


def test_gradient_of_c_is_the_projected_gradient():
    """dL/dC = s B' G A', G that of the module's weights."""
    params = initial("frozen_basis")
    params["second"] = params["second"]._replace(c=jnp.ones((RANK, RANK)))
    inputs = DATA.inputs[0]

    def with_delta(delta):
        hidden = jnp.tanh(inputs @ FROZEN["first"])
        return (hidden @ (FROZEN["second"] + delta.T) ** 2).sum()

    def with_core(c):
        return with_delta(tri_matrix.delta(params["second"]._replace(c=c), SCALE))

    weight_gradient = jax.grad(with_delta)(tri_matrix.delta(params["second"], SCALE))
    expected = SCALE * params["second"].b.T @ weight_gradient @ params["second"].a.T
    np.testing.assert_allclose(
        jax.grad(with_core)(params["second"].c), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("start", ["trained_basis", "frozen_basis"])
def test_adapters_start_without_effect(start):
    for name, adapter in initial(start).items():
        if name != "bias":
            np.testing.assert_array_equal(tri_matrix.delta(adapter, SCALE), 0)


def test_bytes_are_four_r_squared_a_module():
    """24 modules of rank 8, as query and value of 12 blocks: 6.1 kB, 192 times less than LoRA."""
    make = functools.partial(tri_matrix.init, d_in=768, d_out=768, rank=8)
    params = jax.vmap(lambda k: make(k))(jax.random.split(KEY, 24))
    assert tri_matrix.payload_bytes(params) == 4 * 8**2 * 24 == 6144
    assert tri_matrix.payload_bytes(jax.eval_shape(lambda: params)) == 6144
    lora = 4 * 24 * (params.a[0].size + params.b[0].size)
    assert lora == 192 * tri_matrix.payload_bytes(params)
    ledger = Ledger()
    message = ALL.server_message(ALL.server_init(params, jnp.ones((2, 2))), 1)
    _, update = ALL.client_final(message, ALL.client_init(message, params, KEY))
    for direction, payload in (("up", update), ("down", message)):
        ledger.record(
            "cores", np.asarray(payload).tobytes(), tier="edge-device", direction=direction, round=0
        )
    assert ledger.total(direction="up") == ledger.total(direction="down") == 6144


def test_similarity_of_data():
    similarity = jax.jit(data_similarity)
    distance = jnp.asarray([[0.0, 1.0, 2.0], [1.0, 0.0, 4.0], [2.0, 4.0, 0.0]])
    np.testing.assert_allclose(similarity(distance), np.exp(-distance / 2), rtol=1e-6)
    np.testing.assert_array_equal(similarity(jnp.zeros((3, 3))), np.ones((3, 3)))
    np.testing.assert_array_equal(similarity(jnp.zeros((1, 1))), np.ones((1, 1)))
    clusters = jnp.zeros((5, 5)).at[4, :4].set(1.0).at[:4, 4].set(1.0)  # most pairs at 0
    assert similarity(clusters)[0, 4] == pytest.approx(np.exp(-1 / 0.4), rel=1e-5)


def test_weights_are_the_normalised_mean():
    data = jnp.asarray([[1.0, 0.5], [0.5, 1.0]])
    model = jnp.asarray([[1.0, 0.1], [0.3, 1.0]])
    expected = [[1 / 1.2, 0.2 / 1.2], [0.35 / 1.35, 1 / 1.35]]
    np.testing.assert_allclose(mixing_weights(data, model, 0.25), expected, rtol=1e-6)


def test_both_modes_train_what_they_should():
    for algorithm, start in ((ALL, "trained_basis"), (CORES, "frozen_basis")):
        _, states, metrics = trained(algorithm, start)
        loss = np.asarray(metrics.client["loss"])
        assert (loss[-1] < 0.85 * loss[0]).all(), start
        for name in ("first", "second"):
            before, after = initial(start)[name], jax.tree.map(np.asarray, states[name])
            assert np.abs(after.c - before.c[None]).max() > 1e-2
            for factor in ("a", "b"):
                moved = np.abs(getattr(after, factor) - getattr(before, factor)[None]).max()
                assert (moved > 1e-3) if algorithm is ALL else (moved == 0)
        assert np.abs(np.asarray(states["bias"])).min(axis=1).max() > 1e-3


def test_frozen_basis_survives_weight_decay():
    params = initial("frozen_basis")
    algorithm = celora(loss_fn, optax.adamw(0.1, weight_decay=0.5), train="cores")
    state = algorithm.client_init(tri_matrix.cores(params), params, KEY)
    batch = clients.Batch(DATA.inputs[0], DATA.labels[0], jnp.ones(30))
    state, _ = jax.jit(algorithm.client_step)(state, batch)
    for name in ("first", "second"):
        np.testing.assert_array_equal(state.params[name].a, params[name].a)
        np.testing.assert_array_equal(state.params[name].b, params[name].b)
        assert np.abs(state.params[name].c).min() > 1e-3
    # No moments are kept for what is frozen.
    floats = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer_state) if leaf.ndim)
    assert floats == 2 * (2 * RANK**2 + CLASSES)


def test_identical_clients_get_uniform_rows_and_stay_identical():
    data = make_data(equal=True)

    def sketch(inputs, labels, size):
        return gmm.fit_classes(KEY, inputs, labels, size, num_classes=CLASSES)

    @jax.jit
    def similarity_of(data):
        sketches = jax.vmap(sketch)(data.inputs, data.labels, data.size)
        return data_similarity(transport.client_distances(sketches))

    similarity = similarity_of(data)
    params = clients.replicate(initial("trained_basis"), 4)
    # Full batches: everyone takes the same steps, whatever its own order of samples.
    server = ALL.server_init(initial("trained_basis"), similarity)
    server, states, metrics = rounds(ALL)(server, params, data)
    weights = mixing_weights(similarity, cka.pairwise_cka(server.received), 0.5)
    np.testing.assert_allclose(weights, np.full((4, 4), 0.25), atol=1e-5)
    np.testing.assert_allclose(metrics.server["self_weight"], 0.25, atol=1e-5)
    np.testing.assert_allclose(
        server.personalized, clients.replicate(server.received[0], 4), atol=1e-5
    )
    assert np.ptp(np.asarray(states["first"].b), axis=0).max() < 1e-5


def test_identity_weights_are_local_training():
    params = initial("trained_basis")
    states = clients.replicate(params, 4)
    algorithm = celora(loss_fn, ADAM, data_share=1.0)
    server, together, metrics = rounds(algorithm)(
        algorithm.server_init(params, jnp.eye(4)), states, DATA
    )
    _, alone, _ = rounds(local(loss_fn, ADAM))((), states, DATA)
    # Two programs round differently.
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), together, alone)
    np.testing.assert_array_equal(metrics.server["self_weight"], np.ones((4, 4)))
    np.testing.assert_array_equal(server.personalized, server.received)
    _, shared, _ = trained()
    assert np.abs(shared["first"].c - alone["first"].c).max() > 1e-3


def test_server_mixes_what_it_received():
    server, states, _ = trained()
    np.testing.assert_array_equal(server.received, jax.vmap(tri_matrix.cores)(states))
    weights = np.zeros((4, 4))
    received = np.asarray(server.received)
    similarity = cka.pairwise_cka(received)
    for i in range(4):
        for j in range(4):
            model = similarity[i, j]
            weights[i, j] = 0.5 * (1.0 if i == j else 0.5) + 0.5 * model
    weights /= weights.sum(axis=1, keepdims=True)
    expected = np.einsum("ij,jmpq->impq", weights, received)
    np.testing.assert_allclose(server.personalized, expected, atol=1e-5)


def test_updates_that_did_not_arrive_leave_their_rows():
    server = ALL.server_init(initial("trained_basis"), jnp.eye(4))
    updates = jnp.arange(4.0).reshape(-1, 1, 1, 1) + jax.random.normal(KEY, (4, 2, RANK, RANK))
    updates = updates.at[3].set(jnp.nan)
    # Row 2 comes twice, late first; row 0 and row 1's second did not arrive.
    rows = jnp.asarray([2, 1, 2, 0])
    weights = jnp.asarray([3.0, 1.0, 2.0, 0.0])
    new, _ = jax.jit(ALL.server_update)(server, updates, weights, rows)
    expected = [server.received[0], updates[1], updates[2], server.received[3]]
    np.testing.assert_array_equal(new.received, jnp.stack(expected))
    assert bool(jnp.isfinite(new.personalized).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: celora(loss_fn, ADAM, data_share=1.5), "from 0 to 1"),
        (lambda: celora(loss_fn, ADAM, train="c"), "'all' or 'cores'"),
        (lambda: ALL.server_init({}, jnp.eye(2)), "no TriMatrix"),
        (
            lambda: ALL.server_init(initial("trained_basis"), jnp.ones(2)),
            r"\[C, C\]",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
