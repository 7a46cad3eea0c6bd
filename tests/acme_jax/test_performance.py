"""Rates and memory of rounds."""

import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acme_jax import device, header, performance, refine
from acme_jax.config import RefineConfig
from acme_jax.header_layout import HeaderDims
from acme_jax.importance_rounds import LocalState
from acme_jax.layout import make_mesh
from acme_jax.performance import RoundMeter
from fed.clients import Batch


def test_resident_memory_follows_an_allocation():
    before = performance.memory()
    assert set(before) == {"host_memory_bytes"}  # CPU devices have no memory of their own
    block = np.ones(100_000_000, np.uint8)
    assert performance.memory()["host_memory_bytes"] - before["host_memory_bytes"] > 90_000_000
    del block


def test_device_memory_is_added_up_over_the_mesh():
    def fake(**stats):
        return SimpleNamespace(memory_stats=lambda: stats or None)

    mesh = SimpleNamespace(local_devices=[fake(bytes_in_use=3), fake(bytes_in_use=4)])
    assert performance.memory(mesh)["device_memory_bytes"] == 7
    mesh.local_devices.append(fake())
    assert "device_memory_bytes" not in performance.memory(mesh)


def test_rates_leave_compiling_out():
    meter = RoundMeter(clients=10, flops=1e6, peak_flops_per_second=2e8)
    step = jax.jit(lambda x: jnp.linalg.qr(x)[1] @ x)
    with meter.measure() as row:
        step(jnp.ones((3, 3))).block_until_ready()
        time.sleep(0.02)
    assert 0 < row["compile_seconds"] < row["seconds"] - 0.02
    working = row["seconds"] - row["compile_seconds"]
    assert row["clients_per_second"] == pytest.approx(10 / working)
    assert row["flops_per_second"] == pytest.approx(1e6 / working)
    assert row["flop_fraction"] == pytest.approx(1e6 / working / 2e8)
    assert row["host_memory_bytes"] > 2**26


def test_what_is_unknown_is_left_out():
    with RoundMeter().measure() as row:
        pass
    assert set(row) == {"seconds", "compile_seconds", "host_memory_bytes"}
    with RoundMeter(flops=1.0).measure() as row:
        pass
    assert "flops_per_second" in row and not {"flop_fraction", "clients_per_second"} & set(row)


def test_peak_is_measured_once(monkeypatch):
    calls = []
    monkeypatch.setattr(performance, "matmul_peak", lambda mesh: calls.append(mesh) or 1e9)
    performance.measured_peak.cache_clear()
    mesh = make_mesh()
    assert [performance.measured_peak(mesh) for _ in range(2)] == [1e9, 1e9]
    assert calls == [mesh]
    performance.measured_peak.cache_clear()


def test_refinement_flops_agree_with_what_xla_counts():
    """Of one training step in compact form, which has no loops; XLA counts elementwise work too."""
    dims = HeaderDims(
        grid_height=4, grid_width=4, embed_dim=64, channels=32, num_classes=10, blocks=2,
        num_layers=3,
    )  # fmt: skip
    cell = ((0, 4, 1, 3), (2, 3, 0, 4))
    config, batch_size = RefineConfig(), 8
    params = header.init(jax.random.key(0), cell, dims)
    algorithm = device.refinement(dims, config, cell=cell)
    state = device.init_device(params, cell, dims, 1, config, static=True)
    local = LocalState(state, jnp.zeros_like(state.mask), jnp.float32(0.0))
    batch = Batch(
        jnp.zeros((batch_size, 16, dims.embed_dim)),
        jnp.zeros(batch_size, jnp.int32),
        jnp.ones(batch_size),
    )
    counted = jax.jit(algorithm.client_step).lower(local, batch).cost_analysis()["flops"]
    mine = refine.round_flops(dims, cell, batch_size) / len(refine.METHODS)
    assert 0.6 < mine / counted < 1.1
