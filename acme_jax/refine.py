"""One edge's refinement loop: its devices under every method, with the messages that travel.

All methods run in one cohort of M * C rows (method-major), with block-diagonal mixing
weights, so that every method has the same data, order of samples and schedule in one
compiled program. Only ACME's rows (`wasserstein`) send messages that count; the others are
baselines for comparison.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax import device as device_tier
from acme_jax import header
from acme_jax.context import Context, Stream
from acme_jax.device import DeviceState, EdgeState
from acme_jax.messages import FeatureSketch, ImportanceSet, PersonalizedImportance
from acme_jax.post import Post
from acme_jax.session import Rows
from acme_jax.vit import Params
from fed import similarity
from fed.algorithms.local import local
from fed.clients import ClientData, replicate
from fed.simulate import run_clients
from nas.cells import StaticCell

METHODS = ("no_pruning", "alone", "avg", "js", "wasserstein")
"""Rows of the cohort, in order; the last is ACME."""


class Cohort(NamedTuple):
    """Everything that changes in refinement."""

    edge: EdgeState  # rows [M * C]
    devices: DeviceState  # rows [M * C]
    linear: Any  # the linear header's parameters, rows [C]


class Mixing(NamedTuple):
    """How devices listen to each other, and what it rests on. All [C, C]."""

    distance: np.ndarray
    similarity: np.ndarray
    wasserstein: np.ndarray
    js: np.ndarray
    avg: np.ndarray


class Refined(NamedTuple):
    """The outcome of an edge's refinement."""

    cohort: Cohort
    mixing: Mixing


def exchange_sketches(
    context: Context, post: Post, edge: int, cls_features: list[Array], sizes: Array
) -> Mixing:
    """Every device sends its feature sketch once; the edge compares them.

    Args:
      context: of the run.
      post: counts the messages.
      edge: which edge.
      cls_features: for each device the normalised CLS features [n, D] of its training data.
      sizes: [C] numbers of training samples.
    """
    config = context.config.refine
    sketches = []
    for features in cls_features:
        sketch = similarity.quantile_sketch(features, config.num_quantiles)
        message = FeatureSketch(np.asarray(sketch, np.float16))
        received = post.send(message, tier="edge-device", direction="up", round=0)
        sketches.append(np.asarray(received.quantiles, np.float32))
    found = device_tier.mixing_weights(
        jnp.stack(sketches), sizes, config, context.stream(Stream.SKETCH, edge)
    )
    return Mixing(**{name: np.asarray(found[name]) for name in Mixing._fields})


def run_edge(
    context: Context,
    post: Post,
    edge: int,
    cell: StaticCell,
    params: Params,
    linear: Params,
    data: ClientData,
    mixing: Mixing,
) -> Cohort:
    """Runs all rounds of one edge, checkpointed.

    Args:
      context: of the run.
      post: counts ACME's messages; its ledger is checkpointed with the rounds.
      edge: which edge.
      cell: of the edge's header.
      params: of that header, where every device starts.
      linear: parameters of the linear header, likewise.
      data: the devices' training features, rows [C].
      mixing: from `exchange_sketches`.

    Returns:
      The cohort after the last round, every personalised set applied.
    """
    config = context.config.refine
    count = data.size.shape[0]
    acme = slice(METHODS.index("wasserstein") * count, (METHODS.index("wasserstein") + 1) * count)
    algorithm = device_tier.refinement(cell, context.header_dims, config)
    sgd = device_tier.optimizer(config)
    linear_algorithm = local(device_tier.linear_loss, sgd)
    ids = jnp.asarray([d.id for d in context.devices if d.edge == edge], jnp.int32)
    key = context.stream(Stream.REFINE, edge)
    chunk, mesh = context.config.compute.client_chunk, context.mesh
    options = {"epochs": 1, "batch_size": config.batch_size, "chunk_size": chunk, "mesh": mesh}
    tiled: ClientData = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * len(METHODS)), data)
    # Equal ids on purpose: a device draws the same batches under every method.
    tiled_ids = jnp.tile(ids, len(METHODS))

    @jax.jit
    def local_round(
        cohort: Cohort, tiled: ClientData, data: ClientData, tiled_ids: Array, index: Array
    ) -> tuple[DeviceState, Array, Any, dict[str, Array]]:
        rows = jnp.arange(tiled_ids.shape[0], dtype=jnp.int32)
        messages = jax.vmap(algorithm.server_message, in_axes=(None, 0))(cohort.edge, rows)
        devices, updates, metrics = run_clients(
            algorithm, messages, cohort.devices, tiled, key, index,
            client_ids=tiled_ids, **options,
        )  # fmt: skip
        linear, _, _ = run_clients(
            linear_algorithm, (), cohort.linear, data, key, index, client_ids=ids, **options
        )
        return devices, updates, linear, metrics

    update_edge = jax.jit(algorithm.server_update)
    apply_last = jax.jit(jax.vmap(partial(device_tier.receive, config=config)))

    def initial() -> Cohort:
        identity = jnp.eye(count)
        matrices = [identity, identity, *(jnp.asarray(getattr(mixing, m)) for m in METHODS[2:])]
        gates = header.num_gates(context.header_dims, cell)
        states = [
            replicate(device_tier.init_device(params, gates, pruned, config), count)
            for pruned in (0, *[config.prune_per_round] * (len(METHODS) - 1))
        ]
        return Cohort(
            algorithm.server_init(device_tier.block_diagonal(matrices)),
            jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *states),
            replicate(linear, count),
        )

    def advance(cohort: Cohort, index: int) -> tuple[Cohort, Rows]:
        round_index = index + 1
        devices, updates, linear_params, metrics = local_round(
            cohort, tiled, data, tiled_ids, jnp.int32(index)
        )
        sent = np.array(updates)
        for row in range(acme.start, acme.stop):
            message = ImportanceSet(sent[row])
            received = post.send(message, tier="edge-device", direction="up", round=round_index)
            sent[row] = received.importance
        edge_state, _ = update_edge(cohort.edge, jnp.asarray(sent), tiled.size)
        down = np.array(edge_state.personalized)
        for row in range(acme.start, acme.stop):
            answer = PersonalizedImportance(down[row])
            read = post.send(answer, tier="edge-device", direction="down", round=round_index)
            down[row] = read.importance
        edge_state = edge_state._replace(personalized=jnp.asarray(down))
        if round_index == config.rounds:
            devices = apply_last(devices, edge_state.personalized)
        losses = np.asarray(metrics["loss"], np.float64).reshape(len(METHODS), count).mean(axis=1)
        row = {"round": round_index, "loss": float(losses[-1])}
        row |= {f"loss_{name}": float(loss) for name, loss in zip(METHODS, losses, strict=True)}
        row["pruned"] = float(np.sum(np.asarray(devices.mask[acme]) == 0) / count)
        return Cohort(edge_state, devices, linear_params), [row]

    return context.session.loop(
        f"refinement, edge {edge}",
        total=config.rounds,
        every=context.config.compute.checkpoint_every,
        initial=initial,
        advance=advance,
        extra=lambda: {"ledger": post.to_records()},
        restored=lambda extra: post.from_records(extra["ledger"]),
    )
