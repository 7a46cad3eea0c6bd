"""From the seconds of `bench_clients.py` to rates, ratios, fractions of the peak and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]

OURS = {False: "bucketed", True: "mixed_bucketed"}
"""What the others are compared with, by whether the workload is mixed."""

GOALS = {
    "plain_loop": 2.3,
    "func": 1.3,
    "func_processes": 1.1,
    "mixed_masked": 2.0,
    "mixed_plain_loop": 2.0,
}
"""How many times as fast as each ours shall be; the tuned loops are shown without a goal."""

FRACTION_GOAL = 0.45
"""Of the matmul peak, homogeneous."""

MEMORY_GOAL = (64, 1.7e9)
"""Clients and bytes, homogeneous."""

MIXED_GOAL = 0.8
"""FLOP/s of the mixed workload, times those of the homogeneous one."""


def is_mixed(form: str) -> bool:
    """Whether the contender does the mixed workload."""
    return form.startswith("mixed_")


def summarise(
    rows: Sequence[Row], num_clients: int, num_steps: int, flops: Mapping[bool, float]
) -> Row:
    """Adds rates, ratios and fractions to each contender's measurements, and the targets.

    Fractions of the peak count the operations of the dense sub-networks, also for a contender
    that masks. The peak is the largest that a JAX worker measured in its own process.

    Args:
      rows: form, seconds by pass, peak_rss_bytes, info and whatever else shall be kept.
      num_clients: C.
      num_steps: of each client in a round.
      flops: mean FLOPs of a client-step, by whether the workload is mixed.
    """
    peak = max((row["info"].get("matmul_peak_flops", 0.0) for row in rows), default=0.0)
    rate = {row["form"]: num_clients * num_steps / np.asarray(row["seconds"]) for row in rows}
    contenders = []
    for row in rows:
        mixed, each = is_mixed(row["form"]), rate[row["form"]]
        ours, median = rate.get(OURS[mixed]), float(np.median(each))
        contenders.append(
            row
            | {
                "workload": "mixed" if mixed else "homogeneous",
                "steps_per_s": {"median": median, "best": float(each.max()), "all": each.tolist()},
                "flops_per_step": flops[mixed],
                "masked_flops_per_step": flops[False],
                "fraction_of_peak": median * flops[mixed] / peak if peak else None,
                "ours_is_times": None if ours is None else float(np.median(ours / each)),
            }
        )
    section: Row = {
        "clients": num_clients,
        "matmul_peak_flops_per_s": peak or None,
        "contenders": contenders,
    }
    if set(OURS.values()) <= set(rate):
        times = rate[OURS[True]] / rate[OURS[False]] * (flops[True] / flops[False])
        section["mixed_times_homogeneous"] = float(np.median(times))
    return section | {"targets": targets(section)}


def targets(section: Mapping[str, Any]) -> list[Row]:
    """What was aimed at beside what was measured, where it was."""
    rows = {row["form"]: row for row in section["contenders"]}
    found: list[tuple[str, float | None, str, float]] = []
    for form, goal in GOALS.items():
        times = rows[form]["ours_is_times"] if form in rows else None
        found.append((f"{OURS[is_mixed(form)]}, times {form}", times, ">=", goal))
    if (ours := rows.get(OURS[False])) is not None:
        fraction = ours["fraction_of_peak"]
        found.append((f"{OURS[False]}, of the matmul peak", fraction, ">=", FRACTION_GOAL))
        clients, limit = MEMORY_GOAL
        if section["clients"] == clients:
            used = ours["peak_rss_bytes"] / 1e9
            found.append((f"{OURS[False]}, peak memory in GB", used, "<=", limit / 1e9))
    times = section.get("mixed_times_homogeneous")
    found.append((f"{OURS[True]}, FLOP/s times those of {OURS[False]}", times, ">=", MIXED_GOAL))
    return [
        {
            "name": name,
            "value": value,
            "relation": relation,
            "goal": goal,
            "met": value >= goal if relation == ">=" else value <= goal,
        }
        for name, value, relation, goal in found
        if value is not None
    ]
