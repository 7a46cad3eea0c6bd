"""The controller against random sampling, aging evolution and no search, at equal cost.

The searches share everything but their way of proposing cells: one set of shared weights, trained
on uniformly drawn cells (weights trained on the controller's cells would favour the controller's
taste); the same number of rewards, each the accuracy on one select batch; the same number of cells
ranked on the whole select split; and the same training of each winner from the shared weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from acme_jax import header
from acme_jax.blocks import Params
from acme_jax.config import HeaderConfig
from acme_jax.experiments import cell_searchers, header_runs, searched_header
from acme_jax.experiments.cell_searchers import Search, Searcher
from acme_jax.experiments.header_runs import Setting
from acme_jax.experiments.study import EdgeData
from acme_jax.header_layout import HeaderDims
from acme_jax.header_training import Dataset, header_programs
from nas import cells
from nas.cells import CellSpace, StaticCell

SEARCHERS = ("controller", "random", "evolution")
UNSEARCHED = "none"
"""A uniform cell, taken as it comes: what any search has to beat."""


class Winner(NamedTuple):
    """What one search ended with."""

    searcher: str
    cell: StaticCell
    num_rewards: int
    """Cells rewarded on one batch."""
    num_ranked: int
    """Cells evaluated on the whole select split."""
    late_reward: float
    """Mean of the last third of the rewards, in [0, 1]; NaN without rewards."""
    shared_accuracy: float
    """Of the cell with shared weights, on the select split."""


def num_rewards(config: HeaderConfig) -> int:
    """Rewards of a search: as many as the edge's controller gets."""
    return config.search_epochs * config.controller_steps


def shared_weights(key: Array, data: EdgeData, dims: HeaderDims, config: HeaderConfig) -> Params:
    """Trains the search supernet for `search_epochs`, a fresh uniform cell each batch."""
    programs = header_programs(dims, config, linear=False)
    train = Dataset(data.train_tokens, data.train_labels)
    steps = len(train.labels) // min(config.batch_size, len(train.labels))
    init_key, *epoch_keys = jax.random.split(key, 1 + config.search_epochs)
    state = programs.init(init_key)
    for epoch_key in epoch_keys:
        cell_key, train_key = jax.random.split(epoch_key)
        drawn = _draw(cell_key, steps, CellSpace(dims.blocks))
        state, _ = programs.epoch(train_key, state, drawn, config.search_epochs * steps, train)
    return state.params


def search(
    key: Array,
    searcher: str,
    shared: Params,
    data: EdgeData,
    dims: HeaderDims,
    config: HeaderConfig,
) -> Winner:
    """One search with given shared weights, or one uniform cell without any."""
    select = Dataset(data.select_tokens, data.select_labels)
    accuracy = header_programs(dims, config, linear=False).accuracy
    if searcher == UNSEARCHED:
        drawn = _draw(key, 1, CellSpace(dims.blocks))
        cell = cell_searchers.candidates(drawn, 1)[0]
        shared_accuracy = float(accuracy(shared, cells.from_static(cell), select))
        return Winner(searcher, cell, 0, 0, float("nan"), shared_accuracy)
    found = search_program(searcher, dims, config)(key, shared, select)
    ranked = cell_searchers.candidates(found.proposals, config.num_candidates)
    accuracies = [float(accuracy(shared, cells.from_static(cell), select)) for cell in ranked]
    best, rewards = int(np.argmax(accuracies)), np.asarray(found.rewards)
    return Winner(
        searcher,
        ranked[best],
        len(rewards),
        len(ranked),
        float(rewards[-(len(rewards) // 3) :].mean()) / 100.0,
        accuracies[best],
    )


@functools.lru_cache(maxsize=16)
def search_program(
    searcher: str, dims: HeaderDims, config: HeaderConfig
) -> Callable[[Array, Params, Dataset], Search]:
    """A compiled search: key, shared weights, select split."""
    space, count = CellSpace(dims.blocks), num_rewards(config)
    run: Searcher = {
        "controller": cell_searchers.policy_gradient(space, count, config.num_candidates),
        "random": cell_searchers.random(space, count),
        "evolution": cell_searchers.aging_evolution(space, count),
    }[searcher]

    def program(key: Array, shared: Params, select: Dataset) -> Search:
        size = min(config.batch_size, len(select.labels))

        def reward(key: Array, cell: cells.Cell) -> Array:
            rows = jax.random.randint(key, (size,), 0, len(select.labels))
            logits = header.apply_shared(shared, cell, dims, select.features[rows])
            return 100.0 * (logits.argmax(-1) == select.labels[rows]).mean()

        return run(key, reward)

    return jax.jit(program)


class TrainedCells(NamedTuple):
    """Winners after their training."""

    select_accuracy: list[float]
    classifiers: list[Callable[[Array], Array]]


def train(
    key: Array,
    winners: Sequence[StaticCell],
    shared: Params,
    data: EdgeData,
    dims: HeaderDims,
    config: HeaderConfig,
    devices: Sequence[jax.Device],
) -> TrainedCells:
    """Trains every cell from the shared weights, in the schedule of the edge's final training."""
    predict = searched_header.predictor(dims)
    setting = Setting(config.learning_rate, config.final_epochs)
    chosen = [cells.from_static(cell) for cell in winners]
    runs = [
        header_runs.train(
            predict,
            key,
            _gather(shared, cell, dims),
            cell,
            setting,
            data,
            config.batch_size,
            devices[index % len(devices)],
        )
        for index, cell in enumerate(chosen)
    ]
    return TrainedCells(
        [float(run.select_accuracy) for run in runs],
        [
            header_runs.classifier(predict, jax.device_get(run.params), cell)
            for run, cell in zip(runs, chosen, strict=True)
        ],
    )


_gather = jax.jit(header.gather, static_argnums=2)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: Array, count: int, space: CellSpace) -> cells.Cell:
    keys = jax.random.split(key, count)
    drawn: cells.Cell = jax.vmap(lambda one: cells.sample(one, space))(keys)
    return drawn
