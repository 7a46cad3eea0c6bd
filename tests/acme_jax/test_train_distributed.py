"""The distributed job as a user runs it: processes that die, and others that go on."""

import contextlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from acme_jax.checkpoint import CheckpointStore

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_distributed.py"
PATIENCE_S = 300
"""A process takes five seconds to start, on a busy machine much longer."""
TINY = ["--patch-size", "4", "--embed-dim", "8", "--num-layers", "1", "--num-heads", "2",
        "--num-neurons", "8", "--clients", "5", "--samples", "12", "--batch-size", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """100 random images of 8 x 8 in the format of Fashion-MNIST."""
    directory = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (100, 8, 8)).astype(np.uint8)
    header = struct.pack(">4I", 0x803, 100, 8, 8)
    (directory / "train-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    labels = (np.arange(100) % 10).astype(np.uint8)
    header = struct.pack(">2I", 0x801, 100)
    (directory / "train-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return directory


class Launcher:
    """Starts the job in a directory of its own; `options` are those of every start."""

    def __init__(self, directory, images, *options):
        self.directory = directory
        directory.mkdir()
        self.options = [*TINY, "--data-path", str(images), *options, "--checkpoint-dir",
                        str(directory / "checkpoints"), "--out", str(directory / "rounds.jsonl"),
                        "--resume"]  # fmt: skip

    def log(self, index=0):
        return (self.directory / f"{index}.log").read_text()

    @contextlib.contextmanager
    def started(self, count, *arguments, num_devices=1):
        """`count` processes; dead at the end, whatever happens."""
        flags = re.sub(r"(device_count)=\d+", rf"\1={num_devices}", os.environ["XLA_FLAGS"])
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        running = []
        for index in range(count):
            command = [sys.executable, str(SCRIPT), *self.options, *arguments]
            if count > 1:
                command += ["--coordinator", address, "--num-processes", str(count),
                            "--process-id", str(index)]  # fmt: skip
            with (self.directory / f"{index}.log").open("w") as log:
                running.append(
                    subprocess.Popen(
                        command,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=os.environ | {"XLA_FLAGS": flags},
                    )
                )
        try:
            yield running
        finally:
            for process in running:
                process.kill()
            for process in running:
                process.wait()

    def complete(self, count, *arguments, num_devices=1):
        with self.started(count, *arguments, num_devices=num_devices) as running:
            for index, process in enumerate(running):
                assert process.wait(PATIENCE_S) == 0, self.log(index)

    def rounds(self):
        path = self.directory / "rounds.jsonl"
        return [json.loads(row) for row in path.read_text().splitlines()] if path.exists() else []

    def arrays(self):
        return CheckpointStore(self.directory / "checkpoints").restore_latest()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedavg", "local"])
def test_killed_resumed_by_one_process_and_then_by_two(tmp_path, images, algorithm):
    """Ends as an uninterrupted run of one process on one device."""
    job = Launcher(tmp_path / "job", images, "--algorithm", algorithm)
    with job.started(2, "--rounds", "100000") as running:
        deadline = time.monotonic() + PATIENCE_S
        while len(job.rounds()) < 3:
            assert running[0].poll() is None and time.monotonic() < deadline, job.log()
            time.sleep(0.05)
        running[1].kill()
        assert running[0].wait(60) == 75, job.log()
    last = job.log().splitlines()[-1]
    line = r"process 1 of 2 is gone \(.*\); the newest checkpoint is round (\d+); start again"
    newest = int(re.match(line, last)[1])
    assert newest >= 2 and last.endswith("with --resume")

    job.complete(1, "--rounds", str(newest + 1), num_devices=2)
    job.complete(2, "--rounds", str(newest + 2))
    rows = job.rounds()
    assert [row["round"] for row in rows] == list(range(1, newest + 3))
    assert [row["processes"] for row in rows[-3:]] == [2, 1, 2]
    assert all(len(row["host_rss_bytes"]) == row["processes"] for row in rows)

    whole = Launcher(tmp_path / "whole", images, "--algorithm", algorithm)
    whole.complete(1, "--rounds", str(newest + 2))
    for row, expected in zip(rows, whole.rounds(), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert row["clients_per_s"] > 0 and row["flop_fraction"] > 0
    found, expected = job.arrays(), whole.arrays()
    assert found.step == expected.step == newest + 2
    assert found.tree.keys() == expected.tree.keys()
    for name, leaf in expected.tree.items():
        assert leaf.shape[:1] == (5,) or algorithm == "fedavg"
        np.testing.assert_allclose(found.tree[name], leaf, rtol=0, atol=1e-5, err_msg=name)


def test_refusals_are_one_line(tmp_path, images):
    launcher = Launcher(tmp_path / "job", images)
    refused = [
        (["--batch-size", "0"], "error: --batch-size must be positive, got 0"),
        (["--num-processes", "2"], "error: --num-processes needs --coordinator HOST:PORT, or"),
    ]
    for arguments, line in refused:
        with launcher.started(1, *arguments) as (process,):
            assert process.wait(PATIENCE_S) == 2
        assert launcher.log().startswith(line) and launcher.log().count("\n") == 1
