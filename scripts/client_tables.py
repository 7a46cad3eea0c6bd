"""Tables of what `bench_clients.py` measured, for its output and for the documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nas_tables import Report, Tables, measured

HEADS = (
    "clients", "workload", "contender", "client-steps/s, median", "best", "of peak",
    "ours is times", "start-up s", "peak memory GB",
)  # fmt: skip

CONTENDERS = {
    "bucketed": "ours",
    "plain_loop": "PyTorch, loop over modules",
    "loop": "PyTorch, loop, tuned",
    "func": "PyTorch, `torch.func`",
    "func_processes": "PyTorch, `torch.func`, a process for each core",
    "mixed_bucketed": "ours, sub-networks in 16 buckets",
    "mixed_4_buckets": "ours, sub-networks in 4 buckets",
    "mixed_masked": "ours, masks at full size",
    "mixed_plain_loop": "PyTorch, loop over modules, dense sub-networks",
    "mixed_loop": "PyTorch, loop over dense sub-networks, tuned",
}


def contender_rows(section: dict[str, Any]) -> list[list[str]]:
    """Cells under `HEADS` of one number of clients."""

    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    return [
        [
            str(section["clients"]),
            row["workload"],
            CONTENDERS[row["form"]],
            cell(row["steps_per_s"]["median"], 1),
            cell(row["steps_per_s"]["best"], 1),
            cell(row["fraction_of_peak"], 2),
            cell(row["ours_is_times"], 2),
            cell(row["start_s"], 1),
            cell(row["peak_rss_bytes"] / 1e9, 2),
        ]
        for row in section["contenders"]
    ]


def target_rows(section: dict[str, Any]) -> list[list[str]]:
    """Clients, target, goal, measured, whether met."""
    return [
        [
            str(section["clients"]),
            target["name"],
            f"{target['relation']} {target['goal']:g}",
            f"{target['value']:.2f}",
            "yes" if target["met"] else "no",
        ]
        for target in section["targets"]
    ]


def as_text(section: dict[str, Any]) -> str:
    """Both tables of one number of clients in aligned columns."""
    tables = [
        [[*HEADS], *contender_rows(section)],
        [["clients", "target", "goal", "measured", "met"], *target_rows(section)],
    ]
    lines = []
    for table in tables:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        lines.append("")
    return "\n".join(lines)


def _markdown(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return [lines[0], "|---" * len(heads) + "|", *lines[1:]]


def clients(report: Report) -> list[str]:
    """Speed, memory and start-up of all contenders."""
    rows = [row for section in report["sections"] for row in contender_rows(section)]
    loads = [f"{part['load_before']:.1f}" for part in report["sections"] if "load_before" in part]
    load = f" Load average before: {', '.join(loads)} (0 is an idle machine)." if loads else ""
    return [*_markdown([*HEADS], rows), measured(report) + load]


def client_targets(report: Report) -> list[str]:
    """What was aimed at."""
    rows = [row for section in report["sections"] for row in target_rows(section)]
    return _markdown(["clients", "target", "goal", "measured", "met"], rows)


def clients_table(path: str | Path) -> str:
    """The table of contenders as Markdown, from the JSON that `bench_clients.py` wrote."""
    return "\n".join(clients(json.loads(Path(path).read_text())))


TABLES: Tables = {
    "clients": ("bench_clients.json", clients),
    "client_targets": ("bench_clients.json", client_targets),
}
