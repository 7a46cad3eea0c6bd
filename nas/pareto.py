"""Pareto sets of minimised objectives: dominance, rank, crowding, volume, grid and selection.

The names of `nas.dominance`, `nas.hypervolume` and `nas.selection` in one place. A row that
holds a NaN is invalid: it ranks behind every other row and is never selected.
"""

from __future__ import annotations

from nas.dominance import (
    crowding_distance,
    dominates,
    non_dominated_rank,
    rank_and_crowding,
)
from nas.hypervolume import hypervolume
from nas.ordering import sort_key
from nas.selection import Rule, Selection, front_grid, score, select

__all__ = [
    "Rule",
    "Selection",
    "crowding_distance",
    "dominates",
    "front_grid",
    "hypervolume",
    "non_dominated_rank",
    "rank_and_crowding",
    "score",
    "select",
    "sort_key",
]
