"""Tables of what `fed` measures, each from the JSON that one script wrote; see `make_tables.py`."""

from __future__ import annotations

import json
from pathlib import Path

from nas_tables import Report, Tables, measured

DISTANCES = {
    "flat": "`pairwise_wasserstein`, `flat`",
    "per_dimension": "`pairwise_wasserstein`, `per_dimension`",
    "sliced": "`pairwise_wasserstein`, `sliced`, 50 projections",
    "js": "`pairwise_js` of quantile sketches",
    "flat, sums over the last axis": "JAX, `flat`, sorted int32 keys, sums over the last axis",
    "NumPy, flat, sorted once": "NumPy, `flat`, every client sorted once",
    "SciPy, flat, pair by pair": "SciPy, `flat`, pair by pair",
}


def similarity(report: Report) -> list[str]:
    """Seconds for all pairs of clients, by way and number of clients."""
    counts = sorted({row["clients"] for row in report["rows"]})
    found = {(row["name"], row["clients"]): row for row in report["rows"]}
    heads = " | ".join(f"{count} clients" for count in counts)
    rows = [f"| seconds for all pairs | {heads} | times `flat` |", "|---" * (len(counts) + 2) + "|"]
    for name in dict.fromkeys(row["name"] for row in report["rows"]):
        own = [found[name, count] for count in counts]
        cells = [
            f"{row['seconds']:.4f}{' (scaled)' if 'scaled_from_pairs' in row else ''}"
            for row in own
        ]
        rows.append(f"| {DISTANCES[name]} | {' | '.join(cells)} | {own[-1]['ratio']:.1f} |")
    scaled = {row["scaled_from_pairs"] for row in report["rows"] if "scaled_from_pairs" in row}
    note = "; scaled from " + " and ".join(f"{n} pairs" for n in sorted(scaled)) if scaled else ""
    worst = max(
        row["worst_relative_error"]
        for row in report["rows"] + report["large"]
        if "worst_relative_error" in row
    )
    return [
        *rows,
        f"\n{report['samples_per_client']} samples of {report['dims']} features a client; medians "
        f"of {report['rounds']} rounds in turn{note}. The last column is for {counts[-1]} clients. "
        f"Largest relative difference of `flat` from SciPy in float64: {worst:.1e}.",
        measured(report),
    ]


def similarity_large(report: Report) -> list[str]:
    """Seconds and memory at thousands of clients."""
    rows = [
        "| distances | clients | samples each | seconds | peak memory, GB | input, GB | "
        "result, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["large"]:
        sizes = (f"{row[f'{name}_bytes'] / 1e9:.2f}" for name in ("peak_memory", "input", "result"))
        rows.append(
            f"| {DISTANCES[row['name']]} | {row['clients']:,} | {row['samples_per_client']} | "
            f"{row['seconds']:.1f} | {' | '.join(sizes)} |"
        )
    return [*rows, "\nThe memory is that of the whole process, JAX included.", measured(report)]


def similarity_table(path: Path) -> str:
    """Both tables of a `bench_similarity.json`."""
    report = json.loads(path.read_text())
    return "\n".join([*similarity(report), "", *similarity_large(report)])


TABLES: Tables = {
    "similarity": ("bench_similarity.json", similarity),
    "similarity_large": ("bench_similarity.json", similarity_large),
}
