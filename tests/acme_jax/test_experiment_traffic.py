"""Messages in few bits: in the run's refinement, in the cohorts' program, and their bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acme_jax import header, header_layout, header_slots, messages, number_formats, refine, supernet
from acme_jax.config import Config, ConfigError, RefineConfig, from_dict
from acme_jax.context import Stream
from acme_jax.device import EdgeState
from acme_jax.experiments import cohorts, traffic, traffic_bytes
from acme_jax.experiments.cohorts import Method
from acme_jax.experiments.settings import settings
from acme_jax.experiments.study import open_study
from acme_jax.experiments.wire_settings import (
    RECOMMENDED,
    SETTINGS,
    Models,
    apply_setting,
    edge_messages,
    uplink_of_device,
)
from acme_jax.fleet_refinement import FleetSetup
from acme_jax.fleet_refinement import traffic as fleet_traffic
from acme_jax.header_layout import HeaderDims
from acme_jax.progress import Reporter, StopFlag
from acme_jax.supernet_training import Stages
from fed import quantize
from fed.algorithm import FedAlgorithm
from nas.cells import OPS

CELL = ((0, OPS.index("sep1x1"), 1, OPS.index("identity")),) * 2
FORMATS = {"importance_format": "log4", "sketch_format": "linear8", "num_quantiles": 4}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The tiny study with a network that nobody has trained."""
    config = settings("tiny")
    config = dataclasses.replace(
        config,
        header=dataclasses.replace(config.header, channels=4),
        refine=dataclasses.replace(config.refine, **FORMATS),
        fleet=dataclasses.replace(config.fleet, samples_per_device=40),
    )
    with (
        Reporter() as reporter,
        open_study(config, tmp_path_factory.mktemp("study"), reporter, StopFlag()) as study,
    ):
        params = supernet.init(jax.random.key(0), study.context.encoder)
        study.__dict__["stages"] = Stages(params, params, params, params)
        yield study


@pytest.fixture(scope="module")
def models(study):
    dims, point = study.context.header_dims, study.point(0.5, 0.5)
    params = jax.tree.map(np.asarray, header.init(jax.random.key(1), CELL, dims))
    gates = header_layout.num_gates(dims, CELL)
    backbone = study.backbone(point.arch)
    return Models(point.arch, backbone, CELL, params, dims.embed_dim, gates)


@pytest.fixture(scope="module")
def ran(study, models):
    """The run's own refinement: rows of the ledger, and the devices at its end."""
    patch = pytest.MonkeyPatch()
    patch.setattr(traffic_bytes, "MEASURED", ("float32",))  # as configured: in few bits
    cohort, run_edge = [], refine.run_edge
    patch.setattr(refine, "run_edge", lambda *args: cohort.append((args, run_edge(*args))))
    rows = traffic_bytes.measured(study, models)
    patch.undo()
    return rows, cohort[0]


def test_the_ledger_holds_the_encoded_sizes(study, models, ran):
    rows, _ = ran
    found = {
        (row["direction"], row["tier"], row["message"]): (row["messages"], row["bytes"])
        for row in rows
        if row["setting"] == "float32"
    }
    devices = [device for device in study.context.devices if device.edge == 0]
    expected = edge_messages(study.config.refine, models, len(devices), 20)
    assert len(found) == len(expected) == 8
    for sent in expected:
        number, size = found[sent.direction, sent.tier, sent.message]
        assert number == sent.number
        if "profile" not in sent.message:  # whose numbers have more or fewer digits
            assert size == sent.number * sent.size
    # By hand: prefix, header, scale, half a byte a gate, checksum.
    one = 10 + len(f'["log4:{models.num_gates}"]') + 8 + models.num_gates // 2 + 4
    assert found["up", "edge-device", "importance_set"] == (9, 9 * one)
    dims = study.context.header_dims
    one = 10 + len(f'["linear8:4,{dims.embed_dim}"]') + 8 + 4 * dims.embed_dim + 4
    assert found["up", "edge-device", "feature_sketch"] == (3, 3 * one)
    up, down = (row["bytes"] for row in rows if row["setting"] == "centralized")
    assert up == sum(len(device.train) for device in devices) * (64 + 1)
    sizes = [leaf.size for leaf in jax.tree.leaves((models.backbone, models.header))]
    assert down == 3 * 4 * sum(sizes)


def test_the_run_computes_with_what_it_reads(study, models, ran):
    """Its devices end as those of a program that quantises inside; others prune other gates."""
    _, (arguments, cohort) = ran
    context, data, mixing = arguments[0], arguments[6], arguments[7]
    count, dims = len(data.size), context.header_dims
    number = refine.gates_per_round(context, models.cell)
    method = Method(np.asarray(mixing.wasserstein), number)
    plain = RefineConfig(**dataclasses.asdict(context.config.refine) | {"num_quantiles": 32})
    bits = (4,) * count + (quantize.EXACT_BITS,) * count
    done = cohorts.refine(
        context.stream(Stream.REFINE, 0), plain, dims, models.cell, models.header, data,
        {"read": method, "exact": method}, context.mesh,
        wrap=number_formats.importance_as_read(bits),
    )  # fmt: skip
    first = refine.METHODS.index("wasserstein") * count
    gates = header_slots.gate_positions(dims, models.cell)
    ours = np.asarray(cohort.devices.mask)[first : first + count, gates]
    assert (ours == 0).sum() == count * number * plain.rounds
    np.testing.assert_array_equal(ours, done["read"].mask[:, gates])
    smoothed = np.asarray(cohort.devices.smoothed)[first : first + count, gates]
    # A number at the border of two levels may round to either; one flip in a sum of many. Another
    # format would be off by parts of a level, tens of percent.
    np.testing.assert_allclose(smoothed, done["read"].smoothed[:, gates], rtol=1e-2)
    assert (ours != done["exact"].mask[:, gates]).any()


def test_settings_train_and_prune_as_much():
    base = RefineConfig()
    for name, setting in SETTINGS.items():
        config = apply_setting(base, name)
        assert config.rounds * config.local_epochs == base.rounds
        assert config.rounds * config.prune_per_round == base.rounds * base.prune_per_round
        assert config.rounds == base.rounds // setting.fewer
    # Three rounds have no half: one round of three epochs.
    odd = apply_setting(dataclasses.replace(base, rounds=3), "small_half")
    assert (odd.rounds, odd.local_epochs, odd.prune_per_round) == (1, 3, 30)


def test_the_recommended_setting_fits_any_header_of_the_study(models):
    config = settings("fashion_mnist")
    dims = HeaderDims(
        4, 4, config.model.embed_dim, config.header.channels, 10, config.header.blocks,
        num_layers=config.header.repeats + 2,
    )  # fmt: skip
    gates = header_layout.num_gates(dims, ((0, 0, 1, 0),) * config.header.blocks)
    largest = models._replace(embed_dim=config.model.embed_dim, num_gates=gates)
    sent = [uplink_of_device(apply_setting(config.refine, name), largest, 248) for name in SETTINGS]
    assert sent == sorted(sent, reverse=True)
    assert sent[list(SETTINGS).index(RECOMMENDED)] <= 0.01 * 248 * (28 * 28 + 1)


def test_the_papers_shapes():
    models = traffic_bytes.paper_models()
    assert models.num_gates == 1024
    sizes = [leaf.size for leaf in jax.tree.leaves(models.backbone)]
    assert sum(sizes) == pytest.approx(6.1e6, rel=0.01)
    assert 0.37e6 < sum(leaf.size for leaf in jax.tree.leaves(models.header)) < 0.44e6
    config = settings("cifar100").refine
    by_kind = {
        (s.direction, s.message): s
        for s in edge_messages(config, models, 5, 1250)
        if s.tier[0] == "e"
    }
    overheads = {
        ("up", "importance_set"): 4096,
        ("up", "feature_sketch"): 32 * 768 * 2,
        ("down", "backbone"): 4 * sum(sizes),
    }
    for key, payload in overheads.items():
        assert payload < by_kind[key].size < payload + 3000
    without = uplink_of_device(config, models, 1250, sketch=False)
    assert uplink_of_device(config, models, 1250) - without == by_kind["up", "feature_sketch"].size


def test_a_fleet_counts_its_messages_in_the_configured_form():
    dims = HeaderDims(2, 2, embed_dim=16, channels=4, num_classes=3, blocks=2, num_layers=2)
    params = header.init(jax.random.key(0), CELL, dims)
    found = {}
    for form in ("float32", "log8"):
        setup = FleetSetup(
            CELL, dims, RefineConfig(rounds=3, prune_per_round=1, importance_format=form)
        )
        found[form] = fleet_traffic(setup, params)
    gates = header_layout.num_gates(dims, CELL)
    shorter = len(f'["f4:{gates}"]') + 4 * gates - (len(f'["log8:{gates}"]') + 8 + gates)
    for before, after in zip(found["float32"], found["log8"], strict=True):
        assert before - after == 3 * shorter


def test_sets_not_mixed_anew_stay_as_they_are():
    def server_update(state, updates, sizes, rows):
        mixed = jnp.where(sizes[:, None] > 0, updates[::-1], state.personalized)
        return state._replace(personalized=mixed, rounds=state.rounds + (sizes > 0)), {}

    sets = jnp.asarray(np.random.default_rng(0).random((2, 9)), jnp.float32)
    state = EdgeState(jnp.eye(2), sets, jnp.ones(2, jnp.int32))
    algorithm = FedAlgorithm(*[None] * 5, server_update)
    wrapped = number_formats.importance_as_read((4, 4))(algorithm)
    after, _ = jax.jit(wrapped.server_update)(state, sets, jnp.asarray([1, 0]), jnp.arange(2))
    np.testing.assert_array_equal(after.personalized[1], sets[1])
    once = jax.jit(lambda values: quantize.log_round_trip(values, 4))
    twice = once(once(sets[1]))
    np.testing.assert_allclose(after.personalized[0], twice, rtol=1e-4)


def test_messages_refuse_what_has_no_code():
    for bad in (np.nan, np.inf, -1.0):
        values = np.asarray([0.5, bad, 2.0], np.float32)
        for form in ("log8", "log4", "log2"):
            with pytest.raises(messages.MessageError, match="was coded from NaN, infinite or"):
                messages.encode(messages.ImportanceSet(number_formats.importance(values, form)))
    with pytest.raises(messages.MessageError, match="NaN or infinite"):
        messages.encode(messages.ImportanceSet(np.asarray([np.nan], np.float32)))


@pytest.mark.parametrize(
    ("field", "value", "pattern"),
    [
        ("importance_format", "log3", "importance_format is 'log3'; expected one of float32, log8"),
        (
            "sketch_format",
            "float32",
            "sketch_format is 'float32'; expected one of float16, linear8",
        ),
        ("local_epochs", 0, "local_epochs must be positive, got 0"),
    ],
)
def test_bad_formats(field, value, pattern):
    with pytest.raises(ConfigError, match=pattern):
        from_dict({"refine": {field: value}})
    assert traffic.units(Config()) == ["measured", "encoded", "c3", "dirichlet", "c3_hard"]
