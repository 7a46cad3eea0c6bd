"""Rules that choose one backbone among candidates within a size limit, and how they are judged.

Accuracy A counts as it is; size S, latency T and energy E run from 0 to 1 over all candidates. The
paper judges a choice by MER = A / S, EER = A / E and its trade-off score A - (S + E) / 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from acme_jax.experiments.paper_candidates import Candidates
from nas import pareto

DIVISIONS = 10
"""Of the grid, along each of its objectives 1 - A, T and E."""


class Box(NamedTuple):
    """What the grid divides, and where the ideal point is, in (1 - A, T, E)."""

    ideal: tuple[float, ...]
    nadir: tuple[float, ...]


PAPER_BOX = Box((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""The paper's: an accuracy of 1 at no cost, though no candidate's accuracy is near 0 or 1."""


def own_box(candidates: Candidates) -> Box:
    """From the best to the worst value of each objective, as `acme_jax.cloud` chooses."""
    objectives = _objectives(candidates)
    return Box(tuple(objectives.min(axis=0).tolist()), tuple(objectives.max(axis=0).tolist()))


RULES = {
    "grid_filter": "grid, then size limit, then highest accuracy (the paper's code)",
    "filter_grid": "size limit, then grid, then highest accuracy",
    "filter_grid_trade_off": "size limit, then grid, then best trade-off score",
    "trade_off": "size limit, then best trade-off score",
    "nearest_ideal": "size limit, then nearest to the ideal point",
    "lowest_error": "size limit, then highest accuracy",
    "largest": "size limit, then the largest",
    "random": "size limit, then any, the mean over all",
    "optimum": "size limit, then best trade-off score, by looking at each one",
}
"""By name, what each one does."""


def trade_off(candidates: Candidates) -> np.ndarray:
    """A - (S + E) / 2, [P]."""
    return candidates.accuracy - 0.5 * (candidates.size + candidates.energy)


def shares(candidates: Candidates, rule: str, limit: float, box: Box) -> np.ndarray:
    """How often each candidate is chosen, [P], summing to 1: one 1, but for "random".

    All 0 where the rule finds nothing: no candidate fits, or with "grid_filter" none that
    represents its cell.

    Args:
      candidates: to choose from.
      rule: one of `RULES`.
      limit: of the normalised size; a size equal to it fits.
      box: of the grid; the distance to its ideal point is in units of its sides.

    Raises:
      ValueError: an unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; expected one of {', '.join(RULES)}")
    # In float32, as `nas.pareto.select` compares.
    fits = candidates.size.astype(np.float32) <= np.float32(limit)
    chosen = np.zeros(fits.size)
    if rule == "random":
        return fits / max(fits.sum(), 1)
    if fits.any() and (index := _index(candidates, rule, limit, fits, box)) is not None:
        chosen[index] = 1.0
    return chosen


def _index(
    candidates: Candidates, rule: str, limit: float, fits: np.ndarray, box: Box
) -> int | None:
    rows = np.flatnonzero(fits)
    if rule == "largest":  # of equal sizes the one that takes most energy, as in the paper
        size, energy = candidates.size, candidates.energy
        return max(rows.tolist(), key=lambda i: (size[i], energy[i]))
    if rule == "optimum":
        return max(rows.tolist(), key=trade_off(candidates).__getitem__)
    objectives, sides = _objectives(candidates), np.asarray(box, np.float32)
    if rule.startswith("filter_grid"):
        objectives[~fits] = np.nan  # the grid leaves such rows out from the start
    if rule == "filter_grid_trade_off":
        rows = np.flatnonzero(np.asarray(_representatives(objectives, sides)))
        return max(rows.tolist(), key=trade_off(candidates).__getitem__)
    name = "paper" if rule in ("grid_filter", "filter_grid") else rule
    size = candidates.size.astype(np.float32)
    index, feasible = _select(name)(objectives, size, np.float32(limit), sides)
    return int(index) if bool(feasible) else None


def _objectives(candidates: Candidates) -> np.ndarray:
    columns = [1 - candidates.accuracy, candidates.latency, candidates.energy]
    return np.stack(columns, axis=1).astype(np.float32)


@jax.jit
def _representatives(objectives: jax.Array, sides: jax.Array) -> jax.Array:
    ideal, nadir = sides
    return pareto.front_grid(objectives, ideal=ideal, nadir=nadir, num_divisions=DIVISIONS)


@functools.lru_cache
def _select(rule: pareto.Rule) -> Callable[..., pareto.Selection]:
    @jax.jit
    def select(
        objectives: jax.Array, size: jax.Array, limit: jax.Array, sides: jax.Array
    ) -> pareto.Selection:
        ideal, nadir = sides
        return pareto.select(
            objectives,
            size,
            limit,
            rule=rule,
            ideal=ideal,
            nadir=nadir,
            num_divisions=DIVISIONS,
        )

    return select


def worth_of(candidates: Candidates, share: np.ndarray) -> dict[str, Any]:
    """What a choice is worth: means over what may be chosen, ratios of means.

    Args:
      candidates: chosen from.
      share: from `shares`.
    """
    accuracy, size, energy = (
        float(share @ column)
        for column in (candidates.accuracy, candidates.size, candidates.energy)
    )
    return {
        "accuracy": accuracy,
        "size": size,
        "energy": energy,
        "mer": accuracy / size if size > 0 else math.nan,
        "eer": accuracy / energy if energy > 0 else math.nan,
        "trade_off": accuracy - 0.5 * (size + energy),
    }
