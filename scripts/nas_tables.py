"""Tables of docs/NAS.md, each from the JSON that one script wrote; see `make_tables.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Report = dict[str, Any]

Tables = Mapping[str, tuple[str, Callable[[Report], list[str]]]]
"""Name of a table -> the file in docs/ and what makes the table of it."""

CONTENDERS = {
    "nas": "`nas`",
    "nas, all on": "`nas` with an archive of 256 and the hypervolume's history",
    "qdax": "QDax",
    "pymoo": "pymoo",
}


WAYS = {
    "own costs": "`fleet.select`, latency and energy of every device its own",
    "shared costs": "`fleet.select`, all devices alike, limits their own",
}

NETWORKS = {
    "fit": "those fitted to",
    "held_out": "others, of measured widths",
    "between": "others, of widths in between",
}


def measured(report: Report) -> str:
    """One line on how the numbers came about."""
    environment = report.get("environment", report)
    versions = environment.get("versions", environment)
    hardware = environment["hardware"]
    name, changed, _ = environment["commit"].partition("-dirty")
    return (
        f"\n`{report['command']}`, {report['date']}, "
        f"{'changed after ' if changed else ''}commit {name[:9]}, "
        f"{hardware['cpu_cores']} cores of {hardware['cpu']}, JAX {versions['packages']['jax']}."
    )


def quality(report: Report) -> list[str]:
    """Hypervolume of NSGA-II here and in pymoo."""
    rows = [
        "| problem | genes | population | generations | `nas` | pymoo | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        ours, theirs = (f"{row[c]['mean']:.4f} ± {row[c]['std']:.4f}" for c in ("nas", "pymoo"))
        rows.append(
            f"| {row['problem']} | {row['num_genes']} | {row['population']} | "
            f"{row['generations']} | {ours} | {theirs} | {row['ratio']:.3f} |"
        )
    seeds = len(report["seeds"])
    return [
        *rows,
        f"\nMean and standard deviation over {seeds} seeds; pymoo {report['pymoo']}.",
        measured(report),
    ]


def speed(report: Report) -> list[str]:
    """Time of a generation, ours and others'."""
    rows = [
        "| population | contender | ms a generation | times `nas` | seconds to trace and compile | "
        "hypervolume, one seed |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {row['population']} | {CONTENDERS[row['name']]} | {row['ms']:.2f} | "
        f"{row['ratio']:.1f} | {row['compile_seconds']:.1f} | {row['hypervolume']:.3f} |"
        for row in report["rows"]
    ]
    return [*rows, measured(report)]


def alternatives(report: Report) -> list[str]:
    """What else was tried for speed."""
    sizes = [key for key in report["alternatives"][0] if key.startswith("ms_")]
    heads = " | ".join(f"ms, population {key[3:]}" for key in sizes)
    rows = [f"| variant | {heads} | what it is |", "|---" * (2 + len(sizes)) + "|"]
    for row in report["alternatives"]:
        cells = " | ".join(f"{row[key]:.2f}" for key in sizes)
        rows.append(f"| {row['name']} | {cells} | {row['note']} |")
    return rows


def searchers(report: Report) -> list[str]:
    """NSGA-II beside NSGA-III and the controls."""
    names = next(iter(report["cases"].values()))["searchers"]
    rows = [f"| problem (objectives) | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for case in report["cases"].values():
        cells = [
            f"{found['archive']['mean']:.4f} ± {found['archive']['std']:.4f}"
            for found in case["searchers"].values()
        ]
        rows.append(f"| {case['title']} | {' | '.join(cells)} |")
    return [
        *rows,
        f"\nMean and standard deviation over {report['seeds']} seeds; population "
        f"{report['population']}, {report['generations']} generations, archive of "
        f"{report['archive_capacity']} places.",
        measured(report),
    ]


def predictors(report: Report) -> list[str]:
    """Leave-one-out quality of surrogates."""
    rows = [
        "| grid | predictor | RMSE | largest error | Kendall | within 90 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for grid, found in report["grids"].items():
        for name, q in found.items():
            covered = 100 * q["coverage"][report["levels"].index(0.9)]
            rows.append(
                f"| {grid} | {name} | {q['rmse']:.4f} | {q['worst_error']:.4f} | "
                f"{q['kendall_tau']:.2f} | {covered:.0f} % |"
            )
    return [*rows, measured(report)]


def rejection(report: Report) -> list[str]:
    """Gain of searches with early rejection at the last number of evaluations."""
    evaluations = report["population"] * report["checkpoints"][-1]
    rows = [
        f"| error of the problem | search | hypervolume after {evaluations} evaluations | gain ± "
        "standard error | seeds above | Kendall |",
        "|---|---|---|---|---|---|",
    ]
    for problem, found in report["searches"].items():
        for name, row in found.items():
            tau = row["predictor"]["kendall_tau"] if row["predictor"] else None
            rows.append(
                f"| {problem} | {name} | {row['mean'][-1]:.4f} | {row['gain_mean'][-1]:+.4f} ± "
                f"{row['gain_standard_error'][-1]:.4f} | {row['seeds_above_plain'][-1]} of "
                f"{report['seeds']} | {'' if tau is None else f'{tau:.2f}'} |"
            )
    return rows


def fleet(report: Report) -> list[str]:
    """Time of one call that serves a whole fleet."""
    rows = ["| way | seconds, best | median | first call |", "|---|---|---|---|"]
    for name, seconds in report["seconds"].items():
        cells = [
            f"{seconds[key]:.3f}" if key in seconds else ""
            for key in ("best_s", "median_s", "first_s")
        ]
        rows.append(f"| {WAYS.get(name, name)} | {' | '.join(cells)} |")
    return [
        *rows,
        f"\n{report['devices']:,} devices, {report['candidates']} candidates, limits of "
        f"{', '.join(report['limits'])}; {report['nothing_fits']:,} devices are told that nothing "
        f"fits. Choices equal NumPy's: {all(report['equal_to_numpy'].values())}.",
        measured(report),
    ]


def latency(report: Report) -> list[str]:
    """Error of the latency models on sub-networks that they were not fitted to."""
    rows = [
        "| batch | model | networks | mean error | largest | Kendall rank correlation |",
        "|---|---|---|---|---|---|",
    ]
    for batch in report["batches"]:
        for name, model in batch["models"].items():
            for role, e in model["error"].items():
                tau = "" if e["kendall"] is None else f"{e['kendall']:.2f}"
                rows.append(
                    f"| {batch['batch_size']} | {name} | {NETWORKS[role]} | "
                    f"{100 * e['mape']:.1f} % | {100 * e['worst']:.1f} % | {tau} |"
                )
    repeats = ", ".join(
        f"{100 * batch['repeatability']['mape']:.1f} % (batch {batch['batch_size']})"
        for batch in report["batches"]
    )
    return [*rows, f"\nThe machine repeats its own measurements to {repeats}.", measured(report)]


TABLES: Tables = {
    "speed": ("bench_search_speed.json", speed),
    "alternatives": ("bench_search_speed.json", alternatives),
    "quality": ("bench_search_quality.json", quality),
    "searchers": ("compare_searchers.json", searchers),
    "predictors": ("surrogates.json", predictors),
    "rejection": ("surrogates.json", rejection),
    "fleet": ("bench_select.json", fleet),
    "latency": ("profile_cpu.json", latency),
}
