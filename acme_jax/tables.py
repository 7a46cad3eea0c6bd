"""The tables of a finished run: built once from its results, shown on the terminal.

`acme_jax.report` writes the same tables as HTML.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.table
from rich.console import Console
from rich.text import Text

from acme_jax.wording import (
    NONE,
    Results,
    all_methods,
    column,
    compare,
    method,
    method_names,
    percent,
    quantity,
    traffic_rows,
)
from nas.cells import OPS

_WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text_columns: frozenset[int] = frozenset({0})
    """Columns that are aligned left; numbers are aligned right."""
    strong: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of the cells in bold."""


def subnetwork(edge: Mapping[str, Any]) -> str:
    """Blocks, heads and neurons that the edge's backbone keeps, such as "3 / 8 / 448"."""
    if not {"depth", "heads", "neurons", "kept_layers"} <= set(edge):
        return NONE
    heads, neurons = (sum(edge[k][i] for i in edge["kept_layers"]) for k in ("heads", "neurons"))
    return f"{edge['depth']} / {heads} / {neurons}"


def cell_text(cell: Sequence[Sequence[int]]) -> str:
    """A header cell in words: "sep3x3(0) + identity(1); ..." with the nodes read."""
    blocks = (f"{OPS[op_x]}({x}) + {OPS[op_y]}({y})" for x, op_x, y, op_y in cell)
    return "; ".join(blocks)


def methods_table(results: Results) -> Table:
    """Accuracy of every method over all devices."""
    summary = results.get("summary", {})
    names = method_names(summary)
    rows = []
    for name in names:
        row, gain = summary[name], compare(results, name, "no_pruning")
        rows.append(
            (
                method(name).label,
                f"{percent(row['mean'])} ± {percent(row['std'])}",
                percent(row.get("worst_tenth")),
                NONE
                if gain is None or name == "no_pruning"
                else f"{100 * gain.mean:+.1f} ± {100 * gain.spread:.1f}",
                method(name).meaning,
            )
        )
    strong = {
        (place, column)
        for column, key in ((1, "mean"), (2, "worst_tenth"))
        for place in _best([summary[name].get(key) for name in names])
    }
    return Table(
        "Test accuracy by method, %",
        ("method", "mean ± std", "worst tenth", "against no pruning", "what it is"),
        tuple(rows),
        "Mean and standard deviation over devices; worst tenth: mean of the worst 10 % of "
        "devices; against no pruning: mean difference in points and its standard deviation "
        "over devices. Best in bold.",
        frozenset({0, 4}),
        frozenset(strong),
    )


def devices_table(results: Results) -> Table:
    """What each device got and how well it does."""
    names, devices = all_methods(results), results.get("devices", ())
    edges = {edge["edge"]: edge for edge in results.get("edges", ())}
    budget, budgets = column([d.get("budget_bytes") for d in devices], "B")
    size, sizes = column([d.get("size_bytes") for d in devices], "B")
    flops, flop_counts = column([d.get("num_flops") for d in devices], "FLOP")
    latency, latencies = column([d.get("latency_s") for d in devices], "s")
    energy, energies = column([d.get("energy_j") for d in devices], "J")
    rows, strong = [], set()
    for place, device in enumerate(devices):
        total, pruned = device.get("gates_total"), device.get("gates_pruned")
        accuracies = [device["accuracy"].get(name) for name in names]
        rows.append(
            (
                str(device["device"]),
                str(device["edge"]),
                budgets[place],
                subnetwork(edges.get(device["edge"], {})),
                sizes[place],
                flop_counts[place],
                latencies[place],
                energies[place],
                percent(pruned / total, 0) if total and pruned is not None else NONE,
                *(percent(value) for value in accuracies),
            )
        )
        strong |= {(place, 9 + best) for best in _best(accuracies)}
    costs = (f"size {size}", flops, f"latency {latency}", f"energy {energy}", "pruned %")
    return Table(
        "Devices",
        (
            *("device", "edge", f"budget {budget}", "blocks/ heads/ neurons", *costs),
            *(method(name).short for name in names),
        ),
        tuple(rows),
        "Blocks, heads, neurons: what the backbone keeps in all. Size: backbone and pruned "
        "header, float32, 1 kB = 1,000 bytes. FLOP: one sample forward. Latency and energy are "
        "modelled, not measured. Pruned: part of the header's gates. Last columns: test accuracy "
        "in %, the device's best in bold.",
        frozenset({0, 1, 3}),
        frozenset(strong),
    )


def edges_table(results: Results) -> Table:
    """The backbone and the header that each edge's devices share."""
    rows = []
    for edge in results.get("edges", ()):
        kept = edge.get("kept_layers", ())
        rows.append(
            (
                str(edge["edge"]),
                quantity(edge.get("budget_bytes"), "B"),
                quantity(edge.get("size_bytes"), "B"),
                " ".join(str(layer) for layer in kept),
                " ".join(str(edge["heads"][layer]) for layer in kept),
                " ".join(str(edge["neurons"][layer]) for layer in kept),
                quantity(edge.get("num_flops")),
                percent(edge.get("select_accuracy")),
                percent(edge.get("linear_select_accuracy")),
                percent(edge.get("header_select_accuracy")),
                quantity(edge.get("header_params")),
                cell_text(edge.get("cell", ())),
            )
        )
    columns = ("edge", "budget", "backbone size", "blocks kept", "heads", "neurons", "FLOPs")
    header = ("backbone acc.", "linear acc.", "header acc.", "header params", "header cell")
    return Table(
        "Edges",
        columns + header,
        tuple(rows),
        "Heads and neurons: one number for each kept block. Accuracies in % on the select split, "
        "which made the choices: the backbone with the supernet's classifier, with a linear "
        "header, with the searched header. Cell: op(node it reads) + op(node it reads).",
        frozenset({0, 3, 4, 5, 11}),
    )


def quality_table(results: Results) -> Table:
    """What devices reported of their training data, where they were asked."""
    names = ("log_likelihood", "label_entropy", "approximate_entropy", "lempel_ziv_entropy")
    rows = [
        (
            str(row["device"]),
            str(row["edge"]),
            *(NONE if row[name] is None else f"{row[name]:.3f}" for name in names),
        )
        for row in results.get("data_quality", ())
    ]
    return Table(
        "Quality of the devices' data",
        ("device", "edge", "log-likelihood", "label entropy", "ApEn", "Lempel-Ziv"),
        tuple(rows),
        "Nats. Log-likelihood: of a sample by the device's others, a dimension of the edge's "
        "projection; compare devices of one edge. ApEn and Lempel-Ziv: of texts' token sequences. "
        "ApEn of short sequences over many tokens measures their length (all different looks like "
        "constant): read Lempel-Ziv beside it. And runs that differ in depth and width only cannot "
        "tell what the data are worth.",
    )


def traffic_table(results: Results) -> Table:
    """Bytes by tier, direction and kind of message, and the centralised totals."""
    rows = [
        (tier, direction, kind.replace("_", " "), f"{messages:,}", f"{size:,}", "")
        for tier, direction, kind, messages, size in traffic_rows(results)
    ]
    traffic, strong = results.get("traffic", {}), set()
    for direction in ("uplink", "downlink"):
        ours, central = (traffic.get(f"{p}{direction}_bytes") for p in ("", "centralized_"))
        if ours is None:
            continue
        strong |= {(len(rows), column) for column in range(6)}
        share = f"{100 * ours / central:.3g} %" if central else NONE
        rows.append(("all", direction, "ACME total", "", f"{ours:,}", share))
        if central is not None:
            rows.append(("all", direction, "centralised total", "", f"{central:,}", "100 %"))
    return Table(
        "Traffic",
        ("tier", "direction", "message", "messages", "bytes", "of centralised"),
        tuple(rows),
        "Bytes of the encoded messages, all rounds; backbones travel twice, cloud to edge and edge "
        "to device. Centralised: every raw training sample up "
        "(a byte a pixel or of text, one for the label), every finished float32 model down.",
        frozenset({0, 1, 2}),
        frozenset(strong),
    )


def seconds_table(timing: Mapping[str, Any]) -> Table:
    """Wall-clock seconds by phase, compilation apart."""
    phases = timing.get("phases", ())
    rows = []
    for phase in phases:
        seconds, compiling = phase["seconds"], phase.get("compile_seconds") or 0.0
        rows.append(
            (phase["phase"], *(f"{s:.1f}" for s in (seconds - compiling, compiling, seconds)))
        )
    total = timing.get("total_seconds")
    if total is not None:
        compiling = sum(phase.get("compile_seconds") or 0.0 for phase in phases)
        rows.append(("total", *(f"{s:.1f}" for s in (total - compiling, compiling, total))))
    notes = ["The total includes what lies between the phases."] if rows else []
    if timing.get("peak_memory_bytes"):
        notes.append(f"Peak memory {quantity(timing['peak_memory_bytes'], 'B')}.")
    if timing.get("supernet_fraction"):
        notes.append(
            f"Supernet training reached {quantity(timing.get('supernet_flops_per_s'), 'FLOP/s')}, "
            f"{percent(timing['supernet_fraction'], 0)} % of this machine's measured matrix-product"
            f" peak of {quantity(timing.get('matmul_peak_flops_per_s'), 'FLOP/s')}."
        )
    strong = frozenset((len(rows) - 1, column) for column in range(4)) if total else frozenset()
    return Table(
        "Seconds by phase",
        ("phase", "running", "compiling", "seconds"),
        tuple(rows),
        " ".join(notes),
        strong=strong,
    )


def print_results(
    results: Results, timing: Mapping[str, Any], console: Console | None = None
) -> None:
    """Prints the tables; 120 columns suffice, and output to a file uses just those."""
    console = console or Console()
    if not console.is_terminal and console.width < _WIDTH:
        console = Console(file=console.file, width=_WIDTH)
    tables = (devices_table(results), methods_table(results), quality_table(results))
    for table in (*tables, traffic_table(results), seconds_table(timing)):
        if table.rows:
            console.print(_to_rich(table))
            console.print(Text(table.note, "dim"))


def _to_rich(table: Table) -> rich.table.Table:
    wide = len(table.columns) > 8
    view = rich.table.Table(
        title=f"\n{table.title}",
        title_justify="left",
        title_style="bold",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 0 if wide else 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    for place, name in enumerate(table.columns):
        view.add_column(
            # Words below each other keep many columns narrow.
            name.replace(" ", "\n") if wide else name,
            justify="left" if place in table.text_columns else "right",
            no_wrap=place not in table.text_columns,
        )
    for place, row in enumerate(table.rows):
        view.add_row(
            *(
                Text(cell, "bold" if (place, i) in table.strong else "")
                for i, cell in enumerate(row)
            )
        )
    return view


def _best(values: Sequence[float | None]) -> list[int]:
    """Places of the largest value (all of them when tied)."""
    largest = max((value for value in values if value is not None), default=None)
    return [i for i, value in enumerate(values) if value is not None and value == largest]
