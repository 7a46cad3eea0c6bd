"""Pa3dFL (arXiv 2405.20589): shared factors, and personal ones from a hyper-network."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from acme_jax.methods.controls import held, own_flops
from acme_jax.methods.method import Built, Method, Payload
from acme_jax.methods.problem import Problem, weighted_loss
from fed import factorised, hypernetwork
from fed.algorithms.pa3dfl import Factors, Pa3dflMessage, Pa3dflUpdate, pa3dfl
from fed.clients import Batch
from fed.factorised import FactorisedLayer

EMBEDDING = 8
HIDDEN = (32, 32)
SPREAD = 0.01
"""Clients begin this near to the start that all methods share."""
SERVER_OPTIMIZER = optax.adam(1e-3)
"""As the specification has it; on the digits, where this was chosen, larger steps diverge."""
MAX_NORM = 1.0
"""Of the clients' gradients: those of a product of factors grow with both, and without a limit
training on few labels diverges. Chosen on the digits."""


def build(problem: Problem) -> Built:
    """All three layers are factorised; a client holds the first units of both hidden layers."""
    header = problem.header
    least = float(problem.capacities.min())
    layer = functools.partial(FactorisedLayer, min_capacity=least)
    first = layer(header.num_hidden, header.num_features, prune_inputs=False)
    blocks = first.num_blocks
    layers = {
        "first": first,
        "second": layer(header.num_hidden, header.num_hidden, input_blocks=blocks),
        "last": layer(
            header.num_classes, header.num_hidden, prune_outputs=False, input_blocks=blocks
        ),
    }

    def masks(capacity: Array) -> dict[str, Array]:
        return {name: factorised.capacity_mask(each, capacity) for name, each in layers.items()}

    def logits_of(factors: Factors, features: Array) -> Array:
        params = {
            name: {
                "kernel": factorised.compose(
                    factors.general[name]["theta_u"],
                    factors.personal[name],
                    factors.masks[name],
                    each,
                ).T,
                "bias": factors.general[name]["bias"],
            }
            for name, each in layers.items()
        }
        # Pruned units have a bias still; without what follows them it reaches nobody.
        return header.logits(params, features)

    def loss_fn(factors: Factors, batch: Batch, key: Array) -> tuple[Array, Any]:
        del key
        return weighted_loss(logits_of(factors, batch.inputs), batch)

    general = {
        name: {"theta_u": _identity(each), "bias": problem.start[name]["bias"]}
        for name, each in layers.items()
    }
    personal = {
        name: _personal(each, problem.start[name]["kernel"]) for name, each in layers.items()
    }
    network = hypernetwork.init(
        jax.random.fold_in(problem.key, 6),
        personal,
        num_clients=problem.num_clients,
        embedding_size=EMBEDDING,
        hidden=HIDDEN,
        spread=SPREAD,
    )
    algorithm = pa3dfl(
        loss_fn,
        problem.schedule.optimizer(max_norm=MAX_NORM),
        masks,
        server_optimizer=SERVER_OPTIMIZER,
    )

    def logits(server: Any, client: tuple[()], row: Array, features: Array) -> Array:
        del client
        own = algorithm.server_message(server, row)
        return logits_of(Factors(own.general, own.personal, masks(own.capacity)), features)

    def payload(general: Any, personal: Any, row: int) -> Payload:
        kept = jax.tree.map(
            lambda mask, leaf: np.broadcast_to(mask, leaf.shape),
            masks(jnp.float32(problem.capacities[row])),
            personal,
        )
        return [*(np.asarray(leaf) for leaf in jax.tree.leaves(general)), *held(personal, kept)]

    def down(message: Pa3dflMessage, row: int) -> Payload:
        return payload(message.general, message.personal, row)

    def up(update: Pa3dflUpdate, row: int) -> Payload:
        return payload(update.general, update.change, row)

    server = algorithm.server_init(general, network, problem.capacities)
    return Built(algorithm, server, (), logits, own_flops(problem), down, up)


def _identity(layer: FactorisedLayer) -> Array:
    """theta_u with which every product is theta_v: blocks of dense layers are square."""
    return jnp.eye(layer.num_blocks)[:, None, :]


def _personal(layer: FactorisedLayer, kernel: Array) -> Array:
    """theta_v [R2, G, S] of a kernel [S, T], for `_identity` and the order "prefix"."""
    places = kernel.T.reshape(layer.group_size, layer.num_blocks, layer.inputs)
    return jnp.swapaxes(places, 0, 1)


METHOD = Method(
    "pa3dfl",
    "Pa3dFL",
    "Factors that all share, and personal ones that a hyper-network makes for each capacity.",
    build,
)
