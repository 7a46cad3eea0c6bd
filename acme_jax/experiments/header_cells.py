"""How large the searched header should be, and whether the controller finds better cells.

Units "map-bB-uU": the edge's header search with cells of B blocks, stacked U + 2 times, on the
smallest and on the largest backbone of the distilled supernet (the paper: the smallest header is
best on the largest backbone, and the other way round). Units "search-...": the controller against
other searches at equal cost (`cell_contest`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax

from acme_jax import edge, header_slots
from acme_jax.blocks import Params
from acme_jax.config import Config
from acme_jax.experiments import cell_contest, final, header_runs, searched_header
from acme_jax.experiments.cell_contest import SEARCHERS, UNSEARCHED
from acme_jax.experiments.experiment import Experiment, Row
from acme_jax.experiments.header_backbones import tokens
from acme_jax.experiments.study import EdgeData, Study
from nas import cells

Size = Literal["smallest", "largest"]
BACKBONES: dict[Size, tuple[float, float]] = {"smallest": (0.25, 0.25), "largest": (1.0, 1.0)}
SIZES = (1, 2, 3)
"""B and U."""
NUM_SEARCHES = 3
"""Of each kind, on the same shared weights."""
NUM_UNSEARCHED = 6
"""Uniform cells trained for comparison."""


def units(config: Config) -> list[str]:
    """The map cell by cell, then the contest on each backbone."""
    del config
    cells_of_map = [f"map-b{blocks}-u{repeats}" for blocks in SIZES for repeats in SIZES]
    return [*cells_of_map, *(f"search-{size}" for size in BACKBONES)]


def run(study: Study, unit: str) -> list[Row]:
    """One unit; `kind` tells its rows apart ("map", "search")."""
    for size in BACKBONES:
        if unit == f"search-{size}":
            return _contest(study, size)
    blocks, repeats = (int(part[1:]) for part in unit.split("-")[1:])
    return [_place(study, size, blocks, repeats) for size in BACKBONES]


def _place(study: Study, size: Size, blocks: int, repeats: int) -> Row:
    """One cell of the map on one backbone."""
    backbone, data = _seen(study, size)
    config = dataclasses.replace(study.config.header, blocks=blocks, repeats=repeats)
    dims = dataclasses.replace(study.context.header_dims, blocks=blocks, num_layers=repeats + 2)
    found = edge.search_header(study.key(f"header cells {size}"), *data, dims, config)
    # With the cell traced, or every map would compile 18 more programs.
    params = header_slots.to_slots(found.params, found.cell, dims)
    classify = header_runs.classifier(
        searched_header.predictor(dims), params, cells.from_static(found.cell)
    )
    return {
        "kind": "map",
        **_described(study, size),
        "blocks": blocks,
        "repeats": repeats,
        **searched_header.describe(found.cell, dims),
        "shared_accuracy": float(found.candidate_accuracies[0]),
        "select_accuracy": found.select_accuracy,
        "test_accuracy": final.header(study, backbone, classify),
    }


def _contest(study: Study, size: Size) -> list[Row]:
    """Every search several times, and cells without search, on one backbone."""
    backbone, data = _seen(study, size)
    config, dims = study.config.header, study.context.header_dims
    key = study.key(f"cell contest {size}")
    shared_key, train_key, *search_keys = jax.random.split(key, 2 + NUM_UNSEARCHED)
    shared = cell_contest.shared_weights(shared_key, data, dims, config)
    winners = [
        cell_contest.search(search_key, searcher, shared, data, dims, config)
        for searcher in (*SEARCHERS, UNSEARCHED)
        for search_key in search_keys[: NUM_UNSEARCHED if searcher == UNSEARCHED else NUM_SEARCHES]
    ]
    trained = cell_contest.train(
        train_key,
        [winner.cell for winner in winners],
        shared,
        data,
        dims,
        config,
        list(study.context.mesh.devices.flat),
    )
    named = {str(index): classify for index, classify in enumerate(trained.classifiers)}
    features = functools.partial(tokens, study, backbone)
    accuracies = final.headers(study, features, named)
    return [
        {
            "kind": "search",
            **_described(study, size),
            **winner._asdict(),
            **searched_header.describe(winner.cell, dims),
            "select_accuracy": trained.select_accuracy[index],
            "test_accuracy": accuracies[str(index)],
        }
        for index, winner in enumerate(winners)
    ]


def _described(study: Study, size: Size) -> Row:
    point = study.point(*BACKBONES[size])
    return {"backbone": size, "depth": point.depth, "width": point.width}


@functools.lru_cache(maxsize=len(BACKBONES))
def _seen(study: Study, size: Size) -> tuple[Params, EdgeData]:
    """Backbone and features, which all units of a study share."""
    backbone = study.backbone(study.point(*BACKBONES[size]).arch)
    return backbone, study.edge_data(backbone)


EXPERIMENT = Experiment(
    "header_cells", "size of the searched header; controller against other searches", units, run
)
