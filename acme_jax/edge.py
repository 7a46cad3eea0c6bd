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

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from acme_jax import header
from acme_jax.config import HeaderConfig
from acme_jax.header import GateLayout, HeaderDims
from nas import cells, controller
from nas.cells import Cell, CellSpace, StaticCell

Params = dict[str, Any]
Progress = Callable[[Mapping[str, float | str]], None]

WEIGHT_DECAY = 1e-4
CLIP_NORM = 5.0
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


class TrainState(NamedTuple):
    """Weights under training, and the optimiser's state."""

    params: Params
    opt_state: Any


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
    programs = _search_programs(dims, config, _steps(len(train_labels), config))
    init_key, epochs_key, candidate_key, final_key = jax.random.split(key, 4)

    children, policy = programs.init(init_key)
    losses, rewards, entropies = [], [], []
    for epoch in range(config.search_epochs):
        epoch_key = jax.random.fold_in(epochs_key, epoch)
        children, policy, numbers = programs.epoch(epoch_key, children, policy, train, select)
        loss, reward, entropy = (float(number) for number in numbers)
        losses.append(loss)
        rewards.append(reward)
        entropies.append(entropy)
        report(
            {
                "phase": "header_search",
                "epoch": epoch,
                "loss": loss,
                "reward": reward,
                "entropy": entropy,
            }
        )

    candidates = _distinct(programs.draw(candidate_key, policy), config.num_candidates)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(cells.from_static, candidates))
    accuracies = np.asarray(programs.rank(children.params, stacked, select))
    order = np.argsort(-accuracies, kind="stable")
    winner = candidates[order[0]]

    params, final_losses = _fit(
        final_key,
        _final_programs(dims, winner, config, _steps(len(train_labels), config)),
        header.extract(children.params, winner, dims),
        train,
        config,
        "header_final",
        report,
    )
    accuracy = _final_programs(dims, winner, config, _steps(len(train_labels), config)).accuracy
    return HeaderSearch(
        cell=winner,
        params=params,
        gate_layout=header.gate_layout(dims, winner),
        candidate_cells=tuple(candidates[index] for index in order),
        candidate_accuracies=accuracies[order],
        history=SearchHistory(
            np.asarray(losses), np.asarray(rewards), np.asarray(entropies), final_losses
        ),
        select_accuracy=float(accuracy(params, select)),
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
    programs = _final_programs(dims, None, config, _steps(len(train_labels), config))
    init_key, fit_key = jax.random.split(key)
    params, losses = _fit(
        fit_key,
        programs,
        header.init_linear(init_key, dims.embed_dim, dims.num_classes),
        train,
        config,
        "header_linear",
        progress or _silent,
    )
    return LinearHeader(params, losses, float(programs.accuracy(params, select)))


class _Dataset(NamedTuple):
    features: jax.Array  # [N, T, D]
    labels: jax.Array  # [N] int32


class _SearchPrograms(NamedTuple):
    init: Callable[..., Any]
    epoch: Callable[..., Any]
    draw: Callable[..., Cell]
    rank: Callable[..., jax.Array]


class _FinalPrograms(NamedTuple):
    init: Callable[[Params], TrainState]
    epoch: Callable[..., Any]
    accuracy: Callable[..., jax.Array]


@functools.lru_cache(maxsize=8)
def _search_programs(
    dims: HeaderDims, config: HeaderConfig, steps_per_epoch: int
) -> _SearchPrograms:
    space = CellSpace(dims.blocks)
    policy = controller.reinforce(space)
    optimizer = _optimizer(config, config.search_epochs * steps_per_epoch)

    def init(key: jax.Array) -> tuple[TrainState, controller.ControllerState]:
        shared_key, policy_key = jax.random.split(key)
        params = header.init_shared(shared_key, dims)
        return TrainState(params, optimizer.init(params)), policy.init(policy_key)

    def predict(params: Params, cell: Cell, features: jax.Array) -> jax.Array:
        return header.apply_shared(params, cell, dims, features)

    def train_policy(
        state: controller.ControllerState, step: Any
    ) -> tuple[controller.ControllerState, Any]:
        key, params, select = step
        cell_key, batch_key = jax.random.split(key)
        cell = policy.sample(cell_key, state)
        count = min(config.batch_size, len(select.labels))
        rows = jax.random.permutation(batch_key, len(select.labels))[:count]
        logits = predict(params, cell, select.features[rows])
        reward = 100.0 * _accuracy(logits, select.labels[rows])
        state, info = policy.update(state, cell, reward)
        return state, (reward, info.entropy)

    def epoch(
        key: jax.Array,
        children: TrainState,
        policy_state: controller.ControllerState,
        train: _Dataset,
        select: _Dataset,
    ) -> Any:
        child_key, policy_key = jax.random.split(key)

        def draw(key: jax.Array) -> Cell:
            return policy.sample(key, policy_state)

        children, loss = _train_epoch(
            child_key, optimizer, predict, children, train, config.batch_size, draw
        )
        keys = jax.random.split(policy_key, config.controller_steps)
        policy_state, (rewards, entropies) = lax.scan(
            lambda state, key: train_policy(state, (key, children.params, select)),
            policy_state,
            keys,
        )
        return children, policy_state, (loss, rewards.mean(), entropies.mean())

    def draw_many(key: jax.Array, state: controller.ControllerState) -> Cell:
        keys = jax.random.split(key, _OVERSAMPLING * config.num_candidates)
        return jax.vmap(lambda key: policy.sample(key, state))(keys)

    def rank(params: Params, candidates: Cell, select: _Dataset) -> jax.Array:
        return lax.map(
            lambda cell: _accuracy(predict(params, cell, select.features), select.labels),
            candidates,
        )

    return _SearchPrograms(jax.jit(init), jax.jit(epoch), jax.jit(draw_many), jax.jit(rank))


@functools.lru_cache(maxsize=32)
def _final_programs(
    dims: HeaderDims, cell: StaticCell | None, config: HeaderConfig, steps_per_epoch: int
) -> _FinalPrograms:
    """Training of one chosen cell, or of the linear header when `cell` is None."""
    optimizer = _optimizer(config, config.final_epochs * steps_per_epoch)

    def predict(params: Params, _: None, features: jax.Array) -> jax.Array:
        if cell is None:
            return header.apply_linear(params, features)
        return header.apply(params, cell, dims, features)

    def epoch(key: jax.Array, state: TrainState, train: _Dataset) -> tuple[TrainState, jax.Array]:
        return _train_epoch(
            key, optimizer, predict, state, train, config.batch_size, lambda _: None
        )

    def accuracy(params: Params, select: _Dataset) -> jax.Array:
        return _accuracy(predict(params, None, select.features), select.labels)

    return _FinalPrograms(
        lambda params: TrainState(params, optimizer.init(params)),
        jax.jit(epoch),
        jax.jit(accuracy),
    )


def _train_epoch(
    key: jax.Array,
    optimizer: optax.GradientTransformation,
    predict: Callable[..., jax.Array],
    state: TrainState,
    train: _Dataset,
    batch_size: int,
    draw: Callable[[jax.Array], Any],
) -> tuple[TrainState, jax.Array]:
    """One pass over shuffled full batches; the remainder waits for another epoch's shuffle.

    Returns:
      The state and the mean batch loss [].
    """
    order_key, draw_key = jax.random.split(key)
    count = len(train.labels)
    size = min(batch_size, count)
    steps = count // size
    rows = jax.random.permutation(order_key, count)[: steps * size].reshape(steps, size)

    def step(state: TrainState, batch: tuple[jax.Array, jax.Array]) -> Any:
        rows, key = batch
        choice = draw(key)

        def loss_of(params: Params) -> jax.Array:
            logits = predict(params, choice, train.features[rows])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, train.labels[rows]
            ).mean()

        loss, grads = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss

    state, losses = lax.scan(step, state, (rows, jax.random.split(draw_key, steps)))
    return state, losses.mean()


def _fit(
    key: jax.Array,
    programs: _FinalPrograms,
    params: Params,
    train: _Dataset,
    config: HeaderConfig,
    phase: str,
    report: Progress,
) -> tuple[Params, np.ndarray]:
    """Trains for `final_epochs`; returns the weights and the loss of each epoch."""
    state, losses = programs.init(params), []
    for epoch in range(config.final_epochs):
        state, loss = programs.epoch(jax.random.fold_in(key, epoch), state, train)
        losses.append(float(loss))
        report({"phase": phase, "epoch": epoch, "loss": losses[-1]})
    return state.params, np.asarray(losses)


def _optimizer(config: HeaderConfig, num_steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(config.learning_rate, num_steps)
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM), optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    )


def _distinct(drawn: Cell, count: int) -> list[StaticCell]:
    """The first `count` different cells in drawing order; fewer when there are fewer."""
    inputs, ops = np.asarray(drawn.inputs), np.asarray(drawn.ops)
    genomes = (
        cells.to_static(Cell(*genes)) for genes in zip(inputs, ops, strict=True)  # type: ignore[arg-type]
    )
    return list(dict.fromkeys(genomes))[:count]


def _accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (logits.argmax(-1) == labels).mean()


def _steps(count: int, config: HeaderConfig) -> int:
    return count // min(config.batch_size, count)


def _dataset(features: jax.Array, labels: jax.Array, name: str) -> _Dataset:
    if len(labels) == 0 or len(features) != len(labels):
        raise ValueError(
            f"the {name} split has {len(features)} features and {len(labels)} labels; header "
            "search needs equally many, at least one"
        )
    return _Dataset(jnp.asarray(features), jnp.asarray(labels, jnp.int32))


def _silent(_: Mapping[str, float | str]) -> None:
    """The default progress callback."""
