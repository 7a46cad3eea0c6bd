"""Tables about the refinement's choices: accuracy by similarity, bytes by format and coding.

From the document of `scripts/compare_components.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from results_claims import Claim, percent

from acme_jax.experiments.statistics import estimate, paired

Document = dict[str, Any]

REFERENCE = "per_dimension"
_TITLES = {
    "per_dimension": "Wasserstein, per dimension",
    "flat": "Wasserstein, flat (the original's)",
    "kde": "leave-one-out kernel densities",
    "avg": "plain average",
    "alone": "own importance only",
    "no_pruning": "no pruning",
}


def accuracy(document: Document) -> list[str]:
    """Mean accuracy of the devices and what the exchange before the rounds costs, by similarity."""
    rows = [row for row in document["rows"] if row["kind"] == "accuracy"]

    def by_seed(name: str, field: str) -> list[float]:
        return [
            float(np.mean([r[field] for r in rows if (r["seed"], r["similarity"]) == (seed, name)]))
            for seed in document["seeds"]
        ]

    lines = [
        "| importances mixed by | accuracy, % | minus the first row | bytes up | bytes down |",
        "|---|---|---|---|---|",
    ]
    present = {row["similarity"]: "up_bytes" in row for row in rows}
    for name, travels in present.items():
        found = by_seed(name, "test_accuracy")
        difference = paired(found, by_seed(REFERENCE, "test_accuracy"))
        cells = [
            percent(estimate(found)),
            "" if name == REFERENCE else percent(difference, signed=True),
            *(
                f"{np.mean(by_seed(name, field)):,.0f}" if travels else "0"
                for field in ("up_bytes", "down_bytes")
            ),
        ]
        lines.append(f"| {_TITLES[name]} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"Devices' own test samples, mean over {len(document['seeds'])} seeds; ± is the half width "
        "of the 95 % interval, differences are paired by seed. Bytes of one device, once, before "
        "the rounds.",
    ]


def coding(document: Document) -> list[str]:
    """Bytes that one device sends up in all rounds, by format and lossless coding."""
    rows = [row for row in document["rows"] if row["kind"] == "bytes"]
    codings = [name for name in ("none", "zlib", "zstd", "adaptive") if _has(rows, "coding", name)]
    lines = [
        f"| message | format | {' | '.join(codings)} | adaptive saves |",
        "|---|---|" + "---|" * (len(codings) + 1),
    ]
    devices = len({r["device"] for r in document["rows"] if r["kind"] == "accuracy"})
    for kind, title in (
        ("feature_sketch", "feature sketch, once"),
        ("importance_set", "importance sets, all rounds"),
    ):
        for form in dict.fromkeys(row["format"] for row in rows):
            sizes = [
                np.mean(
                    [
                        row["bytes"] / devices
                        for row in rows
                        if (row["message"], row["format"], row["coding"]) == (kind, form, name)
                    ]
                )
                for name in codings
            ]
            saved = 1 - sizes[codings.index("adaptive")] / sizes[codings.index("none")]
            cells = [*(f"{size:,.0f}" for size in sizes), f"{100 * saved:.0f} %"]
            lines.append(f"| {title} | {form} | {' | '.join(cells)} |")
    left_out = "" if "zstd" in codings else " zstd was not installed."
    return [
        *lines,
        "",
        f"Bytes of one device, mean over {len(document['seeds'])} seeds. zlib (level 9) and zstd "
        "(19) compress every message by itself; adaptive tables learn over the messages of a "
        "device. All are lossless; checksums and headers are included." + left_out,
    ]


def _has(rows: list[dict[str, Any]], field: str, value: str) -> bool:
    return any(row[field] == value for row in rows)


TABLES: dict[str, Callable[[Document], list[str]]] = {
    "components_accuracy": accuracy,
    "components_coding": coding,
}
FIGURES: dict[str, Callable[[Document], Figure]] = {}


def claims(document: Document) -> list[Claim]:
    """None: these are parts of our own."""
    del document
    return []
