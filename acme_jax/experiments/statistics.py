"""Means over seeds and paired differences, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean and how far it may be off."""

    mean: float
    half_width: float
    """Of Student's 95 % interval; NaN with one value."""
    std: float
    """Sample standard deviation; NaN with one value."""
    num: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies on one side of zero, else 0: tied."""
        if not abs(self.mean) > self.half_width:
            return 0
        return 1 if self.mean > 0 else -1


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent values, one for each seed, with Student's interval.

    Raises:
      ValueError: no values.
    """
    array = np.asarray(values, np.float64)
    if array.size == 0:
        raise ValueError("no values to take the mean of; expected one for each seed")
    if array.size == 1:
        return Estimate(float(array[0]), math.nan, math.nan, 1)
    std = float(array.std(ddof=1))
    quantile = float(stats.t.ppf(0.5 + LEVEL / 2, array.size - 1))
    return Estimate(float(array.mean()), quantile * std / math.sqrt(array.size), std, array.size)


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """The mean difference ours - theirs of values that belong together, seed by seed.

    Raises:
      ValueError: different numbers of values, or none.
    """
    if len(ours) != len(theirs):
        raise ValueError(
            f"paired values must come in pairs, got {len(ours)} and {len(theirs)}; compare the "
            "same seeds"
        )
    return estimate(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))  # type: ignore[arg-type]
