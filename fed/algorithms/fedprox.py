"""FedProx (Li et al., MLSys 2020): averaging, with clients held near the model they were sent."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fed.aggregate import weighted_mean
from fed.algorithm import FedAlgorithm
from fed.algorithms.local_sgd import LossFn, SgdState, make_step, start
from fed.clients import Batch


class ProximalState(NamedTuple):
    """What a client carries from one step to the next."""

    sgd: SgdState
    anchor: Any  # the model it was sent


def fedprox(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, mu: float | jax.Array
) -> FedAlgorithm:
    """FedProx; states, messages and updates are those of `fedavg`.

    Client k takes steps on h_k(w; w_t) = F_k(w) + mu / 2 |w - w_t|^2 (the paper's equation 2),
    where w_t is the model of the round. Clients may take unequal numbers of steps (the paper's
    inexact solutions): the caller's schedule says how many. `mu = 0` is FedAvg.

    Args:
      loss_fn: (params, batch, key) -> (loss, metrics); weighs samples by `batch.weight`.
      optimizer: the clients' optimiser; SGD in the paper.
      mu: [] strength of the proximal term, not negative; may be traced. The paper tries 0.001
        to 1.

    Raises:
      ValueError: `mu` is negative.
    """
    check_strength("mu", mu)

    def client_init(message: Any, client_state: tuple[()], key: jax.Array) -> ProximalState:
        del client_state
        return ProximalState(start(message, optimizer, key), message)

    def client_step(state: ProximalState, batch: Batch) -> tuple[ProximalState, Any]:
        step = make_step(proximal(loss_fn, mu, state.anchor), optimizer)
        sgd, metrics = step(state.sgd, batch)
        return state._replace(sgd=sgd), metrics

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
        client_final=lambda message, state: ((), state.sgd.params),
        server_update=server_update,
    )


def proximal(loss_fn: LossFn, strength: float | jax.Array, anchor: Any) -> LossFn:
    """The loss plus `strength / 2` times the squared distance to `anchor`; metrics are the loss's.

    Args:
      loss_fn: as for `fedprox`.
      strength: [], may be traced.
      anchor: a tree like the parameters.
    """

    def with_distance(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        loss, metrics = loss_fn(params, batch, key)
        squares = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), params, anchor)
        return loss + strength / 2 * sum(jax.tree.leaves(squares)), metrics

    return with_distance


def check_strength(name: str, value: float | jax.Array) -> None:
    """Refuses a negative number; a traced one passes.

    Raises:
      ValueError: names the argument.
    """
    if not isinstance(value, jax.core.Tracer) and float(value) < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
