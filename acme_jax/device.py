"""The device tier, and what the edge computes for it: refinement by importance sets.

A round (ACME section on header refinement): every device trains its own header on its own
samples and sends up one number per gate; the edge answers with a mean personalised by data
similarity; the device smooths it and prunes exactly N further gates. Weights never leave a
device. Written as a `FedAlgorithm`, so `fed.simulate` runs all devices in one program.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from acme_jax import header, header_slots
from acme_jax.blocks import Params
from acme_jax.config import RefineConfig
from acme_jax.header_layout import HeaderDims
from fed import similarity
from fed.aggregate import personalized_mean
from fed.algorithm import FedAlgorithm
from fed.clients import Batch, ClientData
from nas.cells import Cell, StaticCell
from nas.importance import gate_importance, prune_lowest


class DeviceState(NamedTuple):
    """What a device keeps between rounds. Fields add a leading [C] in a cohort.

    Header and gates are in the uniform form of `acme_jax.header_slots`, and the cell is data:
    one compiled program serves the devices of every edge. [G] is that form's gate vector,
    whose places without a gate are masked from the start. Where all devices share a static cell,
    header and gates are in compact form, and the cell stands in the program instead.
    """

    cell: Cell | tuple[()]
    params: Params  # of the header
    momentum: optax.OptState
    mask: Array  # [G] float32, 0 where a gate is pruned
    smoothed: Array  # [G] the smoothed personalised importance
    rounds: Array  # [] int32, the edge's number of the last set received; 0: none yet
    prune_per_round: Array  # [] int32, N; 0 is the baseline without pruning


class LocalState(NamedTuple):
    """A device in the middle of its local training."""

    device: DeviceState
    importance: Array  # [G] sum over steps
    steps: Array  # [] float32


class EdgeState(NamedTuple):
    """What the edge holds; rows are devices."""

    weights: Array  # [C, C] row-stochastic, how much each device listens to each other one
    personalized: Array  # [C, G] the sets that go down next
    rounds: Array  # [C] int32, sets mixed for each device so far


class Downlink(NamedTuple):
    """What an edge sends to one device at the start of a round."""

    personalized: Array  # [G]
    rounds: Array  # [] int32, number of the set; a device applies each number once


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
    )


def receive(state: DeviceState, personalized: Array, config: RefineConfig) -> DeviceState:
    """Smooths the personalised importance [G] and prunes exactly N further gates.

    The first set is taken as it is, later ones by `smoothing * old + (1 - smoothing) * new`.
    Gates pruned earlier are masked before smoothing. Ties go by gate index (the original
    prunes every gate at the threshold).
    """
    first = state.rounds == 0
    blended = config.smoothing * state.smoothed + (1.0 - config.smoothing) * personalized
    smoothed = jnp.where(first, personalized, blended) * state.mask
    return state._replace(
        mask=prune_lowest(smoothed, state.mask, state.prune_per_round),
        smoothed=smoothed,
        rounds=state.rounds + 1,
    )


def refinement(
    dims: HeaderDims, config: RefineConfig, *, cell: StaticCell | None = None
) -> FedAlgorithm:
    """ACME's refinement as a federated algorithm.

    The update that travels up is the importance set I_k [G]: the plain mean over the steps
    of the squared first-order Taylor term of each gate. (The original averages running sums,
    which weighs early batches more.) `server_init` takes the mixing weights [C, C]: the
    identity gives the baseline `alone`, n_j / n rows the baseline `avg`.

    Args:
      dims: of the headers.
      config: learning rate, momentum, weight decay, smoothing.
      cell: the static cell of all devices (`init_device(..., static=True)`), many of which then
        run fast under one `vmap`; None: every device's state holds its own.
    """
    sgd = optimizer(config)

    def loss_fn(
        params: Params, gates: Array, device: DeviceState, batch: Batch
    ) -> tuple[Array, Array]:
        logits = _logits(device._replace(params=params), dims, cell, batch.inputs, gates)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        total = jnp.maximum(batch.weight.sum(), 1.0)
        correct = (jnp.argmax(logits, axis=-1) == batch.labels) * batch.weight
        return jnp.sum(losses * batch.weight) / total, jnp.sum(correct) / total

    def server_init(weights: Array) -> EdgeState:
        points = header_slots.num_points(dims) * dims.channels
        num_gates = points if cell is None else header.num_gates(dims, cell)
        count = weights.shape[0]
        return EdgeState(weights, jnp.zeros((count, num_gates)), jnp.zeros(count, jnp.int32))

    def server_message(state: EdgeState, row: Array) -> Downlink:
        return Downlink(state.personalized[row], state.rounds[row])

    def client_init(message: Downlink, device: DeviceState, key: Array) -> LocalState:
        del key  # local training has no randomness beyond the order of the samples
        pruned = receive(device, message.personalized, config)._replace(rounds=message.rounds)
        device = jax.tree.map(
            lambda new, old: jnp.where(message.rounds > device.rounds, new, old), pruned, device
        )
        return LocalState(device, jnp.zeros_like(device.mask), jnp.float32(0.0))

    def client_step(state: LocalState, batch: Batch) -> tuple[LocalState, dict[str, Array]]:
        device = state.device
        value_and_grad = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
        (loss, accuracy), (grads, gate_grad) = value_and_grad(
            device.params, jnp.ones_like(device.mask), device, batch
        )
        updates, momentum = sgd.update(grads, device.momentum, device.params)
        device = device._replace(
            params=optax.apply_updates(device.params, updates), momentum=momentum
        )
        importance = state.importance + gate_importance(device.mask, gate_grad)
        return LocalState(device, importance, state.steps + 1.0), {
            "loss": loss,
            "accuracy": accuracy,
        }

    def client_final(message: Downlink, state: LocalState) -> tuple[DeviceState, Array]:
        del message
        return state.device, state.importance / jnp.maximum(state.steps, 1.0)

    def server_update(
        state: EdgeState, updates: Array, sizes: Array, rows: Array
    ) -> tuple[EdgeState, dict[str, Array]]:
        # How much a sample counts is in the mixing weights, where a method uses it; here 0
        # says that a set did not arrive. Two sets of one device count as their mean.
        arrived = (sizes > 0).astype(jnp.float32)
        num_devices = state.weights.shape[0]
        counts = jax.ops.segment_sum(arrived, rows, num_devices)
        kept = jnp.where(arrived[:, None] > 0, updates, 0.0)
        sets = jax.ops.segment_sum(kept, rows, num_devices) / jnp.maximum(counts, 1.0)[:, None]
        weights = state.weights * (counts > 0)[None]
        total = weights.sum(axis=1)
        heard = total > 0  # else nobody that this device listens to has sent anything
        mixed = personalized_mean(weights / jnp.where(heard, total, 1.0)[:, None], sets)
        personalized = jnp.where(heard[:, None], mixed, state.personalized)
        return EdgeState(state.weights, personalized, state.rounds + heard), {}

    return FedAlgorithm(
        server_init, server_message, client_init, client_step, client_final, server_update
    )


class Mixing(NamedTuple):
    """How devices listen to each other, and what that rests on. All [C, C]."""

    distance: Array  # Wasserstein, of the sketches
    similarity: Array
    wasserstein: Array  # row-stochastic, as are those below
    js: Array
    avg: Array  # n_j / n


def mixing_weights(sketches: Array, sizes: Array, key: Array, config: RefineConfig) -> Mixing:
    """The methods' row-stochastic weights from what the edge received.

    Args:
      sketches: quantiles [C, Q, D].
      sizes: [C] training samples.
      key: for the projections of `sliced`, consumed.
      config: similarity, temperature.
    """
    count = sketches.shape[0]
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


def optimizer(config: RefineConfig) -> optax.GradientTransformation:
    """SGD with momentum and L2 weight decay, the devices' optimiser."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(config.learning_rate, momentum=config.momentum),
    )


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
