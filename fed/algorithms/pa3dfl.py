"""Pa3dFL: personal models of different capacities from shared factors and a hyper-network.

Wang et al., "Selective Knowledge Sharing for Personalized Federated Learning Under Capacity
Heterogeneity" (arXiv 2405.20589). Layers are products of a general factor, which all clients
train in full and the server averages, and a personal factor, pruned to the client's capacity, which
a hyper-network on the server makes from the client's embedding (`fed.factorised`,
`fed.hypernetwork`). Clients send the general arrays and the change of the personal ones; the
hyper-network learns from the change by a vector-Jacobian product, as in pFedHN (Shamsian et al.
2021).

Where the public sources are silent: arrays beside the factors (biases, scales) are general unless
the caller puts them among the personal ones; the pull-back is averaged over the clients heard.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fed import hypernetwork
from fed.aggregate import weighted_mean
from fed.algorithm import FedAlgorithm
from fed.algorithms.local_sgd import SgdState, make_step, start
from fed.clients import Batch
from fed.hypernetwork import Hypernetwork


class Factors(NamedTuple):
    """What a client's loss is a function of."""

    general: Any  # e.g. theta_u of every layer, and biases
    personal: Any  # e.g. theta_v of every layer; masked
    masks: Any  # tree like `personal`; 0 and 1, leaves that broadcast to its leaves' shapes


FactorsLoss = Callable[[Factors, Batch, jax.Array], tuple[jax.Array, Any]]
"""(factors, batch, key) -> (loss [], metrics); weighs samples by `batch.weight`."""


class Pa3dflServer(NamedTuple):
    """State of the server."""

    general: Any
    hypernetwork: Hypernetwork
    optimizer_state: Any
    capacity: jax.Array  # float32 [C], fractions of channels


class Pa3dflMessage(NamedTuple):
    """What a client receives. Its capacity it knows itself: it is here, but need not travel."""

    general: Any
    personal: Any  # pruned entries are 0 and do not travel
    capacity: jax.Array  # float32 []


class Pa3dflUpdate(NamedTuple):
    """What a client sends; the payload down and up is `fed.factorised.num_floats` a layer."""

    general: Any
    change: Any  # of the personal arrays; pruned entries are 0


class _Step(NamedTuple):
    sgd: SgdState
    capacity: jax.Array


def pa3dfl(
    loss_fn: FactorsLoss,
    optimizer: optax.GradientTransformation,
    masks: Callable[[jax.Array], Any],
    *,
    server_optimizer: optax.GradientTransformation,
) -> FedAlgorithm:
    """Pa3dFL; clients keep nothing between rounds, each starts a fresh optimiser.

    `server_init(general, hypernetwork, capacity)` takes the general arrays, a
    `fed.hypernetwork.Hypernetwork` for C clients, and their capacities [C]. A client's own model
    is `server_message(state, row)`.

    Args:
      loss_fn: see `FactorsLoss`; composes the layers (`fed.factorised.compose`).
      optimizer: the clients'.
      masks: capacity [] -> tree of masks, see `Factors`; the capacity is traced.
      server_optimizer: of the hyper-network, say `optax.adam(1e-3)`.
    """

    def server_init(general: Any, network: Hypernetwork, capacity: Any) -> Pa3dflServer:
        capacity = jnp.asarray(capacity, jnp.float32)
        if capacity.shape != network.embeddings.shape[:1]:
            raise ValueError(
                f"capacity has shape {capacity.shape}, but the hyper-network is of "
                f"{network.embeddings.shape[0]} clients"
            )
        return Pa3dflServer(general, network, server_optimizer.init(network), capacity)

    def server_message(state: Pa3dflServer, row: jax.Array) -> Pa3dflMessage:
        capacity = state.capacity[row]
        personal = _times(masks(capacity), hypernetwork.generate(state.hypernetwork, row))
        return Pa3dflMessage(state.general, personal, capacity)

    def client_init(message: Pa3dflMessage, client_state: tuple[()], key: jax.Array) -> _Step:
        del client_state
        return _Step(start((message.general, message.personal), optimizer, key), message.capacity)

    def client_step(state: _Step, batch: Batch) -> tuple[_Step, Any]:
        masks_ = masks(state.capacity)

        def loss(params: tuple[Any, Any], batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
            general, personal = params
            return loss_fn(Factors(general, _times(masks_, personal), masks_), batch, key)

        sgd, metrics = make_step(loss, optimizer)(state.sgd, batch)
        return state._replace(sgd=sgd), metrics

    def client_final(message: Pa3dflMessage, state: _Step) -> tuple[tuple[()], Pa3dflUpdate]:
        general, personal = state.sgd.params
        change = jax.tree.map(lambda after, before: after - before, personal, message.personal)
        return (), Pa3dflUpdate(general, _times(masks(state.capacity), change))

    def server_update(
        state: Pa3dflServer, updates: Pa3dflUpdate, weights: jax.Array, rows: jax.Array
    ) -> tuple[Pa3dflServer, dict[str, jax.Array]]:
        # A plain mean, as in the paper: a client's number of samples does not count.
        heard = (weights > 0).astype(jnp.float32)
        gradients = pull_back(state.hypernetwork, updates.change, heard, rows)
        moves, optimizer_state = server_optimizer.update(
            gradients, state.optimizer_state, state.hypernetwork
        )
        network = optax.apply_updates(state.hypernetwork, moves)
        general = weighted_mean(heard, updates.general)
        metrics = {"gradient_norm": optax.tree.norm(gradients)}
        return Pa3dflServer(general, network, optimizer_state, state.capacity), metrics

    return FedAlgorithm(
        server_init=server_init,
        server_message=server_message,
        client_init=client_init,
        client_step=client_step,
        client_final=client_final,
        server_update=server_update,
    )


def pull_back(
    network: Hypernetwork, change: Any, weights: jax.Array, rows: jax.Array
) -> Hypernetwork:
    """The hyper-network's gradient: the vector-Jacobian product with `-change` as cotangent.

    It is the gradient of `0.5 |personal - (personal + change)|^2`: a step against it moves what
    the network makes for these clients to what they trained.

    Args:
      network: at its present parameters.
      change: leaves [K, ...], 0 outside each client's mask.
      weights: [K], not negative; normalised to sum 1.
      rows: int [K], the clients that sent them.
    """
    share = weights / weights.sum()
    cotangent = jax.tree.map(lambda x: -x * share.reshape(-1, *[1] * (x.ndim - 1)), change)
    made, product = jax.vjp(
        lambda network: jax.vmap(partial(hypernetwork.generate, network))(rows), network
    )
    del made
    return product(cotangent)[0]


def _times(masks: Any, tree: Any) -> Any:
    return jax.tree.map(lambda mask, leaf: mask * leaf, masks, tree)
