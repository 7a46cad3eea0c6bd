"""The methods that every other one has to beat."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from acme_jax.blocks import Params
from acme_jax.methods.method import Built, Method, Payload
from acme_jax.methods.mlp_header import prefix_masks
from acme_jax.methods.problem import Problem
from fed.algorithms.ditto import ditto
from fed.algorithms.fedavg import fedavg
from fed.algorithms.fedprox import fedprox
from fed.algorithms.fedrolex import RolexMessage, RolexUpdate, fedrolex
from fed.algorithms.heterofl import Submodel, heterofl, rows_of, window
from fed.algorithms.local import local
from fed.clients import replicate

FEDPROX_MU = 0.01
DITTO_LAMBDA = 0.1


def _full_flops(problem: Problem) -> np.ndarray:
    return np.full(problem.num_clients, 3 * problem.header.flops())


def own_flops(problem: Problem) -> np.ndarray:
    """[C] FLOPs of training the sub-header that a client can hold on one sample."""
    return np.asarray([3 * problem.header.flops(float(c)) for c in problem.capacities])


def shared_logits(problem: Problem) -> Any:
    """Every client predicts with the server's parameters."""

    def logits(server: Params, client: tuple[()], row: Array, features: Array) -> Array:
        del client, row
        return problem.header.logits(server, features)

    return logits


def build_local(problem: Problem) -> Built:
    """Each client trains the sub-header that it can hold, from the start that all share."""
    loss = problem.loss()

    def own_loss(params: Any, batch: Any, key: Array) -> Any:
        weights, mask = params
        mask = jax.lax.stop_gradient(mask)
        return loss(jax.tree.map(jnp.multiply, weights, mask), batch, key)

    def logits(server: Any, client: Any, row: Array, features: Array) -> Array:
        del server, row
        return problem.header.logits(jax.tree.map(jnp.multiply, *client), features)

    optimizer = weights_only(problem.schedule.optimizer())
    return Built(
        local(own_loss, optimizer), (), masked_clients(problem), logits, own_flops(problem)
    )


def masked_clients(problem: Problem) -> tuple[Params, Params]:
    """States of clients with sub-headers: weights and masks, leaves [C, ...]."""
    masks = prefix_masks(problem.header, problem.capacities)
    return replicate(problem.start, problem.num_clients), masks


def weights_only(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimiser on weights; the mask beside them stays, without weight decay either."""
    return optax.multi_transform(
        {"train": optimizer, "keep": optax.set_to_zero()}, ("train", "keep")
    )


def build_fedavg(problem: Problem) -> Built:
    """One header for all, averaged every round."""
    algorithm = fedavg(problem.loss(), problem.schedule.optimizer())
    return Built(algorithm, problem.start, (), shared_logits(problem), _full_flops(problem))


def build_fedprox(problem: Problem) -> Built:
    """FedAvg with clients held near the model of the round."""
    algorithm = fedprox(problem.loss(), problem.schedule.optimizer(), FEDPROX_MU)
    return Built(algorithm, problem.start, (), shared_logits(problem), _full_flops(problem))


def build_ditto(problem: Problem) -> Built:
    """FedAvg, and beside it a personal header held near the shared one."""
    algorithm = ditto(problem.loss(), problem.schedule.optimizer(), DITTO_LAMBDA)

    def logits(server: Params, client: Params, row: Array, features: Array) -> Array:
        del server, row
        return problem.header.logits(client, features)

    clients = replicate(problem.start, problem.num_clients)
    return Built(algorithm, problem.start, clients, logits, 2 * _full_flops(problem))


def build_heterofl(problem: Problem, capacities: np.ndarray | None = None) -> Built:
    """Static sub-headers, averaged where they overlap."""
    capacities = problem.capacities if capacities is None else capacities
    masks = prefix_masks(problem.header, capacities)
    algorithm = heterofl(problem.loss(), problem.schedule.optimizer(), rows_of(masks))
    host = jax.tree.map(np.asarray, masks)

    def logits(server: Params, client: tuple[()], row: Array, features: Array) -> Array:
        del client
        mask = jax.tree.map(lambda leaf: leaf[row], masks)
        return problem.header.logits(jax.tree.map(jnp.multiply, server, mask), features)

    def down(message: Submodel, row: int) -> Payload:
        return held(message.params, jax.tree.map(lambda leaf: leaf[row], host))

    def up(update: Params, row: int) -> Payload:
        return held(update, jax.tree.map(lambda leaf: leaf[row], host))

    flops = np.asarray([3 * problem.header.flops(float(c)) for c in capacities])
    return Built(algorithm, problem.start, (), logits, flops, down, up)


def build_smallest(problem: Problem) -> Built:
    """Everyone trains the sub-header that the weakest client can hold."""
    smallest = np.full(problem.num_clients, problem.capacities.min())
    return build_heterofl(problem, smallest)


def build_fedrolex(problem: Problem) -> Built:
    """Sub-headers that roll over the full one; a client predicts with the prefix it can hold."""
    header = problem.header
    counts = jnp.asarray([header.units(float(c)) for c in problem.capacities])

    def mask_of(row: Array, round_index: Array) -> Params:
        kept = window(header.num_hidden, counts[row], offset=round_index)
        return header.mask(kept, kept)

    algorithm = fedrolex(problem.loss(), problem.schedule.optimizer(), mask_of)

    def logits(server: Any, client: tuple[()], row: Array, features: Array) -> Array:
        del client
        mask = mask_of(row, jnp.int32(0))
        return header.logits(jax.tree.map(jnp.multiply, server.params, mask), features)

    def down(message: RolexMessage, row: int) -> Payload:
        del row
        return held(message.model.params, message.model.mask)

    def up(update: RolexUpdate, row: int) -> Payload:
        mask = mask_of(jnp.int32(row), jnp.asarray(update.round))
        return held(update.params, mask)

    server = algorithm.server_init(problem.start)
    return Built(algorithm, server, (), logits, own_flops(problem), down, up)


def held(params: Any, mask: Any) -> list[np.ndarray]:
    """The entries that a mask keeps, leaf by leaf."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True)
    return [np.asarray(leaf)[np.asarray(kept) != 0] for leaf, kept in pairs]


LOCAL = Method("local", "local training", "Nothing travels.", build_local)
FEDAVG = Method(
    "fedavg", "FedAvg", "One header for all, averaged every round.", build_fedavg, False
)
FEDPROX = Method(
    "fedprox", "FedProx", "FedAvg with clients held near the round's model.", build_fedprox, False
)
DITTO = Method(
    "ditto", "Ditto", "FedAvg, and a personal header held near the shared one.", build_ditto, False
)
HETEROFL = Method(
    "heterofl", "HeteroFL", "Static sub-headers, averaged where they overlap.", build_heterofl
)
FEDROLEX = Method(
    "fedrolex", "FedRolex", "Sub-headers that roll over the full one.", build_fedrolex
)
SMALLEST = Method(
    "smallest", "everyone the smallest", "The sub-header of the weakest client.", build_smallest
)
