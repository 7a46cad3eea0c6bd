"""A claim of the paper (or a goal of ours) beside what was measured."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from acme_jax.experiments.statistics import Estimate

Verdict = Literal["holds", "exceeds", "partly", "fails"]


class Claim(NamedTuple):
    """One row of the table of claims; the verdict is computed, never typed."""

    claim: str
    paper: str
    """The paper's figure, or "goal" where the claim is ours."""
    ours: str
    verdict: Verdict


def percent(value: Estimate, *, signed: bool = False) -> str:
    """An accuracy or a difference of accuracies, in percent (points), with its interval."""
    mean = f"{100 * value.mean:{'+' if signed else ''}.1f}"
    return mean if math.isnan(value.half_width) else f"{mean} ± {100 * value.half_width:.1f}"
