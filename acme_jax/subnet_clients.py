"""Federated training of sub-networks of one supernet, each client its own.

Every client trains the sub-network that its device can hold, and the server averages each
weight over the clients that hold it (HeteroFL, Diao et al. 2021; here depth, heads and neurons
are elastic, the embedding is not). Two forms of the same algorithm:

* `masked`: one program at full size for all clients; masks switch off what a client lacks.
* `sliced`: a program for each bucket of similar sub-networks, at the size of the largest in
  it. What the bucket's members have in common is dense; the rest is masked inside.

Shape letters: C clients, L layers, B batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from acme_jax import supernet
from acme_jax.arch_buckets import Shape, apply_sliced, assign_shapes, put_back, slice_blocks
from acme_jax.blocks import Params
from acme_jax.encoders import EncoderConfig
from fed.aggregate import coverage_weighted_mean
from fed.algorithm import FedAlgorithm
from fed.algorithms.local_sgd import SgdState, make_step, start
from fed.buckets import Buckets, make_buckets
from fed.clients import Batch
from nas.arch import Arch, ArchMask, ArchSpace, to_mask
from nas.cost import num_flops


class Subnets(NamedTuple):
    """The server's state."""

    params: Params  # of the full network
    arch: Arch  # of each client: depth [C], heads [C, L], neurons [C, L]


class Assignment(NamedTuple):
    """What goes down to one client."""

    params: Params  # of the full network; a device is sent the slice of `arch`
    arch: Arch


def masked(
    config: EncoderConfig, space: ArchSpace, optimizer: optax.GradientTransformation
) -> FedAlgorithm:
    """HeteroFL of sub-networks with every client at full size; the oracle of `sliced`.

    `server_init(params, arch)` takes the full parameters and the clients' genomes [C]; the
    update is the client's full tree, of which the server reads what the client holds.
    """

    def loss_fn(params: Params, mask: ArchMask, batch: Batch) -> Array:
        return weighted_loss(supernet.apply(params, batch.inputs, config, mask).logits, batch)

    class State(NamedTuple):
        sgd: SgdState
        mask: ArchMask

    def client_init(message: Assignment, client_state: tuple[()], key: Array) -> State:
        del client_state
        return State(start(message.params, optimizer, key), to_mask(space, message.arch))

    def client_step(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        step = make_step(
            lambda params, batch, key: _with_metrics(loss_fn(params, state.mask, batch)), optimizer
        )
        sgd, metrics = step(state.sgd, batch)
        return state._replace(sgd=sgd), metrics

    return _algorithm(
        space, client_init, client_step, lambda message, state: ((), state.sgd.params)
    )


def sliced(
    config: EncoderConfig, space: ArchSpace, optimizer: optax.GradientTransformation, shape: Shape
) -> FedAlgorithm:
    """The same as `masked`, computed at a bucket's shape."""

    class State(NamedTuple):
        sgd: SgdState
        arch: Arch

    def client_init(message: Assignment, client_state: tuple[()], key: Array) -> State:
        del client_state
        own = slice_blocks(message.params, shape)
        return State(start(own, optimizer, key), message.arch)

    def client_step(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        def loss_fn(params: Params, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
            del key
            logits = apply_sliced(params, batch.inputs, config, shape, state.arch)
            return _with_metrics(weighted_loss(logits, batch))

        sgd, metrics = make_step(loss_fn, optimizer)(state.sgd, batch)
        return state._replace(sgd=sgd), metrics

    def client_final(message: Assignment, state: State) -> tuple[tuple[()], Params]:
        return (), put_back(message.params, state.sgd.params, shape)

    return _algorithm(space, client_init, client_step, client_final)


def buckets(
    config: EncoderConfig,
    space: ArchSpace,
    optimizer: optax.GradientTransformation,
    archs: Arch,
    max_buckets: int | None = None,
) -> Buckets:
    """The cohort's buckets for `fed.simulate.run_round`, with `sliced` for each.

    Args:
      config: of the full network.
      space: the choices.
      optimizer: the clients'.
      archs: the clients' genomes, concrete: depth [C], heads [C, L], neurons [C, L].
      max_buckets: see `assign_shapes`.
    """
    host = jax.tree.map(np.asarray, archs)
    rows = [Arch(*(leaf[row] for leaf in host)) for row in range(len(host.depth))]
    shapes = assign_shapes(rows, config.dims, max_buckets)
    return make_buckets(
        shapes, lambda shape: sliced(config, space, optimizer, shape), cost=_cost(config, archs)
    )


_FIXED = 0.1
"""Time of a block that does not shrink with its width (norms, residuals, transposes), as a part
of the full block's matrix products; from a profile of the ViT of `scripts/bench_clients.py`."""


def _cost(config: EncoderConfig, archs: Arch) -> list[float]:
    """Relative time of a step of each client, for sharing them out over devices."""
    flops = jax.jit(jax.vmap(lambda arch: num_flops(config.dims, arch)))
    blocks = np.asarray(archs.depth)
    layers = config.num_layers
    whole = Arch(
        jnp.full(1, layers, jnp.int32),
        jnp.full((1, layers), config.num_heads, jnp.int32),
        jnp.full((1, layers), config.num_neurons, jnp.int32),
    )
    fixed = _FIXED * float(flops(whole)[0]) / layers
    return [float(cost) for cost in np.asarray(flops(archs)) + fixed * blocks]


def weighted_loss(logits: Array, batch: Batch) -> Array:
    """Mean cross-entropy over a batch's real samples []."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return (losses * batch.weight).sum() / jnp.maximum(batch.weight.sum(), 1.0)


def _with_metrics(loss: Array) -> tuple[Array, dict[str, Array]]:
    return loss, {"loss": loss}


def _algorithm(space: ArchSpace, client_init: Any, client_step: Any, client_final: Any) -> Any:
    """The server's side, which both forms share."""

    def server_update(
        state: Subnets, updates: Params, weights: Array, rows: Array
    ) -> tuple[Subnets, dict[str, Array]]:
        own = jax.tree.map(lambda leaf: leaf[rows], state.arch)
        held = jax.vmap(lambda arch: held_params(state.params, to_mask(space, arch)))(own)
        params = coverage_weighted_mean(weights, updates, held, state.params)
        return state._replace(params=params), {}

    def server_message(state: Subnets, row: Array) -> Assignment:
        return Assignment(state.params, jax.tree.map(lambda leaf: leaf[row], state.arch))

    return FedAlgorithm(
        server_init=Subnets,
        server_message=server_message,
        client_init=client_init,
        client_step=client_step,
        client_final=client_final,
        server_update=server_update,
    )


def held_params(params: Params, mask: ArchMask) -> Params:
    """1 where a sub-network holds a weight, else 0: a tree of the parameters' shapes."""
    block = mask.block
    head, neuron = block[:, None] * mask.head, block[:, None] * mask.neuron

    def spread(values: Array, leaf: Array, *axes: int) -> Array:
        """`values` along the given axes of a leaf, whose other axes it does not depend on."""
        shape = [leaf.shape[axis] if axis in axes else 1 for axis in range(leaf.ndim)]
        return jnp.broadcast_to(values.reshape(shape), leaf.shape)

    attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
    held_attention = {
        name: jax.tree.map(lambda leaf: spread(block, leaf, 0), leaves)
        for name, leaves in attention.items()
    }
    held_mlp = {
        name: jax.tree.map(lambda leaf: spread(block, leaf, 0), leaves)
        for name, leaves in mlp.items()
    }
    for name, axis in (("qkv_kernel", 3), ("qkv_bias", 2), ("out_kernel", 1)):
        held_attention[name] = spread(head, attention[name], 0, axis)
    for name, axis in (("up_kernel", 2), ("up_bias", 1), ("down_kernel", 1)):
        held_mlp[name] = spread(neuron, mlp[name], 0, axis)
    ones = jax.tree.map(jnp.ones_like, params)
    return {**ones, "blocks": {"attention": held_attention, "mlp": held_mlp}}
