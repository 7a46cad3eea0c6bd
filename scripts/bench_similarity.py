"""Times all pairs of clients' distances beside NumPy and SciPy, and at thousands of clients.

    python scripts/bench_similarity.py [--out docs/bench_similarity.json]

Every client has 200 samples of 64 features. Contenders run in turn, round after round; medians
are printed, compile time apart. SciPy is measured on a sample of the pairs where there are
many, and scaled. The large cases run in processes of their own, whose peak memory counts.
About a minute and a half on two cores.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
import tyro

from acme_jax import run_dir
from acme_jax.progress import peak_memory_bytes
from fed import similarity

NUM_SAMPLES, NUM_DIMS, NUM_QUANTILES = 200, 64, 32
LARGE_CASES = {"flat": 2, "per_dimension": 2, "js": 1}
"""Timed calls of each; `js` compares sketches of 32 quantiles, the others raw samples."""

Contender = tuple[Callable[[], Any], float, float]
"""What to time, the seconds that compiling took, and by what to multiply its time."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    clients: tuple[int, ...] = (16, 64, 256)
    large: int = 4096
    """Clients of the large cases; 0 leaves them out."""
    rounds: int = 5
    scipy_pairs: int = 100
    """Pairs that SciPy compares in a round at most."""
    seed: int = 0
    out: Path | None = None
    """JSON file to write; None prints only."""


def make_samples(seed: int, num_clients: int, num_samples: int) -> np.ndarray:
    """float32 [C, N, D], normal with means and spreads of every client's own."""
    rng = np.random.default_rng(seed)
    samples = rng.standard_normal((num_clients, num_samples, NUM_DIMS), dtype=np.float32)
    samples *= rng.uniform(0.5, 2.0, (num_clients, 1, NUM_DIMS)).astype(np.float32)
    samples += rng.standard_normal((num_clients, 1, NUM_DIMS), dtype=np.float32)
    return samples


def distances(method: str) -> Callable[[jax.Array], jax.Array]:
    """The library's function: samples [C, N, D] -> [C, C]."""
    if method == "js":
        return similarity.pairwise_js
    key = jax.random.key(0) if method == "sliced" else None
    return functools.partial(similarity.pairwise_wasserstein, method=method, key=key)  # type: ignore[arg-type]


def reduce_last_axis(samples: jax.Array) -> jax.Array:
    """Flat distances the plain way: sorted int32 keys, each row against all, one sum a pair."""
    bits = jax.lax.bitcast_convert_type(samples.reshape(len(samples), -1), jnp.int32)
    keys = jnp.sort(jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits), axis=1)
    bits = jnp.where(keys < 0, keys ^ 0x7FFFFFFF, keys)
    values = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jax.lax.map(lambda own: jnp.abs(values - own[None]).mean(axis=1), values)


def numpy_sort_once(samples: np.ndarray) -> np.ndarray:
    """Flat distances: every client sorted once, then each row against all."""
    values = np.sort(samples.reshape(len(samples), -1), axis=1)
    return np.stack([np.abs(values - own).mean(axis=1) for own in values])


def sample_pairs(seed: int, num_clients: int, count: int) -> np.ndarray:
    """At most `count` of the pairs i < j, int [pairs, 2]."""
    pairs = np.stack(np.triu_indices(num_clients, 1), axis=1)
    chosen = np.random.default_rng(seed).choice(len(pairs), min(count, len(pairs)), replace=False)
    return pairs[chosen]


def scipy_pairs(samples: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Flat distances of these pairs, one after the other, as the original ACME code does."""
    values = samples.reshape(len(samples), -1)
    return np.array([scipy.stats.wasserstein_distance(values[i], values[j]) for i, j in pairs])


def worst_relative_error(result: np.ndarray, samples: np.ndarray, pairs: np.ndarray) -> float:
    """Of flat distances, against SciPy in float64 on these pairs."""
    exact = scipy_pairs(samples.astype(np.float64), pairs)
    return float(np.abs(result[pairs[:, 0], pairs[:, 1]] / exact - 1.0).max())


def compiled(function: Callable[[jax.Array], jax.Array], samples: jax.Array) -> Contender:
    """The function ready to run on these samples."""
    start = time.perf_counter()
    program = jax.jit(function).lower(samples).compile()
    seconds = time.perf_counter() - start
    return lambda: program(samples).block_until_ready(), seconds, 1.0


def compare(arguments: Arguments, num_clients: int) -> list[dict[str, Any]]:
    """Rows of all contenders at one number of clients."""
    host = make_samples(arguments.seed, num_clients, NUM_SAMPLES)
    samples = jnp.asarray(host)
    pairs = sample_pairs(arguments.seed, num_clients, arguments.scipy_pairs)
    num_pairs = num_clients * (num_clients - 1) // 2
    contenders: dict[str, Contender] = {
        method: compiled(distances(method), samples)
        for method in ("flat", "per_dimension", "sliced")
    }
    contenders["flat, sums over the last axis"] = compiled(reduce_last_axis, samples)
    contenders["NumPy, flat, sorted once"] = (lambda: numpy_sort_once(host), 0.0, 1.0)
    contenders["SciPy, flat, pair by pair"] = (
        lambda: scipy_pairs(host, pairs), 0.0, num_pairs / len(pairs),
    )  # fmt: skip
    for call, compile_seconds, _ in contenders.values():
        if compile_seconds:
            call()  # the first call also allocates
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds):
        for name, (call, _, scale) in contenders.items():
            start = time.perf_counter()
            call()
            seconds[name].append(scale * (time.perf_counter() - start))
    rows = []
    for name, (_, compile_seconds, scale) in contenders.items():
        row = {
            "clients": num_clients,
            "name": name,
            "seconds": statistics.median(seconds[name]),
            "seconds_best": min(seconds[name]),
            "seconds_all": seconds[name],
            "compile_seconds": compile_seconds,
            "ratio": statistics.median(seconds[name]) / statistics.median(seconds["flat"]),
        }
        if scale > 1:
            row["scaled_from_pairs"], row["pairs"] = len(pairs), num_pairs
        rows.append(row)
        print(f"{num_clients:>6}  {name:<32}{row['seconds']:10.4f} s (best "
              f"{row['seconds_best']:.4f}), {row['ratio']:7.1f} x, compile "
              f"{compile_seconds:.1f} s", flush=True)  # fmt: skip
    rows[0]["worst_relative_error"] = worst_relative_error(
        np.asarray(contenders["flat"][0]()), host, pairs
    )
    return rows


def work(arguments: Arguments, case: str) -> dict[str, Any]:
    """One large case in this process: seconds of each call, and peak memory."""
    num_samples = NUM_QUANTILES if case == "js" else NUM_SAMPLES
    host = make_samples(arguments.seed, arguments.large, num_samples)
    if case == "js":
        host.sort(axis=1)
    samples = jnp.asarray(host)
    call, compile_seconds, _ = compiled(distances(case), samples)
    seconds = []
    for _ in range(LARGE_CASES[case]):
        start = time.perf_counter()
        result = np.asarray(call())
        seconds.append(time.perf_counter() - start)
    peak = peak_memory_bytes()
    row = {
        "clients": arguments.large,
        "name": case,
        "samples_per_client": num_samples,
        "seconds": statistics.median(seconds),
        "seconds_all": seconds,
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": peak,
        "input_bytes": host.nbytes,
        "result_bytes": result.nbytes,
    }
    if case == "flat":
        pairs = sample_pairs(arguments.seed, arguments.large, 50)
        row["worst_relative_error"] = worst_relative_error(result, host, pairs)
    return row


def measure_large(arguments: Arguments, case: str) -> dict[str, Any]:
    """Runs `work` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        row = pool.submit(work, arguments, case).result()
    print(f"{row['clients']:>6}  {case:<32}{row['seconds']:10.4f} s, compile "
          f"{row['compile_seconds']:.1f} s, peak memory {row['peak_memory_bytes'] / 1e9:.2f} GB "
          f"(input {row['input_bytes'] / 1e9:.2f} GB)", flush=True)  # fmt: skip
    return row


def main() -> None:
    """Measures, prints and writes."""
    arguments = tyro.cli(Arguments)
    # First the large ones: a process starts with the peak memory of the one that started it.
    large = [measure_large(arguments, case) for case in LARGE_CASES] if arguments.large else []
    rows = [row for count in arguments.clients for row in compare(arguments, count)]
    if arguments.out is not None:
        summary = {
            "command": "python " + shlex.join(sys.argv),
            "date": datetime.date.today().isoformat(),
            "environment": run_dir.versions(),
            "scipy": scipy.__version__,
            "numpy": np.__version__,
            "samples_per_client": NUM_SAMPLES,
            "dims": NUM_DIMS,
            "rounds": arguments.rounds,
            "rows": rows,
            "large": large,
        }
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
