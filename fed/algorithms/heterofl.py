"""HeteroFL (Diao et al., ICLR 2021): clients train sub-models of one model, each what it can hold.

A sub-model is a mask tree over the full parameters: what a client does not hold is zero for it,
gets no gradient, and does not count in the mean. That equals really smaller models wherever
zero weights are the same as missing ones (dense layers and convolutions with a ReLU or GELU
between them; attention heads), at the full model's cost: a program for each size belongs to the
caller, as `acme_jax.subnet_clients` does it for Transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fed.aggregate import coverage_weighted_mean
from fed.algorithm import FedAlgorithm
from fed.algorithms.local_sgd import LossFn, SgdState, make_step, start
from fed.clients import Batch, take_row


class Submodel(NamedTuple):
    """What goes down to one client."""

    params: Any  # zero where the mask is
    mask: Any  # the same tree and shapes, 1 where the client holds an entry


class SubmodelState(NamedTuple):
    """What a client carries from one step to the next."""

    sgd: SgdState
    mask: Any


def heterofl(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mask_of: Callable[[jax.Array], Any],
) -> FedAlgorithm:
    """HeteroFL; the server state is the full model's parameters, the update a sub-model's.

    The server averages every entry over the clients that hold it (the paper's equations 3 to
    5); an entry that nobody holds keeps its value. Two of the paper's additions are the loss's
    to make, because they are the model's: its scaler of activations, and its masked
    cross-entropy over the classes that a client has.

    Args:
      loss_fn: (params, batch, key) -> (loss, metrics), of the full parameters with zeros where a
        client holds nothing; weighs samples by `batch.weight`.
      optimizer: the clients' optimiser; each round starts a fresh one.
      mask_of: row of the cohort (int []) -> mask tree with the parameters' shapes, nonzero where
        that client holds an entry; `rows_of(masks)` where the masks are stacked.
    """
    client_init, client_step = submodel_client(loss_fn, optimizer)

    def server_update(
        params: Any, updates: Any, weights: jax.Array, rows: jax.Array
    ) -> tuple[Any, dict[str, Any]]:
        return coverage_weighted_mean(weights, updates, jax.vmap(mask_of)(rows), params), {}

    return FedAlgorithm(
        server_init=lambda params: params,
        server_message=lambda params, row: cut(params, mask_of(row)),
        client_init=client_init,
        client_step=client_step,
        client_final=lambda message, state: ((), state.sgd.params),
        server_update=server_update,
    )


def submodel_client(
    loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> tuple[Callable[..., SubmodelState], Callable[..., tuple[SubmodelState, Any]]]:
    """`client_init` and `client_step` on a `Submodel`; arguments as in `heterofl`."""

    def client_init(message: Submodel, client_state: tuple[()], key: jax.Array) -> SubmodelState:
        del client_state
        return SubmodelState(start(message.params, optimizer, key), message.mask)

    def client_step(state: SubmodelState, batch: Batch) -> tuple[SubmodelState, Any]:
        def own_loss(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
            return loss_fn(cut(params, state.mask).params, batch, key)

        sgd, metrics = make_step(own_loss, optimizer)(state.sgd, batch)
        return SubmodelState(sgd, state.mask), metrics

    return client_init, client_step


def cut(params: Any, mask: Any) -> Submodel:
    """The part of a model that a mask keeps."""
    kept = jax.tree.map(lambda leaf, held: jnp.where(held != 0, leaf, 0), params, mask)
    return Submodel(kept, mask)


def rows_of(masks: Any) -> Callable[[jax.Array], Any]:
    """`mask_of` from masks that are stacked: leaves [C, ...], rows of the cohort."""
    return lambda row: take_row(masks, row)


def window(num_units: int, count: jax.Array | int, offset: jax.Array | int = 0) -> jax.Array:
    """1 for `count` of a layer's units from `offset` on, around its end; float32 [num_units].

    Args:
      num_units: static, of the full layer.
      count: [] units kept, the client's capacity; may be traced. The first ones (offset 0) are
        HeteroFL's sub-layer.
      offset: [] where the window starts; may be traced. FedRolex moves it by one each round.
    """
    place = (jnp.arange(num_units, dtype=jnp.int32) - offset) % num_units
    return (place < count).astype(jnp.float32)
