"""ACME's refinement of the comparison's header: importance sets travel, weights do not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax.config import RefineConfig
from acme_jax.importance_rounds import (
    DeviceState,
    Downlink,
    EdgeState,
    importance_rounds,
    optimizer,
    receive,
)
from acme_jax.methods.method import Built, Method, Payload
from acme_jax.methods.problem import Problem
from fed import similarity

TEMPERATURE = 0.1
NUM_QUANTILES = 32


def build(problem: Problem, weights: Array | None = None) -> Built:
    """Each client prunes the full header down to its capacity in equal steps.

    Gates are the hidden units of both layers; the edge mixes importance sets by per-dimension
    Wasserstein similarity of feature sketches (ACME sections on refinement).

    Args:
      problem: of the comparison.
      weights: [C, C] row-stochastic mixing instead of the Wasserstein one.
    """
    header, schedule = problem.header, problem.schedule
    config = RefineConfig(
        rounds=schedule.rounds,
        batch_size=schedule.batch_size,
        learning_rate=schedule.learning_rate,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
    )
    num_gates = 2 * header.num_hidden
    sketches = np.asarray(_sketch(problem.data.inputs, problem.data.size)).astype(np.float16)
    if weights is None:
        received = jnp.asarray(sketches.astype(np.float32))
        distance = similarity.pairwise_wasserstein(received, method="per_dimension")
        weights = similarity.weights(distance, temperature=TEMPERATURE)

    def logits(state: DeviceState, features: Array, gates: Array | None) -> Array:
        open_gates = state.mask if gates is None else state.mask * gates
        return header.logits(state.params, features, open_gates)

    kept = 2 * np.asarray([header.units(float(c)) for c in problem.capacities])
    per_round = -(-(num_gates - kept) // schedule.rounds)
    count = problem.num_clients

    def stacked(leaf: Array) -> Array:
        return jnp.repeat(jnp.asarray(leaf)[None], count, axis=0)

    params = jax.tree.map(stacked, problem.start)
    clients = DeviceState(
        cell=(),
        params=params,
        momentum=jax.vmap(optimizer(config).init)(params),
        mask=jnp.ones((count, num_gates)),
        smoothed=jnp.zeros((count, num_gates)),
        rounds=jnp.zeros(count, jnp.int32),
        prune_per_round=jnp.asarray(per_round, jnp.int32),
        min_gates=jnp.asarray(kept, jnp.int32),
    )
    algorithm = importance_rounds(logits, num_gates, config)

    def predict(server: EdgeState, client: DeviceState, row: Array, features: Array) -> Array:
        # The last set still has to be applied.
        return logits(receive(client, server.personalized[row], config), features, None)

    def down(message: Downlink, row: int) -> Payload:
        del row
        return [np.asarray(message.personalized, np.float32)]

    return Built(
        algorithm,
        algorithm.server_init(weights),
        clients,
        predict,
        np.full(count, 3 * header.flops()),
        down=down,
        setup_up=lambda row: [sketches[row]],
    )


@jax.jit
def _sketch(features: Array, sizes: Array) -> Array:
    return jax.vmap(lambda rows, size: similarity.quantile_sketch(rows, NUM_QUANTILES, size=size))(
        features, sizes
    )


METHOD = Method(
    "acme", "ACME", "Importance sets mixed by Wasserstein similarity; clients prune by them.", build
)
