"""Times the main job: seconds by phase, memory, FLOP fraction, accuracy over seeds.

    python scripts/bench_main.py [--preset mnist5k] [--seeds 0 1 2] [--out docs/bench_main.json]

Every seed is a cold start in a process of its own (empty run directory, nothing cached).
`scripts/make_tables.py` turns the JSON into the tables of the README.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

SCRIPT = Path(__file__).parent / "run_acme.py"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    preset: str = "mnist5k"
    seeds: tuple[int, ...] = (0, 1, 2)
    out: Path | None = None
    """JSON file to write; None prints only."""


def run_once(preset: str, seed: int) -> dict[str, Any]:
    """One cold run: its results and timing, and the whole process's seconds."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory) / "run"
        command = [sys.executable, str(SCRIPT), preset, "--seed", str(seed), "--run-dir"]
        start = time.perf_counter()
        subprocess.run([*command, str(run_dir)], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        results = json.loads((run_dir / "results.json").read_text())
        timing = json.loads((run_dir / "timing.json").read_text())
    print(f"seed {seed}: {seconds:.1f} s, peak memory {timing['peak_memory_bytes'] / 1e9:.2f} GB")
    for phase in timing["phases"]:
        print(f"  {phase['phase']:<24}{phase['seconds']:>7.1f} s"
              f"  (compile {phase['compile_seconds']:.1f} s)")  # fmt: skip
    print(
        f"  supernet training: {timing['supernet_flops_per_s'] / 1e9:.1f} GFLOP/s, "
        f"{timing['supernet_fraction']:.2f} of the matmul peak "
        f"({timing['matmul_peak_flops_per_s'] / 1e9:.1f} GFLOP/s)"
    )
    return {"seed": seed, "process_seconds": seconds, "timing": timing, "results": results}


def summarise(arguments: Arguments, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the tables need: by seed, and mean and spread over seeds."""
    first = runs[0]["results"]
    methods = list(first["summary"])
    accuracy = {
        method: [run["results"]["summary"][method]["mean"] for run in runs] for method in methods
    }
    phases = {
        phase["phase"]: {
            "seconds": statistics.median(
                next(p["seconds"] for p in run["timing"]["phases"] if p["phase"] == phase["phase"])
                for run in runs
            ),
            "compile_seconds": statistics.median(
                next(
                    p["compile_seconds"]
                    for p in run["timing"]["phases"]
                    if p["phase"] == phase["phase"]
                )
                for run in runs
            ),
        }
        for phase in runs[0]["timing"]["phases"]
    }
    traffic = ("uplink_bytes", "downlink_bytes", "centralized_uplink_bytes",
               "centralized_downlink_bytes")  # fmt: skip
    return {
        "command": f"python scripts/bench_main.py --preset {arguments.preset} --seeds "
        + " ".join(str(seed) for seed in arguments.seeds),
        "date": datetime.date.today().isoformat(),
        "preset": arguments.preset,
        "commit": first["commit"],
        "versions": first["versions"],
        "hardware": first["hardware"],
        "seeds": list(arguments.seeds),
        "process_seconds": [run["process_seconds"] for run in runs],
        "peak_memory_bytes": [run["timing"]["peak_memory_bytes"] for run in runs],
        "matmul_peak_flops_per_s": [run["timing"]["matmul_peak_flops_per_s"] for run in runs],
        "supernet_fraction": [run["timing"]["supernet_fraction"] for run in runs],
        "phases": phases,
        "reference_test_accuracy": [run["results"]["reference"]["test_accuracy"] for run in runs],
        "lowest_grid_test_accuracy": [
            min(cell["test_accuracy"] for cell in run["results"]["grid"]) for run in runs
        ],
        "grids": [run["results"]["grid"] for run in runs],
        "accuracy_by_seed": accuracy,
        "accuracy": {
            method: {
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            }
            for method, values in accuracy.items()
        },
        "traffic": {name: [run["results"]["traffic"][name] for run in runs] for name in traffic},
    }


def main() -> None:
    """Measures, prints and writes."""
    arguments = tyro.cli(Arguments)
    runs = [run_once(arguments.preset, seed) for seed in arguments.seeds]
    summary = summarise(arguments, runs)
    for method, value in summary["accuracy"].items():
        print(f"{method:<16}{100 * value['mean']:6.1f} ± {100 * value['std']:.1f} %")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
