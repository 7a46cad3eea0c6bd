"""Tables, pictures and claims of the experiment `personalization`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure
from results_claims import Claim, Verdict, percent
from results_personalization_figures import differences_figure, parts_figure, samples_figure
from results_personalization_numbers import (
    DISTRIBUTIONS,
    EXTENDED,
    FEW,
    GROUPS,
    METHODS,
    NO_PRUNING,
    OURS,
    PAPER_METHODS,
    REMEDIES,
    RIVALS,
    SAMPLED,
    UNEQUAL,
    Document,
    accuracies,
    column,
    difference,
    mean,
    signs,
)

from acme_jax.experiments.personal_fleet import FORMS
from acme_jax.experiments.personal_methods import TEMPERATURES
from acme_jax.experiments.statistics import Estimate, estimate

GOAL = 0.04
"""Points over no pruning that the paper claims for its method."""
PAPER_GAINS = {
    "iid": (4.0, 2.2),
    "c2": (3.8, 4.0, 5.2),
    "c3": (3.8, 1.6, 2.6),
    "c4": (3.8, 4.0, 3.2),
}
"""Of the paper's three sets of numbers (SPEC 7), in points."""
EVIDENCE = {
    "rank_correlation_similar": "rank correlation of importances, similar devices",
    "rank_correlation_unlike": "the same, unlike devices",
    "same_pruned_similar": "pruned gates in common, similar devices",
    "same_pruned_unlike": "the same, unlike devices",
    "same_pruned_by_chance": "the same by chance",
    "same_pruned_alone_and_ours": "the same, alone and ACME on one device",
    "same_pruned_avg_and_ours": "the same, average and ACME on one device",
    "weight_of_itself": "how much a device listens to itself",
    "weight_of_unlike": "how much to all unlike devices together",
}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def _share(value: Estimate) -> str:
    if math.isnan(value.mean):
        return "-"
    varies = not math.isnan(value.half_width)
    return f"{value.mean:.2f}" + (f" ± {value.half_width:.2f}" if varies else "")


def methods_table(document: Document) -> list[str]:
    """Accuracy of every method under every distribution."""
    rows = [
        [
            name,
            *(percent(estimate(accuracies(document, u, method))) for u in DISTRIBUTIONS),
            f"{mean(document, 'c3', method, 'uplink_bytes') / 1e3:.1f}",
        ]
        for method, name in METHODS.items()
    ]
    return _table(["accuracy, %", *DISTRIBUTIONS.values(), "up, kB a device"], rows)


def differences_table(document: Document) -> list[str]:
    """Every method minus no pruning."""
    rows = [
        [
            name,
            *(percent(difference(document, u, method), signed=True) for u in DISTRIBUTIONS),
        ]
        for method, name in METHODS.items()
        if method != NO_PRUNING
    ]
    return _table(["minus no pruning, points", *DISTRIBUTIONS.values()], rows)


def against_table(ours: str) -> Callable[[Document], list[str]]:
    """One of our methods minus every rival."""

    def table(document: Document) -> list[str]:
        rows = [
            [
                METHODS[rival],
                *(
                    percent(difference(document, unit, ours, rival), signed=True)
                    for unit in DISTRIBUTIONS
                ),
            ]
            for rival in RIVALS
        ]
        return _table([f"{METHODS[ours]}, minus", *DISTRIBUTIONS.values()], rows)

    return table


def worst_table(document: Document) -> list[str]:
    """The worst tenth of the devices."""

    def cell(unit: str, method: str) -> str:
        name = "worst_tenth_test_accuracy"
        return percent(estimate(column(document, name, unit=unit, method=method)))

    shown = (NO_PRUNING, "alone", "avg", OURS, EXTENDED, "fedavg_tuned")
    rows = [[METHODS[m], *(cell(u, m) for u in DISTRIBUTIONS)] for m in shown]
    return _table(["worst tenth, %", *DISTRIBUTIONS.values()], rows)


def samples_table(document: Document) -> list[str]:
    """Fewer training samples: differences to no pruning."""
    units = {
        f"{name}_samples_{samples}": f"{DISTRIBUTIONS[name]}, {samples}"
        for name in SAMPLED
        for samples in FEW
    }
    shown = [
        m
        for m in METHODS
        if m != NO_PRUNING and not math.isnan(accuracies(document, next(iter(units)), m)[0])
    ]
    rows = [[METHODS[NO_PRUNING] + ", %"]]
    rows[0] += [percent(estimate(accuracies(document, unit, NO_PRUNING))) for unit in units]
    rows += [
        [METHODS[m], *(percent(difference(document, u, m), signed=True) for u in units)]
        for m in shown
    ]
    return _table(["minus no pruning, points", *units.values()], rows)


def devices_table(document: Document) -> list[str]:
    """5, 10 and 50 devices, C3: differences to no pruning."""
    units = {"c3_devices_5": "5", "c3": "10", "c3_devices_50": "50"}
    shown = (OURS, EXTENDED, "avg_sharing_prior")
    rows = [[METHODS[m], *(percent(difference(document, u, m), signed=True) for u in units)]
            for m in shown]  # fmt: skip
    return _table(["C3, minus no pruning, points; devices:", *units.values()], rows)


def temperatures_table(document: Document) -> list[str]:
    """Similarities and temperatures, C3: differences to the average of all importances."""
    rows = [
        [
            f"{METHODS.get('wasserstein' if form == 'per_dimension' else form, form)}, few samples",
            *(
                percent(
                    difference(
                        document,
                        "c3_temperatures_few",
                        "wasserstein" if form == "per_dimension" else form,
                        "avg",
                        temperature=tau,
                    ),
                    signed=True,
                )
                for tau in TEMPERATURES
            ),
        ]
        for form in FORMS
    ]
    rows.append(
        [
            f"{METHODS[OURS]}, all samples, minus no pruning",
            *(
                percent(difference(document, "c3_temperatures", OURS, temperature=tau), signed=True)
                for tau in TEMPERATURES
            ),
        ]
    )
    return _table(["minus average, points; tau:", *map(str, TEMPERATURES)], rows)


def remedies_table(document: Document) -> list[str]:
    """What else was tried: differences to no pruning."""
    units = {"c3_remedies": "C3", "dirichlet_0.5_remedies": "Dirichlet 0.5"}
    rows = [
        [name, *(percent(difference(document, u, m), signed=True) for u in units)]
        for m, name in REMEDIES.items()
    ]
    for method, name in (
        ("no_pruning_quarter_rate", "no pruning, a quarter of the rate"),
        ("no_pruning_fourfold_rate", "no pruning, four times the rate"),
    ):
        rows.append([name, percent(difference(document, "c3_remedies", method), signed=True), "-"])
    return _table(["minus no pruning, points", *units.values()], rows)


def evidence_table(document: Document) -> list[str]:
    """How much importances differ between devices."""
    rows = [
        [
            name,
            *(
                _share(estimate(column(document, key, kind="evidence", unit=unit)))
                for unit in DISTRIBUTIONS
            ),
        ]
        for key, name in EVIDENCE.items()
    ]
    return _table(["", *DISTRIBUTIONS.values()], rows)


TABLES: dict[str, Callable[[Document], list[str]]] = {
    "personalization_methods": methods_table,
    "personalization_differences": differences_table,
    "personalization_acme_against": against_table(OURS),
    "personalization_extended_against": against_table(EXTENDED),
    "personalization_worst": worst_table,
    "personalization_samples": samples_table,
    "personalization_devices": devices_table,
    "personalization_temperatures": temperatures_table,
    "personalization_remedies": remedies_table,
    "personalization_evidence": evidence_table,
}
FIGURES: dict[str, Callable[[Document], Figure]] = {
    "personalization_differences": differences_figure,
    "personalization_samples": samples_figure,
    "personalization_parts": parts_figure,
}


def best_or_tied(found: list[int]) -> Verdict:
    """Of signs of differences that should not be negative anywhere."""
    return "holds" if all(sign >= 0 for sign in found) else "fails"


def best(found: list[int]) -> Verdict:
    """Of signs of differences that should be positive everywhere."""
    if all(sign > 0 for sign in found):
        return "holds"
    return "partly" if any(sign > 0 for sign in found) and min(found) >= 0 else "fails"


def gain_verdict(value: Estimate, goal: float) -> Verdict:
    """Of a gain in [0, 1] that should be `goal`."""
    if value.mean >= goal and value.sign > 0:
        return "holds"
    return "partly" if value.sign > 0 else "fails"


def claims(document: Document) -> list[Claim]:
    """The paper's claims, and the goals of this experiment."""
    found = [_best(document, "ACME is the best of alone, average, JS and no pruning", OURS)]
    for unit, name in GROUPS.items():
        least = min(PAPER_GAINS[unit])
        stated = " / ".join(f"+{gain}" for gain in PAPER_GAINS[unit])
        for text, rival in (
            (f"ACME over no pruning, {name}, equal schedule", NO_PRUNING),
            (f"the same, no pruning as the original schedules it, {name}", UNEQUAL),
        ):
            gain = difference(document, unit, OURS, rival)
            verdict = gain_verdict(gain, least / 100)
            found.append(Claim(text, stated, percent(gain, signed=True), verdict))
    every = signs(document, EXTENDED, RIVALS, DISTRIBUTIONS)
    found.append(
        _count("extended ACME best or tied with every rival", "goal", every, best_or_tied(every))
    )
    for unit, name in GROUPS.items():
        value = difference(document, unit, EXTENDED)
        found.append(
            Claim(
                f"extended ACME 4 points over no pruning, {name}",
                "goal",
                percent(value, signed=True),
                gain_verdict(value, GOAL),
            )
        )
    for label, method, rival in (
        ("importance prunes better than chance", "alone", "random"),
        ("similar devices' importances beat the average of all", OURS, "avg"),
    ):
        each = signs(document, method, (rival,), DISTRIBUTIONS)
        found.append(_count(label, "goal", each, best(each)))
    return found


def _best(document: Document, text: str, method: str) -> Claim:
    against = (NO_PRUNING, *PAPER_METHODS)
    found = signs(document, method, against, GROUPS)
    return _count(text, "highest in all settings", found, best(found))


def _count(text: str, paper: str, found: list[int], verdict: Verdict) -> Claim:
    better, tied = (sum(sign == value for sign in found) for value in (1, 0))
    ours = f"better {better}, tied {tied}, worse {len(found) - better - tied} of {len(found)}"
    return Claim(text, paper, ours, verdict)
