"""Table of docs/MODELS.md, from the JSON of `bench_full_size.py`; see `make_tables.py`."""

from __future__ import annotations

from nas_tables import Report, Tables, measured


def steps(report: Report) -> list[str]:
    """Seconds and memory of a full-size training step, planned and measured."""
    rows = [
        "| phase | remat | seconds a step | of the matmul peak | planned, GB | XLA says, GB "
        "| the process grew by, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["phases"]:
        sizes = (row[name] for name in ("planned_bytes", "xla_bytes", "process_growth_bytes"))
        rows.append(
            f"| {row['phase']} | {'yes' if row['remat'] else 'no'} | "
            f"{row['seconds_per_step']:.1f} | {row['flop_fraction']:.2f} | "
            + " | ".join(f"{size / 1e9:.2f}" for size in sizes)
            + " |"
        )
    arguments = report["arguments"]
    return [
        *rows,
        f"\nViT-B/16 at 224 x 224 ({report['weights'] / 1e6:.1f} million weights), batch "
        f"{arguments['batch_size']}, {arguments['dtype']}, mean of {arguments['steps']} steps.",
        measured(report),
    ]


TABLES: Tables = {"full_size": ("bench_full_size.json", steps)}
