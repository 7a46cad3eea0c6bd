"""ACME's device-edge loop for up to millions of simulated devices, streamed through one program.

    python scripts/simulate_devices.py [--devices 100000] [--out runs/devices] [--KEY VALUE ...]

The devices' data are made in `--data-dir` where they are absent. The same command continues a
run that was stopped or killed. `--help` lists every key.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import tyro

from acme_jax import layout
from acme_jax.config import ComputeConfig, ConfigError, RefineConfig

FORESEEN = ("ConfigError", "DataError", "MappedTreeError", "RunError", "StreamError")
"""Errors whose message is all that a user needs; by name, because they are imported late."""

STOPPED = 143
"""Exit status after SIGTERM or Ctrl-C: 128 + 15, as a shell reports a terminated process."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line of one simulation."""

    devices: int = 100_000
    devices_per_edge: int = 10
    rounds: int = 3
    samples: int = 16
    """Of one device, from Fashion-MNIST; the last quarter is held out."""
    alpha: float = 0.3
    """Of the Dirichlet distribution of a device's labels."""
    cohort_edges: int = 200
    """Edges in one cohort, at most."""
    chunk: int | None = None
    """Devices in one vmap: whole edges of them, or a part of one edge's. None: one edge's on
    CPU, a cohort's on accelerators."""
    num_devices: int | None = None
    """JAX devices; None: every accelerator, or one host device for each CPU core."""
    seed: int = 0
    data_dir: Path = Path("runs/device-data")
    """Where the devices' data are, or will be."""
    fashion_path: str | None = None
    """Directory of the Fashion-MNIST files; None: found by itself."""
    out: Path = Path("runs/devices")
    """Results, metrics and state."""
    compilation_cache: str | None = None
    """Directory in which compiled programs are kept for later runs; None: every run compiles."""
    prepare: bool = False
    """Only make the devices' data."""


def refine_config(rounds: int) -> RefineConfig:
    """Refinement at the size of these devices: 12 training samples, 32 gates.

    A gate a round is about the part that the original prunes: 100 of 1,024 in 10 rounds.
    """
    return RefineConfig(
        rounds=rounds,
        batch_size=4,
        prune_per_round=1,
        num_quantiles=8,
    )


def report(summary: dict[str, Any]) -> str:
    """The summary in four lines."""
    rate = 1.0 / summary["seconds_per_device"]
    return "\n".join(
        (
            f"{summary['devices']:,} devices in {summary['seconds']:.1f} s, of which compiling "
            f"{summary['compile_seconds']:.1f} s: {rate:,.0f} devices/s, peak memory "
            f"{summary['peak_memory_bytes'] / 1e6:.0f} MB",
            f"accuracy on own held-out samples: {100 * summary['accuracy_before']:.2f} % before, "
            f"{100 * summary['accuracy_after']:.2f} % after; {summary['gates_kept']:.1f} of "
            f"{summary['gates']} gates kept",
            f"bytes of a device: {summary['uplink_bytes_per_device']:,} up, "
            f"{summary['downlink_bytes_per_device']:,} down, and the backbone once: "
            f"{summary['backbone_bytes']:,}",
            f"on public images the backbone had {100 * summary['backbone_accuracy']:.1f} %, the "
            f"header {100 * summary['header_accuracy']:.1f} %",
        )
    )


def run(arguments: Arguments) -> int:
    """Simulates; returns the exit status."""
    layout.configure(
        ComputeConfig(
            num_devices=arguments.num_devices, compilation_cache=arguments.compilation_cache
        )
    )
    # Imported late: the layout must be set before JAX starts.
    from acme_jax import device_store, feature_pool, fleet_simulation
    from acme_jax.device_store import StoreConfig
    from acme_jax.progress import Reporter, stop_on_signals

    store = StoreConfig(arguments.devices, arguments.samples, arguments.alpha, arguments.seed)
    config = fleet_simulation.SimulationConfig(
        store,
        refine_config(arguments.rounds),
        arguments.devices_per_edge,
        arguments.cohort_edges,
        arguments.chunk,
    )
    if arguments.prepare:
        pool = feature_pool.open_or_make(
            arguments.data_dir, arguments.seed, path=arguments.fashion_path
        )
        device_store.open_or_make(arguments.data_dir, store, pool)
        return 0
    with Reporter() as reporter, stop_on_signals() as stop:
        summary = fleet_simulation.simulate(
            config,
            arguments.data_dir,
            arguments.out,
            reporter,
            stop,
            num_devices=arguments.num_devices,
            fashion_path=arguments.fashion_path,
        )
    if summary is None:
        print("stopped; the same command continues", file=sys.stderr)
        return STOPPED
    print(report(summary))
    return 0


def main(argv: list[str]) -> int:
    """Parses the command line, runs, and turns every foreseen error into one line."""
    try:
        return run(tyro.cli(Arguments, args=argv))
    except Exception as error:
        if type(error).__name__ in FORESEEN or isinstance(error, ConfigError | OSError):
            print(f"error: {error}", file=sys.stderr)
            return 2
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
