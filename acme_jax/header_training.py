"""The compiled programs of the edge's header search.

Jitted once for each (dims, config) and kept, so that every edge after the first starts at once.
The chosen cell is a traced argument even in the winner's final training: the program that
searched is reused instead of compiling a new one for each winner.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from acme_jax import header
from acme_jax.blocks import Params
from acme_jax.config import HeaderConfig
from acme_jax.header import HeaderDims
from nas import controller
from nas.cells import Cell, CellSpace

WEIGHT_DECAY = 1e-4
CLIP_NORM = 5.0


class TrainState(NamedTuple):
    """Weights under training, the optimiser's state and the steps made."""

    params: Params
    opt_state: Any
    step: jax.Array  # [] int32


class Dataset(NamedTuple):
    """One split's features and labels."""

    features: jax.Array  # [N, T, D]
    labels: jax.Array  # [N] int32


class HeaderPrograms(NamedTuple):
    """Programs of one kind of header; `choice` is a cell, or None for the linear one."""

    init: Callable[..., TrainState]  # key -> state
    epoch: Callable[..., Any]  # key, state, choices [steps], num_steps, train -> state, loss
    accuracy: Callable[..., jax.Array]  # params, choice, select -> []


class PolicyPrograms(NamedTuple):
    """Programs of the controller."""

    init: Callable[..., controller.ControllerState]  # key -> state
    epoch: Callable[..., Any]  # key, state, params, select -> state, (reward, entropy)
    draw: Callable[..., Cell]  # key, state, S -> cells [S]


@functools.lru_cache(maxsize=8)
def header_programs(dims: HeaderDims, config: HeaderConfig, linear: bool) -> HeaderPrograms:
    """Initialisation, one epoch and accuracy of the supernet or of the linear header."""
    optimizer = make_optimizer()

    def predict(params: Params, choice: Any, features: jax.Array) -> jax.Array:
        if linear:
            return header.apply_linear(params, features)
        return header.apply_shared(params, choice, dims, features)

    def init(key: jax.Array) -> TrainState:
        if linear:
            params = header.init_linear(key, dims.embed_dim, dims.num_classes)
        else:
            params = header.init_shared(key, dims)
        return restart(params)

    def epoch(
        key: jax.Array, state: TrainState, choices: Any, num_steps: jax.Array, train: Dataset
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

    def accuracy(params: Params, choice: Any, select: Dataset) -> jax.Array:
        return _accuracy(predict(params, choice, select.features), select.labels)

    return HeaderPrograms(jax.jit(init), jax.jit(epoch), jax.jit(accuracy))


@functools.lru_cache(maxsize=8)
def policy_programs(dims: HeaderDims, config: HeaderConfig) -> PolicyPrograms:
    """Initialisation, one epoch of REINFORCE and sampling of the controller."""
    policy = controller.reinforce(CellSpace(dims.blocks))

    def epoch(
        key: jax.Array, state: controller.ControllerState, params: Params, select: Dataset
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

    def draw(key: jax.Array, state: controller.ControllerState, count: int) -> Cell:
        return jax.vmap(policy.sample, in_axes=(0, None))(jax.random.split(key, count), state)

    return PolicyPrograms(jax.jit(policy.init), jax.jit(epoch), jax.jit(draw, static_argnums=2))


@jax.jit
def restart(params: Params) -> TrainState:
    """Training state at step 0 from given weights."""
    return TrainState(params, make_optimizer().init(params), jnp.zeros((), jnp.int32))


def make_optimizer() -> optax.GradientTransformation:
    """AdamW without its learning rate, which the epoch program applies."""
    return optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.scale_by_adam(),
        optax.add_decayed_weights(WEIGHT_DECAY),
    )


def _accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (logits.argmax(-1) == labels).mean()
