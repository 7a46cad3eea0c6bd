"""FedVTC: rounds, samples of absent classes, headers of any structure, shared generators."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from class_statistics_reference import reference

from fed import buckets, class_statistics, clients, latent_generator, simulate
from fed.algorithms import fedvtc_step
from fed.algorithms.fedvtc import (
    Model,
    VtcConfig,
    feature_model,
    fedvtc,
    start_clients,
    start_generator,
)
from fed.participation import Participation

NUM_CLASSES, NUM_FEATURES = 5, 8


def test_synthetic_labels_are_even():
    keys = jax.random.split(jax.random.key(0), 400)
    for number in (20, 2):
        labels = jax.jit(
            jax.vmap(lambda key, n=number: fedvtc_step.synthetic_labels(key, n, NUM_CLASSES))
        )(keys)
        counts = np.asarray([np.bincount(row, minlength=NUM_CLASSES) for row in labels])
        if number == 20:
            assert (counts == 4).all()
        else:
            assert (counts.max(1) == 1).all() and counts.sum(0).min() > 100


# Rounds: clients with two of five classes each, features of a frozen backbone, headers of two
# structures.

SIZES = (24, 27, 30, 33, 36, 39)
NUM_CLIENTS = len(SIZES)
IDS = jnp.arange(NUM_CLIENTS) + 10
MEANS = np.random.default_rng(0).normal(size=(NUM_CLASSES, NUM_FEATURES)) * 1.2


def draw(labels, rng):
    noise = np.tanh(2 * rng.normal(size=(len(labels), NUM_FEATURES)))
    return (MEANS[labels] + 0.6 * noise).astype(np.float32)


def make_client(row):
    rng = np.random.default_rng(row + 1)
    labels = (row + rng.integers(0, 2, SIZES[row])) % NUM_CLASSES
    return draw(labels, rng), labels


PAIRS = [make_client(row) for row in range(NUM_CLIENTS)]
DATA = clients.stack_clients(PAIRS)
TEST_LABELS = np.arange(500) % NUM_CLASSES
TEST_FEATURES = draw(TEST_LABELS, np.random.default_rng(99))


def linear(params, features):
    return features @ params["linear"]["w"] + params["linear"]["b"][None]


def perceptron(params, features):
    return jax.nn.relu(features @ params["perceptron"]["w1"]) @ params["perceptron"]["w2"]


HEADERS = {"linear": linear, "perceptron": perceptron}
STRUCTURES = [("linear", "perceptron")[row % 2] for row in range(NUM_CLIENTS)]
W1, W2 = (
    0.4 * jax.random.normal(jax.random.key(i), shape)
    for i, shape in enumerate([(NUM_FEATURES, 16), (16, NUM_CLASSES)])
)
PARAMS = {
    "linear": {"w": jnp.zeros((NUM_FEATURES, NUM_CLASSES)), "b": jnp.zeros(NUM_CLASSES)},
    "perceptron": {"w1": W1, "w2": W2},
}
STACKED = clients.replicate(PARAMS, NUM_CLIENTS)
CONFIG = VtcConfig(num_classes=NUM_CLASSES, num_features=NUM_FEATURES, num_synthetic=20)
GENERATOR = latent_generator.dense_generator(NUM_FEATURES, hidden=16)
NUM_ROUNDS = 15
SCHEDULE = {"client_ids": IDS, "batch_size": 12, "epochs": 3}


def algorithm_of(structure, config=CONFIG, generator=GENERATOR):
    return fedvtc(
        feature_model(HEADERS[structure]),
        optax.adam(1e-2),
        config,
        generator=generator,
        generator_optimizer=None if generator is None else optax.adam(3e-3),
    )


def accuracies(params):
    """[C] of every client's own header on all classes."""
    scores = []
    for row, structure in enumerate(STRUCTURES):
        logits = HEADERS[structure](clients.take_row(params, row), TEST_FEATURES)
        scores.append(float((logits.argmax(1) == TEST_LABELS).mean()))
    return np.asarray(scores)


def knowing(server, kind):
    """The server's state when all clients' samples are known, in round 1."""
    inputs, labels = (np.concatenate(arrays) for arrays in zip(*PAIRS, strict=True))
    statistics = reference(inputs, labels, kind, NUM_CLASSES)
    known = class_statistics.ClassStatistics(*(jnp.asarray(x, jnp.float32) for x in statistics))
    return server._replace(statistics=known, round=jnp.int32(1))


def one_step(algorithm):
    """(message, client state, key, batch) -> (step state before, after, metrics)."""

    @jax.jit
    def step(message, client, key, batch):
        before = algorithm.client_init(message, client, key)
        return before, *algorithm.client_step(before, batch)

    return step


def padded_batch(row):
    """All samples of a client and fillers."""
    real = np.arange(DATA.labels.shape[1]) < SIZES[row]
    return clients.Batch(DATA.inputs[row], DATA.labels[row], real.astype(np.float32))


def test_headers_of_any_structure_learn_classes_that_their_clients_lack():
    """Six clients with two classes each; alone they know two fifths of the classes."""
    start = start_clients(jax.random.key(5), STACKED, NUM_CLIENTS, CONFIG, GENERATOR)
    algorithm = algorithm_of("linear")
    run = jax.jit(
        functools.partial(
            simulate.run_rounds,
            algorithm,
            num_rounds=NUM_ROUNDS,
            buckets=buckets.make_buckets(STRUCTURES, algorithm_of),
            **SCHEDULE,
        )
    )
    nothing = algorithm.server_init()
    server, states, metrics = run(nothing, start, DATA, jax.random.key(1))
    # If synthetic samples never begin, what is left is training alone on the same schedule.
    never = nothing._replace(round=jnp.int32(-NUM_ROUNDS))
    _, alone, alone_metrics = run(never, start, DATA, jax.random.key(1))
    assert (alone_metrics.client["synthetic_loss"] == 0).all()
    ours = accuracies(states.params)
    assert ours.min() > 0.9 and accuracies(alone.params).max() < 0.45, ours

    # All clients took part, with whole epochs: the server knows the central statistics.
    together = [np.concatenate(arrays) for arrays in zip(*PAIRS, strict=True)]
    for found, expected in zip(
        server.statistics, reference(*together, "shared", NUM_CLASSES), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(
        states.size > 0, [np.bincount(labels, minlength=NUM_CLASSES) > 0 for _, labels in PAIRS]
    )
    assert metrics.server["known_classes"].tolist() == [NUM_CLASSES] * NUM_ROUNDS
    client = metrics.client
    assert (client["synthetic_loss"][0] == 0).all() and (client["synthetic_loss"][1] > 0.1).all()
    assert (client["reconstruction"][-1] < 0.8 * client["reconstruction"][1]).all()
    # The bound prefers a posterior that is narrower than the prior.
    assert (states.generator.log_ratio.mean(1) < -0.02).all()


def test_a_sampled_round_equals_its_clients_one_by_one_and_sends_statistics_only():
    """Two of six clients with one full batch each: absent classes only, one trace."""
    config = VtcConfig(
        num_classes=NUM_CLASSES,
        num_features=NUM_FEATURES,
        num_synthetic=10,
        synthetic_classes="absent",
        variance="diagonal",
    )
    algorithm = algorithm_of("linear", config, None)
    states = start_clients(jax.random.key(5), STACKED, NUM_CLIENTS, config, None)
    options = {
        "client_ids": IDS,
        "batch_size": max(SIZES),
        "epochs": 1,
        "participation": Participation(num_sampled=2),
        "chunk_size": 2,
    }

    @jax.jit
    @chex.assert_max_traces(n=1)
    def round_(server, states, index):
        return simulate.run_round(
            algorithm, server, states, DATA, jax.random.key(2), index, **options
        )

    @jax.jit
    def client(server, state, client_id, batch):
        own_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), 1), client_id)
        step_state = algorithm.client_init(server, state, jax.random.split(own_key)[0])
        step_state, metrics = algorithm.client_step(step_state, batch)
        return *algorithm.client_final(server, step_state), metrics

    server = knowing(algorithm.server_init(), "diagonal")
    for index in range(2):
        before = server, states
        server, states, metrics = round_(*before, index)
    rows = np.asarray(metrics.roles.rows)
    results = [
        client(before[0], clients.take_row(before[1], row), IDS[row], padded_batch(row))
        for row in rows
    ]
    state, update, client_metrics = jax.tree.map(lambda *leaves: np.stack(leaves), *results)
    expected, _ = algorithm.server_update(before[0], update, DATA.size[rows] * 1.0, rows)
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(assert_close, server, expected)
    jax.tree.map(assert_close, metrics.client, client_metrics)
    jax.tree.map(lambda all_, own: assert_close(np.asarray(all_)[rows], own), states, state)
    others = np.setdiff1d(np.arange(NUM_CLIENTS), rows)
    for new, old in zip(jax.tree.leaves(states), jax.tree.leaves(before[1]), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[others], np.asarray(old)[others])
    floats = sum(leaf[0].size for leaf in jax.tree.leaves(update))
    assert floats == class_statistics.num_floats(NUM_CLASSES, NUM_FEATURES, "diagonal")
    # A class that nobody of this round has keeps what was known of it.
    missing = np.flatnonzero(update.statistics.size.sum(0) == 0)
    assert missing.size > 0
    kept, known = (np.asarray(state.statistics.mean) for state in (server, before[0]))
    np.testing.assert_array_equal(kept[missing], known[missing])
    assert (np.abs(kept).sum(1) > 0).all() and (server.statistics.size > 0).all()


@pytest.mark.parametrize("which", ["all", "absent"])
def test_a_step_on_statistics_equals_numpy(which):
    """Without a generator the samples are draws of the shared Gaussians; one SGD step."""
    config = VtcConfig(
        num_classes=NUM_CLASSES,
        num_features=NUM_FEATURES,
        num_synthetic=10,
        synthetic_classes=which,
        synthetic_weight=0.5,
    )
    algorithm = fedvtc(feature_model(linear), optax.sgd(1.0), config)
    server = knowing(algorithm.server_init(), "shared")
    client = clients.take_row(start_clients(None, STACKED, NUM_CLIENTS, config, None), 0)
    inputs, labels = PAIRS[0]
    state, after, metrics = one_step(algorithm)(server, client, jax.random.key(7), padded_batch(0))

    _, key, _ = jax.random.split(state.key, 3)
    label_key, draw_key = jax.random.split(key)
    made = np.asarray(fedvtc_step.synthetic_labels(label_key, 10, NUM_CLASSES))
    noise = np.asarray(jax.random.normal(draw_key, (10, NUM_FEATURES)), np.float64)
    _, mean, variance = reference(
        *[np.concatenate(arrays) for arrays in zip(*PAIRS, strict=True)], "shared", NUM_CLASSES
    )
    samples = mean[made] + np.sqrt(np.maximum(variance, config.variance_floor)) * noise
    used = np.ones(10) if which == "all" else (~np.isin(made, labels)).astype(float)
    assert used.sum() == (10 if which == "all" else 6)
    # At zero weights all classes have probability 1 / Y.
    pull = np.zeros((NUM_FEATURES, NUM_CLASSES))
    for x, y, weight in [
        *((x, y, 1 / len(labels)) for x, y in zip(inputs, labels, strict=True)),
        *((x, y, 0.5 * u / used.sum()) for x, y, u in zip(samples, made, used, strict=True)),
    ]:
        pull += weight * np.outer(x, np.eye(NUM_CLASSES)[y] - 1 / NUM_CLASSES)
    np.testing.assert_allclose(after.params["linear"]["w"], pull, atol=1e-4)
    np.testing.assert_allclose(metrics["synthetic_loss"], np.log(NUM_CLASSES), rtol=1e-5)


def test_prototype_term_draws_features_to_the_shared_means_as_it_warms_up():
    """A model whose extractor has parameters: a shift of the features, from 0."""
    config = VtcConfig(
        num_classes=2, num_features=3, num_synthetic=2, prototype_weight=0.1, warmup_rounds=10
    )
    model = Model(
        lambda params, inputs: inputs + params[None], lambda params, features: features[:, :2] * 0
    )
    algorithm = fedvtc(model, optax.sgd(1.0), config)
    features = np.random.default_rng(0).normal(size=(4, 3))
    labels = np.asarray([0, 1, 1, 1])
    mean = np.arange(6.0).reshape(2, 3)
    variance = np.asarray([0.5, 1.0, 2.0])
    shared = algorithm.server_init()._replace(
        statistics=class_statistics.ClassStatistics(
            jnp.asarray([3.0, 0.0]), jnp.asarray(mean), jnp.asarray(variance)
        )
    )
    batch = clients.Batch(jnp.asarray(features), jnp.asarray(labels), jnp.ones(4))
    client = clients.take_row(start_clients(None, jnp.zeros((1, 3)), 1, config, None), 0)
    step = one_step(algorithm)
    for round_index, ramp in ((0, 0.0), (5, 0.5), (20, 1.0)):
        message = shared._replace(round=jnp.int32(round_index))
        _, after, _ = step(message, client, jax.random.key(0), batch)
        # Class 1 is not known, so only the first sample is drawn.
        expected = -0.1 * ramp * (features[0] - mean[0]) / variance
        np.testing.assert_allclose(after.params, expected, atol=1e-5)


def test_shared_generators_wait_until_something_is_known_then_travel_and_are_averaged():
    config = VtcConfig(
        num_classes=NUM_CLASSES, num_features=NUM_FEATURES, share_generator=True, num_synthetic=10
    )
    algorithm = algorithm_of("linear", config)
    shared = start_generator(jax.random.key(3), GENERATOR, config)
    server = algorithm.server_init(shared)
    states = start_clients(jax.random.key(5), STACKED, NUM_CLIENTS, config, GENERATOR)
    step = one_step(algorithm)
    arguments = (clients.take_row(states, 0), jax.random.key(7), padded_batch(0))

    before, after, metrics = step(server, *arguments)
    jax.tree.map(np.testing.assert_array_equal, after.generator, before.generator)
    assert all(float(metrics[name]) == 0 for name in ("reconstruction", "kl", "matching"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after.params))

    _, after, _ = step(knowing(server, "shared"), *arguments)
    kept, update = algorithm.client_final(server, after)
    assert kept.generator == ()
    moved = update.generator.log_ratio - shared.log_ratio
    np.testing.assert_allclose(np.abs(moved), 3e-3, rtol=1e-2)  # Adam's first step
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), update, update._replace(generator=shared))
    update_server = jax.jit(algorithm.server_update)
    new, _ = update_server(server, both, jnp.asarray([3.0, 1.0]), jnp.arange(2))
    np.testing.assert_allclose(new.generator.log_ratio, 0.75 * moved, rtol=1e-4)


def test_errors():
    with pytest.raises(ValueError, match="together"):
        fedvtc(feature_model(linear), optax.sgd(0.1), CONFIG, generator=GENERATOR)
    shared = VtcConfig(num_classes=2, num_features=3, share_generator=True)
    with pytest.raises(ValueError, match="no generator"):
        fedvtc(feature_model(linear), optax.sgd(0.1), shared)
    with pytest.raises(ValueError, match="start_generator"):
        algorithm_of("linear", shared).server_init()
    with pytest.raises(ValueError, match="num_synthetic"):
        VtcConfig(num_classes=2, num_features=3, num_synthetic=0)
    with pytest.raises(ValueError, match="variance_floor"):
        VtcConfig(num_classes=2, num_features=3, variance_floor=0.0)
    with pytest.raises(ValueError, match="synthetic_classes"):
        VtcConfig(num_classes=2, num_features=3, synthetic_classes="some")
