"""A simulation of a large fleet: cohorts of edges from the store to results on disk, resumable.

The output directory holds

```
settings.json   what determines the results; a directory continues with the same only
results/        memory-mapped arrays [edges, devices of an edge] (`fed.mapped`)
metrics.jsonl   a line for each cohort: rate, memory
state.json      cohorts done and seconds spent, written after the results of each
summary.json    at the end
```
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from acme_jax import device_store, feature_pool, layout
from acme_jax.config import ConfigError, RefineConfig
from acme_jax.device_store import EdgeSource, StoreConfig
from acme_jax.fleet_refinement import DeviceResults, FleetSetup, Shared, make_step, traffic
from acme_jax.performance import memory
from acme_jax.progress import Phase, Reporter, StopFlag, peak_memory_bytes
from acme_jax.run_dir import RunError, differences, versions, write_json
from fed import mapped, stream

PHASE = "devices"


@dataclasses.dataclass(frozen=True)
class SimulationConfig:
    """What determines the results, and how the work is cut.

    Raises:
      ConfigError: a number that is not positive.
    """

    store: StoreConfig
    refine: RefineConfig
    devices_per_edge: int
    cohort_edges: int
    """At most this many edges in a cohort; the number is rounded up to whole chunks."""
    chunk: int | None = None
    """Devices in one `vmap`; None: those of one edge on CPU, where larger programs are no
    faster, and all of a cohort on accelerators."""

    def __post_init__(self) -> None:
        for name in ("devices_per_edge", "cohort_edges", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be positive, got {value}")


def simulate(
    config: SimulationConfig,
    data_dir: Path,
    out: Path,
    reporter: Reporter,
    stop: StopFlag,
    *,
    num_devices: int | None = None,
    fashion_path: str | None = None,
) -> dict[str, Any] | None:
    """Runs, or continues, a simulation.

    Args:
      config: of the simulation.
      data_dir: of the devices' data; made where it is absent.
      out: of the results.
      reporter: shows progress.
      stop: asks to save and stop.
      num_devices: JAX devices; None: all.
      fashion_path: of the Fashion-MNIST files; None: found by itself.

    Returns:
      The summary, or None: stopped, and the same call continues.

    Raises:
      ConfigError: numbers that do not fit each other.
      MappedTreeError: damaged or other data.
      RunError: `out` holds something else.
    """
    mesh = layout.make_mesh(num_devices)
    setup = FleetSetup(feature_pool.CELL, feature_pool.DIMS, config.refine)
    out.mkdir(parents=True, exist_ok=True)
    _check_same(out, config)
    seed = config.store.seed
    pool = feature_pool.open_or_make(data_dir, seed, path=fashion_path, log=reporter.say)
    devices = device_store.open_or_make(data_dir, config.store, pool, reporter.say)
    source = EdgeSource(pool, devices, config.devices_per_edge)
    chunk = config.chunk or _default_chunk(config, mesh.devices.flat[0].platform)
    cohort_size = _cohort_size(config, chunk, len(source), mesh.size)
    results, state = _open_results(out, len(source), config.devices_per_edge, cohort_size)
    step = make_step(setup, mesh, chunk_size=chunk)
    before = dict(state)
    done = min(state["cohorts"] * cohort_size, len(source)) * config.devices_per_edge
    with reporter.phase(PHASE, config.store.devices, done=done) as phase:
        recorder = _Recorder(out, state, config.devices_per_edge, phase, stop)
        streamed = stream.run_cohorts(
            step,
            Shared(pool.header, jax.random.key(seed)),
            source,
            cohort_size,
            sink=stream.ArraySink(DeviceResults(**cast(Any, results))),
            first=state["cohorts"],
            sharding=NamedSharding(mesh, PartitionSpec(layout.AXIS)),
            on_cohort=recorder,
        )
    # Compile time is known when the phase has ended; the state keeps it apart.
    timing = reporter.timer.records[-1]
    compiled = before["compile_seconds"] + timing.compile_seconds
    state |= {"seconds": before["seconds"] + timing.seconds, "compile_seconds": compiled}
    write_json(out / "state.json", state)
    if streamed.cohorts * cohort_size < len(source):
        return None
    sizes = traffic(setup, pool.header)
    summary = {
        "devices": config.store.devices,
        "edges": len(source),
        "seconds": state["seconds"],
        "compile_seconds": compiled,
        "seconds_per_device": (state["seconds"] - compiled) / config.store.devices,
        "peak_memory_bytes": peak_memory_bytes(),
        "cohort_edges": cohort_size,
        "jax_devices": mesh.size,
        **_accuracies(results),
        "gates": setup.num_gates,
        "uplink_bytes_per_device": sizes.uplink,
        "downlink_bytes_per_device": sizes.downlink,
        **pool.facts,
        "versions": versions(),
    }
    write_json(out / "summary.json", summary)
    return summary


class _Recorder:
    """After each cohort: a line of metrics, then the counter; progress; whether to stop."""

    def __init__(
        self,
        out: Path,
        state: dict[str, Any],
        devices_per_edge: int,
        phase: Phase,
        stop: StopFlag,
    ) -> None:
        self._out, self._state, self._phase, self._stop = out, state, phase, stop
        self._each = devices_per_edge
        self._before = state["seconds"]
        self._start = self._last = time.perf_counter()

    def __call__(self, done: stream.Done) -> bool:
        now = time.perf_counter()
        devices = len(done.rows) * self._each
        rate = devices / (now - self._last)  # of the first cohort: with compiling
        row = {
            "cohort": done.number,
            "devices": devices,
            "devices_per_s": rate,
            "accuracy_before": float(np.mean(done.results.accuracy_before)),
            "accuracy_after": float(np.mean(done.results.accuracy_after)),
            **memory(),
        }
        with (self._out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._state["cohorts"] = done.number + 1
        self._state["seconds"] = self._before + now - self._start
        write_json(self._out / "state.json", self._state)
        self._last = now
        self._phase.advance(devices, f"{rate:,.0f} devices/s")
        return self._stop.requested


def _default_chunk(config: SimulationConfig, platform: str) -> int:
    edges = 1 if platform == "cpu" else config.cohort_edges
    return edges * config.devices_per_edge


def _cohort_size(config: SimulationConfig, chunk: int, num_edges: int, mesh_size: int) -> int:
    """Edges of a cohort: whole chunks on every JAX device, not more than are needed."""
    wanted = min(config.cohort_edges, num_edges)
    each = min(max(chunk // config.devices_per_edge, 1), -(-wanted // mesh_size))
    return -(-wanted // (each * mesh_size)) * each * mesh_size


def _check_same(out: Path, config: SimulationConfig) -> None:
    path, asked = out / "settings.json", dataclasses.asdict(config)
    if path.exists():
        stored = json.loads(path.read_text())
        if stored != asked:
            raise RunError(
                f"{out} holds another simulation: {differences(stored, asked)}; choose another "
                "--out, or set these as there"
            )
    elif others := sorted(p.name for p in out.iterdir()):
        raise RunError(
            f"{out} holds files but no simulation ({', '.join(others[:3])}); choose another --out "
            "or empty it"
        )
    else:
        write_json(path, asked)


def _open_results(
    out: Path, num_edges: int, each: int, cohort_size: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The result arrays and the state, new or of an earlier start."""
    kinds = dict.fromkeys(DeviceResults._fields, "i4") | {
        "accuracy_before": "f4",
        "accuracy_after": "f4",
    }
    template = {name: mapped.ArraySpec((num_edges, each), kind) for name, kind in kinds.items()}
    path, metrics = out / "state.json", out / "metrics.jsonl"
    if not path.exists():
        shutil.rmtree(out / "results", ignore_errors=True)  # of a start killed before its state
        with mapped.building(out / "results", template):
            pass  # zeros; a hole in the file until a cohort is written
        metrics.unlink(missing_ok=True)
        state = {
            "cohorts": 0, "cohort_size": cohort_size, "seconds": 0.0, "compile_seconds": 0.0
        }  # fmt: skip
        write_json(path, state)
    state = json.loads(path.read_text())
    if state["cohort_size"] != cohort_size:
        raise RunError(
            f"{out} was started with cohorts of {state['cohort_size']} edges, now they would have "
            f"{cohort_size}; use as many JAX devices as then, or choose another --out"
        )
    if metrics.exists():  # without the line of a cohort that was not counted any more
        lines = metrics.read_text().splitlines(keepends=True)
        metrics.write_text("".join(lines[: state["cohorts"]]))
    return mapped.open_tree(out / "results", template, mode="r+").tree, state


def _accuracies(results: dict[str, np.ndarray], block: int = 65536) -> dict[str, float]:
    """Means over the devices, read in blocks."""
    means = {}
    for name in ("accuracy_before", "accuracy_after", "gates_kept"):
        leaf = results[name]
        total = sum(
            float(np.sum(mapped.fresh(leaf)[i : i + block], dtype=np.float64))
            for i in range(0, len(leaf), block)
        )
        means[name] = total / leaf.size
    return means
