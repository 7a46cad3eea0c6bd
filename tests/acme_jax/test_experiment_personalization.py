"""Personalisation: methods against plain loops, splits, bytes, and tables of a made-up document."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_models

from acme_jax import header_slots, label_prior, layout, messages
from acme_jax.config import RefineConfig
from acme_jax.experiments import (
    cohorts,
    held_out,
    personal_evidence,
    personal_fleet,
    personal_methods,
    personal_rivals,
    personalization,
)
from acme_jax.experiments.cohorts import Method
from acme_jax.experiments.personal_fleet import Cohort, listening
from acme_jax.experiments.personal_methods import NO_PRUNING, OURS, Variant
from acme_jax.experiments.personal_rivals import Models
from acme_jax.experiments.personal_rules import Rule, wrap
from acme_jax.experiments.settings import settings
from acme_jax.header_layout import HeaderDims
from acme_jax.idx import DataError
from acme_jax.splits import DevicePool
from fed.algorithms.fedavg import fedavg
from fed.clients import ClientData, batch_indices
from fed.simulate import run_rounds

DIMS = HeaderDims(2, 2, 6, 4, 3, 1, 2)
CELL = ((0, small_models.SEP1, 1, small_models.IDENTITY),)
PARAMS = small_models.make_header(DIMS, CELL)
CONFIG = RefineConfig(rounds=3, batch_size=4, learning_rate=0.1, num_quantiles=5)
GATES = header_slots.gate_positions(DIMS, CELL)
KEY = jax.random.key(4)
MESH = layout.make_mesh(None)
COUNT, PRUNED = 3, 2
SHARE = Rule(shares=True)


def make_data(equal=False):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(COUNT, 8, 4, 6)).astype(np.float32)
    labels = rng.integers(0, 3, size=(COUNT, 8)).astype(np.int32)
    if equal:
        inputs, labels = (np.stack([leaf[0]] * COUNT) for leaf in (inputs, labels))
    sizes = [8, 8, 8] if equal else [8, 5, 7]
    return ClientData(jnp.asarray(inputs), jnp.asarray(labels), jnp.asarray(sizes, jnp.int32))


def make_cohort(data):
    """As `personal_fleet.make_cohort`, without backbone and devices."""
    histograms = personal_fleet._histograms(data, DIMS.num_classes)
    compare = personal_fleet._compare(CONFIG.num_quantiles)
    found = compare(data.inputs.mean(axis=2), data.size, KEY)
    shares = histograms / histograms.sum(axis=1, keepdims=True)
    oracle = 0.5 * np.abs(shares[:, None] - shares[None]).sum(axis=-1)
    parts = held_out.Parts(data, data, data)
    distances = jax.tree.map(np.asarray, found) | {"oracle": oracle}
    return Cohort([None] * COUNT, parts, histograms, distances)


def refine(data, methods, rules=None):
    rules = tuple(rules or [Rule()] * len(methods))
    change = wrap(rules, COUNT, DIMS, CONFIG.rounds)
    return cohorts.refine(KEY, CONFIG, DIMS, CELL, PARAMS, data, methods, MESH, wrap=change)


def assert_equal_states(first, second):
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        # Two programs sum in other orders; three rounds at a rate of 0.1 let float32 errors grow.
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@jax.jit
def _gradients(params, mask, inputs, labels, weight):
    genes = small_models_genes()

    def loss(params, gates):
        logits = header_slots.apply(params, genes, DIMS, inputs, gates=gates, mask=mask)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (losses * weight).sum() / weight.sum()

    return jax.grad(loss, argnums=(0, 1))(params, jnp.ones_like(mask))


def small_models_genes():
    return cohorts.device_tier.init_device(PARAMS, CELL, DIMS, 0, CONFIG).cell


def plain_loop(data, weights, schedule, bias=None, shares=False):
    """One method as loops over rounds, devices and batches, in NumPy but for the gradients."""
    start = header_slots.to_slots(PARAMS, CELL, DIMS)
    params = [jax.tree.map(np.array, start) for _ in range(COUNT)]
    for device in range(COUNT):
        params[device]["classifier"]["bias"] += 0 if bias is None else bias[device]
    momentum = [jax.tree.map(np.zeros_like, start) for _ in range(COUNT)]
    mask = np.zeros((COUNT, header_slots.num_points(DIMS) * DIMS.channels), np.float32)
    mask[:, GATES] = 1
    smoothed = np.zeros_like(mask)
    for turn in range(CONFIG.rounds):
        sets = np.zeros_like(mask)
        for device in range(COUNT):
            size = int(data.size[device])
            key = jax.random.fold_in(jax.random.fold_in(KEY, turn), device)
            steps = -(-size // CONFIG.batch_size)
            order = batch_indices(
                jax.random.split(key)[1],
                size,
                max_size=8,
                num_steps=2,
                batch_size=CONFIG.batch_size,
                epochs=1,
            )
            for step in range(steps):
                rows = np.asarray(order.indices[step])
                grads, gate_grads = _gradients(
                    params[device],
                    mask[device],
                    data.inputs[device][rows],
                    data.labels[device][rows],
                    order.weight[step],
                )
                sets[device] += (mask[device] * np.asarray(gate_grads)) ** 2 / steps
                momentum[device] = jax.tree.map(
                    lambda m, g, p: CONFIG.momentum * m + np.asarray(g) + CONFIG.weight_decay * p,
                    momentum[device],
                    grads,
                    params[device],
                )
                params[device] = jax.tree.map(
                    lambda p, m: p - CONFIG.learning_rate * m, params[device], momentum[device]
                )
        mixed = weights @ sets
        if shares:
            own = [p["classifier"]["bias"] for p in params]
            params = [
                jax.tree.map(lambda *leaves, w=row: np.tensordot(w, np.stack(leaves), 1), *params)
                for row in weights
            ]
            for device in range(COUNT):
                params[device]["classifier"]["bias"] = own[device]
        for device in range(COUNT):
            smoothed[device] = mask[device] * (
                mixed[device]
                if turn == 0
                else CONFIG.smoothing * smoothed[device] + (1 - CONFIG.smoothing) * mixed[device]
            )
            open_gates = np.flatnonzero(mask[device])
            lowest = open_gates[
                np.argsort(smoothed[device][open_gates], kind="stable")[: schedule[turn]]
            ]
            mask[device][lowest] = 0
    return params, mask


@pytest.fixture(scope="module")
def trained():
    """Every kind of row at once, on devices of different data."""
    data = make_data()
    cohort = make_cohort(data)
    mixed = listening(cohort, "per_dimension", 0.3)
    bias = np.asarray(label_prior.log_prior(jnp.asarray(cohort.histograms), 0.5))
    eye = np.eye(COUNT, dtype=np.float32)
    methods = {
        "none": Method(eye, 0),
        "alone": Method(eye, PRUNED),
        "mixed": Method(mixed, PRUNED),
        "sharing": Method(mixed, PRUNED, bias),
        "random": Method(eye, PRUNED),
        "once": Method(mixed, PRUNED),
    }
    rules = (Rule(), Rule(), Rule(), SHARE, Rule(random=True), Rule(one_shot=True))
    return data, cohort, mixed, bias, refine(data, methods, rules)


@pytest.mark.parametrize("name", ["none", "alone", "mixed", "sharing", "once"])
def test_methods_equal_plain_loops_over_devices(trained, name):
    """`none` is plain SGD with momentum and decay; the others prune by importances as well."""
    data, _, mixed, bias, found = trained
    eye = np.eye(COUNT)
    weights = eye if name in ("none", "alone") else mixed
    prior = bias if name == "sharing" else None
    schedule = {"none": [0, 0, 0], "once": [3 * PRUNED, 0, 0]}.get(name, [PRUNED] * 3)
    params, mask = plain_loop(data, weights, schedule, prior, shares=name == "sharing")
    np.testing.assert_array_equal(found[name].mask, mask)
    for device in range(COUNT):
        own = jax.tree.map(lambda leaf, d=device: leaf[d], found[name].params)
        assert_equal_states(own, params[device])


def test_rules_prune_as_many_gates_but_others(trained):
    *_, found = trained
    gone = {name: np.asarray(state.mask)[:, GATES] == 0 for name, state in found.items()}
    for name in ("alone", "mixed", "sharing", "random", "once"):
        assert (gone[name].sum(axis=1) == PRUNED * CONFIG.rounds).all()
    assert (gone["random"] != gone["alone"]).any()
    assert (found["once"].prune_per_round == PRUNED).all()


def test_without_rules_the_cohort_is_unchanged(trained):
    data, *_, found = trained
    plain = cohorts.refine(
        KEY, CONFIG, DIMS, CELL, PARAMS, data, {"alone": Method(np.eye(COUNT), PRUNED)}, MESH
    )
    assert_equal_states(plain["alone"], found["alone"])


def test_equal_data_make_wasserstein_the_average():
    data = make_data(equal=True)
    cohort = make_cohort(data)
    for form in personal_fleet.FORMS:
        np.testing.assert_allclose(listening(cohort, form, 0.05), 1 / COUNT, rtol=1e-6)
    np.testing.assert_allclose(listening(cohort, "avg", None), 1 / COUNT, rtol=1e-6)


def test_listening_sources(trained):
    _, cohort, *_ = trained
    np.testing.assert_array_equal(listening(cohort, "alone", None), np.eye(COUNT))
    np.testing.assert_allclose(
        listening(cohort, "avg", None), np.tile([8 / 20, 5 / 20, 7 / 20], (COUNT, 1)), rtol=1e-6
    )
    # At a temperature near 0 devices with different data hear themselves alone.
    np.testing.assert_allclose(listening(cohort, "sliced", 1e-4), np.eye(COUNT), atol=1e-6)
    farthest = listening(cohort, "farthest", None)
    assert (farthest.argmax(axis=1) == cohort.distances["oracle"].argmax(axis=1)).all()
    assert (farthest.sum(axis=1) == 1).all() and (np.diag(farthest) == 0).all()
    for source, tau in (("nearest", 0.1), ("flat", None)):
        with pytest.raises(ValueError, match="unknown source"):
            listening(cohort, source, tau)


def test_accuracies_are_the_same_on_a_mesh(trained):
    data, *_, found = trained
    whole = np.asarray(cohorts.evaluator(found, DIMS)(data))
    odd = dict(list(found.items())[:5])
    np.testing.assert_array_equal(np.asarray(cohorts.evaluator(odd, DIMS, MESH)(data)), whole[:5])


def fake_study(pool=None, config=None):
    encoder = types.SimpleNamespace(num_classes=10)
    base = settings("tiny") if config is None else config
    context = types.SimpleNamespace(
        splits=types.SimpleNamespace(device_pool=pool),
        encoder=encoder,
        full_bytes=10**6,
        header_dims=DIMS,
        mesh=MESH,
        config=base,
    )
    return types.SimpleNamespace(
        context=context, config=base, key=lambda name, index=0: jax.random.fold_in(KEY, index)
    )


def test_fedavg_rows_are_fedavg(trained):
    data, cohort, *_ = trained
    study = fake_study(config=dataclasses.replace(settings("tiny"), refine=CONFIG))
    found = personal_rivals.averaged(study, Models(None, CELL, PARAMS), cohort)
    genes = small_models_genes()

    def loss_fn(params, batch, key):
        logits = header_slots.apply(params, genes, DIMS, batch.inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return (losses * batch.weight).sum() / batch.weight.sum(), {}

    algorithm = fedavg(loss_fn, cohorts.device_tier.optimizer(CONFIG))
    start = jax.tree.map(jnp.asarray, header_slots.to_slots(PARAMS, CELL, DIMS))
    run = jax.jit(
        lambda start: run_rounds(
            algorithm,
            start,
            (),
            data,
            study.key(""),
            num_rounds=CONFIG.rounds,
            epochs=1,
            batch_size=CONFIG.batch_size,
            client_ids=jnp.arange(COUNT, dtype=jnp.int32),
        )[0]
    )
    expected = run(start)
    for device in range(COUNT):
        own = jax.tree.map(lambda leaf, d=device: leaf[d], found["fedavg"].states.params)
        assert_equal_states(own, expected)
    each = len(messages.encode(messages.HeaderMessage(CELL, jax.tree.map(np.asarray, PARAMS))))
    assert found["fedavg"].uplink_bytes == 3 * each
    assert found["fedavg_tuned"].uplink_bytes == 1 * each


def make_pool():
    labels = np.repeat(np.arange(10), 60).astype(np.int32)
    inputs = np.arange(600, dtype=np.float32)[:, None]
    return DevicePool(inputs, labels, np.arange(600))


def test_samples_set_aside_are_neither_trained_on_nor_test_samples():
    fleet = personal_fleet.draw_fleet(fake_study(make_pool()), "c3", 5)
    shorter = [personal_fleet.fewer(device, 10, 0) for device in fleet]
    for devices in (fleet, shorter):
        parts = held_out.divide([d.train.inputs for d in devices], devices, 0)
        for row, device in enumerate(devices):
            fit, check = (
                set(np.asarray(p.inputs)[row, : int(p.size[row]), 0].tolist())
                for p in (parts.fit, parts.check)
            )
            test = set(device.test.inputs[:, 0].tolist())
            assert fit and check and not (fit & check or (fit | check) & test)
            assert fit | check == set(device.train.inputs[:, 0].tolist())
    for whole, few in zip(fleet, shorter, strict=True):
        assert len(few.train) == 10 and few.test is whole.test
        assert set(few.train.indices) < set(whole.train.indices)
        np.testing.assert_array_equal(few.train.inputs[:, 0] // 60, few.train.labels)


def test_a_device_with_one_class_is_drawn_again(monkeypatch):
    seeds = []

    def make_fleet(pool, config, *, num_classes, full_bytes):
        seeds.append((config.seed, config.fleet.dirichlet_alpha))
        if len(seeds) < 3:
            raise DataError("device 1 has samples of one class only")
        return ["fleet"]

    monkeypatch.setattr(personal_fleet, "make_fleet", make_fleet)
    assert personal_fleet.draw_fleet(fake_study(), "dirichlet_0.1", 4) == ["fleet"]
    assert seeds == [(0, 0.1), (1000, 0.1), (2000, 0.1)]
    monkeypatch.setattr(personal_fleet, "ATTEMPTS", 1)
    seeds.clear()
    with pytest.raises(DataError, match="one class"):
        personal_fleet.draw_fleet(fake_study(), "dirichlet_0.1", 4)


def test_uplink_is_what_is_encoded():
    def size(message):
        return len(messages.encode(message))

    each = size(messages.ImportanceSet(np.zeros(GATES.size, np.float32)))
    sketch = size(messages.FeatureSketch(np.zeros((5, 6), np.float16)))
    header = size(messages.HeaderMessage(CELL, jax.tree.map(np.asarray, PARAMS)))

    def uplink(variant):
        return personal_methods.uplink_bytes(variant, CONFIG, DIMS, CELL, PARAMS)

    assert uplink(NO_PRUNING) == uplink(personal_methods.ALONE) == 0
    assert uplink(personal_methods.PRIOR) == 0
    assert uplink(personal_methods.AVG) == 3 * each
    assert uplink(OURS) == sketch + 3 * each
    assert uplink(personal_methods.EXTENDED) == sketch + 3 * header
    assert uplink(personal_methods.RESTRICTED) == 3 * header
    assert uplink(Variant("both", "js", 0.1, 0.3, SHARE)) == sketch + 3 * (each + header)


def test_plans_have_distinct_names_and_the_asked_gates(trained):
    _, cohort, *_ = trained
    for unit in personalization._UNITS.values():
        names = [variant.name for variant in unit.variants]
        assert len(set(names)) == len(names) and NO_PRUNING.name in names
    plan = personal_methods.plan(personal_methods.MAIN, cohort, CONFIG, DIMS, CELL)
    number = int(personal_methods.PART * GATES.size / CONFIG.rounds)
    assert number > 0
    assert plan.methods[OURS.name].prune_per_round == number
    assert plan.methods[NO_PRUNING.name].prune_per_round == 0
    assert plan.methods[OURS.name].bias is None
    assert plan.methods[personal_methods.PRIOR.name].bias is not None


def test_choices_read_the_samples_set_aside():
    rows = [
        {"method": "no_pruning", "select_accuracy": 0.9},
        {"method": "flat", "select_accuracy": 0.7},
        {"method": "wasserstein", "select_accuracy": 0.8},
        {"method": "sharing_prior", "select_accuracy": 0.85},
    ]
    assert personalization._choose(rows) == {"chosen_paper": 2, "chosen_extended": 3}
    assert personalization._choose(rows[:1]) == {}


def test_worst_tenth():
    assert personalization.worst_tenth(np.array([0.5, 0.2, 0.9])) == pytest.approx(0.2)
    assert personalization.worst_tenth(np.arange(20) / 20) == pytest.approx(0.025)


def test_evidence_tells_similar_from_unlike_devices(trained):
    _, cohort, *_ = trained
    size = header_slots.num_points(DIMS) * DIMS.channels
    rng = np.random.default_rng(1)
    base = rng.random(size).astype(np.float32)
    importance = np.stack([base, 2 * base, -base])
    pruned = np.ones((COUNT, size), np.float32)
    pruned[:2, GATES[:4]] = 0
    pruned[2, GATES[4:8]] = 0

    def states(mask):
        return types.SimpleNamespace(smoothed=importance, mask=mask)

    apart = np.array([[0.0, 0.1, 0.9], [0.1, 0.0, 0.8], [0.9, 0.8, 0.0]])
    cohort = cohort._replace(distances={**cohort.distances, "oracle": apart})
    found = personal_evidence.measure(
        {
            NO_PRUNING.name: states(np.ones_like(pruned)),
            personal_methods.ALONE.name: states(pruned),
            personal_methods.AVG.name: states(pruned[::-1]),
            OURS.name: states(pruned),
        },
        cohort,
        DIMS,
        CELL,
    )
    assert found["rank_correlation_similar"] == pytest.approx(1)
    assert found["rank_correlation_unlike"] == pytest.approx(-1)
    assert found["same_pruned_similar"] == 1 and found["same_pruned_unlike"] == 0
    assert found["same_pruned_by_chance"] == pytest.approx(4 / GATES.size)
    assert found["same_pruned_alone_and_ours"] == 1
    assert found["same_pruned_avg_and_ours"] == pytest.approx(1 / 3)
    none = personal_evidence.measure(
        {v.name: states(pruned) for v in (NO_PRUNING, OURS, *personal_methods.FEW)},
        cohort._replace(distances={**cohort.distances, "oracle": np.zeros((COUNT, COUNT))}),
        DIMS,
        CELL,
    )
    assert none["rank_correlation_unlike"] is None
