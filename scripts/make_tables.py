"""Writes the tables of README.md and the pages in docs from the committed JSON.

    python scripts/make_tables.py

A table stands between `<!-- table:NAME -->` and `<!-- end -->`; nothing there is typed by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import client_tables
import fed_tables
import full_size_tables
import nas_tables
import page
import runtime_tables
import scale_tables
import scaling_tables

from acme_jax.wording import METHODS

ROOT = Path(__file__).resolve().parent.parent


def accuracy(bench: dict[str, Any]) -> list[str]:
    """Mean accuracy of the devices by method, over seeds."""
    rows = ["| method | accuracy on the devices' own test data, % | what it is |", "|---|---|---|"]
    for name, value in bench["accuracy"].items():
        method = METHODS[name]
        mean, spread = 100 * value["mean"], 100 * value["std"]
        rows.append(f"| {method.label} | {mean:.1f} ± {spread:.1f} | {method.meaning} |")
    return rows


def phases(bench: dict[str, Any]) -> list[str]:
    """Seconds by phase, edges added up."""
    totals: dict[str, list[float]] = {}
    for name, value in bench["phases"].items():
        total = totals.setdefault(name.split(",")[0], [0.0, 0.0])
        total[0] += value["seconds"]
        total[1] += value["compile_seconds"]
    rows = ["| phase | seconds | of which compiling |", "|---|---|---|"]
    rows += [
        f"| {name} | {both:.1f} | {compiled:.1f} |" for name, (both, compiled) in totals.items()
    ]
    seconds = sorted(bench["process_seconds"])
    rows.append(f"| whole process, median | {seconds[len(seconds) // 2]:.0f} | |")
    return rows


def facts(bench: dict[str, Any]) -> list[str]:
    """Where and how it was measured, and the figures that need no table."""

    def span(values: list[float], scale: float, digits: int) -> str:
        low, high = (f"{scale * value:.{digits}f}" for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    traffic = bench["traffic"]
    up = [a / b for a, b in zip(traffic["uplink_bytes"], traffic["centralized_uplink_bytes"],
                                strict=True)]  # fmt: skip
    down = [a / b for a, b in zip(traffic["downlink_bytes"], traffic["centralized_downlink_bytes"],
                                  strict=True)]  # fmt: skip
    hardware, versions = bench["hardware"], bench["versions"]
    return [
        f"- Measured on {bench['date']} with seeds {bench['seeds']}: `{bench['command']}`, "
        f"commit {bench['commit'][:9]}, {hardware['cpu_cores']} cores of {hardware['cpu']}, "
        f"Python {versions['python']}, JAX {versions['packages']['jax']}.",
        f"- Reference model on the public test split: "
        f"{span(bench['reference_test_accuracy'], 100, 1)} %; the weakest of the 16 uniform "
        f"sub-networks: {span(bench['lowest_grid_test_accuracy'], 100, 1)} %.",
        f"- Uplink: {span(up, 100, 0)} % of sending every raw training image up; downlink: "
        f"{span(down, 100, 0)} % of sending every finished model down.",
        f"- Peak memory {span(bench['peak_memory_bytes'], 1e-9, 2)} GB; supernet training reaches "
        f"{span(bench['supernet_fraction'], 100, 0)} % of the matrix-product peak measured in the "
        f"same process ({span(bench['matmul_peak_flops_per_s'], 1e-9, 0)} GFLOP/s).",
    ]


MAIN_TABLES: nas_tables.Tables = {
    name: ("bench_main.json", table)
    for name, table in {"accuracy": accuracy, "phases": phases, "facts": facts}.items()
}


def fill(path: Path, tables: nas_tables.Tables) -> None:
    """Fills every table of one page from the JSON in docs/."""
    made = {
        name: table(json.loads((ROOT / "docs" / source).read_text()))
        for name, (source, table) in tables.items()
    }
    page.fill(path, made)


def main() -> None:
    """Fills every page."""
    fill(ROOT / "README.md", MAIN_TABLES)
    fill(ROOT / "docs" / "NAS.md", nas_tables.TABLES)
    for module in (fed_tables, client_tables, scale_tables):
        fill(ROOT / "docs" / "FED.md", module.TABLES)
    fill(ROOT / "docs" / "DISTRIBUTED.md", scaling_tables.TABLES)
    fill(ROOT / "docs" / "EXPORT.md", runtime_tables.TABLES)
    fill(ROOT / "docs" / "MODELS.md", full_size_tables.TABLES)


if __name__ == "__main__":
    main()
