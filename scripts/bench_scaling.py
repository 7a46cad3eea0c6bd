"""How clients per second grow with devices and processes, on this machine.

    python scripts/bench_scaling.py --out docs/bench_scaling.json

Runs `train_distributed.py` (FedAvg of the full ViT, equal clients) as one process with 1, 2 and 4
host devices and as two processes with one each. Strong scaling: the same clients on all. Weak
scaling: as many clients for each device. Host devices share the machine's cores: more devices than
cores cannot be faster, and one device alone already uses more than one core.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro

from acme_jax.run_dir import versions

SCRIPT = Path(__file__).with_name("train_distributed.py")
LAYOUTS = ((1, 1), (1, 2), (2, 1), (1, 4))
"""(processes, devices of each)."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    clients: int = 16
    """On all devices together; weak scaling has half of them on a single device."""
    samples: int = 64
    """Of each client."""
    rounds: int = 6
    """Of each run; the first is left out."""
    repeats: int = 2
    """Visits of every layout, in turn with all others; the fastest counts."""
    data: str = "mnist5k"
    patience_s: float = 300.0
    """A run that takes longer is ended."""
    out: Path | None = None
    """JSON file to write; None prints only."""


def measure(arguments: Arguments, processes: int, devices: int, clients: int) -> dict[str, Any]:
    """One run: the median round's rates, and the loss at the end."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "rounds.jsonl"
        command = [sys.executable, str(SCRIPT), "--data", arguments.data,
                   "--clients", str(clients), "--samples", str(arguments.samples),
                   "--alpha", "1000", "--rounds", str(arguments.rounds),
                   "--num-devices", str(devices), "--out", str(out)]  # fmt: skip
        joined = ["--coordinator", address, "--num-processes", str(processes), "--process-id"]
        running = [
            subprocess.Popen(
                command + ([*joined, str(index)] if processes > 1 else []),
                stdout=subprocess.DEVNULL,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
            for index in range(processes)
        ]
        try:
            for process in running:
                if process.wait(arguments.patience_s) != 0:
                    raise SystemExit(f"{shlex.join(command)} failed with {process.returncode}")
        finally:
            for process in running:
                process.kill()
                process.wait()
        rows = [json.loads(row) for row in out.read_text().splitlines()][1:]
    return {
        "processes": processes,
        "devices": processes * devices,
        "clients": clients,
        "clients_per_s": statistics.median(row["clients_per_s"] for row in rows),
        "flop_fraction": statistics.median(row["flop_fraction"] for row in rows),
        "host_rss_bytes": max(sum(row["host_rss_bytes"]) for row in rows),
        "loss": rows[-1]["loss"],
    }


def best_of(arguments: Arguments) -> list[dict[str, Any]]:
    """The fastest run of every layout; first the single device with half of the clients."""
    cases = [(1, 1, arguments.clients // 2), *((*x, arguments.clients) for x in LAYOUTS)]
    best: dict[int, dict[str, Any]] = {}
    for _ in range(arguments.repeats):
        for number, (processes, devices, clients) in enumerate(cases):
            found = measure(arguments, processes, devices, clients)
            print(f"{processes} processes, {found['devices']} devices, {clients} clients: "
                  f"{found['clients_per_s']:.1f} clients/s")  # fmt: skip
            known = best.get(number)
            if known is None or found["clients_per_s"] > known["clients_per_s"]:
                best[number] = found
    return [best[number] for number in range(len(cases))]


def main() -> None:
    """Measures, prints and writes."""
    arguments = tyro.cli(Arguments)
    load_before = os.getloadavg()[0]
    half, one, *others = best_of(arguments)
    for row in (one, *others):
        per_device = row["clients_per_s"] / row["devices"]
        row["strong_efficiency"] = per_device / one["clients_per_s"]
        same_work = row["clients"] / row["devices"] == half["clients"]
        row["weak_efficiency"] = per_device / half["clients_per_s"] if same_work else None
    facts = versions()
    report = {
        "command": shlex.join(["python", "scripts/bench_scaling.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": facts.pop("commit"),
        "hardware": facts.pop("hardware"),
        "load_before": round(load_before, 2),
        "versions": facts,
        "note": f"{len(os.sched_getaffinity(0))} cores; host devices and processes share them, "
        "and one device alone may use more than one core",
        "settings": dataclasses.asdict(arguments) | {"out": str(arguments.out)},
        "half_on_one": half,
        "rows": [one, *others],
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
