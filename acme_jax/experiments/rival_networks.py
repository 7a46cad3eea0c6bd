"""Rivals that train whole sub-networks on the devices: alone, averaged, or HeteroFL.

Every device trains a sub-network of the supernet with its own classifier. One compiled round
serves all of them: devices either go on with their own weights, or everyone goes on with the mean
of each weight over the devices that hold it (`acme_jax.subnet_clients`, after HeteroFL; where all
have the same sub-network that is FedAvg). Shape letters: C devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from acme_jax import concrete, subnet_clients, supernet, training
from acme_jax.arch_buckets import Shape, assign_shapes
from acme_jax.blocks import Params
from acme_jax.config import RefineConfig, TrainConfig
from acme_jax.encoders import EncoderConfig
from acme_jax.experiments.final import Evaluate
from acme_jax.experiments.held_out import padded
from acme_jax.experiments.study import Study
from acme_jax.layout import map_parts, replicate
from acme_jax.subnet_clients import Assignment, Subnets
from fed import clients
from fed.algorithm import FedAlgorithm
from fed.buckets import make_buckets
from fed.clients import ClientData, take_row
from fed.simulate import run_round
from nas.arch import Arch, ArchSpace


class Networks(NamedTuple):
    """All devices' networks: the server's state."""

    params: Params  # of the full network [C, ...]; a device holds its sub-network's
    arch: Arch  # depth [C], heads [C, L], neurons [C, L]
    averaged: Array  # bool []: after a round everyone goes on with the mean


def start(params: Params, archs: Sequence[Arch]) -> Networks:
    """Every device at the same weights; `archs` are concrete, one for each device."""
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *archs)
    return Networks(clients.replicate(params, len(archs)), stacked, jnp.asarray(False))


def network_rounds(
    study: Study,
    networks: Networks,
    data: ClientData,
    *,
    averaged: bool,
    rate: float,
    rounds: range,
) -> Networks:
    """Some rounds; the number of epochs in each and the batches are those of ACME's refinement.

    Each round starts a fresh Adam, clipped as in the cloud's training.

    Args:
      study: its key orders the samples, the same for every rival.
      networks: where it starts.
      data: the devices' samples [C].
      averaged: whether the devices share what they learn after each round.
      rate: learning rate.
      rounds: their numbers, from 0: others than before, or the order of samples is the same.
    """
    context = study.context
    count = data.size.shape[0]
    archs = [jax.tree.map(np.asarray, take_row(networks.arch, row)) for row in range(count)]
    dims = context.encoder.dims
    program = _program(
        context.encoder,
        context.space,
        context.mesh,
        context.config.reference,
        context.config.refine,
        tuple(assign_shapes(archs, dims)),
        tuple(float(concrete.num_flops(dims, arch)) for arch in archs),
    )
    ids = jnp.arange(count, dtype=jnp.int32)
    rest = replicate((data, study.key("rival networks"), jnp.float32(rate), ids), context.mesh)
    state = networks._replace(averaged=jnp.asarray(averaged))
    for index in rounds:
        state = program(replicate(state, context.mesh), jnp.int32(index), *rest)
    return state


@functools.lru_cache(maxsize=4)
def _program(
    encoder: EncoderConfig,
    space: ArchSpace,
    mesh: Mesh,
    cloud_config: TrainConfig,
    config: RefineConfig,
    shapes: tuple[Shape, ...],
    costs: tuple[float, ...],
) -> Callable[..., Networks]:
    """One round, of all rates and rivals whose devices have these shapes."""

    @jax.jit
    def one_round(
        state: Networks, index: Array, data: ClientData, key: Array, rate: Array, ids: Array
    ) -> Networks:
        optimizer = optax.chain(
            training.make_optimizer(cloud_config), optax.scale_by_learning_rate(rate)
        )
        buckets = make_buckets(
            shapes,
            lambda shape: subnet_clients.sliced(encoder, space, optimizer, shape),
            cost=costs,
        )
        state, _, _ = run_round(
            own_or_mean(subnet_clients.masked(encoder, space, optimizer)),
            state,
            (),
            data,
            key,
            index,
            client_ids=ids,
            batch_size=config.batch_size,
            epochs=config.local_epochs,
            mesh=mesh,
            buckets=buckets,
        )
        return state

    return one_round


def own_or_mean(algorithm: FedAlgorithm) -> FedAlgorithm:
    """The algorithm of `subnet_clients`, on a server that keeps every device's own weights."""

    def server_message(state: Networks, row: Array) -> Assignment:
        return Assignment(take_row(state.params, row), take_row(state.arch, row))

    def server_update(
        state: Networks, updates: Params, weights: Array, rows: Array
    ) -> tuple[Networks, dict[str, Array]]:
        # Where a mean is taken the devices started alike, so any row has what nobody holds.
        shared = Subnets(take_row(state.params, 0), state.arch)
        mean, _ = algorithm.server_update(shared, updates, weights, rows)
        params = jax.tree.map(
            lambda one, own: jnp.where(state.averaged, one[None], own), mean.params, updates
        )
        return state._replace(params=params), {}

    return algorithm._replace(
        server_init=Networks, server_message=server_message, server_update=server_update
    )


def network_evaluator(study: Study, found: Sequence[Networks]) -> Evaluate:
    """For `final.devices` with raw inputs: accuracies [M, C] of some rivals' networks."""
    context = study.context
    program = _evaluate_program(context.encoder, context.space, context.mesh)

    def evaluate(data: ClientData) -> Array:
        rows = [replicate((one.params, one.arch, data), context.mesh) for one in found]
        return jnp.asarray(np.stack([np.asarray(program(*row)) for row in rows]))

    return padded(evaluate)


@functools.lru_cache(maxsize=4)
def _evaluate_program(
    encoder: EncoderConfig, space: ArchSpace, mesh: Mesh
) -> Callable[[Params, Arch, ClientData], Array]:
    def one(index: Array, params: Params, archs: Arch, data: ClientData) -> Array:
        own, arch, (inputs, labels, size) = take_row((params, archs, data), index)
        logits = supernet.apply_arch(own, inputs, encoder, space, arch).logits
        valid = jnp.arange(labels.shape[0]) < size
        return jnp.sum((jnp.argmax(logits, axis=-1) == labels) & valid) / size

    @jax.jit
    def evaluate(params: Params, archs: Arch, data: ClientData) -> Array:
        found: Array = map_parts(one, data.size.shape[0], mesh, params, archs, data)
        return found

    return evaluate
