"""CE-LoRA (arXiv 2503.23869): tri-matrix adapters of which only the cores C travel.

Each client trains dW = s B C A (`fed.tri_matrix`); the server answers with a mean of the clients'
cores of its own for each client, weighted by how alike their data and their cores are. A, B and
everything else a client trains stay on it.

The paper's server is not public, so the weights are a reconstruction: similarity of data from
mixtures of Gaussians a class, optimal transport between labels (`fed.gmm`, `fed.transport`), and
linear CKA of the cores (`fed.cka`).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fed.aggregate import personalized_mean
from fed.algorithm import FedAlgorithm
from fed.algorithms.local_sgd import LossFn, SgdState, make_step, start
from fed.arrivals import newest
from fed.cka import pairwise_cka
from fed.clients import replicate
from fed.tri_matrix import cores, freeze_basis, with_cores

Train = Literal["all", "cores"]


class CeLoraServer(NamedTuple):
    """What the server holds; rows are clients."""

    received: jax.Array  # [C, M, r, r] every client's cores as it last sent them
    personalized: jax.Array  # [C, M, r, r] what goes down next
    data: jax.Array  # [C, C] similarity of data, from sketches sent once


def celora(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    data_share: float = 0.5,
    train: Train = "all",
) -> FedAlgorithm:
    """CE-LoRA as a federated algorithm.

    A client's parameters are any tree with `TriMatrix` nodes (`fed.tri_matrix.init`, from one
    key for all clients); they are its client state. `server_init` takes one client's
    parameters, as every client starts, and the similarity of data [C, C] (`data_similarity`).
    Message and update are the cores, [M, r, r] float32: 4 r^2 bytes a module. Each round starts a
    fresh optimiser. Numbers of samples do not enter the weights, only whether an update arrived;
    cores of clients that were not heard count as they were last sent.

    Args:
      loss_fn: (params, batch, key) -> (loss, metrics); weighs samples by `batch.weight`.
      optimizer: the clients' optimiser.
      data_share: lambda in [0, 1]: W ~ lambda * S_data + (1 - lambda) * S_model, rows normalised.
      train: `"all"` three factors, or `"cores"` with everything that is not A or B. The
        latter needs `"frozen_basis"` starts: where B = 0 the gradient of C is 0.

    Raises:
      ValueError: a share outside [0, 1], or an unknown `train`.
    """
    if not 0 <= data_share <= 1:
        raise ValueError(f"data_share must be from 0 to 1, got {data_share}")
    if train not in ("all", "cores"):
        raise ValueError(f"unknown train {train!r}; expected 'all' or 'cores'")
    trainer = optimizer if train == "all" else freeze_basis(optimizer)

    def server_init(params: Any, data: jax.Array) -> CeLoraServer:
        if data.ndim != 2 or data.shape[0] != data.shape[1]:
            raise ValueError(f"data must be similarities [C, C], got shape {data.shape}")
        first = replicate(cores(params), data.shape[0])
        return CeLoraServer(first, first, data)

    def client_init(message: jax.Array, params: Any, key: jax.Array) -> SgdState:
        return start(with_cores(params, message), trainer, key)

    def client_final(message: jax.Array, state: SgdState) -> tuple[Any, jax.Array]:
        del message
        return state.params, cores(state.params)

    def server_update(
        state: CeLoraServer, updates: jax.Array, weights: jax.Array, rows: jax.Array
    ) -> tuple[CeLoraServer, dict[str, jax.Array]]:
        received = newest(state.received, updates, weights > 0, rows)
        mixing = mixing_weights(state.data, pairwise_cka(received), data_share)
        personalized = personalized_mean(mixing, received)
        return CeLoraServer(received, personalized, state.data), {"self_weight": jnp.diag(mixing)}

    return FedAlgorithm(
        server_init=server_init,
        server_message=lambda state, row: state.personalized[row],
        client_init=client_init,
        client_step=make_step(loss_fn, trainer),
        client_final=client_final,
        server_update=server_update,
    )


def data_similarity(distance: jax.Array) -> jax.Array:
    """Similarities exp(-d / median) in (0, 1] of the distances between clients' data.

    The median is over pairs of different clients; where most of them are at distance 0, the
    mean takes its place.

    Args:
      distance: [C, C], not negative, symmetric (`fed.transport.client_distances`).

    Returns:
      [C, C]; 1 for clients with identical data, and for all if all are.
    """
    num_clients = distance.shape[0]
    if num_clients == 1:
        return jnp.ones_like(distance)
    pairs = distance[jnp.triu_indices(num_clients, 1)]
    scale = jnp.where(jnp.median(pairs) > 0, jnp.median(pairs), pairs.mean())
    return jnp.exp(-distance / jnp.where(scale > 0, scale, 1))


def mixing_weights(data: jax.Array, model: jax.Array, data_share: float | jax.Array) -> jax.Array:
    """Row-stochastic weights W ~ lambda * S_data + (1 - lambda) * S_model, oneself included.

    Args:
      data: similarities [C, C], not negative.
      model: likewise.
      data_share: lambda.
    """
    both = data_share * data + (1 - data_share) * model
    return both / both.sum(axis=1, keepdims=True)
