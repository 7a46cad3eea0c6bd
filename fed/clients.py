"""The clients' data, stacked and padded to one shape, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike


class ClientData(NamedTuple):
    """The samples of C clients, padded with zeros to the largest of them."""

    inputs: jax.Array  # [C, N, ...]
    labels: jax.Array  # [C, N] int32
    size: jax.Array  # [C] int32, the number of real samples


class Batch(NamedTuple):
    """What a client sees in one step."""

    inputs: jax.Array  # [B, ...]
    labels: jax.Array  # [B] int32
    weight: jax.Array  # [B] float32: 1 for a sample, 0 for a filler of a short last batch


class BatchPlan(NamedTuple):
    """Which of its samples one client sees in each step."""

    indices: jax.Array  # [S, B] int32; 0 where the weight is 0
    weight: jax.Array  # [S, B] float32, 0 or 1
    valid: jax.Array  # [S] bool; False: the client has finished and the step must not count


def stack_clients(clients: Sequence[tuple[ArrayLike, ArrayLike]]) -> ClientData:
    """Stacks the clients' (inputs [n, ...], labels [n]) and pads with zeros.

    Raises:
      ValueError: no clients, a client without samples, inputs and labels of different
        lengths, or clients whose samples differ in shape.
    """
    if not clients:
        raise ValueError("there are no clients to stack; give at least one (inputs, labels) pair")
    pairs = [(np.asarray(inputs), np.asarray(labels)) for inputs, labels in clients]
    sample_shape = pairs[0][0].shape[1:]
    for client, (inputs, labels) in enumerate(pairs):
        if inputs.ndim == 0 or len(inputs) == 0:
            raise ValueError(
                f"client {client} has no samples; leave it out or give it at least one"
            )
        if labels.shape != (len(inputs),):
            raise ValueError(
                f"client {client} has {len(inputs)} inputs but labels of shape {labels.shape}; "
                f"expected ({len(inputs)},)"
            )
        if inputs.shape[1:] != sample_shape:
            raise ValueError(
                f"client {client} has samples of shape {inputs.shape[1:]}, client 0 of shape "
                f"{sample_shape}; all must be equal"
            )
    sizes = [len(inputs) for inputs, _ in pairs]
    stacked_inputs = np.zeros((len(pairs), max(sizes), *sample_shape), pairs[0][0].dtype)
    stacked_labels = np.zeros((len(pairs), max(sizes)), np.int32)
    for client, (inputs, labels) in enumerate(pairs):
        stacked_inputs[client, : len(inputs)] = inputs
        stacked_labels[client, : len(inputs)] = labels
    return ClientData(
        jnp.asarray(stacked_inputs), jnp.asarray(stacked_labels), jnp.asarray(sizes, jnp.int32)
    )


def replicate(tree: Any, num_clients: int) -> Any:
    """Gives every leaf a leading axis of `num_clients` [C] equal copies."""
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(jnp.asarray(leaf), (num_clients, *jnp.shape(leaf))), tree
    )


def take_row(tree: Any, row: Any) -> Any:
    """Indexes the leading axis of every leaf."""
    return jax.tree.map(lambda leaf: leaf[row], tree)


def batch_indices(
    key: jax.Array,
    size: jax.Array | int,
    *,
    max_size: int,
    num_steps: int,
    batch_size: int,
    epochs: int | None = None,
) -> BatchPlan:
    """One client's batches: every epoch is a fresh random permutation of its samples.

    An epoch has ceil(size / batch_size) steps; the last batch may be short, its fillers have
    weight 0. Each sample's place in an epoch comes from its own random stream, so the plan
    does not depend on `max_size`: padding a client changes nothing.

    Args:
      key: consumed.
      size: int [], the client's samples; may be traced. 0 makes every step invalid.
      max_size: static, the padded length N.
      num_steps: S.
      batch_size: B.
      epochs: the client stops after this many passes over its own samples; None: it takes
        all S steps, starting new epochs as needed.
    """
    size = jnp.asarray(size, jnp.int32)
    steps_per_epoch = jnp.maximum((size + batch_size - 1) // batch_size, 1)
    num_valid = num_steps if epochs is None else epochs * steps_per_epoch
    samples = jnp.arange(max_size, dtype=jnp.int32)

    def permutation(epoch: jax.Array) -> jax.Array:
        epoch_key = jax.random.fold_in(key, epoch)
        # The words of a folded key are themselves random bits; drawing from it again would
        # triple the time to compile. 31 bits as int32 sort faster than floats on CPU. Padding
        # gets the largest value; the sort is stable, so a sample that drew it comes first.
        keys = jax.vmap(lambda i: jax.random.fold_in(epoch_key, i))(samples)
        draws = (jax.random.key_data(keys)[:, 0] >> 1).astype(jnp.int32)
        order = jnp.where(samples < size, draws, jnp.iinfo(jnp.int32).max)
        return jnp.argsort(order).astype(jnp.int32)

    def plan_step(order: jax.Array, step: jax.Array) -> tuple[jax.Array, BatchPlan]:
        epoch, position = step // steps_per_epoch, step % steps_per_epoch
        order = jax.lax.cond(position == 0, lambda: permutation(epoch), lambda: order)
        slots = position * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
        real = slots < size
        indices = jnp.where(real, order[jnp.minimum(slots, max_size - 1)], 0)
        valid = (step < num_valid) & (size > 0)
        return order, BatchPlan(indices, real.astype(jnp.float32), valid)

    steps = jnp.arange(num_steps, dtype=jnp.int32)
    _, plan = jax.lax.scan(plan_step, samples, steps)
    return plan
