r"""Measures sliced sub-networks on this machine and fits the cost models to them.

    python scripts/profile_device.py [--preset mnist5k] [--csv docs/latency_cpu.csv] \
        [--out docs/profile_cpu.json] [--batch-sizes 1 32] [--quick]

Prints how far the measured table, the roofline and ACME's own form are from held-out
networks, and writes the measurements (CSV, which `run_acme.py --search.latency-table` reads)
and the fits (JSON). About 2 minutes a batch size on 2 CPU cores, mostly compiling; run it on
an idle machine. `--quick` takes a quarter of the networks and rounds.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import tyro

from acme_jax import latency_csv, presets, profiling
from acme_jax.encoders import EncoderConfig
from acme_jax.fleet import REFERENCE_PROFILE
from acme_jax.run_dir import versions
from acme_jax.starting_point import make_starting_point
from nas.arch import ArchSpace


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    preset: str = "mnist5k"
    """Whose model and search space."""
    batch_sizes: tuple[int, ...] = (1,)
    rounds: int = 16
    """Visits of every network, in turn with all others."""
    calls: int = 20
    """Timed calls of a visit."""
    held_out: int = 24
    """Random networks of the search space, and as many between its choices."""
    seed: int = 0
    quick: bool = False
    """A quarter of the rounds, the calls and the held-out networks, and only the corners of
    the grid of widths."""
    csv: Path | None = None
    out: Path | None = None


def preset_model(name: str, quick: bool) -> tuple[EncoderConfig, ArchSpace]:
    """The full network of a preset and its space; `quick`: its least and greatest widths."""
    config = presets.get(name)
    encoder = make_starting_point(config).encoder
    fractions = config.search.fractions
    if quick:
        fractions = (min(fractions), max(fractions))
    sizes = (encoder.num_layers, encoder.num_heads, encoder.num_neurons)
    return encoder, ArchSpace.from_fractions(*sizes, fractions)


def show(summary: dict[str, Any]) -> None:
    """One table for each batch size."""
    repeat = summary["repeatability"]["mape"]
    print(f"\nbatch size {summary['batch_size']}; the machine repeats itself to {repeat:.1%}")
    print(f"{'model':<10}{'networks':<10}{'MAPE':>8}{'largest':>9}{'bias':>8}"
          f"{'Kendall':>9}{'Spearman':>10}")  # fmt: skip
    for name, model in summary["models"].items():
        for role, e in model["error"].items():
            ranks = [float("nan") if e[k] is None else e[k] for k in ("kendall", "spearman")]
            print(f"{name:<10}{role:<10}{e['mape']:>8.1%}{e['worst']:>9.1%}{e['bias']:>8.1%}"
                  f"{ranks[0]:>9.3f}{ranks[1]:>10.3f}")  # fmt: skip


def main() -> None:
    """Measures, prints and writes."""
    arguments = tyro.cli(Arguments)
    share = 4 if arguments.quick else 1
    encoder, space = preset_model(arguments.preset, arguments.quick)
    networks = profiling.choose_networks(space, arguments.held_out // share, arguments.seed)
    load_before = os.getloadavg()[0]
    measured = [
        profiling.measure(
            encoder, networks, size, rounds=max(2, arguments.rounds // share),
            calls=max(1, arguments.calls // share), seed=arguments.seed, say=print,
        )
        for size in arguments.batch_sizes
    ]  # fmt: skip
    summaries = [
        profiling.summarise(part, profiling.fit_models(part, REFERENCE_PROFILE))
        for part in measured
    ]
    for summary in summaries:
        show(summary)
    facts = versions()
    report = {
        "command": shlex.join(["python", "scripts/profile_device.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": facts.pop("commit"),
        "hardware": facts.pop("hardware"),
        "load_before": round(load_before, 2),
        "versions": facts,
        "preset": arguments.preset,
        "energy": "modelled with assumed power constants; nothing here measures power",
        "batches": summaries,
    }
    if arguments.csv is not None:
        comments = {k: report[k] if isinstance(report[k], str) else json.dumps(report[k])
                    for k in ("command", "date", "commit", "hardware", "versions",
                              "load_before", "preset")}  # fmt: skip
        latency_csv.write(arguments.csv, measured, comments)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
