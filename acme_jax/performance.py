"""What a round or an epoch costs: seconds, clients and FLOPs per second, memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from acme_jax.benchmark import matmul_peak
from acme_jax.progress import Stopwatch


def resident_bytes() -> int | None:
    """Resident memory of this process now; None where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory(mesh: Mesh | None = None) -> dict[str, int]:
    """Bytes in use by this process.

    Args:
      mesh: whose devices are added up, of this process; None: all of the default backend.

    Returns:
      `host_memory_bytes`, the resident memory, and `device_memory_bytes`, which the backend has
      allocated on the devices; without what is unknown (CPU devices use the host's memory).
    """
    found = {}
    if (resident := resident_bytes()) is not None:
        found["host_memory_bytes"] = resident
    devices = jax.local_devices() if mesh is None else mesh.local_devices
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_in_use" in stat for stat in stats):
        found["device_memory_bytes"] = sum(int(stat["bytes_in_use"]) for stat in stats)
    return found


@functools.lru_cache(maxsize=4)
def measured_peak(mesh: Mesh) -> float:
    """`matmul_peak` [FLOP/s] of the mesh, measured once in a process (about a second)."""
    return matmul_peak(mesh)


@dataclasses.dataclass(frozen=True)
class RoundMeter:
    """Measures units of work that are alike: rounds, epochs.

    meter = RoundMeter(clients=32, flops=2e12, peak_flops_per_second=measured_peak(mesh))
    with meter.measure() as row:
        state = jax.block_until_ready(step(state))
    file.write(json.dumps(row))
    """

    clients: int | None = None
    """That take part in a unit."""
    flops: float | None = None
    """Of a unit, where they are known exactly."""
    peak_flops_per_second: float | None = None
    mesh: Mesh | None = None
    """Of which the device memory is reported; None: all devices of this process."""

    @contextlib.contextmanager
    def measure(self) -> Iterator[dict[str, float]]:
        """Measures the body, which must wait for its results; fills the row when it ends.

        The row has `seconds` and, a part of them, `compile_seconds` (trace, lower, compile);
        `clients_per_second`, `flops_per_second` and `flop_fraction` (of the peak) over the rest
        of the time, as far as they are known; and what `memory` returns.
        """
        row: dict[str, float] = {}
        watch = Stopwatch()
        with watch:
            yield row
        row |= {"seconds": watch.seconds, "compile_seconds": watch.compile_seconds}
        working = max(watch.seconds - watch.compile_seconds, 1e-9)
        if self.clients is not None:
            row["clients_per_second"] = self.clients / working
        if self.flops is not None:
            row["flops_per_second"] = rate = self.flops / working
            if self.peak_flops_per_second is not None:
                row["flop_fraction"] = rate / self.peak_flops_per_second
        row |= memory(self.mesh)
