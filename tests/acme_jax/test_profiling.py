"""Choice, timing and fitting of sub-networks, and the table that a search loads."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from acme_jax import cloud, latency_csv, presets, profiling
from acme_jax.config import ConfigError
from acme_jax.context import make_context
from acme_jax.fleet import REFERENCE_PROFILE
from acme_jax.idx import DataError
from acme_jax.latency_csv import Measurements, genome, identity
from nas import cost
from nas.arch import ArchSpace
from nas.cost import ModelDims
from nas.latency_table import latency_table
from scripts import run_acme

SPACE = tiny.SPACE
DIMS = dataclasses.replace(tiny.CONFIG.dims, num_classes=0)
NETWORKS = profiling.choose_networks(SPACE, 12, seed=0)
TRUE = latency_table(
    SPACE.head_choices,
    SPACE.neuron_choices,
    np.random.default_rng(0).uniform(1e-5, 1e-4, (4, 4)),
    3e-5,
    idle_power_w=0.0,
    energy_per_flop_j=0.0,
    energy_per_byte_j=0.0,
)


def made_up(noise=0.0, seed=0):
    """Measurements as a table with known entries would give them."""
    exact = profiling.predict(DIMS, NETWORKS.archs, TRUE)
    rng = np.random.default_rng(seed)
    times = exact * rng.uniform(1 - noise, 1 + noise, (3, len(exact)))
    return Measurements(DIMS, 1, *NETWORKS, *times)


def write(path, *parts):
    latency_csv.write(path, parts, {})
    return path


def test_networks_cover_the_grid_twice_and_hold_out_distinct_ones():
    rows = [genome(NETWORKS.archs, i) for i in range(len(NETWORKS.roles))]
    keys = [identity(row) for row in rows]
    assert len(set(keys)) == len(keys)
    fit = {key for key, role in zip(keys, NETWORKS.roles, strict=True) if role == "fit"}
    expected = {
        tuple((layer, heads, neurons) for layer in range(depth))
        for depth in (1, 4)
        for heads in SPACE.head_choices
        for neurons in SPACE.neuron_choices
    }
    assert fit == expected
    assert [int(np.sum(NETWORKS.roles == r)) for r in ("held_out", "between")] == [12, 12]
    off_grid = 0
    for key, role in zip(keys, NETWORKS.roles, strict=True):
        assert all(1 <= h <= 4 and 2 <= n <= 8 for _, h, n in key)
        if role == "held_out":
            assert all(n in SPACE.neuron_choices for *_, n in key)
        off_grid += any(n not in SPACE.neuron_choices for *_, n in key)
    assert off_grid > 3


def test_real_networks_are_timed():
    """Every time is positive, of one example, and a deeper network takes longer."""
    config = dataclasses.replace(tiny.CONFIG, num_layers=8, num_neurons=512)
    archs = latency_csv.stack(
        [latency_csv.make_genome(d, np.full(8, 4), np.full(8, 512)) for d in (1, 8)]
    )
    networks = profiling.Networks(np.array(["fit", "held_out"]), archs)
    said = []
    found = profiling.measure(config, networks, 64, rounds=6, calls=5, say=said.append)
    assert found.dims == dataclasses.replace(config.dims, num_classes=0)
    assert found.batch_size == 64
    times = np.stack([found.latency_s, found.first_half_s, found.second_half_s])
    assert np.all(times > 0) and np.all(times * 64 < 10)
    assert found.latency_s[1] > 1.5 * found.latency_s[0]
    assert said == ["compiled 2 of 2 networks, batch size 64"]
    with pytest.raises(ConfigError, match="at least 2 rounds"):
        profiling.measure(config, networks, 64, rounds=1, calls=5)


def test_times_are_of_one_example_and_medians(monkeypatch):
    """A clock that advances by known steps: round 1 is slow, and the median forgets it."""
    ticks = iter(np.cumsum([t for s in (64.0, 2.0, 2.0) for t in (0.0, s) * 2]))
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: next(ticks))
    one = profiling.Networks(
        np.array(["fit"]), latency_csv.stack([latency_csv.make_genome(1, np.ones(4), np.ones(4))])
    )
    found = profiling.measure(tiny.CONFIG, one, 4, rounds=3, calls=2)
    np.testing.assert_allclose(
        [found.latency_s[0], found.first_half_s[0], found.second_half_s[0]], [0.5, 16.0, 0.5]
    )


def test_models_are_fitted_to_the_fit_rows_only_and_judged_on_the_rest():
    measured = made_up(noise=0.02)
    spoilt = measured.latency_s.copy()
    spoilt[measured.roles != "fit"] *= 3.0  # must change the errors, not the models
    models = profiling.fit_models(measured, REFERENCE_PROFILE)
    same = profiling.fit_models(measured._replace(latency_s=spoilt), REFERENCE_PROFILE)
    for name, model in models.items():
        tiny.assert_trees_equal(model, same[name])
    np.testing.assert_allclose(models["table"].block_s, TRUE.block_s, rtol=0.2)
    summary = profiling.summarise(measured, models)
    json.dumps(summary, allow_nan=False)
    errors = {name: model["error"] for name, model in summary["models"].items()}
    assert set(errors) == {"table", "roofline", "paper"}
    assert errors["table"]["held_out"]["mape"] < 0.03
    assert errors["table"]["held_out"]["kendall"] > 0.9
    for name in ("roofline", "paper"):
        assert errors[name]["held_out"]["mape"] > errors["table"]["held_out"]["mape"]
    bad = profiling.summarise(measured._replace(latency_s=spoilt), models)
    held_out = bad["models"]["table"]["error"]["held_out"]
    np.testing.assert_allclose(held_out["mape"], 2 / 3, atol=0.02)
    np.testing.assert_allclose(held_out["bias"], -2 / 3, atol=0.02)
    assert 0 < summary["repeatability"]["mape"] < 0.04


def test_a_search_loads_the_table_of_its_model(tmp_path):
    path = write(tmp_path / "a.csv", made_up())
    table = profiling.load_table(path, tiny.CONFIG.dims, SPACE, REFERENCE_PROFILE)
    found = profiling.predict(DIMS, NETWORKS.archs, table)
    np.testing.assert_allclose(found, made_up().latency_s, rtol=1e-3)
    arch = tiny.GENOMES[1]
    latency = float(cost.latency_s(DIMS, arch, TRUE))
    energy = latency * REFERENCE_PROFILE.idle_power_w
    energy += float(cost.num_flops(DIMS, arch)) * REFERENCE_PROFILE.energy_per_flop_j
    energy += float(cost.size_bytes(DIMS, arch)) * REFERENCE_PROFILE.energy_per_byte_j
    np.testing.assert_allclose(cost.energy_j(DIMS, arch, table), energy, rtol=1e-3)


def test_a_table_of_another_model_batch_size_or_space_is_refused(tmp_path):
    path = write(tmp_path / "a.csv", made_up())
    other = dataclasses.replace(tiny.CONFIG.dims, embed_dim=16, num_tokens=9)
    message = "another model: embed_dim 8 there, 16 here, num_tokens 7 there, 9 here"
    with pytest.raises(ConfigError, match=message):
        profiling.load_table(path, other, SPACE, REFERENCE_PROFILE)
    with pytest.raises(ConfigError, match="no measurements at batch size 8, only at 1"):
        profiling.load_table(path, DIMS, SPACE, REFERENCE_PROFILE, batch_size=8)
    wider = ArchSpace.from_fractions(4, 4, 8, fractions=(0.1, 1.0))
    with pytest.raises(ConfigError, match="with 2 to 8 neurons, but the search offers 1 to 8"):
        profiling.load_table(path, DIMS, wider, REFERENCE_PROFILE)


def test_measurements_that_do_not_determine_a_table_are_refused(tmp_path):
    measured = made_up()
    keep = np.flatnonzero((measured.roles != "fit") | (measured.archs.depth == 4))
    deep = Measurements(DIMS, 1, *jax.tree.map(lambda leaf: leaf[keep], tuple(measured[2:])))
    path = write(tmp_path / "a.csv", deep)
    with pytest.raises(DataError, match="determine only 16 of the table's 17 numbers"):
        profiling.load_table(path, DIMS, SPACE, REFERENCE_PROFILE)
    with pytest.raises(DataError, match="do not determine the cost models"):
        profiling.fit_models(deep, REFERENCE_PROFILE)
    rest = np.flatnonzero(measured.roles != "fit")
    none = Measurements(DIMS, 1, *jax.tree.map(lambda leaf: leaf[rest], tuple(measured[2:])))
    with pytest.raises(DataError, match="no measurement has the role 'fit'"):
        profiling.fit_models(none, REFERENCE_PROFILE)
    with pytest.raises(DataError, match="no measurement has the role 'fit'"):
        profiling.load_table(write(tmp_path / "b.csv", none), DIMS, SPACE, REFERENCE_PROFILE)


def smoke_table(path):
    """Measurements of the smoke preset's model, made up."""
    data = ModelDims(4, 32, 4, 8, 64, 17, 4)
    space = ArchSpace.from_fractions(4, 4, 64, (0.5, 1.0))
    networks = profiling.choose_networks(space, 2, seed=0)
    table = TRUE._replace(
        head_counts=np.array([2.0, 4.0]),
        neuron_counts=np.array([32.0, 64.0]),
        block_s=np.array([[1e-5, 2e-5], [4e-5, 8e-5]]),
    )
    seconds = profiling.predict(data, networks.archs, table)
    return write(path, Measurements(data, 1, *networks, seconds, seconds, seconds))


def test_one_flag_makes_a_run_use_the_table(tmp_path):
    config = presets.get("smoke")
    search = dataclasses.replace(
        config.search, latency_table=str(smoke_table(tmp_path / "smoke.csv"))
    )
    session = SimpleNamespace(decoding=None, say=print)
    made = make_context(dataclasses.replace(config, search=search), session=session)
    arch = latency_csv.make_genome(2, [2, 4, 4, 4], [64, 64, 32, 64])  # blocks 0 and 2
    latency = 3e-5 + 2e-5 + 4e-5
    rows = np.asarray(cloud.costs(made.backbone_dims, latency_csv.stack([arch]), made.cost_model))
    np.testing.assert_allclose(rows[0, 1], latency, rtol=1e-3)
    np.testing.assert_allclose(
        rows[0, 2], cost.energy_j(made.backbone_dims, arch, made.cost_model), rtol=1e-5
    )
    for device in made.devices:
        slower = REFERENCE_PROFILE.flops_per_s / device.profile.flops_per_s
        model = made.device_cost_model(device)
        found = cost.latency_s(made.backbone_dims, arch, model)
        np.testing.assert_allclose(found, latency * slower, rtol=1e-3)
    assert len({device.profile.flops_per_s for device in made.devices}) > 1
    plain = make_context(config, session=session)
    assert plain.cost_model == REFERENCE_PROFILE
    assert plain.device_cost_model(plain.devices[1]) is plain.devices[1].profile


def test_the_command_line_refuses_a_bad_table_before_any_training(tmp_path, capsys):
    def fail(preset, path):
        run = tmp_path / "run"
        argv = [preset, "--run-dir", str(run), "--search.latency-table", str(path)]
        assert run_acme.main(argv) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
        assert not run.exists()
        return shown.err

    assert "nowhere.csv is missing; make it with" in fail("smoke", tmp_path / "nowhere.csv")
    path = smoke_table(tmp_path / "smoke.csv")
    assert "measured with another model: num_layers 4 there, 6 here" in fail("digits", path)
    path.write_text(path.read_text().replace("fit,1,2 2 2 2,32", "fit,1,2 2 2 2,nan"))
    assert "invalid literal" in fail("smoke", path)
