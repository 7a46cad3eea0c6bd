"""Tables, pictures and claims of the experiment `backbone_grid`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from results_backbone_grid_figures import alone_figure, stages_figure
from results_backbone_grid_numbers import (
    STAGES,
    Document,
    Place,
    budget,
    mean_difference,
    mean_of,
    places,
    values,
)
from results_claims import Claim, Verdict, percent

from acme_jax.experiments.statistics import Estimate, estimate, paired

PAPER = {
    (1.0, 1.0): 0.9207, (1.0, 0.75): 0.9060, (1.0, 0.5): 0.8677, (1.0, 0.25): 0.7054,
    (0.75, 1.0): 0.8955, (0.75, 0.75): 0.8723, (0.75, 0.5): 0.8075, (0.75, 0.25): 0.6206,
    (0.5, 1.0): 0.7921, (0.5, 0.75): 0.7337, (0.5, 0.5): 0.6401, (0.5, 0.25): 0.4236,
    (0.25, 1.0): 0.4381, (0.25, 0.75): 0.3990, (0.25, 0.5): 0.3375, (0.25, 0.25): 0.2262,
}  # fmt: skip
"""The paper's Linear column (CIFAR-100), by (depth, width)."""


TOLERANCE = 0.01
"""Accuracy by which "not worse" may be off: where the interval crosses zero, its lower end must lie
above that."""


def accuracy_table(document: Document) -> list[str]:
    """Test accuracy of every sub-network at every stage."""
    lines = [
        "| depth | width | " + " | ".join(STAGES.values()) + " | paper, CIFAR-100 |",
        "|---|---|" + "---|" * (len(STAGES) + 1),
    ]
    for place in places(document):
        cells = [_percent(values(document, stage, place)) for stage in STAGES]
        printed = f"{100 * PAPER[place]:.1f}" if place in PAPER else ""
        lines.append(f"| {place[0]:g} | {place[1]:g} | {' | '.join(cells)} | {printed} |")
    means = [
        percent(estimate(mean_of(document, stage)))
        if all(values(document, stage, place) for place in places(document))
        else ""
        for stage in STAGES
    ]
    of_paper = 100 * sum(PAPER.values()) / len(PAPER)
    lines.append(f"| mean | | {' | '.join(means)} | {of_paper:.1f} |")
    return lines


def difference_table(document: Document) -> list[str]:
    """What each stage adds, and the supernet against networks alone, in points."""
    pairs = {
        "reordered - cut out": ("reordered", "trained"),
        "width distillation - reordered": ("width_adaptive", "reordered"),
        "depth distillation - width": ("elastic", "width_adaptive"),
        "supernet - alone, same compute": ("elastic", "same_compute"),
        "supernet - alone, same epochs": ("elastic", "same_epochs"),
    }
    lines = [
        "| depth | width | " + " | ".join(pairs) + " |",
        "|---|---|" + "---|" * len(pairs),
    ]
    for place in places(document):
        cells = [
            percent(paired(values(document, ours, place), theirs), signed=True)
            if (theirs := values(document, other, place))
            else ""
            for ours, other in pairs.values()
        ]
        lines.append(f"| {place[0]:g} | {place[1]:g} | {' | '.join(cells)} |")
    return lines


def budget_table(document: Document) -> list[str]:
    """What the one supernet and all networks alone cost."""
    names = {
        "supernet": "one supernet: reference model and both distillations",
        "same_compute": "all sub-networks alone, same compute",
        "same_epochs": "all sub-networks alone, same epochs",
    }
    whole = budget(document, "supernet")["train_flops"]
    lines = [
        "| | epochs of a network | training FLOPs | of the supernet's |",
        "|---|---|---|---|",
    ]
    for name, meaning in names.items():
        row = budget(document, name)
        flops = row["train_flops"]
        lines.append(
            f"| {meaning} | {row['epochs']} | {flops / 1e12:.1f} T | {flops / whole:.2f} |"
        )
    return lines


def claims(document: Document) -> list[Claim]:
    """The paper's claims about the backbone, and our goals."""
    found = [*_reordering(document), _untrained(document), _grows(document)]
    found += [_depth_distillation(document), _full_network(document)]
    for length, meaning in (
        ("same_compute", "as all sub-networks alone get together"),
        ("same_epochs", "as many epochs as each sub-network alone"),
    ):
        found.append(_against_alone(document, length, meaning))
    return found


def _reordering(document: Document) -> list[Claim]:
    """One claim for each width below the full one, at full depth."""
    depth = max(place[0] for place in places(document))
    return [
        Claim(
            f"Reordering helps width {place[1]:g} before any width training (depth {depth:g})",
            "82.98 to 86.02 at width 0.9",
            f"{_percent(values(document, 'trained', place))} to "
            f"{_percent(values(document, 'reordered', place))}, "
            f"{percent(gain, signed=True)} points",
            verdict(gain),
        )
        for place in places(document)
        if place[0] == depth and place[1] < 1.0
        for gain in [_gain(document, "reordered", "trained", place)]
    ]


def _untrained(document: Document) -> Claim:
    place = _nearest(document, 1.0, 0.5)
    gain = _gain(document, "width_adaptive", "reordered", place)
    return Claim(
        f"Narrow networks need width distillation (depth {place[0]:g}, width {place[1]:g})",
        "14.77 at width 0.6 without, 84.12 at width 0.5 with",
        f"{_percent(values(document, 'reordered', place))} without, "
        f"{_percent(values(document, 'width_adaptive', place))} with, "
        f"{percent(gain, signed=True)} points",
        verdict(gain),
    )


def _grows(document: Document) -> Claim:
    largest, smallest = _nearest(document, 1.0, 1.0), _nearest(document, 0.0, 0.0)
    gain = paired(values(document, "elastic", largest), values(document, "elastic", smallest))
    return Claim(
        "The full network is better than the smallest, with the classifier of their own",
        "92.07 against 22.62",
        f"{_percent(values(document, 'elastic', largest))} against "
        f"{_percent(values(document, 'elastic', smallest))}, {percent(gain, signed=True)} points",
        verdict(gain),
    )


def _depth_distillation(document: Document) -> Claim:
    gain = mean_difference(document, "elastic", "width_adaptive")
    return Claim(
        "Depth distillation, which the paper's code lacks, improves the mean over the grid",
        "goal",
        f"{percent(estimate(mean_of(document, 'width_adaptive')))} to "
        f"{percent(estimate(mean_of(document, 'elastic')))}, {percent(gain, signed=True)} points",
        verdict(gain),
    )


def _full_network(document: Document) -> Claim:
    gain = _gain(document, "elastic", "trained", _nearest(document, 1.0, 1.0))
    return Claim(
        "Distillation keeps the full network's accuracy",
        "goal",
        f"{percent(gain, signed=True)} points against the reference model",
        not_worse(gain),
    )


def _against_alone(document: Document, length: str, meaning: str) -> Claim:
    gain = mean_difference(document, "elastic", length)
    each = [
        paired(values(document, "elastic", place), alone)
        for place in places(document)
        if (alone := values(document, length, place))
    ]
    worse = sum(difference.sign < 0 for difference in each)
    result = not_worse(gain)
    if result != "fails" and worse:
        result = "partly"
    return Claim(
        f"The supernet is not worse than sub-networks trained alone, with as much training: "
        f"{meaning}",
        "goal",
        f"{percent(gain, signed=True)} points in the mean of {len(each)} sub-networks, worse at "
        f"{worse} of them",
        result,
    )


def verdict(gain: Estimate) -> Verdict:
    """Of a difference that should be positive."""
    return "holds" if gain.sign > 0 else "fails"


def not_worse(gain: Estimate) -> Verdict:
    """Of a difference that should not be negative; a wide interval shows nothing."""
    if gain.sign != 0:
        return "exceeds" if gain.sign > 0 else "fails"
    spread = 0.0 if math.isnan(gain.half_width) else gain.half_width
    if gain.mean - spread > -TOLERANCE:
        return "holds"
    return "fails" if math.isnan(gain.half_width) else "partly"


def _gain(document: Document, ours: str, theirs: str, place: Place) -> Estimate:
    return paired(values(document, ours, place), values(document, theirs, place))


def _nearest(document: Document, depth: float, width: float) -> Place:
    return min(places(document), key=lambda p: abs(p[0] - depth) + abs(p[1] - width))


def _percent(of_seeds: Sequence[float]) -> str:
    return percent(estimate(of_seeds)) if of_seeds else ""


TABLES: dict[str, Callable[[Document], list[str]]] = {
    "backbone_grid": accuracy_table,
    "backbone_grid_differences": difference_table,
    "backbone_grid_budget": budget_table,
}
FIGURES = {"backbone_grid_stages": stages_figure, "backbone_grid_alone": alone_figure}
