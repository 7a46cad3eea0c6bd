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
    """Weights under training, the optimiser's state and the steps made."""

    params: Params
    opt_state: Any
    step: jax.Array  # [] int32


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
    programs, policy = _programs(dims, config, linear=False), _policy_programs(dims, config)
    child_key, policy_key, epochs_key, candidate_key, final_key = jax.random.split(key, 5)
    steps = _steps(train, config)

    children, state, rows = programs.init(child_key), policy.init(policy_key), []
    for epoch in range(config.search_epochs):
        cells_key, train_key, reward_key = jax.random.split(
            jax.random.fold_in(epochs_key, epoch), 3
        )
        drawn = policy.draw(jax.random.split(cells_key, steps), state)
        children, loss = programs.epoch(
            train_key, children, drawn, config.search_epochs * steps, train
        )
        state, (reward, entropy) = policy.epoch(reward_key, state, children.params, select)
        rows.append((float(loss), float(reward), float(entropy)))
        numbers = dict(zip(("loss", "reward", "entropy"), rows[-1], strict=True))
        report({"phase": "header_search", "epoch": epoch, **numbers})

    keys = jax.random.split(candidate_key, _OVERSAMPLING * config.num_candidates)
    candidates = _distinct(policy.draw(keys, state), config.num_candidates)
    genomes = [cells.from_static(cell) for cell in candidates]
    accuracies = np.asarray(
        [float(programs.accuracy(children.params, genome, select)) for genome in genomes]
    )
    order = np.argsort(-accuracies, kind="stable")
    winner = candidates[order[0]]

    fresh = TrainState(
        children.params, _optimizer().init(children.params), jnp.zeros((), jnp.int32)
    )
    params, final_losses = _fit(
        final_key, programs, fresh, genomes[order[0]], train, config, "header_final", report
    )
    columns = np.asarray(rows).T
    return HeaderSearch(
        cell=winner,
        params=header.extract(params, winner, dims),
        gate_layout=header.gate_layout(dims, winner),
        candidate_cells=tuple(candidates[index] for index in order),
        candidate_accuracies=accuracies[order],
        history=SearchHistory(*columns, final_losses),
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
    programs = _programs(dims, config, linear=True)
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


class _Dataset(NamedTuple):
    features: jax.Array  # [N, T, D]
    labels: jax.Array  # [N] int32


class _Programs(NamedTuple):
    """Programs of one kind of header, jitted but for `init`; `choice` is a cell, or None for the linear one."""

    init: Callable[..., TrainState]  # key -> state
    epoch: Callable[..., Any]  # key, state, choices [steps], num_steps, train -> state, loss
    accuracy: Callable[..., jax.Array]  # params, choice, select -> []


class _PolicyPrograms(NamedTuple):
    init: Callable[..., controller.ControllerState]  # key -> state
    epoch: Callable[..., Any]  # key, state, params, select -> state, (reward, entropy)
    draw: Callable[..., Cell]  # keys [S], state -> cells [S]


# The chosen cell is a traced argument even in the final training: the program that searched is
# then reused, at every edge, instead of compiling a new one for each winner.
@functools.lru_cache(maxsize=8)
def _programs(dims: HeaderDims, config: HeaderConfig, linear: bool) -> _Programs:
    optimizer = _optimizer()

    def predict(params: Params, choice: Any, features: jax.Array) -> jax.Array:
        if linear:
            return header.apply_linear(params, features)
        return header.apply_shared(params, choice, dims, features)

    def init(key: jax.Array) -> TrainState:
        if linear:
            params = header.init_linear(key, dims.embed_dim, dims.num_classes)
        else:
            params = header.init_shared(key, dims)
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def epoch(
        key: jax.Array, state: TrainState, choices: Any, num_steps: jax.Array, train: _Dataset
    ) -> tuple[TrainState, jax.Array]:
        def step(state: TrainState, batch: tuple[jax.Array, Any]) -> Any:
            rows, choice = batch

            def loss_of(params: Params) -> jax.Array:
                logits = predict(params, choice, train.features[rows])
                return optax.softmax_cross_entropy_with_integer_labels(
                    logits, train.labels[rows]
                ).mean()

            loss, grads = jax.value_and_grad(loss_of)(state.params)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            rate = config.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * state.step / num_steps))
            params = jax.tree.map(lambda leaf, change: leaf - rate * change, state.params, updates)
            return TrainState(params, opt_state, state.step + 1), loss

        size = min(config.batch_size, len(train.labels))
        steps = len(train.labels) // size
        # the remainder of incomplete batches waits for another epoch's shuffle
        rows = jax.random.permutation(key, len(train.labels))[: steps * size].reshape(steps, size)
        state, losses = lax.scan(step, state, (rows, choices))
        return state, losses.mean()

    def accuracy(params: Params, choice: Any, select: _Dataset) -> jax.Array:
        return _accuracy(predict(params, choice, select.features), select.labels)

    return _Programs(init, jax.jit(epoch), jax.jit(accuracy))


@functools.lru_cache(maxsize=8)
def _policy_programs(dims: HeaderDims, config: HeaderConfig) -> _PolicyPrograms:
    policy = controller.reinforce(CellSpace(dims.blocks))

    def epoch(
        key: jax.Array, state: controller.ControllerState, params: Params, select: _Dataset
    ) -> Any:
        count = min(config.batch_size, len(select.labels))

        def step(state: controller.ControllerState, key: jax.Array) -> Any:
            cell_key, batch_key = jax.random.split(key)
            cell = policy.sample(cell_key, state)
            rows = jax.random.randint(batch_key, (count,), 0, len(select.labels))
            logits = header.apply_shared(params, cell, dims, select.features[rows])
            reward = 100.0 * _accuracy(logits, select.labels[rows])
            state, info = policy.update(state, cell, reward)
            return state, (reward, info.entropy)

        state, numbers = lax.scan(step, state, jax.random.split(key, config.controller_steps))
        return state, jax.tree.map(jnp.mean, numbers)

    draw = jax.vmap(policy.sample, in_axes=(0, None))
    return _PolicyPrograms(policy.init, jax.jit(epoch), jax.jit(draw))


def _fit(
    key: jax.Array,
    programs: _Programs,
    state: TrainState,
    choice: Any,
    train: _Dataset,
    config: HeaderConfig,
    phase: str,
    report: Progress,
) -> tuple[Params, np.ndarray]:
    """Trains one choice for `final_epochs`; returns the weights and the loss of each epoch."""
    steps, losses = _steps(train, config), []
    choices = jax.tree.map(lambda gene: jnp.stack([gene] * steps), choice)
    for epoch in range(config.final_epochs):
        epoch_key = jax.random.fold_in(key, epoch)
        state, loss = programs.epoch(epoch_key, state, choices, config.final_epochs * steps, train)
        losses.append(float(loss))
        report({"phase": phase, "epoch": epoch, "loss": losses[-1]})
    return state.params, np.asarray(losses)


def _optimizer() -> optax.GradientTransformation:
    """AdamW without its learning rate, which the epoch program applies."""
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.scale_by_adam(),
        optax.add_decayed_weights(WEIGHT_DECAY),
    )


def _distinct(drawn: Cell, count: int) -> list[StaticCell]:
    """The first `count` different cells in drawing order; fewer when there are fewer."""
    inputs, ops = np.asarray(drawn.inputs), np.asarray(drawn.ops)
    genomes = (
        cells.to_static(Cell(*genes))
        for genes in zip(inputs, ops, strict=True)  # type: ignore[arg-type]
    )
    return list(dict.fromkeys(genomes))[:count]


def _accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (logits.argmax(-1) == labels).mean()


def _steps(train: _Dataset, config: HeaderConfig) -> int:
    """Full batches of an epoch."""
    return len(train.labels) // min(config.batch_size, len(train.labels))


def _dataset(features: jax.Array, labels: jax.Array, name: str) -> _Dataset:
    if len(labels) == 0 or len(features) != len(labels):
        raise ValueError(
            f"the {name} split has {len(features)} features and {len(labels)} labels; header "
            "search needs equally many, at least one"
        )
    return _Dataset(jnp.asarray(features), jnp.asarray(labels, jnp.int32))


def _silent(_: Mapping[str, float | str]) -> None:
    """The default progress callback."""
