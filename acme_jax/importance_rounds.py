"""Rounds of local training, importance sets and pruning, for any header with gates.

A round (ACME section on header refinement): every device trains its own header on its own
samples and sends up one number per gate; the edge answers with a mean personalised by data
similarity; the device smooths it and prunes exactly N further gates. Weights never leave a
device. Written as a `FedAlgorithm`, so `fed.simulate` runs all devices in one program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from acme_jax.blocks import Params
from acme_jax.config import RefineConfig
from fed.aggregate import personalized_mean
from fed.algorithm import FedAlgorithm
from fed.clients import Batch
from nas.cells import Cell
from nas.importance import gate_importance, prune_lowest


class DeviceState(NamedTuple):
    """What a device keeps between rounds. Fields add a leading [C] in a cohort.

    A cell header and its gates are in the uniform form of `acme_jax.header_slots`, and the cell
    is data: one compiled program serves the devices of every edge. [G] is that form's gate
    vector, whose places without a gate are masked from the start. Where all devices share a
    static cell, header and gates are in compact form, and the cell stands in the program instead;
    so it is with headers that have no cell.
    """

    cell: Cell | tuple[()]
    params: Params  # of the header
    momentum: optax.OptState
    mask: Array  # [G] float32, 0 where a gate is pruned
    smoothed: Array  # [G] the smoothed personalised importance
    rounds: Array  # [] int32, the edge's number of the last set received; 0: none yet
    prune_per_round: Array  # [] int32, N; 0 is the baseline without pruning
    min_gates: Array  # [] int32, where pruning ends: N is lowered so that this many stay open


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


def receive(state: DeviceState, personalized: Array, config: RefineConfig) -> DeviceState:
    """Smooths the personalised importance [G] and prunes exactly N further gates.

    The first set is taken as it is, later ones by `smoothing * old + (1 - smoothing) * new`.
    Gates pruned earlier are masked before smoothing. Ties go by gate index (the original
    prunes every gate at the threshold).
    """
    first = state.rounds == 0
    blended = config.smoothing * state.smoothed + (1.0 - config.smoothing) * personalized
    smoothed = jnp.where(first, personalized, blended) * state.mask
    spare = jnp.sum(state.mask != 0, dtype=jnp.int32) - state.min_gates
    return state._replace(
        mask=prune_lowest(smoothed, state.mask, jnp.minimum(state.prune_per_round, spare)),
        smoothed=smoothed,
        rounds=state.rounds + 1,
    )


Logits = Callable[[DeviceState, Array, Array | None], Array]
"""(state, inputs [N, ...], gates [G] or None for all ones) -> logits [N, num_classes]; the gates
multiply what the state's mask leaves, and importance is the gradient at one."""


def importance_rounds(logits: Logits, num_gates: int, config: RefineConfig) -> FedAlgorithm:
    """ACME's refinement of headers that `logits` evaluates.

    The update that travels up is the importance set I_k [G]: the plain mean over the steps
    of the squared first-order Taylor term of each gate. (The original averages running sums,
    which weighs early batches more.) `server_init` takes the mixing weights [C, C]: the
    identity gives the baseline `alone`, n_j / n rows the baseline `avg`.

    Args:
      logits: of one device's header.
      num_gates: G.
      config: learning rate, momentum, weight decay, smoothing.
    """
    sgd = optimizer(config)

    def loss_fn(
        params: Params, gates: Array, device: DeviceState, batch: Batch
    ) -> tuple[Array, Array]:
        found = logits(device._replace(params=params), batch.inputs, gates)
        losses = optax.softmax_cross_entropy_with_integer_labels(found, batch.labels)
        total = jnp.maximum(batch.weight.sum(), 1.0)
        correct = (jnp.argmax(found, axis=-1) == batch.labels) * batch.weight
        return jnp.sum(losses * batch.weight) / total, jnp.sum(correct) / total

    def server_init(weights: Array) -> EdgeState:
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


def optimizer(config: RefineConfig) -> optax.GradientTransformation:
    """SGD with momentum and L2 weight decay, the devices' optimiser."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(config.learning_rate, momentum=config.momentum),
    )
