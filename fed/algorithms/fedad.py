"""FedAD: each client trains without some unimportant units, more of them where it has more data.

The second part of FedDHAD (arXiv 2507.10430); `fed.unit_dropout` has its pure functions. Units
are dropped by factors that the loss multiplies their outputs with, so one program serves every
sub-model. What a dropped unit alone uses has a gradient of exactly 0 and comes back as it was
sent; averaging such updates is what the paper calls scattering the sub-models back.

Scores and rates belong to the server and change between rounds, not in them: replace
`state.scores` with what the probes measured and `state.rates` with `dropout_rates` when dropout
is to begin; until then rates are 0 and this is FedAvg.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from fed.aggregate import weighted_mean
from fed.algorithm import FedAlgorithm
from fed.algorithms.local_sgd import SgdState, make_step, start
from fed.clients import Batch
from fed.unit_dropout import draw_factors, kept_share


class UnitLossFn(Protocol):
    """A loss of a model whose units can be dropped."""

    def __call__(
        self, params: Any, batch: Batch, key: jax.Array, factors: Any
    ) -> tuple[jax.Array, Any]:
        """(loss [], metrics); `factors`, leaves [U], multiply the outputs of the layers' units."""


class ServerState(NamedTuple):
    """The server's model, what the probes found, and how much each client drops."""

    params: Any
    scores: Any  # leaves [U], one a layer
    rates: jax.Array  # [C]


class Message(NamedTuple):
    """What a client gets; a real one would hold the kept part of the parameters only."""

    params: Any
    scores: Any
    rate: jax.Array  # []


class Update(NamedTuple):
    """What a client sends."""

    params: Any
    kept: jax.Array  # [] part of the units that it trained


class _Client(NamedTuple):
    sgd: SgdState
    factors: Any


def fedad(
    loss_fn: UnitLossFn, optimizer: optax.GradientTransformation, *, temperature: float = 1.0
) -> FedAlgorithm:
    """FedAvg of sub-models; one draw of units for each client and round.

    `server_init` takes the parameters, the scores (leaves [U]) and the rates [C]. The optimiser
    must leave parameters without a gradient alone: no weight decay.

    Args:
      loss_fn: see `UnitLossFn`.
      optimizer: the clients' optimiser.
      temperature: see `fed.unit_dropout.drop_probabilities`.
    """

    def client_init(message: Message, client_state: tuple[()], key: jax.Array) -> _Client:
        del client_state
        unit_key, sgd_key = jax.random.split(key)
        factors = draw_factors(unit_key, message.scores, message.rate, temperature=temperature)
        return _Client(start(message.params, optimizer, sgd_key), factors)

    def client_step(state: _Client, batch: Batch) -> tuple[_Client, Any]:
        def loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
            return loss_fn(params, batch, key, state.factors)

        sgd, metrics = make_step(loss, optimizer)(state.sgd, batch)
        return _Client(sgd, state.factors), metrics

    def client_final(message: Message, state: _Client) -> tuple[tuple[()], Update]:
        del message
        return (), Update(state.sgd.params, kept_share(state.factors))

    def server_update(
        state: ServerState, updates: Update, weights: jax.Array, rows: jax.Array
    ) -> tuple[ServerState, dict[str, jax.Array]]:
        del rows
        heard = weights > 0
        kept = jnp.sum(jnp.where(heard, updates.kept, 0)) / jnp.maximum(jnp.sum(heard), 1)
        params = weighted_mean(weights, updates.params)
        return state._replace(params=params), {"kept_units": kept}

    return FedAlgorithm(
        server_init=lambda params, scores, rates: ServerState(params, scores, jnp.asarray(rates)),
        server_message=lambda state, row: Message(state.params, state.scores, state.rates[row]),
        client_init=client_init,
        client_step=client_step,
        client_final=client_final,
        server_update=server_update,
    )
