"""The whole system's rivals against plain training, its costs against counted bytes, its claims."""

import contextlib
import dataclasses
import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from acme_jax import encoders, header, layout, messages, slicing, subnet_clients, supernet, training
from acme_jax.config import RefineConfig, TrainConfig
from acme_jax.experiments import (
    device_costs,
    held_out,
    rival_headers,
    rival_networks,
    rival_plans,
    system_edges,
    whole_system,
)
from acme_jax.experiments.device_costs import HeaderModel, Link
from acme_jax.experiments.study import GridPoint
from acme_jax.fleet import REFERENCE_PROFILE
from acme_jax.header_layout import HeaderDims
from acme_jax.vit import ViTConfig
from fed import simulate
from fed.algorithms.fedavg import fedavg
from fed.algorithms.heterofl import heterofl
from fed.algorithms.local import local
from fed.clients import replicate, stack_clients, take_row
from nas.arch import ArchSpace, full, to_mask, uniform
from nas.cells import OPS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import results_whole_system as results

ENCODER = ViTConfig((8, 8, 1), 4, 16, num_layers=2, num_heads=2, num_neurons=8, num_classes=3)
SPACE = ArchSpace.from_fractions(2, 2, 8, fractions=(0.5, 1.0))
SMALL = jax.tree.map(np.asarray, uniform(SPACE, 0.5, 0.5))
WHOLE = jax.tree.map(np.asarray, full(SPACE))
ARCHS = [SMALL, WHOLE, SMALL]
DIMS = HeaderDims(2, 2, embed_dim=16, channels=4, num_classes=3, blocks=1, num_layers=1)
CELL = ((0, OPS.index("sep3x3"), 1, OPS.index("identity")),)
REFINE = RefineConfig(rounds=4, batch_size=4, learning_rate=0.05, momentum=0.5)
RNG = np.random.default_rng(0)
KEY = jax.random.key(1)
SIZES = (6, 9, 8)
RATE = 0.01


CONTEXT = SimpleNamespace(
    encoder=ENCODER,
    space=SPACE,
    mesh=layout.make_mesh(),
    config=SimpleNamespace(reference=TrainConfig(), refine=REFINE),
    header_dims=DIMS,
    backbone_dims=dataclasses.replace(ENCODER.dims, num_classes=0),
)
STUDY = SimpleNamespace(context=CONTEXT, key=lambda name, index=0: KEY)
IDS = jnp.arange(len(SIZES))
OPTIONS = {"client_ids": IDS, "batch_size": 4, "epochs": 1}


def make_device(number, size):
    images = RNG.random((size, 8, 8, 1)).astype(np.float32)
    return SimpleNamespace(
        id=number,
        edge=number % 2,
        budget_bytes=1000 * (number + 1),
        profile=REFERENCE_PROFILE,
        train=_Split(images, RNG.integers(0, 3, size).astype(np.int32)),
    )


class _Split:
    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels

    def __len__(self):
        return len(self.labels)


FLEET = [make_device(number, size) for number, size in enumerate(SIZES)]
DATA = stack_clients([(device.train.inputs, device.train.labels) for device in FLEET])
PARAMS = tiny.make_params(ENCODER)
HEADER = jax.jit(header.init, static_argnums=(1, 2))(jax.random.key(5), CELL, DIMS)


def parameter_bytes(tree):
    return 4 * tiny.count(tree)


# Samples set aside


def test_samples_set_aside_are_never_trained_on_and_nothing_is_lost():
    numbers = [np.arange(size, dtype=np.float32)[:, None] + 100 * i for i, size in enumerate(SIZES)]
    parts = held_out.divide(numbers, FLEET, seed=3)
    assert parts.everything.inputs.shape[1] % held_out.ROWS == 0
    for row, size in enumerate(SIZES):
        fit, check = int(parts.fit.size[row]), int(parts.check.size[row])
        assert check == max(1, round(0.2 * size)) and fit + check == size
        trained = np.asarray(parts.fit.inputs)[row, :fit, 0]
        checked = np.asarray(parts.check.inputs)[row, :check, 0]
        np.testing.assert_array_equal(np.sort([*trained, *checked]), numbers[row][:, 0])
        places = checked.astype(int) - 100 * row
        np.testing.assert_array_equal(
            parts.check.labels[row, :check], FLEET[row].train.labels[places]
        )
        assert int(parts.everything.size[row]) == size
    again = held_out.divide(numbers, FLEET, seed=3)
    tiny.assert_trees_equal(parts, again)
    other = held_out.divide(numbers, FLEET, seed=4)
    assert not np.array_equal(parts.check.inputs, other.check.inputs)


def test_best_is_the_first_of_equals():
    assert held_out.best([3, 1, 2], {1: 0.5, 2: 0.5, 3: 0.4}.get) == 1


# Whole networks


def optimizer(rate):
    return optax.chain(training.make_optimizer(TrainConfig()), optax.scale_by_learning_rate(rate))


def without_key_bias(params):
    """Attention does not depend on it, so Adam makes large steps of its gradient's rounding."""

    def clear(path, leaf):
        is_bias = any(getattr(key, "key", None) == "qkv_bias" for key in path)
        return np.delete(leaf, 1, axis=leaf.ndim - 3) if is_bias else np.asarray(leaf)

    return jax.tree_util.tree_map_with_path(clear, params)


def assert_same_network(found, expected):
    tiny.assert_trees_close(
        without_key_bias(found), without_key_bias(expected), rtol=1e-3, atol=1e-4
    )


def rounds_of(averaged, rounds):
    start = rival_networks.start(PARAMS, ARCHS)
    return rival_networks.network_rounds(
        STUDY, start, DATA, averaged=averaged, rate=RATE, rounds=rounds
    )


def network_loss(params, batch, key):
    """Of the full network, or of a slice."""
    del key
    apply = slicing.apply if isinstance(params["blocks"], list) else supernet.apply
    return subnet_clients.weighted_loss(apply(params, batch.inputs, ENCODER).logits, batch), {}


def test_averaged_rounds_are_heterofl():
    """The general one of `fed`, on masked parameters at full size."""
    found = rounds_of(True, range(2)).params
    tiny.assert_trees_equal(take_row(found, 0), take_row(found, 2))
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *ARCHS)

    def mask_of(row):
        return subnet_clients.held_params(PARAMS, to_mask(SPACE, take_row(stacked, row)))

    general = heterofl(network_loss, optimizer(RATE), mask_of)
    run = functools.partial(simulate.run_rounds, general, num_rounds=2, **OPTIONS)
    assert_same_network(take_row(found, 0), jax.jit(run)(PARAMS, (), DATA, KEY)[0])


def test_rounds_alone_train_each_device_its_own_dense_network():
    found = rounds_of(False, range(1, 3))
    row = 0
    states = replicate(slicing.slice_params(PARAMS, ARCHS[row]), 1)
    data = jax.tree.map(lambda leaf: leaf[row : row + 1], DATA)
    run = functools.partial(
        simulate.run_rounds, local(network_loss, optimizer(RATE)), num_rounds=2, batch_size=4,
        epochs=1, client_ids=IDS[row : row + 1],
    )  # fmt: skip
    _, states, _ = jax.jit(run)((), states, data, KEY, first_round=1)
    own = slicing.slice_params(jax.device_get(take_row(found.params, row)), ARCHS[row])
    assert_same_network(own, take_row(states, 0))


def test_networks_are_measured_as_their_slices():
    networks = rival_networks.start(PARAMS, ARCHS)
    found = rival_networks.network_evaluator(STUDY, [networks, networks])(DATA)
    assert found.shape == (2, 3)
    twin = tiny.to_float64(PARAMS)
    shapes = {"layers": [0], "heads": [1, 1], "neurons": [4, 4]}
    for row, kept in enumerate((shapes, {}, shapes)):
        logits, _, _ = tiny.numpy_vit(twin, FLEET[row].train.inputs, ENCODER, **kept)
        expected = np.mean(logits.argmax(axis=1) == FLEET[row].train.labels)
        np.testing.assert_allclose(found[:, row], expected, rtol=1e-6)


# Headers


def test_header_rounds_are_fedavg_beside_local_training():
    """In the compact form, with the device's own optimiser; two devices, of unequal size."""
    params = HEADER
    tokens = [RNG.normal(size=(size, 4, 16)).astype(np.float32) for size in SIZES]
    data = stack_clients([(x, d.train.labels) for x, d in zip(tokens, FLEET, strict=True)])
    start = rival_headers.start(params, CELL, DIMS, len(SIZES))
    rates = rival_headers.Rates(shared=0.05, personal=0.02, strength=0.0)
    found = rival_headers.header_rounds(STUDY, 0, CELL, start, data, rates, range(2))

    def loss_fn(params, batch, key):
        del key
        logits = header.apply(params, CELL, DIMS, batch.inputs)
        return subnet_clients.weighted_loss(logits, batch), {}

    def sgd(rate):
        return optax.chain(
            optax.add_decayed_weights(REFINE.weight_decay), optax.sgd(rate, REFINE.momentum)
        )

    run = functools.partial(simulate.run_rounds, num_rounds=2, **OPTIONS)

    @jax.jit
    def expected():
        shared, _, _ = run(fedavg(loss_fn, sgd(0.05)), params, (), data, KEY)
        everyone = replicate(params, len(SIZES))
        return shared, run(local(loss_fn, sgd(0.02)), (), everyone, data, KEY)[1]

    shared, alone = expected()
    in_slots = functools.partial(rival_headers.header_slots.to_slots, cell=CELL, dims=DIMS)
    tiny.assert_trees_close(found.shared, in_slots(shared), rtol=1e-4, atol=1e-6)
    for row in range(len(SIZES)):
        tiny.assert_trees_close(
            take_row(found.personal, row), in_slots(take_row(alone, row)), rtol=1e-4, atol=1e-6
        )
    near = rival_headers.header_rounds(
        STUDY, 0, CELL, start, data, rates._replace(strength=5.0), range(2)
    )
    tiny.assert_trees_equal(near.shared, found.shared)
    assert not np.allclose(near.personal["classifier"]["kernel"],
                           found.personal["classifier"]["kernel"], atol=1e-3)  # fmt: skip


# Costs


def backbone_of(arch):
    sliced = slicing.slice_params(PARAMS, arch)
    return {name: leaf for name, leaf in sliced.items() if name not in encoders.HEADS}


MODEL = HeaderModel(SMALL, backbone_of(SMALL), CELL, HEADER)


def test_a_network_costs_its_slice_for_every_time_it_travels():
    device, size = FLEET[1], parameter_bytes(slicing.slice_params(PARAMS, SMALL))
    cost = device_costs.network(ENCODER, SMALL, device, Link(up=4, down=5), epochs=4)
    assert cost.uplink_bytes == 4 * size and cost.downlink_bytes == 5 * size
    assert cost.model_bytes == size
    assert cost.train_flops == 3 * cost.inference_flops * 9 * 4
    bigger = device_costs.network(ENCODER, WHOLE, device, Link(4, 5), epochs=4)
    assert bigger.inference_flops > 1.5 * cost.inference_flops


def test_a_header_rival_sends_the_header_only_and_computes_features_once():
    device, size = FLEET[0], parameter_bytes(MODEL.params)
    fixed = parameter_bytes(MODEL.backbone)
    once, ten, ditto = (
        device_costs.header(CONTEXT, MODEL, device, Link(3, 4), epochs, trained)
        for epochs, trained in ((1, 1), (10, 1), (10, 2))
    )
    assert ten.uplink_bytes == 3 * size and ten.downlink_bytes == fixed + 4 * size
    assert ten.model_bytes == fixed + size
    per_epoch = (ten.train_flops - once.train_flops) / 9
    features = once.train_flops - per_epoch
    assert per_epoch == 3 * len(device.train) * header.num_flops(DIMS, CELL)
    assert features == len(device.train) * (ten.inference_flops - header.num_flops(DIMS, CELL))
    assert ditto.train_flops == ten.train_flops + 10 * per_epoch
    idle = device_costs.header(CONTEXT, MODEL, device, Link(0, 1), 0)
    assert idle.train_flops == 0


def test_acme_costs_its_encoded_messages():
    device, gates = FLEET[2], header.num_gates(DIMS, CELL)
    mask = np.ones(gates)
    mask[:4] = 0  # the whole stem: what it fed is removed, too
    cost = device_costs.acme(CONTEXT, MODEL, device, pruning(1), mask)
    vector = np.zeros(gates, np.float32)
    up = [
        messages.DeviceProfileMessage(2, 3000, 8, REFERENCE_PROFILE),
        messages.FeatureSketch(np.zeros((32, 16), np.float16)),
        *[messages.ImportanceSet(vector)] * 4,
    ]
    down = [
        messages.BackboneMessage(SMALL, MODEL.backbone),
        messages.HeaderMessage(CELL, MODEL.params),
        *[messages.PersonalizedImportance(vector)] * 4,
    ]
    assert cost.uplink_bytes == sum(len(messages.encode(m)) for m in up)
    assert cost.downlink_bytes == sum(len(messages.encode(m)) for m in down)
    whole = device_costs.header(CONTEXT, MODEL, device, Link(0, 1), 4)
    assert cost.train_flops == whole.train_flops  # masks save nothing in training
    assert cost.inference_flops < whole.inference_flops and cost.model_bytes < whole.model_bytes
    before = device_costs.acme(CONTEXT, MODEL, device, pruning(1), None)
    assert before.train_flops == 0 and before.uplink_bytes == len(messages.encode(up[0]))


def pruning(number):
    return RefineConfig(rounds=4, batch_size=4, prune_per_round=number)


def test_columns_say_how_many_devices_can_hold_their_model():
    costs = [device_costs.Cost(10.0, 0.0, 0.0, 0.0, size) for size in (1000.0, 2001.0, 2999.0)]
    found = device_costs.columns(costs, FLEET)  # budgets of 1000, 2000 and 3000 bytes
    assert found["fits"] == pytest.approx(2 / 3) and found["model_bytes"] == 2000.0


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        ("local_scratch", 0, 0),
        ("local_network", 0, 1),
        ("heterofl_scratch", 10, 11),
        ("heterofl_cloud", 10, 11),
        ("heterofl_cloud_tuned", 5, 6),
        ("fedavg_one_size_tuned", 5, 6),
        ("local_header", 0, 1),
        ("fedavg_header", 10, 11),
        ("fedavg_header_tuned", 5, 6),
        ("ditto_header", 10, 10),
    ],
)
def test_how_often_weights_travel(name, up, down):
    if name in rival_plans.NETWORK_RIVALS:
        link = rival_plans.network_link(rival_plans.NETWORK_RIVALS[name], 10)
    else:
        link = rival_plans.header_link(name, 10)
    assert link == Link(up, down)


# Which rivals do what


class Recorder:
    """Stands in for `network_rounds`: a state is the list of what was done to it."""

    def __init__(self, accuracy=None):
        self.accuracy = accuracy or {}

    def start(self, params, archs):
        return [("start", params, tuple(archs))]

    def network_rounds(self, study, state, data, *, averaged, rate, rounds):
        return [*state, (data, averaged, rate, tuple(rounds))]

    def network_evaluator(self, study, states):
        (state,) = states
        return lambda data: np.full((1, 3), self.accuracy[state[1][2]])


def rival_study(cached=None):
    config = SimpleNamespace(refine=REFINE, reference=TrainConfig(learning_rate=2.0))
    return SimpleNamespace(
        config=config,
        context=SimpleNamespace(
            encoder=ENCODER,
            session=SimpleNamespace(phase=lambda name: contextlib.nullcontext()),
        ),
        key=STUDY.key,
        stages=SimpleNamespace(elastic="supernet"),
        cached=cached or (lambda name, make: make()),
    )


SIZES_OF_RIVALS = rival_plans.Sizes(["a", "b", "c"], "s")
PARTS = held_out.Parts("everything", "fit", "check")


def test_rivals_that_are_tuned_go_on_alone_from_the_middle(monkeypatch):
    monkeypatch.setattr(rival_plans, "rival_networks", Recorder())
    rates = {name: float(i) for i, name in enumerate(rival_plans.NETWORK_RIVALS)}
    found = rival_plans.train_networks(rival_study(), SIZES_OF_RIVALS, PARTS, rates)
    assert list(found) == list(rival_plans.NETWORK_RIVALS)

    def work(name):
        return [(*step[:3], *step[3]) for step in found[name][1:]]

    hetero, alone = rates["heterofl_cloud"], rates["local_network"]
    first = ("everything", True, hetero, 0, 1)
    assert work("heterofl_cloud") == [first, ("everything", True, hetero, 2, 3)]
    assert work("heterofl_cloud_tuned") == [first, ("everything", False, alone, 2, 3)]
    assert work("local_scratch")[0] == ("everything", False, rates["local_scratch"], 0, 1)
    assert found["fedavg_one_size"][0] == ("start", "supernet", ("s", "s", "s"))
    assert found["heterofl_cloud"][0] == ("start", "supernet", ("a", "b", "c"))
    drawn = found["heterofl_scratch"][0][1]
    assert jax.tree.structure(drawn) == jax.tree.structure(PARAMS)
    assert found["local_scratch"][0][1] is not drawn  # drawn again,
    tiny.assert_trees_equal(found["local_scratch"][0][1], drawn)  # the same numbers


def test_rates_are_chosen_on_what_was_set_aside(monkeypatch):
    """Whole networks by a table of accuracies."""
    factors = rival_plans.NETWORK_FACTORS
    accuracy = {2 * factor: 0.5 for options in factors.values() for factor in options}
    accuracy[2 * factors["cloud"][0]] = 0.9
    accuracy[2 * factors["scratch"][2]] = 0.8
    monkeypatch.setattr(rival_plans, "rival_networks", Recorder(accuracy))
    kept = []

    def cached(name, make):
        tree, facts = make()
        kept.append((name, json.loads(json.dumps(facts))))
        return tree, kept[-1][1]

    study = rival_study(cached)
    rates, tried = rival_plans.choose_network_rates(study, "rates", SIZES_OF_RIVALS, lambda: PARTS)
    assert kept[0] == ("rates", {"rates": rates, "tried": tried})
    assert rates["local_network"] == 2 * factors["cloud"][0]
    assert rates["heterofl_scratch"] == 2 * factors["scratch"][2]
    assert "heterofl_cloud_tuned" not in rates
    options = [t for t in tried if t["method"] == "local_scratch"]
    assert [t["learning_rate"] for t in options] == [2 * f for f in factors["scratch"]]


def test_a_row_has_the_mean_and_the_worst_tenth():
    fleet = [SimpleNamespace(edge=i // 6, budget_bytes=10) for i in range(12)]
    costs = [device_costs.Cost(1.0, 2.0, 3.0, 4.0, 5.0)] * 12
    way = whole_system.Found(np.arange(12)[::-1] / 20, costs, None)
    row = whole_system._row("acme", way, fleet)
    assert row["test_accuracy"] == pytest.approx(5.5 / 20)
    assert row["worst_tenth_test_accuracy"] == pytest.approx(0.5 / 20)  # two of twelve
    assert row["edge0_test_accuracy"] == pytest.approx(8.5 / 20)
    assert row["uplink_bytes"] == 1.0 and row["fits"] == 1.0


# What is handed out


def test_best_within_a_limit():
    archs = {0.5: SMALL, 1.0: WHOLE}
    grid = [GridPoint(d, d, arch) for d, arch in archs.items()]
    study = SimpleNamespace(
        grid=grid, cached=lambda name, make: ({"accuracy": np.array([0.8, 0.7])}, {})
    )
    small, whole = (parameter_bytes(slicing.slice_params(PARAMS, a)) for a in archs.values())
    assert system_edges.best_within(study, whole, ENCODER.dims).arch is SMALL  # the better one
    study.cached = lambda name, make: ({"accuracy": np.array([0.6, 0.7])}, {})
    assert system_edges.best_within(study, whole, ENCODER.dims).arch is WHOLE
    assert system_edges.best_within(study, whole - 1, ENCODER.dims).arch is SMALL
    with pytest.raises(ValueError, match=f"the smallest has {small:,}"):
        system_edges.best_within(study, small - 1, ENCODER.dims)


# Tables and claims


def document(advantage):
    """Three seeds; ACME at 0.8, each rival `advantage[seed]` below, in both distributions."""
    rows = []
    for seed, below in enumerate(advantage):
        for unit in results.UNITS:
            for name in results.METHODS:
                accuracy = 0.8 + 0.01 * seed - (below if name in results.RIVALS else 0.0)
                rows.append(
                    {
                        "kind": "method", "seed": seed, "unit": unit, "method": name,
                        "test_accuracy": accuracy, "worst_tenth_test_accuracy": accuracy - 0.1,
                        "uplink_bytes": 0.0 if "local" in name else 5e3, "downlink_bytes": 2e6,
                        "train_flops": 3e9, "inference_flops": 1e6, "fits": 1.0,
                    }
                )  # fmt: skip
    return {"seeds": list(range(len(advantage))), "rows": rows}


@pytest.mark.parametrize(
    ("advantage", "verdict"),
    [
        ((0.15, 0.151, 0.149), "exceeds"),
        ((0.10, 0.12, 0.09), "holds"),
        ((0.05, 0.051, 0.049), "partly"),
        ((-0.2, 0.3, 0.0), "fails"),
        ((-0.1, -0.1, -0.11), "fails"),
    ],
)
def test_verdicts(advantage, verdict):
    *found, _ = results.claims(document(advantage))
    assert len(found) == 1 + len(results.RIVALS)
    assert {claim.verdict for claim in found} == {verdict}
    mean = 100 * np.mean(advantage)
    assert all(f"c3 {mean:+.1f} ±" in claim.ours for claim in found)


@pytest.mark.parametrize(("best", "verdict"), [(0.02, "fails"), (-0.02, "holds")])
def test_best_rival_is_one_whose_models_fit(best, verdict):
    made = document((0.1, 0.1, 0.11))
    for row in made["rows"]:
        row["fits"] = float(row["method"] != "cloud_full")
        if row["method"] == "heterofl_cloud":
            row["test_accuracy"] = 0.8 + 0.01 * row["seed"] + best + 0.001 * row["seed"]
            row["uplink_bytes"] = 4e6
        if row["method"] == "cloud_full":
            row["test_accuracy"] = 1.0
    claim = results.claims(made)[-1]
    assert claim.verdict == verdict
    assert "HeteroFL from the supernet;" in claim.ours and "4.0 MB there, 5.0 kB" in claim.ours


def test_tables_pair_the_seeds():
    lines = results.TABLES["whole_system_c3"](document((0.05, 0.05, 0.05)))
    assert len(lines) == 2 + len(results.METHODS)
    rival = next(line for line in lines if line.startswith("| FedAvg of the edge's header |"))
    # The accuracies differ between seeds, the differences do not.
    assert "76.0 ± 2.5" in rival and "+5.0 ± 0.0" in rival
    assert "5.0 kB | 2.0 MB | 3.0 | 1.00 | 100 %" in rival


def test_picture_shows_every_method_in_both_panels():
    figure = results.FIGURES["whole_system_traffic"](document((0.05, 0.06, 0.05)))
    for axis in figure.axes:
        assert len(axis.containers) == len(results.METHODS) and axis.get_xscale() == "log"
    names = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert names == set(results.METHODS.values())
