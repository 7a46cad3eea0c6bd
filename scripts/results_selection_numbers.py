"""The numbers of the experiment `selection` that its tables, pictures and claims share."""

from __future__ import annotations

import math
from typing import Any

from acme_jax.experiments.statistics import Estimate, estimate, paired
from acme_jax.plot_style import COLOURS, GREY

Document = dict[str, Any]

LIMIT = 0.8
"""The paper's size limit."""
SEARCHERS = {
    "nsga2_grid": ("NSGA-II from the grid, as in a run", COLOURS[1]),
    "nsga2": ("NSGA-II from random sub-networks", COLOURS[0]),
    "random_grid": ("random search and the grid", COLOURS[2]),
    "random": ("random search", GREY),
}
GOAL_SHARE = 0.99


def column(document: Document, name: str, **wanted: Any) -> list[float]:
    """One column of the rows that are as wanted, one value a seed; NaN where there is none."""
    found = {
        row["seed"]: row.get(name)
        for row in document["rows"]
        if all(row.get(key) == value for key, value in wanted.items())
    }
    values = [found.get(seed) for seed in document["seeds"]]
    return [math.nan if value is None else float(value) for value in values]


def choice(document: Document, unit: str, rule: str, name: str, limit: float = LIMIT) -> Estimate:
    """One column of what a rule chose."""
    values = column(document, name, unit=unit, kind="choice", rule=rule, limit=limit)
    return estimate(values)


def number(value: Estimate, digits: int = 3, *, signed: bool = False) -> str:
    """A mean with its interval; a dash where a seed has none."""
    if math.isnan(value.mean):
        return "-"
    text = f"{value.mean:{'+' if signed else ''}.{digits}f}"
    varies = not math.isnan(value.half_width) and value.half_width >= 0.5 * 10**-digits
    return f"{text} ± {value.half_width:.{digits}f}" if varies else text


def gain(document: Document, rule: str) -> float:
    """How much better the trade-off score is than highest accuracy's, on the paper's candidates."""
    ours, theirs = (choice(document, "paper", r, "trade_off").mean for r in (rule, "lowest_error"))
    return ours / theirs - 1.0


def archive_difference(document: Document, rule: str, name: str) -> Estimate:
    """A rule's choice minus that of highest accuracy on our supernet, seed by seed."""
    ours, theirs = (
        column(document, name, unit="archive", kind="choice", rule=r, limit=LIMIT)
        for r in (rule, "lowest_error")
    )
    return paired(ours, theirs)


def share(document: Document, searcher: str, evaluations: int, name: str = "share") -> Estimate:
    """Hypervolume in the space of single layers, a part of the exhaustive uniform grid's."""
    wanted = {"kind": "per_layer", "searcher": searcher, "evaluations": evaluations}
    return estimate(column(document, name, **wanted))


def steps(document: Document, kind: str, searcher: str) -> list[int]:
    """After how many evaluations a search was measured."""
    return sorted(
        {
            row["evaluations"]
            for row in document["rows"]
            if row["kind"] == kind and row["searcher"] == searcher
        }
    )
