"""Table of time and memory against the number of devices, from the JSON of `bench_scale.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nas_tables import Tables, measured


def scale(report: dict[str, Any]) -> list[str]:
    """Time of a device, memory and accuracy, by the number of devices."""
    rows = [
        "| devices | µs a device | devices/s | seconds | of which compiling | peak memory, MB | "
        "accuracy before, % | after, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        each = row["seconds_per_device"]
        rows.append(
            f"| {row['devices']:,} | {1e6 * each:.0f} | {1 / each:,.0f} | {row['seconds']:.1f} | "
            f"{row['compile_seconds']:.1f} | {row['peak_memory_bytes'] / 1e6:.0f} | "
            f"{100 * row['accuracy_before']:.2f} | {100 * row['accuracy_after']:.2f} |"
        )
    last = report["rows"][-1]
    return [
        *rows,
        f"\nOf each device {last['uplink_bytes_per_device']:,} bytes go up and "
        f"{last['downlink_bytes_per_device']:,} down, the backbone ({last['backbone_bytes']:,}) "
        "apart.",
        measured(report),
    ]


def scale_table(path: Path) -> str:
    """The table of one JSON file, in Markdown."""
    return "\n".join(scale(json.loads(path.read_text())))


TABLES: Tables = {"scale": ("bench_scale.json", scale)}
