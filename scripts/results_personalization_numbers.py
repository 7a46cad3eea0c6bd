"""The numbers of the experiment `personalization` that its tables, pictures and claims share."""

from __future__ import annotations

import math
from typing import Any

from acme_jax.experiments.statistics import Estimate, estimate, paired

Document = dict[str, Any]

GROUPS = {"iid": "IID", "c2": "C2", "c3": "C3", "c4": "C4"}
"""The paper's distributions."""
DISTRIBUTIONS = GROUPS | {
    "dirichlet_0.1": "Dirichlet 0.1",
    "dirichlet_0.5": "Dirichlet 0.5",
    "dirichlet_1": "Dirichlet 1",
}
SAMPLED = ("iid", "c3", "dirichlet_0.5")
FEW = (50, 20)
NO_PRUNING, UNEQUAL = "no_pruning", "unequal"
OURS, OURS_PRIOR, EXTENDED = "wasserstein", "wasserstein_prior", "sharing_prior"
METHODS = {
    "edge_header": "edge's header, not trained",
    "edge_header_prior": "the same, with the device's log prior",
    UNEQUAL: "no pruning, the original's schedule (1 epoch, rate / 10)",
    NO_PRUNING: "no pruning",
    "random": "random pruning",
    "alone": "alone",
    "avg": "average",
    "js": "Jensen-Shannon",
    OURS: "ACME: Wasserstein by dimension",
    "flat": "Wasserstein flat (the original)",
    "sliced": "Wasserstein sliced",
    "oracle": "oracle: true label histograms",
    "farthest": "only the most unlike device",
    "no_pruning_prior": "no pruning, log prior",
    OURS_PRIOR: "ACME, log prior",
    EXTENDED: "extended: weights averaged by similarity, log prior",
    "avg_sharing_prior": "weights averaged over all, log prior (FedRS)",
    "fedavg": "FedAvg",
    "fedavg_tuned": "FedAvg, then alone",
    "chosen_paper": "chosen on held-out samples: ACME",
    "chosen_extended": "chosen on held-out samples: ACME or extended",
}
"""What tables call them, in this order."""
REMEDIES = {
    "wasserstein_half": "half of the gates",
    "one_shot": "30 % of the gates after the first round",
    "sharing": "weights averaged by similarity",
    "sharing_prior_pruned": "that, log prior, 30 % of the gates",
}
RIVALS = (
    NO_PRUNING,
    "edge_header_prior",
    "random",
    "alone",
    "avg",
    "js",
    "no_pruning_prior",
    "avg_sharing_prior",
    "fedavg",
    "fedavg_tuned",
)
PAPER_METHODS = ("alone", "avg", "js")
"""What the paper compares with, besides no pruning."""


def column(document: Document, name: str, **wanted: Any) -> list[float]:
    """One column of the rows that are as wanted, one value a seed; NaN where there is none."""
    found = {
        row["seed"]: row.get(name)
        for row in document["rows"]
        if all(row.get(key) == value for key, value in wanted.items())
    }
    values = [found.get(seed) for seed in document["seeds"]]
    return [math.nan if value is None else float(value) for value in values]


def accuracies(document: Document, unit: str, method: str, **wanted: Any) -> list[float]:
    """Test accuracies of a method in a unit, seed by seed."""
    return column(document, "test_accuracy", kind="method", unit=unit, method=method, **wanted)


def difference(
    document: Document, unit: str, method: str, rival: str = NO_PRUNING, **wanted: Any
) -> Estimate:
    """A method minus a rival of the same unit, seed by seed.

    Args:
      document: of the experiment.
      unit: of both.
      method: whose rows `wanted` narrows down, for instance by temperature.
      rival: by its name alone.
      **wanted: see above.
    """
    return paired(accuracies(document, unit, method, **wanted), accuracies(document, unit, rival))


def signs(document: Document, method: str, rivals: tuple[str, ...], units: Any) -> list[int]:
    """For every unit and rival 1 where the method is better, 0 where tied, -1 where worse."""
    return [
        difference(document, unit, method, rival).sign
        for unit in units
        for rival in rivals
        if rival != method
    ]


def mean(document: Document, unit: str, method: str, name: str) -> float:
    """Mean over seeds of any column of a method's rows."""
    return estimate(column(document, name, kind="method", unit=unit, method=method)).mean
