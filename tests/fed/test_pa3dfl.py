"""Pa3dFL: personal learning at different capacities, one round by hand, payload, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fed import clients, factorised, hypernetwork, simulate
from fed.algorithms.local import local
from fed.algorithms.pa3dfl import Factors, Pa3dflUpdate, pa3dfl, pull_back
from fed.factorised import FactorisedLayer
from fed.participation import Participation

# Rounds: ten clients of capacities from 20 % to 100 %, in two groups that name the four quadrants
# of the same plane differently; 14 of the 16 inputs are noise.

NUM_CLIENTS, NUM_INPUTS, NUM_HIDDEN, NUM_CLASSES = 10, 16, 20, 4
CAPACITY = np.linspace(0.2, 1, NUM_CLIENTS).astype(np.float32)
HIDDEN = FactorisedLayer(NUM_HIDDEN, NUM_INPUTS, min_capacity=0.2, prune_inputs=False)
HEAD = FactorisedLayer(
    NUM_CLASSES, NUM_HIDDEN, min_capacity=0.5, prune_outputs=False, input_blocks=HIDDEN.num_blocks
)
LAYERS = {"hidden": HIDDEN, "head": HEAD}
IDS = jnp.arange(NUM_CLIENTS) + 30


def make_client(row, size, seed):
    rng = np.random.default_rng((row, seed))
    inputs = rng.normal(size=(size, NUM_INPUTS)) * np.where(np.arange(NUM_INPUTS) < 2, 2, 1)
    quadrant = (inputs[:, 0] > 0) * 2 + (inputs[:, 1] > 0)
    return inputs.astype(np.float32), (quadrant + row % 2) % NUM_CLASSES


DATA = clients.stack_clients([make_client(row, 28 + row, 1) for row in range(NUM_CLIENTS)])
TEST = clients.stack_clients([make_client(row, 300, 2) for row in range(NUM_CLIENTS)])


def masks(capacity):
    return {name: factorised.capacity_mask(layer, capacity) for name, layer in LAYERS.items()}


def logits(factors, inputs):
    hidden, head = (
        factorised.compose(*(part[name] for part in (factors.general, factors.personal,
                                                     factors.masks)), layer)
        for name, layer in LAYERS.items()
    )  # fmt: skip
    return jax.nn.relu(inputs @ hidden.T + factors.general["bias"][None]) @ head.T


def loss(factors, batch, key):
    del key
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(factors, batch.inputs), batch.labels
    )
    return (batch.weight * losses).sum() / batch.weight.sum(), {}


@jax.jit
def accuracies(factors):
    """[C] for stacked factors."""
    right = jax.vmap(logits)(factors, TEST.inputs).argmax(-1) == TEST.labels
    return right.mean(1)


def start():
    keys = jax.random.split(jax.random.key(0), 3)
    pairs = {
        name: factorised.init(key, layer)
        for key, (name, layer) in zip(keys, LAYERS.items(), strict=False)
    }
    general = {name: pair[0] for name, pair in pairs.items()} | {"bias": jnp.zeros(NUM_HIDDEN)}
    personal = {name: pair[1] for name, pair in pairs.items()}
    network = hypernetwork.init(
        keys[2], personal, num_clients=NUM_CLIENTS, embedding_size=8, hidden=(32, 32)
    )
    return general, personal, network


GENERAL, PERSONAL, HYPER = start()
ALGORITHM = pa3dfl(
    loss,
    optax.sgd(0.05),
    masks,
    server_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5)),
)
SCHEDULE = {"client_ids": IDS, "batch_size": 8, "epochs": 1}
ALL_MASKS = jax.jit(jax.vmap(masks))(CAPACITY)


def test_personal_models_beat_training_alone_at_the_same_capacities():
    run = functools.partial(simulate.run_rounds, num_rounds=60, **SCHEDULE)
    key = jax.random.key(1)
    server = ALGORITHM.server_init(GENERAL, HYPER, CAPACITY)
    server, _, metrics = jax.jit(functools.partial(run, ALGORITHM))(server, (), DATA, key)
    messages = jax.jit(jax.vmap(ALGORITHM.server_message, (None, 0)))(
        server, jnp.arange(NUM_CLIENTS)
    )
    shared = Factors(messages.general, messages.personal, ALL_MASKS)
    assert np.isfinite(metrics.server["gradient_norm"]).all()

    def own_loss(params, batch, key):
        masks_ = jax.lax.stop_gradient(params.masks)
        personal = jax.tree.map(jnp.multiply, masks_, params.personal)
        return loss(Factors(params.general, personal, masks_), batch, key)

    own = Factors(*clients.replicate((GENERAL, PERSONAL), NUM_CLIENTS), ALL_MASKS)
    alone = local(own_loss, optax.sgd(0.05))
    _, own, _ = jax.jit(functools.partial(run, alone))((), own, DATA, key)
    means = [float(accuracies(factors).mean()) for factors in (shared, own)]
    assert means[0] > means[1] + 0.05, means


def test_a_sampled_round_equals_its_clients_one_by_one_and_a_plain_mean():
    """Four of ten clients, one trace; weights are sizes, but a mean of general arrays is plain."""
    options = {**SCHEDULE, "batch_size": 64, "participation": Participation(num_sampled=4)}

    @jax.jit
    @chex.assert_max_traces(n=1)
    def round_(server, index):
        return simulate.run_round(
            ALGORITHM, server, (), DATA, jax.random.key(2), index, chunk_size=4, **options
        )

    before = ALGORITHM.server_init(GENERAL, HYPER, CAPACITY)
    for index in range(2):
        after, _, metrics = round_(before, index)
    rows = np.asarray(metrics.roles.rows)

    @jax.jit
    def client(row, batch):
        message = ALGORITHM.server_message(before, row)
        state = ALGORITHM.client_init(message, (), jax.random.key(0))  # the loss needs no key
        state, _ = ALGORITHM.client_step(state, batch)
        return message, ALGORITHM.client_final(message, state)[1]

    updates = []
    for row in rows:
        real = np.arange(DATA.labels.shape[1]) < DATA.size[row]
        batch = clients.Batch(DATA.inputs[row], DATA.labels[row], real.astype(np.float32))
        message, update = client(row, batch)
        updates.append(update)
        for name, mask in ALL_MASKS.items():
            change, made = np.asarray(update.change[name]), np.asarray(message.personal[name])
            outside = np.broadcast_to(np.asarray(mask)[row] == 0, change.shape)
            assert (change[outside] == 0).all() and (made[outside] == 0).all()
            assert np.abs(change[~outside]).max() > 0
    for name, leaf in after.general.items():
        expected = np.mean([np.asarray(u.general[name], np.float64) for u in updates], 0)
        np.testing.assert_allclose(leaf, expected, atol=1e-5)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *updates)
    gradient = jax.device_get(jax.jit(pull_back)(HYPER, stacked.change, np.ones(4), rows))
    size = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
    expected = jax.tree.map(lambda p, g: np.asarray(p) - 0.5 * g / max(size, 1), HYPER, gradient)
    assert_close = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(assert_close, after.hypernetwork, expected)
    np.testing.assert_array_equal(after.capacity, CAPACITY)


def test_a_loss_that_forgets_the_masks_sees_no_pruned_entry():
    """Every entry is drawn to 1; twice, since the first message is masked already."""
    layer = FactorisedLayer(4, 4, min_capacity=0.5)

    def drawn(factors, batch, key):
        del batch, key
        return 0.5 * ((factors.personal - 1) ** 2).sum(), {"total": factors.personal.sum()}

    algorithm = pa3dfl(
        drawn,
        optax.sgd(0.5),
        functools.partial(factorised.capacity_mask, layer),
        server_optimizer=optax.sgd(1.0),
    )
    network = hypernetwork.init(
        jax.random.key(0), jnp.zeros(layer.personal_shape), num_clients=1, hidden=(2,), spread=0.0
    )
    server = algorithm.server_init((), network, [0.5])

    @jax.jit
    def two_steps(server):
        message = algorithm.server_message(server, jnp.int32(0))
        state = algorithm.client_init(message, (), jax.random.key(0))
        state, _ = algorithm.client_step(state, ())
        state, metrics = algorithm.client_step(state, ())
        return algorithm.client_final(message, state)[1], metrics

    update, metrics = two_steps(server)
    # Rank 2, one of two places, two of four inputs: 4 entries of 0.5, then of 0.75.
    assert float(metrics["total"]) == 4 * 0.5
    assert float(update.change.sum()) == float(update.change[:, :1, :2].sum()) == 4 * 0.75


def test_what_travels_is_what_the_counter_counts():
    message = jax.jit(ALGORITHM.server_message)(
        ALGORITHM.server_init(GENERAL, HYPER, CAPACITY), jnp.int32(3)
    )
    for name, layer in LAYERS.items():
        kept = int((np.asarray(message.personal[name]) != 0).sum())
        assert kept + GENERAL[name].size == factorised.num_floats(layer, float(CAPACITY[3]))
    assert Pa3dflUpdate._fields == ("general", "change")


def test_errors():
    with pytest.raises(ValueError, match="hyper-network is of 10 clients"):
        ALGORITHM.server_init(GENERAL, HYPER, CAPACITY[:3])
    with pytest.raises(ValueError, match="theta_v has shape"):
        factorised.compose(GENERAL["head"], PERSONAL["hidden"], ALL_MASKS["head"][0], HEAD)
    for wrong, match in (
        ({"outputs": 0}, "outputs"),
        ({"min_capacity": 0.0}, "min_capacity"),
        ({"input_blocks": 3}, "whole groups"),
        ({"order": "random"}, "unknown order"),
    ):
        with pytest.raises(ValueError, match=match):
            FactorisedLayer(**{"outputs": 4, "inputs": 4, **wrong})
