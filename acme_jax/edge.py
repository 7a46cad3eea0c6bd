"""The edge tier's header search, on the frozen backbone's cached features.

ENAS (Pham et al. 2018) as ACME (ICDCS 2025) uses it: epochs of training shared weights, a fresh
cell each batch, alternate with REINFORCE updates of the controller; then cells are sampled from
the controller, ranked, and the best one is trained on. Deviations: the backbone is frozen; the
weights train with AdamW and one cosine decay instead of SGD with restarts; the winner is the
best of several evaluated cells on the whole select split, not the cell at the maximum of a
running average. Rewards come from select batches and the ranking from the select split; the
train split only trains weights, and nothing here ever sees test data. The select accuracies are
therefore slightly optimistic, like those of any model choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from acme_jax import header
from acme_jax.blocks import Params
from acme_jax.config import HeaderConfig
from acme_jax.header import GateLayout, HeaderDims
from acme_jax.header_training import (
    Dataset,
    HeaderPrograms,
    TrainState,
    header_programs,
    policy_programs,
    restart,
)
from nas import cells
from nas.cells import Cell, StaticCell

Progress = Callable[[Mapping[str, float | str]], None]

_OVERSAMPLING = 4
"""Cells drawn for each candidate wanted, because the controller repeats itself."""


class SearchHistory(NamedTuple):
    """Per-epoch means; a loss that is not finite shows that the phase diverged."""

    search_loss: np.ndarray  # [search_epochs] cross-entropy of the sampled cells
    reward: np.ndarray  # [search_epochs] batch accuracy, percent
    entropy: np.ndarray  # [search_epochs] of the controller, nats
    final_loss: np.ndarray  # [final_epochs] cross-entropy of the winner


class HeaderSearch(NamedTuple):
    """What an edge found."""

    cell: StaticCell
    params: Params  # of the chosen header (`header.apply`)
    gate_layout: GateLayout
    candidate_cells: tuple[StaticCell, ...]  # ranked, best first
    candidate_accuracies: np.ndarray  # with shared weights, on the select split, same order
    history: SearchHistory
    select_accuracy: float  # of the trained winner


class LinearHeader(NamedTuple):
    """The linear baseline, trained like the winner."""

    params: Params
    loss: np.ndarray  # [final_epochs]
    select_accuracy: float


def search_header(
    key: jax.Array,
    train_features: jax.Array,
    train_labels: jax.Array,
    select_features: jax.Array,
    select_labels: jax.Array,
    dims: HeaderDims,
    config: HeaderConfig,
    progress: Progress | None = None,
) -> HeaderSearch:
    """Searches a header for one edge; deterministic in `key`.

    Host function. Programs are compiled once for each (dims, config) and shape, and reused by
    later edges.

    Args:
      key: consumed.
      train_features: [N, T, D] backbone features of the edge's shared data.
      train_labels: [N] int32.
      select_features: [M, T, D], for rewards and ranking.
      select_labels: [M] int32.
      dims: the header's sizes.
      config: schedules and counts.
      progress: called after each epoch with `phase` ("header_search" or "header_final"),
        `epoch` (from 0) and the epoch's numbers.

    Raises:
      ValueError: no training or select samples, or lengths that differ.
    """
    train = _dataset(train_features, train_labels, "train")
    select = _dataset(select_features, select_labels, "select")
    report = progress or _silent
    programs, policy = header_programs(dims, config, linear=False), policy_programs(dims, config)
    child_key, policy_key, epochs_key, candidate_key, final_key = jax.random.split(key, 5)
    steps = _steps(train, config)
    # one number for both uses of the sampler, so that it is compiled once
    num_drawn = max(steps, _OVERSAMPLING * config.num_candidates)

    children, state, rows = programs.init(child_key), policy.init(policy_key), []
    for epoch in range(config.search_epochs):
        # five keys like above, because splitting in another number is another program
        cells_key, train_key, reward_key, *_ = jax.random.split(
            jax.random.fold_in(epochs_key, epoch), 5
        )
        drawn = policy.draw(cells_key, state, num_drawn)
        chosen = jax.tree.map(lambda genes: np.asarray(genes)[:steps], drawn)
        children, loss = programs.epoch(
            train_key, children, chosen, config.search_epochs * steps, train
        )
        state, (reward, entropy) = policy.epoch(reward_key, state, children.params, select)
        rows.append((float(loss), float(reward), float(entropy)))
        numbers = dict(zip(("loss", "reward", "entropy"), rows[-1], strict=True))
        report({"phase": "header_search", "epoch": epoch, **numbers})

    drawn = policy.draw(candidate_key, state, num_drawn)
    candidates = _distinct(drawn, config.num_candidates)
    genomes = [cells.from_static(cell) for cell in candidates]
    accuracies = np.asarray(
        [float(programs.accuracy(children.params, genome, select)) for genome in genomes]
    )
    order = np.argsort(-accuracies, kind="stable")
    winner = candidates[order[0]]

    fresh = restart(children.params)
    params, final_losses = _fit(
        final_key, programs, fresh, genomes[order[0]], train, config, "header_final", report
    )
    columns = np.asarray(rows).T
    return HeaderSearch(
        cell=winner,
        params=header.extract(jax.device_get(params), winner, dims),
        gate_layout=header.gate_layout(dims, winner),
        candidate_cells=tuple(candidates[index] for index in order),
        candidate_accuracies=accuracies[order],
        history=SearchHistory(columns[0], columns[1], columns[2], final_losses),
        select_accuracy=float(programs.accuracy(params, genomes[order[0]], select)),
    )


def train_linear_header(
    key: jax.Array,
    train_features: jax.Array,
    train_labels: jax.Array,
    select_features: jax.Array,
    select_labels: jax.Array,
    dims: HeaderDims,
    config: HeaderConfig,
    progress: Progress | None = None,
) -> LinearHeader:
    """Trains the linear baseline under the schedule of the winner's final training.

    Arguments and errors as in `search_header`; `progress` gets the phase "header_linear".
    """
    train = _dataset(train_features, train_labels, "train")
    select = _dataset(select_features, select_labels, "select")
    programs = header_programs(dims, config, linear=True)
    init_key, fit_key = jax.random.split(key)
    params, losses = _fit(
        fit_key,
        programs,
        programs.init(init_key),
        None,
        train,
        config,
        "header_linear",
        progress or _silent,
    )
    return LinearHeader(params, losses, float(programs.accuracy(params, None, select)))


def _fit(
    key: jax.Array,
    programs: HeaderPrograms,
    state: TrainState,
    choice: Any,
    train: Dataset,
    config: HeaderConfig,
    phase: str,
    report: Progress,
) -> tuple[Params, np.ndarray]:
    """Trains one choice for `final_epochs`; returns the weights and the loss of each epoch."""
    steps, losses = _steps(train, config), []
    choices = jax.tree.map(lambda gene: np.stack([np.asarray(gene)] * steps), choice)
    for epoch in range(config.final_epochs):
        epoch_key = jax.random.fold_in(key, epoch)
        state, loss = programs.epoch(epoch_key, state, choices, config.final_epochs * steps, train)
        losses.append(float(loss))
        report({"phase": phase, "epoch": epoch, "loss": losses[-1]})
    return state.params, np.asarray(losses)


def _distinct(drawn: Cell, count: int) -> list[StaticCell]:
    """The first `count` different cells in drawing order; fewer when there are fewer."""
    inputs, ops = np.asarray(drawn.inputs), np.asarray(drawn.ops)
    genomes = (cells.to_static(Cell(*genes)) for genes in zip(inputs, ops, strict=True))
    return list(dict.fromkeys(genomes))[:count]


def _steps(train: Dataset, config: HeaderConfig) -> int:
    """Full batches of an epoch."""
    return len(train.labels) // min(config.batch_size, len(train.labels))


def _dataset(features: jax.Array, labels: jax.Array, name: str) -> Dataset:
    if len(labels) == 0 or len(features) != len(labels):
        raise ValueError(
            f"the {name} split has {len(features)} features and {len(labels)} labels; header "
            "search needs equally many, at least one"
        )
    return Dataset(jnp.asarray(features), jnp.asarray(labels, jnp.int32))


def _silent(_: Mapping[str, float | str]) -> None:
    """The default progress callback."""
