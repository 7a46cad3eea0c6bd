"""The device tier with cell headers, and what the edge computes for it.

The rounds themselves, for any header with gates, are `acme_jax.importance_rounds`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from acme_jax import densities, header, header_slots
from acme_jax.blocks import Params
from acme_jax.config import RefineConfig
from acme_jax.header_layout import HeaderDims
from acme_jax.importance_rounds import (
    DeviceState,
    EdgeState,
    importance_rounds,
    optimizer,
    receive,
)
from fed import similarity
from fed.algorithm import FedAlgorithm
from fed.clients import Batch, ClientData
from nas.cells import Cell, StaticCell

__all__ = [
    "DeviceState",
    "EdgeState",
    "Mixing",
    "evaluate",
    "evaluate_linear",
    "init_device",
    "linear_loss",
    "mixing_weights",
    "optimizer",
    "receive",
    "refinement",
]


def init_device(
    params: Params,
    cell: StaticCell,
    dims: HeaderDims,
    prune_per_round: int,
    config: RefineConfig,
    *,
    static: bool = False,
) -> DeviceState:
    """State of a device that has just received its header in compact form. Host function.

    Leaves stay NumPy arrays: the caller stacks a cohort, and every operation of JAX outside
    jit would compile a program of its own. With `static` the state is for a `refinement` that
    is given the cell.
    """
    if static:
        weights = jax.tree.map(np.asarray, params)
        mask = np.ones(header.num_gates(dims, cell), np.float32)
        genes: Cell | tuple[()] = ()
    else:
        weights = header_slots.to_slots(params, cell, dims)
        mask = np.zeros(header_slots.num_points(dims) * dims.channels, np.float32)
        mask[header_slots.gate_positions(dims, cell)] = 1.0
        inputs, ops = (
            np.asarray([[block[i], block[i + 2]] for block in cell], np.int32) for i in (0, 1)
        )
        genes = Cell(*cast(Any, (inputs, ops)))
    return DeviceState(
        cell=genes,
        params=weights,
        momentum=jax.tree.map(  # zero at first
            lambda leaf: np.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(optimizer(config).init, weights),
        ),
        mask=cast(Any, mask),
        smoothed=cast(Any, np.zeros_like(mask)),
        rounds=cast(Any, np.int32(0)),
        prune_per_round=cast(Any, np.int32(prune_per_round)),
        min_gates=cast(Any, np.int32(0)),
    )


def refinement(
    dims: HeaderDims, config: RefineConfig, *, cell: StaticCell | None = None
) -> FedAlgorithm:
    """`importance_rounds` of cell headers.

    Args:
      dims: of the headers.
      config: learning rate, momentum, weight decay, smoothing.
      cell: the static cell of all devices (`init_device(..., static=True)`), many of which then
        run fast under one `vmap`; None: every device's state holds its own.
    """
    points = header_slots.num_points(dims) * dims.channels
    num_gates = points if cell is None else header.num_gates(dims, cell)

    def logits(device: DeviceState, inputs: Array, gates: Array | None) -> Array:
        return _logits(device, dims, cell, inputs, gates)

    return importance_rounds(logits, num_gates, config)


class Mixing(NamedTuple):
    """How devices listen to each other, and what that rests on. All [C, C]."""

    distance: Array  # Wasserstein, of the sketches; with similarity "kde" Jensen-Shannon, in nats
    similarity: Array
    wasserstein: Array  # by that similarity; row-stochastic, as are those below
    js: Array
    avg: Array  # n_j / n


def mixing_weights(
    sketches: Array,
    sizes: Array,
    key: Array,
    config: RefineConfig,
    log_density: Array | None = None,
) -> Mixing:
    """The methods' row-stochastic weights from what the edge received.

    Args:
      sketches: quantiles [C, Q, D].
      sizes: [C] training samples.
      key: for the projections of `sliced`, consumed.
      config: similarity, temperature.
      log_density: [C, M] the devices' answers, for similarity "kde" (`acme_jax.densities`).

    Raises:
      ConfigError: similarity "kde" without answers.
    """
    count = sketches.shape[0]
    if config.similarity == "kde":
        distance = densities.distances(log_density)
    else:
        distance = similarity.pairwise_wasserstein(sketches, method=config.similarity, key=key)
    js_distance = similarity.pairwise_js(sketches)
    sizes = sizes.astype(jnp.float32)
    return Mixing(
        distance=distance,
        similarity=similarity.similarity(distance),
        wasserstein=similarity.weights(distance, temperature=config.temperature),
        js=similarity.weights(js_distance, temperature=config.temperature),
        avg=jnp.broadcast_to((sizes / sizes.sum())[None], (count, count)),
    )


def evaluate(
    states: DeviceState,
    data: ClientData,
    dims: HeaderDims,
    *,
    cell: StaticCell | None = None,
    chunk_size: int | None = None,
) -> Array:
    """Accuracy [C] of every device's pruned header on its own samples.

    Args:
      states: of the devices.
      data: of the devices.
      dims: of the headers.
      cell: as for `refinement`.
      chunk_size: devices in one `vmap`; None: one after the other.
    """

    def one(args: tuple[DeviceState, Array, Array, Array]) -> Array:
        state, inputs, labels, size = args
        return _accuracy(_logits(state, dims, cell, inputs, None), labels, size)

    rows = (states, data.inputs, data.labels, data.size)
    return lax.map(one, rows, batch_size=chunk_size)


def linear_loss(params: Params, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
    """Loss of the linear header for `fed.algorithms.local`."""
    del key
    logits = header.apply_linear(params, batch.inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    loss = jnp.sum(losses * batch.weight) / jnp.maximum(batch.weight.sum(), 1.0)
    return loss, {"loss": loss}


def evaluate_linear(params: Params, data: ClientData) -> Array:
    """Accuracy [C] of every device's linear header on its own samples."""

    def one(args: tuple[Params, Array, Array, Array]) -> Array:
        params, inputs, labels, size = args
        return _accuracy(header.apply_linear(params, inputs), labels, size)

    return lax.map(one, (params, data.inputs, data.labels, data.size))


def _logits(
    state: DeviceState,
    dims: HeaderDims,
    cell: StaticCell | None,
    inputs: Array,
    gates: Array | None,
) -> Array:
    """Of one device's header [N, num_classes], in the form that its state has."""
    if cell is not None:
        return header.apply(state.params, cell, dims, inputs, gates=gates, mask=state.mask)
    genes = cast(Cell, state.cell)
    return header_slots.apply(state.params, genes, dims, inputs, gates=gates, mask=state.mask)


def _accuracy(logits: Array, labels: Array, size: Array) -> Array:
    valid = jnp.arange(labels.shape[0]) < size
    return jnp.sum((jnp.argmax(logits, axis=-1) == labels) & valid) / size
