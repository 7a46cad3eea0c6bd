"""FedVTC (arXiv 2508.01669) on features: class statistics travel, samples are made of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from acme_jax.methods.controls import masked_clients, own_flops, weights_only
from acme_jax.methods.method import Built, Method
from acme_jax.methods.problem import Problem
from fed.algorithms.fedvtc import VtcClient, VtcConfig, VtcServer, fedvtc, start_clients
from fed.algorithms.fedvtc_step import feature_model


def build(problem: Problem) -> Built:
    """Each client trains the sub-header that it can hold, also on draws of the classes' Gaussians.

    The inputs are features already, so the draws are samples and no generator is needed.
    """
    header = problem.header
    config = VtcConfig(header.num_classes, header.num_features)

    def classify(params: Any, features: Array) -> Array:
        weights, mask = params
        held = jax.tree.map(jnp.multiply, weights, jax.lax.stop_gradient(mask))
        return header.logits(held, features)

    algorithm = fedvtc(feature_model(classify), weights_only(problem.schedule.optimizer()), config)
    clients = start_clients(
        jax.random.fold_in(problem.key, 5),
        masked_clients(problem),
        problem.num_clients,
        config,
        None,
    )

    def logits(server: VtcServer, client: VtcClient, row: Array, features: Array) -> Array:
        del server, row
        return classify(client.params, features)

    # Local samples and as many synthetic ones as the configuration says.
    factor = 1.0 + config.num_synthetic / problem.schedule.batch_size
    return Built(algorithm, algorithm.server_init(), clients, logits, factor * own_flops(problem))


METHOD = Method(
    "fedvtc",
    "FedVTC",
    "Statistics of classes travel; clients make samples of the classes that they lack.",
    build,
)
