"""Trains headers for comparisons: one program for each kind, on every backbone and seed alike.

The loss, the optimiser, the batches and the cosine decay are those of `acme_jax.header_training`.
What differs between runs (weights to start from, cell, learning rate, epochs) is traced. A run is
only started here: JAX computes on its device while the host starts the next one on another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from acme_jax.blocks import Params
from acme_jax.cloud import in_batches
from acme_jax.experiments.study import EdgeData
from acme_jax.header_training import make_optimizer

Predict = Callable[[Params, Any, Array], Array]
"""(params, choice, inputs [B, ...]) -> logits [B, num_classes]; `choice`, for instance a cell, is
not trained. Always the same object, because programs are kept by it."""

EVAL_BATCH = 500
"""Samples that are classified at once; only memory depends on it."""


class Setting(NamedTuple):
    """How long and how fast one run trains."""

    learning_rate: float
    epochs: int


class Run(NamedTuple):
    """A run that is complete, or under way; reading an array waits for it."""

    params: Params
    select_accuracy: Array  # []


def train(
    predict: Predict,
    key: Array,
    start: Params,
    choice: Any,
    setting: Setting,
    data: EdgeData,
    batch_size: int,
    device: jax.Device,
) -> Run:
    """Starts one run, after those that its device has already been given.

    Args:
      predict: of the header.
      key: of the order of the samples.
      start: weights to begin with.
      choice: what `predict` gets.
      setting: of the run.
      data: of the edge; the inputs are whatever `predict` reads.
      batch_size: samples of a step; all there are, if there are fewer.
      device: where it runs.
    """
    program = _program(predict, min(batch_size, len(data.train_labels)))
    rate, epochs = np.float32(setting.learning_rate), np.int32(setting.epochs)
    return Run(*program(*jax.device_put((key, start, choice, rate, epochs, data), device)))


def classifier(predict: Predict, params: Params, choice: Any = None) -> Callable[[Array], Array]:
    """A trained header for `final.headers`: inputs [N, ...] -> logits [N, num_classes]."""
    return functools.partial(_classify(predict), params, choice)


@functools.lru_cache(maxsize=64)
def _classify(predict: Predict) -> Callable[..., Array]:
    def classify(params: Params, choice: Any, inputs: Array) -> Array:
        return in_batches(lambda rows: predict(params, choice, rows), EVAL_BATCH, inputs)

    return jax.jit(classify)


@functools.lru_cache(maxsize=64)
def _program(predict: Predict, size: int) -> Callable[..., tuple[Params, Array]]:
    optimizer = make_optimizer()

    def run(
        key: Array, start: Params, choice: Any, rate: Array, epochs: Array, data: EdgeData
    ) -> tuple[Params, Array]:
        count = len(data.train_labels)
        # the remainder of incomplete batches waits for another epoch's shuffle
        steps = count // size

        def loss_of(params: Params, rows: Array) -> Array:
            logits = predict(params, choice, data.train_tokens[rows])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, data.train_labels[rows]
            ).mean()

        def step(carry: Any, rows: Array) -> tuple[Any, None]:
            params, opt_state, number = carry
            grads = jax.grad(loss_of)(params, rows)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            scale = rate * 0.5 * (1 + jnp.cos(jnp.pi * number / (epochs * steps)))
            params = jax.tree.map(lambda leaf, change: leaf - scale * change, params, updates)
            return (params, opt_state, number + 1), None

        def epoch(number: Array, carry: Any) -> Any:
            order = jax.random.permutation(jax.random.fold_in(key, number), count)
            return lax.scan(step, carry, order[: steps * size].reshape(steps, size))[0]

        carry = (start, optimizer.init(start), jnp.zeros((), jnp.int32))
        params, _, _ = lax.fori_loop(0, epochs, epoch, carry)
        logits = in_batches(
            lambda rows: predict(params, choice, rows), EVAL_BATCH, data.select_tokens
        )
        return params, (logits.argmax(-1) == data.select_labels).mean()

    return jax.jit(run)
