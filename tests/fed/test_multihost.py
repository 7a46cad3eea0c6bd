"""Clients over many devices and over real processes: equal results, own data, clean ends."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import multihost_worker
import numpy as np
import pytest
from jax.sharding import Mesh

from fed import multihost

WORKER = Path(multihost_worker.__file__)
ROOT = WORKER.parents[2]
PATIENCE_S = 200
"""A process takes three seconds to start, on a busy machine much longer."""
CLIENTS, ROUNDS = 6, 3
"""Six clients do not fill four or eight devices."""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def start(options, directory, num_devices):
    flags = re.sub(
        r"(device_count)=\d+", rf"\1={num_devices}", os.environ["XLA_FLAGS"]
    )  # as in this process: another level of optimisation rounds otherwise
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    name = f"{options['do']}.{options.get('id', 0)}.log"
    with (directory / name).open("w") as output:
        return subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(options)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


@contextlib.contextmanager
def two_processes(directory, do, **options):
    """Two processes of one device each; dead at the end, whatever happens."""
    options |= {
        "do": do,
        "coordinator": f"127.0.0.1:{free_port()}",
        "processes": 2,
        "clients": CLIENTS,
        "rounds": ROUNDS,
        "out": str(directory / "out"),
    }
    running = [start(options | {"id": index}, directory, 1) for index in range(2)]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()


def log(directory, do, index):
    return (directory / f"{do}.{index}.log").read_text()


def wait_for(condition, running, directory, do):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        for index, process in enumerate(running):
            assert process.poll() is None, log(directory, do, index)
        assert time.monotonic() < deadline, log(directory, do, 0) + log(directory, do, 1)
        time.sleep(0.05)


def rounds_done(directory, index):
    path = directory / f"out.{index}"
    text = path.read_text() if path.exists() else ""
    return int(text or 0)


def load(path):
    with np.load(path) as file:
        return dict(file)


def assert_close(found, expected, atol):
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def expected():
    """One process, two devices; plainly different from where it started."""
    mesh = Mesh(np.array(jax.devices()), ("clients",))
    flat = multihost_worker.results(mesh, CLIENTS, ROUNDS)
    assert np.abs(flat["fedavg server['w']"] - multihost_worker.PARAMS["w"]).max() > 0.1
    assert flat["local clients['w']"].shape == (CLIENTS, multihost_worker.DIMS)
    return flat


def test_one_two_four_and_eight_devices_give_equal_results(tmp_path, expected):
    options = {"do": "meshes", "clients": CLIENTS, "rounds": ROUNDS, "out": str(tmp_path / "out")}
    process = start(options, tmp_path, 8)
    try:
        assert process.wait(PATIENCE_S) == 0, log(tmp_path, "meshes", 0)
    finally:
        process.kill()
        process.wait()
    # A program for other numbers of clients a device may round the last bit differently.
    for count, atol in ((1, 1e-6), (2, 0), (4, 1e-6), (8, 1e-6)):
        assert_close(load(tmp_path / f"out{count}.npz"), expected, atol)
    assert "call it first" in (tmp_path / "out.late").read_text()


def test_two_processes_give_equal_bits_and_load_their_own_clients_only(tmp_path, expected):
    with two_processes(tmp_path, "whole") as running:
        for index, process in enumerate(running):
            assert process.wait(PATIENCE_S) == 0, log(tmp_path, "whole", index)
    found = load(tmp_path / "out.npz")
    np.testing.assert_array_equal(found.pop("loaded"), [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(found.pop("negative zero"), [True, True])
    assert_close(found, expected, atol=0)


# What happens to whom, and what the other one's line says about it.
DEATHS = {
    "killed": (signal.SIGKILL, 1, {}, "process 1 of 2 is gone (its connection closed"),
    "the coordinator is killed, the other is not waiting for it": (
        signal.SIGKILL,
        0,
        {"dawdles": 1},
        "process 0 of 2 is gone (its connection closed",
    ),
    "frozen": (
        signal.SIGSTOP,
        1,
        {"heartbeat_timeout_s": 4.0},
        "process 1 of 2 is gone (no sign of life for 4 s",
    ),
    "the coordinator is frozen": (
        signal.SIGSTOP,
        0,
        {"heartbeat_timeout_s": 4.0},
        "process 0 of 2 is gone (no sign of life for 4 s",
    ),
}


@pytest.mark.parametrize(
    "what",
    [pytest.param(what, marks=[pytest.mark.slow] if "frozen" in what else []) for what in DEATHS],
)
def test_the_others_stop_with_one_line_when_a_process_is_gone(tmp_path, what):
    number, victim, options, line = DEATHS[what]
    other = 1 - victim
    with two_processes(tmp_path, "endless", **options) as running:
        wait_for(lambda: rounds_done(tmp_path, other) >= 3, running, tmp_path, "endless")
        running[victim].send_signal(number)
        assert running[other].wait(60) == multihost.LOST, log(tmp_path, "endless", other)
    said = log(tmp_path, "endless", other)
    assert line in said
    assert said.splitlines()[-1].endswith("); start again with --resume")
    assert "stack trace" not in said


def test_a_failing_process_tells_the_others_why(tmp_path):
    with two_processes(tmp_path, "endless", fails=1) as running:
        assert running[1].wait(PATIENCE_S) == 2
        assert running[0].wait(60) == multihost.LOST
    line = "process 1 of 2 is gone (ValueError: this one has a fault); start again with --resume"
    assert log(tmp_path, "endless", 0).splitlines()[-1] == line


def test_data_over_the_mesh_are_not_moved():
    mesh = multihost.client_mesh()
    assert mesh.size == 2
    one_round, *arguments = multihost_worker.prepare("fedavg", mesh, 4)
    program = one_round.lower(*arguments, np.int32(0)).compile().as_text()
    moved = re.findall(
        r"= (\S+) (?:all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(", program
    )
    shapes = {re.sub(r"\{.*", "", shape) for shape in moved}
    # Every client's update, and weights; never inputs [4, 7, 5] or labels [4, 7].
    assert "f32[4,5]" in shapes
    assert shapes <= {"f32[4,5]", "f32[4]", "s32[4]", "f32[]", "s32[]"}


def test_rows_and_arrays():
    mesh = multihost.client_mesh()
    np.testing.assert_array_equal(multihost.my_rows(3, mesh), [0, 1, 2])
    assert multihost.padded_count(3, mesh) == 4
    local = {"a": np.arange(6.0, dtype=np.float32).reshape(3, 2), "b": np.arange(3) > 0}
    placed = multihost.from_local(mesh, local, 3)
    assert placed["a"].sharding.spec == jax.sharding.PartitionSpec(("clients",))
    assert {shard.data.shape for shard in placed["a"].addressable_shards} == {(2, 2)}
    host = multihost.to_host(placed)
    np.testing.assert_array_equal(host["a"], [[0, 1], [2, 3], [4, 5], [0, 0]])
    np.testing.assert_array_equal(host["b"], [False, True, True, False])
    everywhere = multihost.replicate(mesh, local)["a"]
    assert everywhere.is_fully_replicated
    np.testing.assert_array_equal(multihost.to_host(everywhere), local["a"])
    with pytest.raises(ValueError, match=r"\(2, 2\).* the 3 clients of this process"):
        multihost.from_local(mesh, local["a"][:2], 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10.0.0.1:8476", 2, 2), "process_id is 2; expected 0 to 1"),
        (("10.0.0.1:8476", 2, -1), "process_id is -1; expected 0 to 1"),
        (("10.0.0.1:8476", 0, 0), "num_processes must be at least 1, got 0"),
        (("10.0.0.1", 2, 0), "expected host:port"),
        (("10.0.0.1:http", 2, 0), "expected host:port"),
    ],
)
def test_impossible_places_are_refused(arguments, message):
    with pytest.raises(multihost.MultihostError, match=message):
        multihost.initialize(*arguments)
