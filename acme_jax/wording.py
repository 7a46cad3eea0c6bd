"""What a run's numbers are called and how they compare: shared by tables, pictures, report.

Everything loops over what the results hold, so a run without some method or edge gives less
to say, not an error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Results = Mapping[str, Any]
"""The dictionary that a run writes to results.json."""
NONE = "–"  # noqa: RUF001 (an en dash marks an empty cell)
_PREFIXES = {1e-9: "n", 1e-6: "µ", 1e-3: "m", 1.0: "", 1e3: "k", 1e6: "M", 1e9: "G", 1e12: "T"}


class Method(NamedTuple):
    """How a method is named: in a narrow column, in a sentence, and what it does."""

    short: str
    label: str
    meaning: str


METHODS: dict[str, Method] = {
    "unpersonalized": Method(
        "unpers.", "unpersonalised model", "the edge's model as sent, not trained on the device"
    ),
    "linear": Method("linear", "linear header", "one linear layer instead of the searched header"),
    "no_pruning": Method("no pr.", "no pruning", "header trained on the device, no gate removed"),
    "alone": Method("alone", "own importance", "gates pruned by the device's own importance"),
    "avg": Method("avg", "plain average", "gates pruned by the edge's average importance"),
    "js": Method("js", "Jensen-Shannon", "importance mixed by Jensen-Shannon similarity of data"),
    "wasserstein": Method("ACME", "ACME", "importance mixed by similarity of the devices' data"),
}


class Comparison(NamedTuple):
    """One method against another on the same devices; accuracies as fractions."""

    mean: float
    """Mean over devices of (accuracy of the method - accuracy of the other)."""
    spread: float
    """Standard deviation over devices of that difference."""
    better: int
    worse: int
    equal: int

    @property
    def within_spread(self) -> bool:
        """Whether the mean difference is no larger than its spread over devices."""
        return abs(self.mean) <= self.spread


def method(name: str) -> Method:
    """The method's names; an unknown one stands for itself."""
    return METHODS.get(name, Method(name, name, ""))


def method_names(present: Mapping[str, Any]) -> list[str]:
    """The methods in `present`, known ones first and in the order of `METHODS`."""
    return [*(m for m in METHODS if m in present), *(m for m in present if m not in METHODS)]


def all_methods(results: Results) -> list[str]:
    """Every method that at least one device of the run was evaluated with."""
    found: dict[str, None] = {}
    for device in results.get("devices", ()):
        found.update(dict.fromkeys(device.get("accuracy", {})))
    return method_names(found)


def compare(results: Results, name: str, other: str) -> Comparison | None:
    """`name` against `other` over the devices that have both; None when no device has."""
    both = [d["accuracy"] for d in results.get("devices", ())]
    gains = [a[name] - a[other] for a in both if name in a and other in a]
    if not gains:
        return None
    better, worse = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
    spread = statistics.pstdev(gains)
    return Comparison(statistics.fmean(gains), spread, better, worse, len(gains) - better - worse)


def quantity(value: float | None, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: 123456, "B" -> "123 kB"."""
    if value is None:
        return NONE
    scale = _scale([value], unit)
    number = float(f"{value / scale:.3g}")
    return f"{number:g} {_PREFIXES[scale]}{unit}".strip()


def column(values: Sequence[float | None], unit: str = "") -> tuple[str, list[str]]:
    """Numbers for one column in a common unit: [362e3, 1.2e6], "B" -> "kB", ["362", "1200"].

    Unit and decimals suit the smallest number, which keeps three significant digits.
    """
    scale = _scale(values, unit)
    scaled = [None if value is None else value / scale for value in values]
    smallest = min((abs(value) for value in scaled if value), default=100.0)
    decimals = min(2, max(0, 2 - math.floor(math.log10(smallest))))
    texts = [NONE if value is None else f"{value:.{decimals}f}" for value in scaled]
    return _PREFIXES[scale] + unit, texts


def _scale(values: Sequence[float | None], unit: str) -> float:
    smallest = min((abs(value) for value in values if value), default=1.0)
    # 0.9995 of a scale already rounds to it with three digits: 999,600 B is "1 MB".
    scale = max((s for s in _PREFIXES if s * 0.9995 <= smallest), default=min(_PREFIXES))
    return max(scale, 1.0) if unit == "B" else scale


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage, without the sign "%"."""
    return NONE if value is None else f"{100 * value:.{digits}f}"


def traffic_rows(results: Results) -> list[tuple[str, str, str, int, int]]:
    """(tier, direction, kind, messages, bytes) summed over rounds, uplink first."""
    sums: dict[tuple[str, str, str], list[int]] = {}
    for record in results.get("traffic", {}).get("records", ()):
        where = sums.setdefault((record["tier"], record["direction"], record["kind"]), [0, 0])
        where[0] += record["messages"]
        where[1] += record["bytes"]
    order = sorted(sums, key=lambda where: (where[1] != "up", where[0], -sums[where][1]))
    return [(*where, sums[where][0], sums[where][1]) for where in order]
