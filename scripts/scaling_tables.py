"""The table of docs/DISTRIBUTED.md, from the JSON of `bench_scaling.py`; see `make_tables.py`."""

from __future__ import annotations

from nas_tables import Report, Tables, measured


def scaling(report: Report) -> list[str]:
    """Clients per second by layout, and how efficient it is."""
    rows = [
        "| processes | devices | clients/s | of the matmul peak | strong scaling | weak scaling | "
        "memory of all processes, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        weak = row["weak_efficiency"]
        rows.append(
            f"| {row['processes']} | {row['devices']} | {row['clients_per_s']:.0f} | "
            f"{row['flop_fraction']:.2f} | {row['strong_efficiency']:.2f} | "
            f"{'' if weak is None else f'{weak:.2f}'} | {row['host_rss_bytes'] / 1e9:.2f} |"
        )
    settings = report["settings"]
    return [
        *rows,
        f"\nStrong scaling: {settings['clients']} clients of {settings['samples']} images on all; "
        f"weak: {report['half_on_one']['clients']} clients a device. Both are clients per second "
        f"and device, relative to one device. {report['note'].capitalize()}.",
        measured(report),
    ]


TABLES: Tables = {"scaling": ("bench_scaling.json", scaling)}
