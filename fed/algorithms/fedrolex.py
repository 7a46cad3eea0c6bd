"""FedRolex (Alam et al., NeurIPS 2022): HeteroFL with sub-models that roll over the full model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fed.aggregate import coverage_weighted_mean
from fed.algorithm import FedAlgorithm
from fed.algorithms.heterofl import Submodel, SubmodelState, cut, submodel_client
from fed.algorithms.local_sgd import LossFn


class RolexState(NamedTuple):
    """The server's state."""

    params: Any  # of the full model
    round: jax.Array  # [] int32, rounds counted so far


class RolexMessage(NamedTuple):
    """What goes down to one client."""

    model: Submodel
    round: jax.Array  # [] int32


class RolexUpdate(NamedTuple):
    """What goes up."""

    params: Any  # zero where the client held nothing
    round: jax.Array  # [] int32: which sub-model this is, since it may arrive a round late


def fedrolex(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mask_of: Callable[[jax.Array, jax.Array], Any],
) -> FedAlgorithm:
    """FedRolex (the paper's algorithm 1 and equation 3); `server_init` takes the full model.

    In round j a client of capacity b holds b units of every layer from unit j on, around the
    end (`fed.algorithms.heterofl.window(num_units, b, offset=j)`), so that every unit is trained
    by every client in time and no weight sees the large clients only. Everything else is
    `heterofl`, to which it is equal where `mask_of` does not look at the round. A round in which
    nothing arrives is not counted.

    Args:
      loss_fn: as for `heterofl`.
      optimizer: the clients' optimiser; each round starts a fresh one.
      mask_of: (row of the cohort, round), int [] each -> mask tree with the parameters' shapes,
        nonzero where that client holds an entry in that round.
    """
    submodel_init, client_step = submodel_client(loss_fn, optimizer)

    def server_message(state: RolexState, row: jax.Array) -> RolexMessage:
        return RolexMessage(cut(state.params, mask_of(row, state.round)), state.round)

    def client_init(
        message: RolexMessage, client_state: tuple[()], key: jax.Array
    ) -> SubmodelState:
        return submodel_init(message.model, client_state, key)

    def client_final(message: RolexMessage, state: SubmodelState) -> tuple[tuple[()], RolexUpdate]:
        return (), RolexUpdate(state.sgd.params, message.round)

    def server_update(
        state: RolexState, updates: RolexUpdate, weights: jax.Array, rows: jax.Array
    ) -> tuple[RolexState, dict[str, Any]]:
        masks = jax.vmap(mask_of)(rows, updates.round)
        params = coverage_weighted_mean(weights, updates.params, masks, state.params)
        return RolexState(params, state.round + 1), {}

    return FedAlgorithm(
        server_init=lambda params: RolexState(params, jnp.int32(0)),
        server_message=server_message,
        client_init=client_init,
        client_step=client_step,
        client_final=client_final,
        server_update=server_update,
    )
