"""Ditto (Li et al., ICML 2021): a shared model, and a personal one that is held near it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from fed.aggregate import weighted_mean
from fed.algorithm import FedAlgorithm
from fed.algorithms.fedprox import check_strength, proximal
from fed.algorithms.local_sgd import LossFn, SgdState, make_step, start
from fed.clients import Batch


class DittoState(NamedTuple):
    """What a client carries from one step to the next."""

    shared: SgdState
    personal: SgdState
    anchor: Any  # the shared model it was sent


class DittoMetrics(NamedTuple):
    """Those of the loss, for both models; without the proximal term."""

    shared: Any
    personal: Any


def ditto(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    lam: float | jax.Array,
    *,
    personal_optimizer: optax.GradientTransformation | None = None,
) -> FedAlgorithm:
    """Ditto with FedAvg as its solver of the shared model (the paper's algorithm 1).

    The server state, the message and the update are the shared model's parameters, as in
    `fedavg`; the client state is the personal model's. Equal starting points come from
    `fed.clients.replicate(params, num_clients)`. Every step of a client is one on the shared
    model and, on the same batch and with the same random numbers, one on
    h_k(v; w_t) = F_k(v) + lam / 2 |v - w_t|^2 (the paper's equation 2), where w_t is the shared
    model of the round as it was sent. `lam = 0` is training alone, large ones tend to FedAvg.

    Args:
      loss_fn: (params, batch, key) -> (loss, metrics); weighs samples by `batch.weight`.
      optimizer: the clients' optimiser; SGD in the paper. Each round starts a fresh one.
      lam: [] strength of the proximal term, not negative; may be traced. The paper tries 0.05
        to 2.
      personal_optimizer: of the personal model; None: the same.

    Raises:
      ValueError: `lam` is negative.
    """
    check_strength("lam", lam)
    own = optimizer if personal_optimizer is None else personal_optimizer
    shared_step = make_step(loss_fn, optimizer)

    def client_init(message: Any, personal: Any, key: jax.Array) -> DittoState:
        return DittoState(start(message, optimizer, key), start(personal, own, key), message)

    def client_step(state: DittoState, batch: Batch) -> tuple[DittoState, DittoMetrics]:
        personal_step = make_step(proximal(loss_fn, lam, state.anchor), own)
        shared, shared_metrics = shared_step(state.shared, batch)
        personal, personal_metrics = personal_step(state.personal, batch)
        metrics = DittoMetrics(shared_metrics, personal_metrics)
        return DittoState(shared, personal, state.anchor), metrics

    def server_update(
        params: Any, updates: Any, weights: jax.Array, rows: jax.Array
    ) -> tuple[Any, dict[str, Any]]:
        del params, rows
        return weighted_mean(weights, updates), {}

    return FedAlgorithm(
        server_init=lambda params: params,
        server_message=lambda params, row: params,
        client_init=client_init,
        client_step=client_step,
        client_final=lambda message, state: (state.personal.params, state.shared.params),
        server_update=server_update,
    )
