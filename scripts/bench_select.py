"""Times the choice from one archive for a whole fleet, next to two ways of NumPy.

    python scripts/bench_select.py [--devices 100000] [--out docs/bench_select.json]

Every device has its own speed, bandwidth and powers, and its own limits of size, latency and
energy. "shared costs" gives all devices the same latencies and energies. Prints compile time,
the median and the best of the repeated calls, how many devices nothing fitted, and the same
choice in NumPy: vectorised, and a plain loop over the first devices. About 20 s.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from acme_jax import run_dir
from nas import arch, cost, fleet

SPACE = arch.ArchSpace.from_fractions(num_layers=12, num_heads=12, num_neurons=3072)
DIMS = cost.ModelDims(12, 768, 12, 64, 3072, num_tokens=197, patch_dim=768, num_classes=1000)
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    devices: int = 100_000
    candidates: int = 256
    repeats: int = 20
    loop_devices: int = 200
    """Devices that the plain NumPy loop serves; its time is scaled up."""
    seed: int = 0
    out: Path | None = None
    """JSON file to write; None prints only."""


def make_candidates(seed: int, count: int) -> tuple[arch.Arch, jax.Array]:
    """As many sub-networks as an archive has places, and invented errors [A]."""
    key, noise_key = jax.random.split(jax.random.key(seed))
    genomes = arch.sample(key, SPACE, count)
    flops = jax.vmap(lambda a: cost.num_flops(DIMS, a))(genomes)
    noise = 0.02 * jax.random.normal(noise_key, (count,))
    return genomes, 0.2 + 0.5 * jnp.exp(-flops / 1e10) + noise


def make_fleet(seed: int, count: int) -> tuple[cost.DeviceProfile, Arrays]:
    """Profiles and limits, spread over about two orders of magnitude."""
    rng = np.random.default_rng(seed)

    def spread(low: float, high: float) -> jax.Array:
        return jnp.asarray(np.exp(rng.uniform(np.log(low), np.log(high), count)), jnp.float32)

    profiles = cost.DeviceProfile(
        flops_per_s=spread(1e10, 1e12),
        bytes_per_s=spread(2e9, 5e10),
        overhead_s=spread(1e-5, 1e-3),
        idle_power_w=spread(0.5, 5.0),
        energy_per_flop_j=spread(1e-12, 1e-10),
        energy_per_byte_j=spread(1e-11, 1e-9),
    )
    limits = {
        "size_bytes": spread(3e7, 4e8),
        "latency_s": spread(0.02, 4.0),
        "energy_j": spread(0.1, 20.0),
    }
    return profiles, limits


def cost_function(genomes: arch.Arch) -> Callable[[cost.DeviceProfile], Arrays]:
    """Costs of every genome [A] on one device."""

    def costs(profile: cost.DeviceProfile) -> Arrays:
        return {
            "size_bytes": jax.vmap(lambda a: cost.size_bytes(DIMS, a))(genomes),
            "latency_s": jax.vmap(lambda a: cost.latency_s(DIMS, a, profile))(genomes),
            "energy_j": jax.vmap(lambda a: cost.energy_j(DIMS, a, profile))(genomes),
        }

    return costs


def measure(call: Callable[[], Any], repeats: int) -> Arrays:
    """Seconds of a call: the first (which compiles), then median and best."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    first, rest = seconds[0], seconds[1:]
    return {"first_s": first, "median_s": statistics.median(rest), "best_s": min(rest)}


def numpy_vectorised(error: np.ndarray, costs: Arrays, limits: Arrays) -> np.ndarray:
    """Index [C] of the lowest error that fits, A where nothing does; shared costs [A]."""
    fits = np.isfinite(error)[None, :]
    for name, values in costs.items():
        fits = fits & (values[None, :] <= limits[name][:, None])
    index = np.where(fits, error[None, :], np.inf).argmin(axis=1)
    return np.where(fits.any(axis=1), index, len(error))


def numpy_loop(error: np.ndarray, costs: Arrays, limits: Arrays) -> np.ndarray:
    """The same, one device and one candidate at a time."""
    chosen = []
    for device in range(len(next(iter(limits.values())))):
        best, best_error = len(error), np.inf
        for row in range(len(error)):
            if error[row] < best_error and all(
                costs[name][row] <= limits[name][device] for name in costs
            ):
                best, best_error = row, error[row]
        chosen.append(best)
    return np.array(chosen)


def main() -> None:
    """Measures, compares, prints and writes."""
    arguments = tyro.cli(Arguments)
    genomes, error = make_candidates(arguments.seed, arguments.candidates)
    profiles, limits = make_fleet(arguments.seed, arguments.devices)
    costs = cost_function(genomes)
    middle = jax.tree.map(jnp.median, profiles)
    shared = jax.jit(costs)(middle)
    own = jax.jit(
        lambda p, b: fleet.select(error[:, None], costs, b, rule="lowest_error", profiles=p)
    )
    same = jax.jit(lambda c, b: fleet.select(error[:, None], c, b, rule="lowest_error"))
    times = {
        "own costs": measure(lambda: own(profiles, limits), arguments.repeats),
        "shared costs": measure(lambda: same(shared, limits), arguments.repeats),
    }
    host_error = np.asarray(error)
    host_costs, host_limits = (jax.tree.map(np.asarray, tree) for tree in (shared, limits))
    times["NumPy, shared costs"] = measure(
        lambda: numpy_vectorised(host_error, host_costs, host_limits), min(arguments.repeats, 3)
    )
    few = {name: values[: arguments.loop_devices] for name, values in host_limits.items()}
    loop = measure(lambda: numpy_loop(host_error, host_costs, few), 1)
    scale = arguments.devices / len(next(iter(few.values())))
    times["NumPy loop, shared costs, scaled"] = {k: v * scale for k, v in loop.items()}

    index = np.asarray(same(shared, limits).index)
    equal = {
        "vectorised": bool(
            np.array_equal(index, numpy_vectorised(host_error, host_costs, host_limits))
        ),
        "loop": bool(
            np.array_equal(index[: len(few["size_bytes"])], numpy_loop(host_error, host_costs, few))
        ),
    }
    served = own(profiles, limits)
    nothing_fits = int((~served.feasible).sum())
    for name, seconds in times.items():
        print(f"{name:<36}" + "  ".join(f"{k} {v:9.4f}" for k, v in seconds.items()))
    print(f"equal to NumPy: {equal}")
    print(f"devices that nothing fits (own costs): {nothing_fits} of {arguments.devices}")
    line = next(d for d in range(arguments.devices) if not served.feasible[d])
    print(fleet.explain(served, limits, line))
    if arguments.out is not None:
        summary = {
            "command": "python " + " ".join(sys.argv),
            "date": datetime.date.today().isoformat(),
            "environment": run_dir.versions(),
            "devices": arguments.devices,
            "candidates": arguments.candidates,
            "limits": sorted(limits),
            "seconds": times,
            "equal_to_numpy": equal,
            "nothing_fits": nothing_fits,
        }
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
