"""The directory of compiled programs: the second process compiles nothing."""

import json
import os
import subprocess
import sys

import pytest

from acme_jax import layout
from acme_jax.config import ComputeConfig, ConfigError

PROGRAM = """
import collections, json, sys
import jax, jax.numpy as jnp
from acme_jax import layout
from acme_jax.config import ComputeConfig

layout.configure(ComputeConfig(num_devices=2, compilation_cache=sys.argv[1]))
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
mesh = layout.make_mesh()
x = layout.replicate(jnp.linspace(0.0, 1.0, 64).reshape(8, 8), mesh)
step = jax.jit(lambda x: layout.map_parts(lambda i, x: jnp.tanh(x @ x) * i, 4, mesh, x).sum())
value = float(step(x))
print(json.dumps({"value": value.hex(), "events": events, "devices": len(jax.devices())}))
"""


def run(directory):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(directory)],
        capture_output=True, text=True, timeout=300, env=environment, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def entries(directory):
    return sorted(path.name for path in directory.iterdir() if path.name.endswith("-cache"))


def test_second_process_compiles_nothing(tmp_path):
    directory = tmp_path / "made" / "here"
    first = run(directory)
    kept = entries(directory)
    # However small and fast to compile, every program is kept.
    requests = first["events"]["/jax/compilation_cache/compile_requests_use_cache"]
    assert len(kept) == requests == first["events"]["/jax/compilation_cache/cache_misses"] >= 3
    second = run(directory)
    assert entries(directory) == kept
    assert second["events"]["/jax/compilation_cache/cache_hits"] == requests
    assert "/jax/compilation_cache/cache_misses" not in second["events"]
    assert second["value"] == first["value"]
    assert first["devices"] == second["devices"] == 2


@pytest.mark.parametrize("below", [".", "deeper"])
def test_directory_that_cannot_be_made(tmp_path, below):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / below
    with pytest.raises(ConfigError, match=r"compilation_cache: cannot make the directory .*file"):
        layout.configure(ComputeConfig(compilation_cache=str(path)))


def test_directory_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(layout.os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="cannot be written; choose another directory"):
        layout.configure(ComputeConfig(compilation_cache=str(tmp_path)))
