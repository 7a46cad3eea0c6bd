"""Federated averaging (McMahan et al. 2017): one shared model, averaged every round."""

from __future__ import annotations

from typing import Any

import jax
import optax

from fed.aggregate import weighted_mean
from fed.algorithm import FedAlgorithm
from fed.algorithms.local_sgd import LossFn, SgdState, make_step, start


def fedavg(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> FedAlgorithm:
    """FedAvg; the server state, the message and the update are the model's parameters.

    Clients keep nothing between rounds (`client_state` is `()`), so each round starts a
    fresh optimiser.

    Args:
      loss_fn: (params, batch, key) -> (loss, metrics); weighs samples by `batch.weight`.
      optimizer: the clients' optimiser.
    """

    def client_init(message: Any, client_state: tuple[()], key: jax.Array) -> SgdState:
        del client_state
        return start(message, optimizer, key)

    def server_update(
        params: Any, updates: Any, weights: jax.Array, rows: jax.Array
    ) -> tuple[Any, dict[str, Any]]:
        del params, rows
        return weighted_mean(weights, updates), {}

    return FedAlgorithm(
        server_init=lambda params: params,
        server_message=lambda params, row: params,
        client_init=client_init,
        client_step=make_step(loss_fn, optimizer),
        client_final=lambda message, state: ((), state.params),
        server_update=server_update,
    )
