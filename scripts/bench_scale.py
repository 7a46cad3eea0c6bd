"""Time and memory of a simulated fleet against the number of its devices.

    python scripts/bench_scale.py [--sizes 1000 10000 100000 1000000] [--out docs/bench_scale.json]

Every size is `scripts/simulate_devices.py` in a process of its own, on data made before. The
picture is written beside the JSON as scale.png. A million devices need 64 MB of disk for their
data and 20 MB for their results.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro

SCRIPT = Path(__file__).parent / "simulate_devices.py"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    sizes: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    repeats: int = 3
    """Runs of each size below 100,000, of which the fastest counts; larger ones run once."""
    data_dir: Path = Path("runs/device-data")
    """Where the devices' data are, or will be."""
    seed: int = 0
    out: Path | None = None
    """JSON file to write; None prints only."""


def run_once(arguments: Arguments, size: int) -> dict[str, Any]:
    """One simulation: what its summary says, and its memory at the first and last cohort."""
    command = [sys.executable, str(SCRIPT), "--devices", str(size), "--data-dir",
               str(arguments.data_dir), "--seed", str(arguments.seed)]  # fmt: skip
    subprocess.run([*command, "--prepare"], check=True)
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((out / "summary.json").read_text())
        lines = (out / "metrics.jsonl").read_text().splitlines()
    resident = [json.loads(line)["host_memory_bytes"] for line in lines]
    return summary | {
        "cohorts": len(lines),
        "rss_first_bytes": resident[0],
        "rss_last_bytes": resident[-1],
    }


def measure(arguments: Arguments) -> dict[str, Any]:
    """The fastest run of every size."""
    rows = []
    for size in arguments.sizes:
        runs = [
            run_once(arguments, size) for _ in range(arguments.repeats if size < 100_000 else 1)
        ]
        best = min(runs, key=lambda run: run["seconds_per_device"])
        environment = best.pop("versions")
        all_runs = [run["seconds_per_device"] for run in runs]
        rows.append(best | {"seconds_per_device_runs": all_runs})
        print(
            f"{size:>9,} devices: {1e6 * best['seconds_per_device']:.0f} us each, compile "
            f"{best['compile_seconds']:.1f} s, peak memory {best['peak_memory_bytes'] / 1e6:.0f} MB"
        )
    return {
        "command": "python scripts/bench_scale.py --sizes "
        + " ".join(str(size) for size in arguments.sizes)
        + f" --seed {arguments.seed}",
        "date": datetime.date.today().isoformat(),
        "environment": environment,
        "repeats": arguments.repeats,
        "rows": rows,
    }


def draw(report: dict[str, Any], path: Path) -> None:
    """Time of a device and memory of the process, against the number of devices."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from acme_jax import plot_style

    devices = [row["devices"] for row in report["rows"]]
    panels = (
        ("Time of one device, compiling apart", "microseconds", "seconds_per_device", 1e6),
        ("Largest resident memory of the process", "MB", "peak_memory_bytes", 1e-6),
    )
    with plt.rc_context(plot_style.RC):
        figure, axes = plt.subplots(1, 2, figsize=(plot_style.WIDTH, 3.2), layout="constrained")
        for axis, colour, (title, unit, key, scale) in zip(
            axes, plot_style.COLOURS, panels, strict=False
        ):
            values = [scale * row[key] for row in report["rows"]]
            axis.plot(devices, values, "o-", color=colour)
            axis.set(title=title, xlabel="devices", ylabel=unit, xscale="log")
            axis.set_ylim(0, 1.25 * max(values))
            for x, y in zip(devices, values, strict=True):
                axis.annotate(f"{y:,.0f}", (x, y), (0, 7), textcoords="offset points", ha="center")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main() -> None:
    """Measures, prints, writes and draws."""
    arguments = tyro.cli(Arguments)
    report = measure(arguments)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        draw(report, arguments.out.with_name("scale.png"))


if __name__ == "__main__":
    main()
