"""Choosing backbones: the paper's Pareto Front Grid beside simpler rules, and the search itself.

Units: "paper" chooses among the paper's own 400 candidates (the same for every seed), "archive"
among the 16 uniform sub-networks of our supernet with their exact costs, and "search" compares
NSGA-II with exhaustive evaluation and random search. Choices read the select split; the test
accuracy of what was chosen is reported beside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from acme_jax.config import Config
from acme_jax.experiments import final, paper_candidates, selection_search, selection_uniform
from acme_jax.experiments.experiment import Experiment, Row
from acme_jax.experiments.paper_candidates import Candidates
from acme_jax.experiments.selection_rules import (
    PAPER_BOX,
    RULES,
    Box,
    own_box,
    shares,
    trade_off,
    worth_of,
)
from acme_jax.experiments.selection_search import Evaluation
from acme_jax.experiments.study import Study
from nas.arch import Arch

LIMITS = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Of the normalised size; the paper's is 0.8."""
SEARCH_RULES = ("lowest_error", "nearest_ideal")
"""By which a search's finds are compared with the uniform sub-networks."""


def units(config: Config) -> list[str]:
    """The paper's candidates, our uniform sub-networks, the search."""
    del config
    return ["paper", "archive", "search"]


def run(study: Study, unit: str) -> list[Row]:
    """Rows of one unit, told apart by `kind`.

    "choice": what a rule chose within a limit, and its worth ("found": whether it found anything);
    "candidate": one uniform sub-network; "uniform" and "per_layer": a search's hypervolume after
    so many evaluations, a part of the exhaustive one.
    """
    if unit == "paper":
        return _choices(paper_candidates.candidates(), PAPER_BOX, None)
    judged = selection_search.evaluation(study)
    return _archive(study, judged) if unit == "archive" else _search(study, judged)


def as_candidates(objectives: np.ndarray, grid: np.ndarray, units: np.ndarray) -> Candidates:
    """Sub-networks as the rules want them, costs in units of the uniform sub-networks' range.

    Args:
      objectives: of the sub-networks [P, M], in the order of `acme_jax.cloud.OBJECTIVES`.
      grid: of the uniform ones [16, M].
      units: of the sub-networks [P, 2]: heads of the first block, and blocks.
    """
    low, span = grid.min(axis=0), np.ptp(grid, axis=0)
    _, size, latency, energy = ((objectives - low) / np.where(span > 0, span, 1.0)).T
    return Candidates(units, 1.0 - objectives[:, 0], size, latency, energy)


def _choices(candidates: Candidates, box: Box, test_accuracy: np.ndarray | None) -> list[Row]:
    rows: list[Row] = []
    for limit in LIMITS:
        for rule in RULES:
            share = shares(candidates, rule, limit, box)
            row: dict[str, Any] = {"kind": "choice", "limit": limit, "rule": rule}
            row["found"] = bool(share.sum() > 0)
            if row["found"]:
                row |= worth_of(candidates, share)
                if share.max() == 1:
                    heads, blocks = candidates.units[share.argmax()].tolist()
                    row |= {"heads": heads, "blocks": blocks}
                if test_accuracy is not None:
                    row["select_accuracy"] = row["accuracy"]
                    row["test_accuracy"] = float(share @ test_accuracy)
            rows.append(row)
    return rows


def _archive(study: Study, judged: Evaluation) -> list[Row]:
    archs, grid = [point.arch for point in study.grid], judged.grid
    candidates = as_candidates(grid, grid, _units(_stack(archs)))
    # The choices below read the select split only.
    test_accuracy = final.subnetworks(study, study.stages.elastic, archs)
    rows: list[Row] = [
        {
            "kind": "candidate",
            "depth": point.depth,
            "width": point.width,
            "heads": int(heads),
            "blocks": int(blocks),
            "size_bytes": float(objectives[1]),
            "latency_seconds": float(objectives[2]),
            "energy_joules": float(objectives[3]),
            "size": float(candidates.size[i]),
            "latency": float(candidates.latency[i]),
            "energy": float(candidates.energy[i]),
            "select_accuracy": float(candidates.accuracy[i]),
            "test_accuracy": float(test_accuracy[i]),
            "trade_off": float(trade_off(candidates)[i]),
        }
        for i, (point, objectives, (heads, blocks)) in enumerate(
            zip(study.grid, grid, candidates.units, strict=True)
        )
    ]
    return rows + _choices(candidates, own_box(candidates), test_accuracy)


def _search(study: Study, judged: Evaluation) -> list[Row]:
    grid = judged.grid
    rows = selection_uniform.uniform_rows(study, grid)
    found = selection_search.per_layer(study, judged)
    best = found["nsga2_grid"]
    sources = {
        "uniform": (_stack([point.arch for point in study.grid]), grid),
        "per_layer": (best.genomes, best.fronts[-1]),
    }
    box = own_box(as_candidates(grid, grid, _units(sources["uniform"][0])))
    chosen: list[Row] = []
    archs: list[Arch] = []
    for source, (genomes, objectives) in sources.items():
        candidates = as_candidates(objectives, grid, _units(genomes))
        for limit in LIMITS:
            for rule in SEARCH_RULES:
                share = shares(candidates, rule, limit, box)
                index = int(share.argmax())
                worth = worth_of(candidates, share)
                chosen.append(
                    {"kind": "find", "source": source, "limit": limit, "rule": rule, **worth}
                    | {"select_accuracy": worth["accuracy"]}
                )
                archs.append(jax.tree.map(lambda leaf, i=index: np.asarray(leaf)[i], genomes))
    # Every front and every choice is final.
    test_accuracy = _test_accuracies(study, [*(f.genomes for f in found.values()), _stack(archs)])
    rows += selection_search.per_layer_rows(found, grid, lambda genomes: 1 - test_accuracy(genomes))
    for row, accuracy in zip(chosen, test_accuracy(_stack(archs)), strict=True):
        row["test_accuracy"] = float(accuracy)
    return rows + chosen


def _test_accuracies(study: Study, parts: list[Arch]) -> Callable[[Arch], np.ndarray]:
    """Genomes [P] -> accuracies [P], of genomes that are among those given: each is tested once."""
    genomes = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    _, first = np.unique(_rows(genomes), axis=0, return_index=True)
    archs = [jax.tree.map(lambda leaf, i=i: leaf[i], genomes) for i in first]
    # In calls of one size, and so one program: as many as there are uniform sub-networks.
    size = len(study.grid)
    padded = [archs[i % len(archs)] for i in range(len(archs) + -len(archs) % size)]
    found = [
        final.subnetworks(study, study.stages.elastic, padded[start : start + size])
        for start in range(0, len(padded), size)
    ]
    known = {
        row.tobytes(): accuracy
        for row, accuracy in zip(_rows(genomes)[first], np.concatenate(found), strict=False)
    }
    return lambda wanted: np.array([known[row.tobytes()] for row in _rows(wanted)])


def _rows(genomes: Arch) -> np.ndarray:
    """Genomes as rows of integers [P, 1 + 2 L]."""
    depth, heads, neurons = (np.asarray(leaf, np.int32) for leaf in genomes)
    return np.concatenate([depth[:, None], heads, neurons], axis=1)


def _stack(archs: list[Arch]) -> Arch:
    stacked: Arch = jax.tree.map(lambda *leaves: np.stack(leaves), *archs)
    return stacked


def _units(genomes: Arch) -> np.ndarray:
    return np.stack([np.asarray(genomes.heads)[:, 0], np.asarray(genomes.depth)], axis=1)


EXPERIMENT = Experiment(
    "selection",
    "rules that choose a backbone, on the paper's candidates and on ours; the Pareto search",
    units,
    run,
)
