"""Traces of one phase: files that TensorBoard and Perfetto read, with the devices' operations."""

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from acme_jax.phase_trace import PhaseTrace
from acme_jax.progress import Reporter
from scripts import run_acme

SCRIPT = Path(run_acme.__file__)


def reporter(trace):
    return Reporter("plain", console=Console(file=io.StringIO()), trace=trace)


def program(name):
    """A jitted program of this name, compiled."""

    def run(x):
        return jnp.tanh(x @ x)

    run.__name__ = run.__qualname__ = name
    compiled, x = jax.jit(run), jnp.ones((64, 64))
    compiled(x).block_until_ready()
    return lambda: compiled(x).block_until_ready()


def traces(directory):
    return list(directory.rglob("*.trace.json.gz"))


def modules(directory):
    """Names of the programs whose operations the only trace shows."""
    (path,) = traces(directory)
    content = json.loads(gzip.decompress(path.read_bytes()))
    found = [event.get("args", {}) for event in content["traceEvents"]]
    return {args["hlo_module"] for args in found if "hlo_op" in args}


def test_second_unit_of_the_first_edge_is_traced(tmp_path):
    trace = PhaseTrace(tmp_path / "profile", "refinement")
    programs = {name: program(name) for name in ("other", "one", "two", "three", "later")}
    with reporter(trace) as shown:
        with shown.phase("reference model", 1) as phase:
            programs["other"]()
            phase.advance()
        with shown.phase("refinement, edge 0", 3) as phase:
            for name in ("one", "two", "three"):
                programs[name]()
                phase.advance()
        with shown.phase("refinement, edge 1", 2) as phase:
            for _ in range(2):
                programs["later"]()
                phase.advance()
    assert modules(tmp_path / "profile") == {"jit_two"}
    (protobuf,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert protobuf.stat().st_size > 1000
    assert trace.report().startswith(f"profile of phase refinement: {tmp_path / 'profile'}")


@pytest.mark.parametrize(("total", "done", "stride"), [(1, 0, 1), (5, 0, 5), (4, 3, 1)])
def test_only_unit_is_traced(tmp_path, total, done, stride):
    trace = PhaseTrace(tmp_path, "pareto search")
    run = program("search")
    with (
        reporter(trace) as shown,
        shown.phase("pareto search", total, done=done, stride=stride) as phase,
    ):
        run()
        phase.advance(total - done)
    assert modules(tmp_path) == {"jit_search"}


def test_failure_in_the_traced_phase_ends_the_trace(tmp_path):
    trace = PhaseTrace(tmp_path, "importance")
    failing = pytest.raises(ZeroDivisionError)
    with reporter(trace) as shown, failing, shown.phase("importance", 1):
        raise ZeroDivisionError
    assert len(traces(tmp_path)) == 1
    with jax.profiler.trace(str(tmp_path / "next")):  # would fail while another one runs
        pass


def test_phase_that_does_not_run_is_reported(tmp_path):
    trace = PhaseTrace(tmp_path, "features")
    with reporter(trace) as shown, shown.phase("importance", 1):
        pass
    assert trace.report() == "no profile: phase features was complete already, so nothing ran"
    assert list(tmp_path.iterdir()) == []


def test_command_line_names_the_phases_before_any_work(tmp_path):
    command = [sys.executable, str(SCRIPT), "smoke", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "--profile", "refine"], capture_output=True, text=True, timeout=120,
        env=os.environ | {"COLUMNS": "400"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "invalid choice 'refine' for argument '--profile'" in done.stdout + done.stderr
    assert "'refinement'" in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--profile"], ["--profile", "refinement"]),
        (["--profile", "--resume"], ["--profile", "refinement", "--resume"]),
        (["--profile", "features", "--seed", "1"], ["--profile", "features", "--seed", "1"]),
        (["--resume"], ["--resume"]),
        ([], []),
    ],
)
def test_profile_without_a_value_is_of_the_refinement(given, expected):
    assert run_acme.profile_value(given) == expected
