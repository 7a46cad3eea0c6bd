"""Training on one client's own samples, as several algorithms do between two messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from fed.clients import Batch

LossFn = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Any]]
"""(params, batch, key) -> (loss [], metrics); weighs samples by `batch.weight`."""


class SgdState(NamedTuple):
    """What a client carries from one step to the next."""

    params: Any
    optimizer_state: Any
    key: jax.Array


def start(params: Any, optimizer: optax.GradientTransformation, key: jax.Array) -> SgdState:
    """A fresh optimiser on the given parameters; the key is consumed."""
    return SgdState(params, optimizer.init(params), key)


def make_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> Callable[[SgdState, Batch], tuple[SgdState, Any]]:
    """One optimiser step on a batch; the metrics are those of `loss_fn`."""

    def step(state: SgdState, batch: Batch) -> tuple[SgdState, Any]:
        key, loss_key = jax.random.split(state.key)
        gradients, metrics = jax.grad(loss_fn, has_aux=True)(state.params, batch, loss_key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return SgdState(params, optimizer_state, key), metrics

    return step
