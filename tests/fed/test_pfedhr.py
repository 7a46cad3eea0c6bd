"""pFedHR: the server's step in parts, the clients' loss, one round, who is not heard."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_chain import CHAIN, MODELS, NUM_INPUTS, PUBLIC, dense

from fed import chain as chains
from fed import clients, reassembly, simulate
from fed.algorithms import pfedhr_server
from fed.algorithms.pfedhr import kl_divergence, pfedhr
from fed.algorithms.pfedhr_server import PfedhrConfig
from fed.participation import Participation

LABELS = jnp.asarray(PUBLIC[:, :2].sum(axis=1) > 0, jnp.int32)
SAMPLES = clients.Batch(PUBLIC, LABELS, jnp.ones(40))
CONFIG = PfedhrConfig(kl_weight=0.5, num_candidates=6, tune_rate=1e-2)
KEY = jax.random.key(0)


def make_data(seed=0):
    rng = np.random.default_rng(seed)
    inputs = [rng.normal(size=(n, NUM_INPUTS)).astype(np.float32) for n in (9, 14, 6)]
    return clients.stack_clients([(x, x[:, :2].sum(axis=1) > 0) for x in inputs])


ALGORITHM = pfedhr(CHAIN, optax.sgd(0.05), CONFIG, KEY)
SERVER = ALGORITHM.server_init(MODELS, PUBLIC, LABELS)
make_with = jax.jit(
    lambda key, chain, models, config=CONFIG: pfedhr_server.make_candidates(
        key, chain, models, SAMPLES, config
    ),
    static_argnums=(1, 3),
)


@functools.cache
def made(tuned):
    return make_with(KEY, CHAIN, MODELS, dataclasses.replace(CONFIG, tuned=tuned))


def row_of(tree, row):
    return jax.tree.map(lambda leaf: leaf[row], tree)


def test_kl_divergence_is_that_of_the_definition_and_0_for_equal_models():
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(2, 6, 4)) * 3
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (student, teacher))
    found = kl_divergence(jnp.asarray(student), jnp.asarray(teacher))
    np.testing.assert_allclose(found, (p * np.log(p / q)).sum(1), rtol=1e-4, atol=1e-6)
    same = jnp.asarray(student, jnp.float32)
    np.testing.assert_allclose(kl_divergence(same, same + 7), 0, atol=1e-6)  # logits are relative
    gradient = jax.grad(lambda x: kl_divergence(x, same).sum())(same)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_drawn_owners_keep_the_rules():
    """With three layers every candidate has one of each; groups are those of the definition."""
    passed = jax.vmap(lambda layers: chains.activations(CHAIN, layers, PUBLIC))(MODELS)
    units = reassembly.units_of([CHAIN.operations] * 3)
    arrays = [
        reassembly.pad_columns([part[u % 3][u // 3] for u in range(9)])
        for part in (passed[:-1], passed[1:])
    ]
    groups = reassembly.group(reassembly.unit_distances(*arrays), 2)
    seen = 0
    for seed in range(3):
        owners, found = pfedhr_server.choose_owners(jax.random.key(seed), CHAIN, passed, 4)
        for row in np.asarray(owners)[np.asarray(found)]:
            members = jnp.asarray(row) * 3 + jnp.arange(3)
            kept = reassembly.rules(units, members, groups, 2)
            assert all(bool(rule) for rule in kept)
            seen += 1
    assert seen > 3


@pytest.mark.parametrize("tuned", ["stitches", "all"])
def test_fine_tuning_lowers_the_loss_and_leaves_what_is_not_there(tuned):
    candidates, found, _ = made(tuned)
    assert found.any()
    before = jax.vmap(
        lambda owners: chains.assemble(
            CHAIN,
            MODELS,
            owners,
            jax.vmap(lambda layers: chains.activations(CHAIN, layers, PUBLIC))(MODELS)[:-1],
        )
    )(candidates.owners)

    def losses(candidates):
        logits = jax.vmap(lambda each: chains.logits(CHAIN, each, PUBLIC))(candidates)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.broadcast_to(LABELS, logits.shape[:2])
        ).mean(axis=1)

    moved = np.asarray(candidates.bridged.any(axis=1)) | (tuned == "all")
    first, after = (np.asarray(losses(each)) for each in (before, candidates))
    assert moved.any() and np.all(after[moved] < first[moved])
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(candidates), strict=True):
        assert not np.any(np.asarray(new)[np.asarray(old) == 0])
    equal = [
        np.array_equal(*pair)
        for pair in zip(
            jax.tree.leaves(before.layers), jax.tree.leaves(candidates.layers), strict=True
        )
    ]
    assert all(equal) if tuned == "stitches" else not any(equal)


def test_clients_get_the_candidate_whose_logits_are_most_like_theirs():
    candidates, found, choice = made("stitches")
    logits = [
        np.asarray(chains.logits(CHAIN, row_of(candidates, g), PUBLIC), np.float64)
        for g in range(6)
    ]
    for client in range(3):
        own = np.asarray(chains.activations(CHAIN, row_of(MODELS, client), PUBLIC)[-1], np.float64)
        unit = own / np.linalg.norm(own, axis=1, keepdims=True)
        alike = [
            np.mean([u @ o / np.linalg.norm(o) for u, o in zip(unit, other, strict=True)])
            for other in logits
        ]
        alike = np.where(found, alike, -2)
        assert choice[client] == int(np.argmax(alike))
        everything = pfedhr_server.logit_similarity(
            jnp.asarray(own[None], jnp.float32), jnp.asarray(logits, jnp.float32)
        )
        np.testing.assert_allclose(everything[0][found], alike[np.asarray(found)], atol=1e-5)


def client_update(algorithm, message, batch, layers, steps=1):
    state = algorithm.client_init(message, layers, jax.random.key(4))
    for _ in range(steps):
        state, metrics = algorithm.client_step(state, batch)
    return algorithm.client_final(message, state)[1], metrics


def test_a_client_learns_from_its_labels_and_its_teacher():
    candidates, _, choice = made("stitches")
    server = SERVER._replace(candidates=candidates, choice=choice)
    message, layers = ALGORITHM.server_message(server, 1), row_of(MODELS, 1)
    batch = clients.Batch(PUBLIC[:8], LABELS[:8], jnp.asarray([1.0] * 6 + [0.0] * 2))
    update, metrics = jax.jit(functools.partial(client_update, ALGORITHM))(message, batch, layers)
    teacher = chains.logits(CHAIN, row_of(candidates, choice[1]), PUBLIC[:6])

    def loss(layers):
        own = chains.activations(CHAIN, layers, PUBLIC[:6])[-1]
        log_own, log_teacher = jax.nn.log_softmax(own), jax.nn.log_softmax(teacher)
        divergence = (jnp.exp(log_own) * (log_own - log_teacher)).sum(axis=1).mean()
        losses = -jnp.take_along_axis(log_own, LABELS[:6, None], axis=1)
        return losses.mean() + 0.5 * divergence

    expected = jax.tree.map(lambda p, g: p - 0.05 * g, layers, jax.grad(loss)(layers))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), update, expected)
    assert metrics["divergence"] > 0


def test_without_candidates_a_client_is_its_own_teacher():
    message, layers = ALGORITHM.server_message(SERVER, 2), row_of(MODELS, 2)
    assert not message.found
    batch = clients.Batch(PUBLIC[:8], LABELS[:8], jnp.ones(8))
    run = jax.jit(client_update, static_argnums=(0, 4))
    _, metrics = run(ALGORITHM, message, batch, layers, 1)
    assert metrics["divergence"] == pytest.approx(0, abs=1e-7)
    alone = pfedhr(CHAIN, optax.sgd(0.05), PfedhrConfig(kl_weight=0.0, num_candidates=6), KEY)
    first, second = (run(a, message, batch, layers, 1)[0] for a in (ALGORITHM, alone))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), first, second)


def test_units_that_are_all_equal_leave_no_candidates():
    layer = {"kernel": jnp.stack([jnp.eye(NUM_INPUTS)] * 3), "bias": jnp.zeros((3, NUM_INPUTS))}
    chain = chains.Chain(
        (dense,) * 3, (0, 0, 1), np.full((3, 2), NUM_INPUTS), np.full((3, 3), layer["bias"].size)
    )
    _, found, choice = make_with(KEY, chain, (layer,) * 3)
    assert not found.any() and choice.tolist() == [-1] * 3


def test_rounds_with_sampled_clients_are_one_program_and_count_their_floats():
    part = Participation(num_sampled=2)
    data = make_data()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def rounds(server, models, first):
        return simulate.run_rounds(
            ALGORITHM,
            server,
            models,
            data,
            jax.random.key(5),
            num_rounds=1,
            first_round=first,
            client_ids=jnp.arange(3),
            batch_size=4,
            epochs=1,
            participation=part,
        )

    server, models = SERVER, MODELS
    for index in range(3):
        before = server
        server, models, metrics = rounds(server, models, jnp.int32(index))
        chex.assert_trees_all_equal_shapes_and_dtypes(server, before)
        rows = np.asarray(metrics.roles.rows)[0]
        for row, floats in zip(rows, np.asarray(metrics.server["down_floats"])[0], strict=True):
            message = ALGORITHM.server_message(before, int(row))
            size = chains.num_floats(CHAIN, message.candidate) if message.found else 0
            assert floats == size and (index == 0) == (size == 0)
        # What the server holds are the models as they were last sent.
        for held, own, old in zip(
            *(jax.tree.leaves(t) for t in (server.received, models, before.received)), strict=True
        ):
            heard = np.isin(np.arange(3), rows)
            np.testing.assert_array_equal(np.asarray(held)[heard], np.asarray(own)[heard])
            np.testing.assert_array_equal(np.asarray(held)[~heard], np.asarray(old)[~heard])
    assert int(server.round) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_candidates": 0}, "num_candidates must be at least 1, got 0"),
        ({"kl_weight": -1.0}, "kl_weight must not be negative"),
        ({"tuned": "layers"}, "unknown tuned 'layers'; expected 'stitches' or 'all'"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        PfedhrConfig(**changes)
