"""Refinement of one edge's devices under any number of methods at once.

What `acme_jax.refine` does for a run's fixed methods, for any mixing weights: all methods run in
one cohort of M * C rows, so that each has the same data, order of samples and schedule, in one
compiled program that serves every edge, cell and seed of the same sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from acme_jax import device as device_tier
from acme_jax import header_slots
from acme_jax.blocks import Params
from acme_jax.config import RefineConfig
from acme_jax.device import DeviceState
from acme_jax.experiments.final import Evaluate
from acme_jax.header_layout import HeaderDims
from acme_jax.layout import replicate
from fed.algorithm import FedAlgorithm
from fed.clients import ClientData
from fed.simulate import run_rounds
from nas.cells import StaticCell

Wrap = Callable[[FedAlgorithm], FedAlgorithm]


class Method(NamedTuple):
    """How the devices listen to each other, and how much each prunes."""

    weights: np.ndarray
    """[C, C], row-stochastic: the identity is alone, equal rows n_j / n are the average."""
    prune_per_round: int
    """Gates; 0 is plain training, without pruning."""
    bias: np.ndarray | None = None
    """[C, num_classes], added to the devices' classifier biases before the first round."""


def gates_per_round(config: RefineConfig, dims: HeaderDims, cell: StaticCell, part: float) -> int:
    """N that prunes this part of a header's gates in all rounds together, rounded down."""
    return int(part * header_slots.gate_positions(dims, cell).size / config.rounds)


def refine(
    key: Array,
    config: RefineConfig,
    dims: HeaderDims,
    cell: StaticCell,
    params: Params,
    data: ClientData,
    methods: Mapping[str, Method],
    mesh: Mesh,
    *,
    wrap: Wrap | None = None,
) -> dict[str, DeviceState]:
    """All rounds of every method; no device ever sends its weights.

    Args:
      key: the same key gives every method the same order of samples.
      config: rounds, batches, learning rate, smoothing; its `prune_per_round` is not read.
      dims: of the header.
      cell: of the header.
      params: of the header in compact form, where every device starts.
      data: training features of the devices, rows [C]: tokens [C, N, T, D].
      methods: by name.
      mesh: devices that share the work.
      wrap: changes the algorithm, e.g. quantises what travels; a function that is always the same
        object, because programs are kept by it.

    Returns:
      By method the devices' states after the last round, rows [C], every set applied.
    """
    names, count = list(methods), data.size.shape[0]
    states = [
        device_tier.init_device(params, cell, dims, methods[name].prune_per_round, config)
        for name in names
    ]
    devices = jax.tree.map(
        lambda *leaves: jnp.asarray(np.repeat(np.stack(leaves), count, axis=0)), *states
    )
    weights = np.zeros((len(names) * count, len(names) * count), np.float32)
    bias = np.zeros((len(names) * count, dims.num_classes), np.float32)
    for index, name in enumerate(names):
        rows = slice(index * count, (index + 1) * count)
        weights[rows, rows] = methods[name].weights
        if methods[name].bias is not None:
            bias[rows] = methods[name].bias
    devices.params["classifier"]["bias"] += bias
    tiled = jax.tree.map(lambda leaf: np.concatenate([np.asarray(leaf)] * len(names)), data)
    ids = jnp.tile(jnp.arange(count, dtype=jnp.int32), len(names))
    program = _program(dims, config, mesh, wrap)
    done = program(*replicate((jnp.asarray(weights), devices, tiled, key, ids), mesh))
    host = jax.tree.map(np.asarray, done)
    return {
        name: jax.tree.map(lambda leaf, i=i: leaf[i * count : (i + 1) * count], host)
        for i, name in enumerate(names)
    }


@functools.lru_cache(maxsize=16)
def _program(
    dims: HeaderDims, config: RefineConfig, mesh: Mesh, wrap: Wrap | None
) -> Callable[..., DeviceState]:
    algorithm = device_tier.refinement(dims, config)
    if wrap is not None:
        algorithm = wrap(algorithm)

    @jax.jit
    def run(
        weights: Array, devices: DeviceState, data: ClientData, key: Array, ids: Array
    ) -> DeviceState:
        server, devices, _ = run_rounds(
            algorithm,
            algorithm.server_init(weights),
            devices,
            data,
            key,
            num_rounds=config.rounds,
            epochs=config.local_epochs,
            batch_size=config.batch_size,
            mesh=mesh,
            client_ids=ids,
        )

        def begin(row: Array, device: DeviceState) -> DeviceState:
            """Applies what came last, as another round would."""
            message = algorithm.server_message(server, row)
            started: DeviceState = algorithm.client_init(message, device, key).device
            return started

        return jax.vmap(begin)(jnp.arange(ids.shape[0], dtype=jnp.int32), devices)

    return run


def evaluator(
    states: Mapping[str, DeviceState], dims: HeaderDims, mesh: Mesh | None = None
) -> Evaluate:
    """For `final.devices`: accuracies [M, C] of every method's devices, in the order given.

    Args:
      states: by method.
      dims: of the header.
      mesh: devices that share the work; None: one.
    """
    num_methods = len(states)
    rows = list(states.values())
    # So that they divide equally; what they find is left out.
    rows += rows[-1:] * (-num_methods % (1 if mesh is None else mesh.size))
    stacked: Any = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

    def evaluate(data: ClientData) -> Array:
        return _evaluation(dims, mesh)(stacked, data)[:num_methods]

    return evaluate


@functools.lru_cache(maxsize=16)
def _evaluation(dims: HeaderDims, mesh: Mesh | None) -> Callable[[DeviceState, ClientData], Array]:
    def every(states: DeviceState, data: ClientData) -> Array:
        return lax.map(lambda one: device_tier.evaluate(one, data, dims), states)

    if mesh is None:
        return jax.jit(every)
    spread = PartitionSpec(mesh.axis_names)
    return jax.jit(
        jax.shard_map(
            every,
            mesh=mesh,
            in_specs=(spread, PartitionSpec()),
            out_specs=spread,
            check_vma=False,  # devices do not communicate, so there is nothing to check
        )
    )
