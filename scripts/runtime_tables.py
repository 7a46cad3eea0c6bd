"""Tables of docs/EXPORT.md, from the JSON of `bench_runtime.py`; see `make_tables.py`."""

from __future__ import annotations

from nas_tables import NETWORKS, Report, Tables, measured

MODELS = {
    "onnxruntime table": "table of blocks, fitted to onnxruntime",
    "onnxruntime roofline": "roofline, fitted to onnxruntime",
    "XLA table": "table of blocks, fitted to XLA (docs/latency_cpu.csv)",
    "XLA roofline": "roofline, fitted to XLA (docs/latency_cpu.csv)",
}


def prediction(report: Report) -> list[str]:
    """How far each cost model is from onnxruntime."""
    rows = ["| cost model | networks | mean error | largest | bias | Kendall's tau |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for name, by_role in report["errors"].items():
        for role, error in by_role.items():
            rows.append(
                f"| {MODELS[name]} | {NETWORKS[role]} | {error['mape']:.1%} | "
                f"{error['worst']:.1%} | {error['bias']:+.1%} | {error['kendall']:.2f} |"
            )
    counts = [sum(row["role"] == role for row in report["rows"]) for role in NETWORKS]
    return [
        *rows,
        f"\n{counts[0]} networks fitted to, {counts[1]} and {counts[2]} others. The two halves of "
        f"the measurement differ by {report['repeatability']['mape']:.1%} (Kendall "
        f"{report['repeatability']['kendall']:.2f}): no model can be expected to do better. "
        f"onnxruntime {report['versions']['packages']['onnxruntime']}, one thread, one image.",
        measured(report),
    ]


def networks(report: Report) -> list[str]:
    """Latency and memory of the uniform networks of full depth."""
    rows = [
        "| heads | neurons | parameters | file, kB | latency, µs | by the table | by the roofline "
        "| memory, MB | of which the model |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    empty, deepest = report["empty_process_bytes"], max(row["depth"] for row in report["rows"])
    for row in report["rows"]:
        if row["role"] != "fit" or row["depth"] != deepest:
            continue
        predicted = row["predicted_s"]
        rows.append(
            f"| {row['heads'][0]} | {row['neurons'][0]} | {row['num_params']:,} | "
            f"{row['file_bytes'] / 1e3:.0f} | {1e6 * row['latency_s']:.0f} | "
            f"{1e6 * predicted['onnxruntime table']:.0f} | "
            f"{1e6 * predicted['onnxruntime roofline']:.0f} | {row['peak_bytes'] / 1e6:.1f} | "
            f"{(row['peak_bytes'] - empty) / 1e6:.1f} |"
        )
    return [
        *rows,
        f"\nUniform networks of {deepest} blocks, `{report['preset']}`; memory is the peak of a "
        f"fresh process, of which Python, NumPy and onnxruntime take {empty / 1e6:.1f} MB.",
    ]


TABLES: Tables = {
    "runtime_prediction": ("bench_runtime.json", prediction),
    "runtime_networks": ("bench_runtime.json", networks),
}
