"""Data-parallel supervised training of one phase: optimiser, epochs, micro-batches.

An epoch is one compiled `lax.scan` over steps. Every batch is divided into
`TrainConfig.shards` parts, spread over the mesh; the parts' gradients are gathered and added
in a fixed order, so that a run's results do not depend on the number of devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.sharding import Mesh

from acme_jax.augmentation import augment
from acme_jax.blocks import Params
from acme_jax.config import ConfigError, TrainConfig
from acme_jax.layout import map_parts

GradFn = Callable[[Array, Params, Any, Array, Array], tuple[dict[str, Array], Params]]
"""(key, params, lesson, inputs [b, ...], labels [b]) -> (metrics, gradients), means over b.

The key is the step's, the same for all parts of its batch."""


class TrainState(NamedTuple):
    """What the next epoch needs."""

    params: Params
    opt_state: optax.OptState
    epoch: Array  # [] int32, epochs done


class Schedule(NamedTuple):
    """The learning rate of a phase. Traced, so that phases can share a program."""

    peak: Array  # []
    warmup: Array  # [] steps
    total: Array  # [] steps
    weight_decay: Array  # [], decoupled (AdamW)


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; nothing of that epoch was kept."""


def steps_per_epoch(num_samples: int, config: TrainConfig) -> int:
    """Whole batches in an epoch.

    Raises:
      ConfigError: fewer samples than one batch, or a batch that the shards do not divide.
    """
    if config.batch_size > num_samples:
        raise ConfigError(
            f"batch_size is {config.batch_size}, but there are only {num_samples} training "
            f"samples; lower batch_size or raise data.public_train"
        )
    if config.batch_size % config.shards:
        raise ConfigError(
            f"batch_size ({config.batch_size}) must be a multiple of shards ({config.shards})"
        )
    return num_samples // config.batch_size


def make_schedule(config: TrainConfig, num_samples: int) -> Schedule:
    """The learning rate's course over a phase of `config.epochs` epochs."""
    total = config.epochs * steps_per_epoch(num_samples, config)
    return Schedule(
        jnp.float32(config.learning_rate),
        jnp.float32(int(total * config.warmup_fraction)),
        jnp.float32(total),
        jnp.float32(config.weight_decay),
    )


def learning_rate(schedule: Schedule, step: Array) -> Array:
    """Linear from 0 to the peak, then linear to 0, where it stays; `step` counts from 0."""
    rising = step / jnp.maximum(schedule.warmup, 1.0)
    rest = jnp.maximum(schedule.total - schedule.warmup, 1.0)
    falling = jnp.maximum(1.0 - (step - schedule.warmup) / rest, 0.0)
    return schedule.peak * jnp.where(step < schedule.warmup, rising, falling)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Adam's direction after clipping by global norm; rate and decay come from the schedule."""
    return _clipped_adam(config.clip_norm)


@functools.lru_cache(maxsize=8)
def _clipped_adam(clip_norm: float) -> optax.GradientTransformation:
    """Cached, so that equal optimisers are one and programs that close over one are shared.

    All parameters as one vector, because every leaf of its own would add to compile time.
    """
    adam = optax.chain(optax.clip_by_global_norm(clip_norm), optax.scale_by_adam())
    return optax.flatten(adam)


@functools.partial(jax.jit, static_argnums=1)
def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first epoch; a copy of the parameters, so that it may be donated."""
    return TrainState(jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.int32(0))


def accumulated(grad_fn: GradFn, num_micro: int) -> GradFn:
    """`grad_fn` on equal parts of its samples one after the other, for less memory.

    The same means, up to rounding; the parts share the key of their batch.
    """
    if num_micro == 1:
        return grad_fn

    def accumulate(
        key: Array, params: Params, lesson: Any, inputs: Array, labels: Array
    ) -> tuple[dict[str, Array], Params]:
        def add(total: Any, part: tuple[Array, ...]) -> tuple[Any, None]:
            found = grad_fn(key, params, lesson, part[0], part[1])
            return jax.tree.map(jnp.add, total, found), None

        parts = tuple(leaf.reshape(num_micro, -1, *leaf.shape[1:]) for leaf in (inputs, labels))
        shapes = jax.eval_shape(grad_fn, key, params, lesson, parts[0][0], parts[1][0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        total, _ = lax.scan(add, zeros, parts)
        mean: tuple[dict[str, Array], Params] = jax.tree.map(lambda leaf: leaf / num_micro, total)
        return mean

    return accumulate


def make_epoch(
    grad_fn: GradFn, config: TrainConfig, mesh: Mesh, num_micro: int = 1
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Builds `epoch(key, state, lesson, schedule, inputs, labels) -> (state, metrics)`.

    Not jitted. `key` is the phase's key, the same for every epoch: each epoch draws from
    `fold_in(key, state.epoch)`. `lesson` is what `grad_fn` takes. Inputs are images
    [N, height, width, channels] or token ids [N, T], labels [N]; metrics are [steps]. Of the
    configuration only batch_size, shards, clip_norm and the augmentation are read, so phases
    that agree in those (and in `grad_fn`) can share one compiled program. A shard's gradient is
    added up from `num_micro` micro-batches.
    """
    grad_fn = accumulated(grad_fn, num_micro)
    shards, batch_size = config.shards, config.batch_size
    optimizer = make_optimizer(config)

    def batch_grad(
        key: Array, params: Params, lesson: Any, inputs: Array, labels: Array
    ) -> tuple[dict[str, Array], Params]:
        # inputs [shards, b, ...]

        def part(index: Array, *args: Any) -> tuple[dict[str, Array], Params]:
            key, params, lesson, inputs, labels = args
            return grad_fn(key, params, lesson, inputs[index], labels[index])

        parts = map_parts(part, shards, mesh, key, params, lesson, inputs, labels)
        return jax.tree.map(lambda leaf: _ordered_mean(leaf, shards), parts)

    def epoch(
        key: Array,
        state: TrainState,
        lesson: Any,
        schedule: Schedule,
        inputs: Array,
        labels: Array,
    ) -> tuple[TrainState, dict[str, Array]]:
        num_steps = steps_per_epoch(inputs.shape[0], config)
        order_key, step_key = jax.random.split(jax.random.fold_in(key, state.epoch))
        order = jax.random.permutation(order_key, inputs.shape[0])
        order = order[: num_steps * batch_size].reshape(num_steps, batch_size)

        def step(
            carry: tuple[Params, optax.OptState], xs: tuple[Array, Array]
        ) -> tuple[tuple[Params, optax.OptState], dict[str, Array]]:
            params, opt_state = carry
            indices, index = xs
            shift_key, grad_key = jax.random.split(jax.random.fold_in(step_key, index))
            batch = augment(shift_key, inputs[indices], config)
            batch = batch.reshape(shards, -1, *inputs.shape[1:])
            batch_labels = labels[indices].reshape(shards, -1)
            metrics, grads = batch_grad(grad_key, params, lesson, batch, batch_labels)
            direction, opt_state = optimizer.update(grads, opt_state, params)
            rate = learning_rate(schedule, state.epoch * num_steps + index)
            decay = schedule.weight_decay
            params = jax.tree.map(lambda p, d: p - rate * (d + decay * p), params, direction)
            return (params, opt_state), metrics

        (params, opt_state), metrics = lax.scan(
            step, (state.params, state.opt_state), (order, jnp.arange(num_steps))
        )
        return TrainState(params, opt_state, state.epoch + 1), metrics

    return epoch


def _ordered_mean(parts: Array, count: int) -> Array:
    total = parts[0]
    for index in range(1, count):
        total = total + parts[index]
    return total / count
