"""Why importances of other devices change little: how much they differ, and what that prunes.

Pairs of devices are similar where their label histograms overlap by at least three quarters, and
unlike where they overlap by at most a half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from acme_jax import header_slots
from acme_jax.device import DeviceState
from acme_jax.experiments import personal_fleet
from acme_jax.experiments.personal_fleet import Cohort
from acme_jax.experiments.personal_methods import ALONE, AVG, NO_PRUNING, OURS
from acme_jax.header_layout import HeaderDims
from nas.cells import StaticCell

SIMILAR = 0.25
"""Largest total variation of two similar devices' labels."""
UNLIKE = 0.5
"""Smallest of two unlike ones'."""


def measure(
    states: Mapping[str, DeviceState], cohort: Cohort, dims: HeaderDims, cell: StaticCell
) -> dict[str, Any]:
    """One row of evidence; a value is None where there are no such pairs.

    Importances are those of the devices that prune nothing, smoothed over the rounds. The pruned
    sets are those of `alone`, compared by the part that two of them have in common.

    Args:
      states: of the main comparison's variants, by their names.
      cohort: of the devices.
      dims: of the header.
      cell: of the header.
    """
    gates = header_slots.gate_positions(dims, cell)
    importance = np.asarray(states[NO_PRUNING.name].smoothed)[:, gates]
    alone, avg, ours = (
        np.asarray(states[variant.name].mask)[:, gates] == 0 for variant in (ALONE, AVG, OURS)
    )
    rank = np.corrcoef(stats.rankdata(importance, axis=1))
    common = _common(alone, alone)
    apart = cohort.distances["oracle"]
    others = ~np.eye(len(apart), dtype=bool)
    similar, unlike = others & (apart <= SIMILAR), others & (apart >= UNLIKE)
    heard = personal_fleet.listening(cohort, OURS.listens, OURS.temperature)
    return {
        "rank_correlation_similar": _mean(rank, similar),
        "rank_correlation_unlike": _mean(rank, unlike),
        "same_pruned_similar": _mean(common, similar),
        "same_pruned_unlike": _mean(common, unlike),
        "same_pruned_by_chance": float(alone.mean()),
        "same_pruned_alone_and_ours": float(np.diag(_common(alone, ours)).mean()),
        "same_pruned_avg_and_ours": float(np.diag(_common(avg, ours)).mean()),
        "weight_of_itself": float(np.diag(heard).mean()),
        "weight_of_unlike": float((heard * unlike).sum(axis=1).mean()),
    }


def _common(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Part of the gates that device i's set and device j's have in common: [C, C] of [C, G]."""
    size = np.maximum(first.sum(axis=1), 1)
    return (first.astype(np.float64) @ second.T.astype(np.float64)) / size[:, None]


def _mean(values: np.ndarray, pairs: np.ndarray) -> float | None:
    return float(values[pairs].mean()) if pairs.any() else None
