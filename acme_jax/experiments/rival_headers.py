"""Rivals that train the edge's header on the devices: alone, FedAvg, and Ditto.

The backbone is frozen and the features are ACME's. One compiled round of Ditto serves all: its
shared model is FedAvg's, and without its proximal term its personal one is training alone.
Headers are in the uniform form of `acme_jax.header_slots`, so that the edges share the program
too. Shape letters: C devices of one edge.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from acme_jax import device, header_slots, subnet_clients
from acme_jax.blocks import Params
from acme_jax.config import RefineConfig
from acme_jax.device import DeviceState
from acme_jax.experiments.study import Study
from acme_jax.header_layout import HeaderDims
from acme_jax.layout import replicate
from fed import clients
from fed.algorithms.ditto import ditto
from fed.clients import Batch, ClientData
from fed.simulate import run_round
from nas import cells
from nas.cells import Cell, StaticCell


class Headers(NamedTuple):
    """The headers of one edge's devices, in the uniform form."""

    shared: Params
    personal: Params  # [C, ...]


class Rates(NamedTuple):
    """What is chosen by the samples set aside."""

    shared: float  # learning rate of the shared header
    personal: float  # learning rate of the personal ones
    strength: float  # of Ditto's proximal term; 0: training alone


def start(params: Params, cell: StaticCell, dims: HeaderDims, count: int) -> Headers:
    """Every device at the edge's header, given in compact form."""
    return both(jax.tree.map(jnp.asarray, header_slots.to_slots(params, cell, dims)), count)


def both(params: Params, count: int) -> Headers:
    """Shared and personal headers at the same weights."""
    return Headers(params, clients.replicate(params, count))


def header_rounds(
    study: Study,
    edge: int,
    cell: StaticCell,
    headers: Headers,
    data: ClientData,
    rates: Rates,
    rounds: range,
) -> Headers:
    """Some rounds; epochs, batches, momentum and decay are those of ACME's refinement.

    Args:
      study: its key orders the samples, the same for every rival.
      edge: number of the edge.
      cell: of its header.
      headers: where it starts.
      data: the devices' features [C, N, T, D].
      rates: rates and strength.
      rounds: their numbers, from 0.
    """
    context = study.context
    program = _program(context.header_dims, context.config.refine, context.mesh)
    ids = jnp.arange(data.size.shape[0], dtype=jnp.int32)
    values = Rates(*(jnp.float32(value) for value in rates))
    key = study.key("rival headers", edge)
    rest = replicate((cells.from_static(cell), data, key, values, ids), context.mesh)
    for index in rounds:
        headers = program(replicate(headers, context.mesh), jnp.int32(index), *rest)
    return headers


@functools.lru_cache(maxsize=4)
def _program(dims: HeaderDims, config: RefineConfig, mesh: Mesh) -> Callable[..., Headers]:
    def optimizer(rate: Array) -> optax.GradientTransformation:
        """As `acme_jax.device.optimizer`, with a traced rate."""
        return optax.chain(
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(rate, momentum=config.momentum),
        )

    @jax.jit
    def one_round(
        state: Headers,
        index: Array,
        genes: Cell,
        data: ClientData,
        key: Array,
        rates: Rates,
        ids: Array,
    ) -> Headers:
        def loss_fn(params: Params, batch: Batch, key: Array) -> tuple[Array, dict[str, Any]]:
            del key
            logits = header_slots.apply(params, genes, dims, batch.inputs)
            return subnet_clients.weighted_loss(logits, batch), {}

        algorithm = ditto(
            loss_fn,
            optimizer(jnp.asarray(rates.shared)),
            rates.strength,
            personal_optimizer=optimizer(jnp.asarray(rates.personal)),
        )
        shared, personal, _ = run_round(
            algorithm,
            state.shared,
            state.personal,
            data,
            key,
            index,
            client_ids=ids,
            batch_size=config.batch_size,
            epochs=config.local_epochs,
            mesh=mesh,
        )
        return Headers(shared, personal)

    return one_round


def states(
    personal: Params, params: Params, cell: StaticCell, dims: HeaderDims, config: RefineConfig
) -> DeviceState:
    """Devices with these headers [C, ...] and nothing pruned, for `cohorts.evaluator`.

    Args:
      personal: in the uniform form, rows [C].
      params: of the edge's header in compact form.
      cell: of it.
      dims: of it.
      config: of the refinement.
    """
    count = jax.tree.leaves(personal)[0].shape[0]
    one = device.init_device(params, cell, dims, 0, config)
    rows: DeviceState = jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * count), one)
    return rows._replace(params=jax.tree.map(np.asarray, personal))
