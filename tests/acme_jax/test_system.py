"""Whole runs in processes of their own: killed, stopped, and laid out differently.

Every run has the same tiny configuration and shares one compilation cache, because almost all
of its time is compilation. A first, uninterrupted run fills the cache.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import assert_trees_equal

from acme_jax import config, context, device_model
from acme_jax.checkpoint import CheckpointStore
from acme_jax.fleet import edge_devices

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "run_acme.py"
PATIENCE_S = 400
"""A cold start on a busy machine takes two minutes."""

OPTIONS = {
    "data": {"public-train": 200, "public-select": 100, "public-test": 100},
    "model": {
        "patch-size": 4,
        "embed-dim": 16,
        "num-layers": 2,
        "num-heads": 2,
        "num-neurons": 16,
    },
    "reference": {"epochs": 3},
    "distill": {"width.epochs": 2, "depth.epochs": 5},
    "search": {"population-size": 4, "num-generations": 2},
    "fleet": {
        "num-edges": 1,
        "devices-per-edge": 3,
        "budgets": 0.9,
        "samples-per-device": 40,
    },
    "header": {
        "blocks": 1,
        "channels": 8,
        "search-epochs": 1,
        "controller-steps": 2,
        "num-candidates": 2,
        "final-epochs": 1,
    },
    # A small header has few gates: the cap must not lower N here.
    "refine": {"rounds": 5, "prune-per-round": 2, "max-pruned-fraction": 0.9},
    # Of 3 or 5 units: a kill may cost units, which are then done again.
    "compute": {"checkpoint-every": 2},
}
"""Changes to the preset `smoke`, whose search space has two fractions."""

ARGUMENTS = [
    word
    for section, options in OPTIONS.items()
    for name, value in options.items()
    for word in (f"--{section}.{name}", str(value))
]


@pytest.fixture(autouse=True)
def _slow_only_when_asked(request):
    wanted = request.config.getoption("markexpr")
    if request.node.get_closest_marker("slow") and "slow" not in wanted:
        pytest.skip("takes a minute or more; run with -m slow")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def start(run_dir, cache, *arguments, num_devices=2):
    """Starts a run; its output goes to a file beside the run directory."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [
        sys.executable,
        str(SCRIPT),
        "smoke",
        *ARGUMENTS,
        "--run-dir",
        str(run_dir),
        *arguments,
    ]
    with output_file(run_dir).open("a") as output:
        return subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )


def output_file(run_dir):
    return run_dir.with_name(f"{run_dir.name}.out")


def complete(run_dir, cache, *arguments, num_devices=2):
    """Runs to the end; returns the directory."""
    process = start(run_dir, cache, *arguments, num_devices=num_devices)
    try:
        status = process.wait(PATIENCE_S)
    finally:
        process.kill()
    assert status == 0, output_file(run_dir).read_text()
    return run_dir


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """The directory of an uninterrupted run."""
    return complete(tmp_path_factory.mktemp("whole") / "run", cache)


def kill_when(condition, run_dir, cache, *, with_signal=signal.SIGKILL):
    """Starts or continues a run and signals it when the condition is met; returns its status.

    The process is halted while the condition is checked again, so that it is signalled in
    exactly that state.
    """
    process = start(run_dir, cache, "--resume")
    deadline = time.monotonic() + PATIENCE_S
    try:
        while time.monotonic() < deadline:
            time.sleep(0.001)
            if not condition(run_dir):
                assert process.poll() is None, output_file(run_dir).read_text()
                continue
            process.send_signal(signal.SIGSTOP)
            _, state = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(state), output_file(run_dir).read_text()
            met = condition(run_dir)
            if met:
                process.send_signal(with_signal)
            process.send_signal(signal.SIGCONT)
            if met:
                return process.wait(PATIENCE_S)
        raise AssertionError(f"never came there:\n{output_file(run_dir).read_text()}")
    finally:
        process.kill()
        process.wait()


def read(path):
    return path.read_text() if path.exists() else ""


def rows(run_dir, phase):
    """The number of metrics rows of a phase."""
    return read(run_dir / "metrics.jsonl").count(f'"phase": "{phase}"')


def checkpoints(run_dir, phase):
    return {path.name for path in (run_dir / "checkpoints" / phase).glob("step_*")}


def in_units(phase, first, total):
    """Units are under way: `first` of them logged, the last not yet saved."""

    def condition(run_dir):
        last = f"step_{total:08d}"
        return rows(run_dir, phase) >= first and last not in checkpoints(run_dir, phase)

    return condition


def in_save(phase):
    """A checkpoint is being written."""
    return lambda run_dir: any((run_dir / "checkpoints" / phase).glob("tmp_step_*"))


def in_header_search(run_dir):
    name = "header search, edge 0"
    begun = (run_dir / "checkpoints" / name).exists()
    return begun and not checkpoints(run_dir, name)


def in_final_evaluation(run_dir):
    return rows(run_dir, "final evaluation") >= 2 and not (run_dir / "results.json").exists()


KILLS = {
    "reference": in_units("reference model", 1, 3),
    "a save in depth distillation": in_save("depth distillation"),
    "depth distillation": in_units("depth distillation", 3, 5),
    "header search": in_header_search,
    "refinement": in_units("refinement, edge 0", 3, 5),
    "a save in refinement": in_save("refinement, edge 0"),
    "final evaluation": in_final_evaluation,
}


def results(run_dir):
    """results.json, without what says where and from which checkout the run was made."""
    content = json.loads((run_dir / "results.json").read_text())
    return {k: v for k, v in content.items() if k not in ("commit", "hardware")}


def models(run_dir):
    return sorted((run_dir / "devices").glob("*/model.safetensors"))


def assert_identical(run_dir, expected):
    """Bit for bit: metrics, results, and every device's model."""
    name = "metrics.jsonl"
    assert (run_dir / name).read_text() == (expected / name).read_text()
    assert results(run_dir) == results(expected)
    assert len(models(expected)) == 3
    for first, second in zip(models(run_dir), models(expected), strict=True):
        assert first.read_bytes() == second.read_bytes()
        descriptions = [path.with_name("config.json").read_bytes() for path in (first, second)]
        assert descriptions[0] == descriptions[1]


def test_killed_at_many_points_and_resumed(whole, cache, tmp_path):
    """SIGKILL, each time continued from where the last one left it, ends bit-identical."""
    path = tmp_path / "run"
    for point, condition in KILLS.items():
        status = kill_when(condition, path, cache)
        assert status == -signal.SIGKILL, f"{point}: {output_file(path).read_text()}"
        assert not (path / "results.json").exists()
    complete(path, cache, "--resume")
    assert_identical(path, whole)
    log = (path / "run.log").read_text()
    # Work was really lost and really continued.
    assert "depth distillation: continues at" in log
    assert "refinement, edge 0: continues at" in log


def test_sigterm_saves_exits_and_resumes(whole, cache, tmp_path):
    path = tmp_path / "run"
    condition = in_units("depth distillation", 1, 5)
    status = kill_when(condition, path, cache, with_signal=signal.SIGTERM)
    assert status == 143
    last = output_file(path).read_text().splitlines()[-1]
    assert last.startswith("stopped in phase depth distillation after ")
    assert last.endswith("everything so far is saved, continue with --resume")
    done = rows(path, "depth distillation")
    assert f"step_{done:08d}" in checkpoints(path, "depth distillation")
    complete(path, cache, "--resume")
    assert_identical(path, whole)
    assert f"depth distillation: continues at {done} of 5" in (path / "run.log").read_text()


def test_diverging_run_names_its_place_and_keeps_what_was_good(whole, cache, tmp_path):
    path = tmp_path / "run"
    process = start(path, cache, "--distill.width.learning-rate", "1e30")
    try:
        assert process.wait(PATIENCE_S) == 2
    finally:
        process.kill()
    last = output_file(path).read_text().splitlines()[-1]
    place = r"phase width distillation, epoch or round 1, step \d+"
    assert re.match(f"error: the loss became (nan|inf) in {place}; the newest checkpoint", last)
    good, expected = (
        CheckpointStore(run_dir / "checkpoints" / "reference model").restore_latest()
        for run_dir in (path, whole)
    )
    assert good.step == expected.step == 3
    assert_trees_equal(good.tree, expected.tree)
    assert checkpoints(path, "width distillation") == set()


def test_exported_models_have_the_reported_accuracy(whole):
    settings = config.from_dict(json.loads((whole / "config.json").read_text()))
    made = context.make_context(settings, SimpleNamespace(decoding=None, say=print))
    reported = {row["device"]: row for row in results(whole)["devices"]}
    assert len(reported) == 3
    for device in edge_devices(made.devices, 0):
        row = reported[device.id]
        model = device_model.load(whole / row["model"])
        accuracy = (model.predict(device.test.inputs) == device.test.labels).mean()
        assert accuracy == pytest.approx(row["accuracy"]["wasserstein"], abs=1e-6)
        assert (np.asarray(model.mask) == 0).sum() == row["gates_pruned"]
        assert row["size_bytes"] <= row["budget_bytes"]


def test_run_directory_is_complete(whole):
    for name in ("report.html", "timing.json", "versions.json", "run.log", "tensorboard"):
        assert (whole / name).exists()
    assert len(list((whole / "plots").glob("*.png"))) >= 5
    # Pruned exactly: 2 gates in each of the 4 rounds after the first set has come back, and
    # in the last answer.
    assert {row["gates_pruned"] for row in results(whole)["devices"]} == {10}


def assert_close(first, second, where=""):
    """Equal structure, text and whole numbers; other numbers to 1e-6 (relative above 1)."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_close(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_close(*pair, f"{where}[{index}]")
    elif isinstance(first, float):
        assert math.isclose(first, second, rel_tol=1e-6, abs_tol=1e-6), (where, first, second)
    else:
        assert first == second, where


def assert_equal_to_1e_6(run_dir, expected):
    for first, second in zip(
        (run_dir / "metrics.jsonl").read_text().splitlines(),
        (expected / "metrics.jsonl").read_text().splitlines(),
        strict=True,
    ):
        assert_close(json.loads(first), json.loads(second))
    assert_close(results(run_dir), results(expected))
    for first, second in zip(models(run_dir), models(expected), strict=True):
        weights, others = load_file(first), load_file(second)
        assert weights.keys() == others.keys()
        for name, leaf in weights.items():
            np.testing.assert_allclose(leaf, others[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 4])
def test_number_of_devices_changes_nothing(cache, tmp_path, num_devices):
    # As released: fast compiling, which `smoke` uses, rounds by the number of devices.
    released = "--compute.no-fast-compile"
    whole = complete(tmp_path / "whole", cache, released)
    path = complete(tmp_path / "run", cache, released, num_devices=num_devices)
    versions = json.loads((path / "versions.json").read_text())
    assert len(versions["hardware"]["devices"]) == num_devices
    assert_equal_to_1e_6(path, whole)


@pytest.mark.slow
def test_client_chunk_changes_nothing(whole, cache, tmp_path):
    path = complete(tmp_path / "run", cache, "--compute.client-chunk", "2")
    assert_equal_to_1e_6(path, whole)
