"""Tables, pictures and claims of the experiment `traffic`."""

from __future__ import annotations

import numpy as np
from results_claims import Claim, Verdict, percent
from results_traffic_figures import accuracy_figure, bytes_figure
from results_traffic_numbers import (
    ALL,
    CENTRAL,
    EXACT,
    FLEET_NAMES,
    GOAL,
    PAPER_SHARE,
    TOLERANCE,
    Document,
    accuracies,
    fraction,
    images_needed,
    inputs,
    loss,
    settings_of,
    total,
    uplink,
)

from acme_jax.experiments.statistics import Estimate, estimate
from acme_jax.experiments.traffic_bytes import ORIGINAL, PAPER_IMAGES, PAPER_TRAIN
from acme_jax.experiments.wire_settings import RECOMMENDED, SETTINGS


def kinds_table(document: Document) -> list[str]:
    """What the run's own refinement sent, by kind of message, and what zlib would make of it."""
    place = inputs(document)[0]
    rows = [
        row
        for row in document["rows"]
        if row["kind"] == "bytes" and row["input"] == place and row["setting"] != CENTRAL
    ]
    lines = [
        "| setting | link | direction | message | messages | bytes | of raw samples | zlib "
        "| values that are zero |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    raw = total(document, place, CENTRAL, "up")
    keys = dict.fromkeys(
        (row["setting"], row["tier"], row["direction"], row["message"]) for row in rows
    )
    for key in sorted(keys, key=lambda k: (list(SETTINGS).index(k[0]), k[2] != "up", k[1], k[3])):
        same = [
            row
            for row in rows
            if (row["setting"], row["tier"], row["direction"], row["message"]) == key
        ]
        size, number, packed = (
            float(np.mean([row[name] for row in same]))
            for name in ("bytes", "messages", "zlib_bytes")
        )
        zeros = [row["zero_share"] for row in same if "zero_share" in row]
        cells = [
            ALL[key[0]],
            key[1],
            key[2],
            key[3].replace("_", " "),
            f"{number:.0f}",
            f"{size:,.0f}",
            fraction(size / raw),
            f"{100 * packed / size:.0f} %",
            f"{100 * np.mean(zeros):.0f} %" if zeros else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def readings_table(document: Document) -> list[str]:
    """Every reading of the paper's 6 %: uplink or total, at each size of images."""
    lines = [
        "| images | how | setting | uplink | without the sketch | total, models included "
        "| all that ACME sends, of raw samples |",
        "|---|---|---|---|---|---|---|",
    ]
    for place in inputs(document):
        raw = total(document, place, CENTRAL, "up")
        whole = total(document, place, CENTRAL)
        for name in settings_of(document, place):
            ours = total(document, place, name)
            up = total(document, place, name, "up")
            bare = total(document, place, name, "up", without="feature_sketch")
            cells = [
                place,
                "encoded shapes" if place in PAPER_IMAGES else "measured in a run",
                "raw features instead of a sketch" if name == ORIGINAL else ALL[name],
                fraction(up / raw),
                fraction(bare / raw),
                fraction(ours / whole),
                fraction(ours / raw),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def accuracy_table(document: Document) -> list[str]:
    """What every setting costs, and the accuracy it loses."""
    lines = [
        "| setting | uplink of a device | of its raw samples | 1 % from ... samples on | "
        + " | ".join(f"{name}: accuracy minus float32, points" for name in FLEET_NAMES.values())
        + " | same gates pruned |",
        "|---|---|---|---|" + "---|" * (len(FLEET_NAMES) + 1),
    ]
    for name, meaning in ALL.items():
        sent = estimate(accuracies(document, "c3", name, "uplink_bytes"))
        same, pruned = (
            accuracies(document, "c3", name, column) for column in ("same_pruned", "pruned")
        )
        differences = [
            percent(estimate(accuracies(document, unit, name, "test_accuracy"))) + " % itself"
            if name == EXACT
            else percent(loss(document, unit, name), signed=True)
            for unit in FLEET_NAMES
        ]
        cells = [
            meaning,
            f"{sent.mean:,.0f} B",
            fraction(uplink(document, name).mean),
            f"{images_needed(document, name):,}",
            *differences,
            f"{100 * sum(same) / sum(pruned):.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def claims(document: Document) -> list[Claim]:
    """The paper's 6 %, and our 1 % without loss."""
    measured, *shapes = inputs(document)
    readings = {
        (place, direction): total(document, place, EXACT, direction)
        / total(document, place, CENTRAL, direction)
        for place in (measured, *shapes)
        for direction in ("up", None)
    }
    holding = [value <= PAPER_SHARE for value in readings.values()]
    found = [
        Claim(
            "What travels is 6 % of centralised training",
            "6 % (formula and image size not given)",
            "uplink "
            + ", ".join(f"{fraction(readings[p, 'up'])} at {p}" for p in (measured, *shapes))
            + "; everything, models included, "
            + ", ".join(f"{fraction(readings[p, None])} at {p}" for p in (measured, *shapes)),
            "holds" if all(holding) else "partly" if any(holding) else "fails",
        )
    ]
    for label, name, share in (
        ("with the devices' own samples", RECOMMENDED, None),
        (f"with the paper's {PAPER_TRAIN:,} samples a device", "log8", PAPER_TRAIN),
    ):
        part = uplink(document, name).mean
        if share is not None:
            part *= accuracies(document, "c3", name, "num_train")[0] / share
        losses = {unit: loss(document, unit, name) for unit in FLEET_NAMES}
        found.append(
            Claim(
                f"Uplink at most 1 % of centralised {label}, no loss of accuracy",
                "goal",
                f"{fraction(part)} ({ALL[name]}); accuracy "
                + ", ".join(
                    f"{percent(value, signed=True)} points ({FLEET_NAMES[unit]})"
                    for unit, value in losses.items()
                ),
                _verdict(part <= GOAL, losses),
            )
        )
    return found


def _verdict(within: bool, losses: dict[str, Estimate]) -> Verdict:
    kept = [value.sign >= 0 and value.mean > -TOLERANCE for value in losses.values()]
    if within and all(kept):
        return "holds"
    return "partly" if within and any(kept) else "fails"


TABLES = {
    "traffic_kinds": kinds_table,
    "traffic_readings": readings_table,
    "traffic_accuracy": accuracy_table,
}
FIGURES = {"traffic_bytes": bytes_figure, "traffic_accuracy": accuracy_figure}
