"""One edge's refinement loop: its devices under every method, with the messages that travel.

All methods run in one cohort of M * C rows (method-major), with block-diagonal mixing
weights, so that every method has the same data, order of samples and schedule in one
compiled program, which serves all edges. Only ACME's rows (`wasserstein`) send messages that
count; the others are baselines for comparison.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from acme_jax import device as device_tier
from acme_jax import header_layout, header_slots, label_prior, number_formats
from acme_jax.blocks import Params
from acme_jax.config import RefineConfig
from acme_jax.context import Context, Stream
from acme_jax.device import DeviceState, EdgeState, Mixing
from acme_jax.fleet import edge_devices
from acme_jax.header_layout import HeaderDims
from acme_jax.layout import replicate
from acme_jax.messages import ImportanceSet, PersonalizedImportance
from acme_jax.performance import RoundMeter, measured_peak
from acme_jax.post import Post
from acme_jax.session import Rows
from fed import similarity
from fed.algorithms.local import local
from fed.clients import ClientData
from fed.simulate import run_clients
from nas.cells import StaticCell

METHODS = ("no_pruning", "alone", "avg", "js", "wasserstein")
"""Rows of the cohort, in order; the last is ACME."""


class Cohort(NamedTuple):
    """Everything that changes in refinement."""

    edge: EdgeState  # rows [M * C]
    devices: DeviceState  # rows [M * C]
    linear: Any  # the linear header's parameters, rows [C]


class Programs(NamedTuple):
    """What is compiled, once for all edges."""

    sketch: Callable[[Array, Array], Array]  # features [C, N, D], sizes [C] -> [C, Q, D]
    mix: Callable[..., Mixing]  # sketches, sizes, key, log_density=[C, M] or None
    local_round: Callable[..., Any]
    update_edge: Callable[..., Any]
    receive: Callable[[DeviceState, Array], DeviceState]


@functools.lru_cache(maxsize=4)
def programs(
    dims: HeaderDims, config: RefineConfig, mesh: Mesh, client_chunk: int | None
) -> Programs:
    """Compiled functions of a refinement; equal arguments share them."""
    algorithm = device_tier.refinement(dims, config)
    linear_algorithm = local(device_tier.linear_loss, device_tier.optimizer(config))

    def sketch(features: Array, sizes: Array) -> Array:
        return jax.vmap(
            lambda rows, size: similarity.quantile_sketch(rows, config.num_quantiles, size=size)
        )(features, sizes)

    def local_round(
        cohort: Cohort, tiled: ClientData, data: ClientData, key: Array, index: Array, ids: Array
    ) -> tuple[DeviceState, Array, Any, dict[str, Array]]:
        rows = jnp.arange(len(METHODS) * ids.shape[0], dtype=jnp.int32)
        messages = jax.vmap(algorithm.server_message, in_axes=(None, 0))(cohort.edge, rows)
        run = functools.partial(
            run_clients,
            epochs=config.local_epochs,
            batch_size=config.batch_size,
            chunk_size=client_chunk,
            mesh=mesh,
        )
        # Equal ids on purpose: a device draws the same batches under every method.
        tiled_ids = jnp.tile(ids, len(METHODS))
        devices, updates, metrics = run(
            algorithm, messages, cohort.devices, tiled, key, index, client_ids=tiled_ids
        )
        linear, _, _ = run(linear_algorithm, (), cohort.linear, data, key, index, client_ids=ids)
        return devices, updates, linear, metrics

    receive = functools.partial(device_tier.receive, config=config)
    return Programs(
        sketch=jax.jit(sketch),
        mix=jax.jit(functools.partial(device_tier.mixing_weights, config=config)),
        local_round=jax.jit(local_round),
        update_edge=jax.jit(algorithm.server_update),
        receive=jax.jit(jax.vmap(receive)),
    )


def edge_programs(context: Context) -> Programs:
    """The run's compiled refinement."""
    config = context.config
    return programs(context.header_dims, config.refine, context.mesh, config.compute.client_chunk)


def gates_per_round(context: Context, cell: StaticCell) -> int:
    """N for an edge: `prune_per_round`, less where the cell has too few gates for it."""
    config = context.config.refine
    gates = header_slots.gate_positions(context.header_dims, cell).size
    return min(config.prune_per_round, int(config.max_pruned_fraction * gates / config.rounds))


def initial_cohort(
    context: Context,
    cell: StaticCell,
    params: Params,
    linear: Params,
    mixing: Mixing,
    prior: Array | None = None,
) -> Cohort:
    """Every device under every method at its start: the edge's header, nothing pruned.

    Args:
      context: of the run.
      cell: of the edge's header.
      params: of that header in compact form.
      linear: of the linear header.
      mixing: of the C devices.
      prior: [C, num_classes], added to every header's classifier; None: nothing.
    """
    config, count = context.config.refine, mixing.avg.shape[0]
    states = [
        device_tier.init_device(params, cell, context.header_dims, number, config)
        for number in (0, *[gates_per_round(context, cell)] * (len(METHODS) - 1))
    ]
    devices = jax.tree.map(
        lambda *leaves: jnp.asarray(np.repeat(np.stack(leaves), count, axis=0)), *states
    )
    linears = jax.tree.map(lambda leaf: jnp.asarray(np.stack([np.asarray(leaf)] * count)), linear)
    if prior is not None:
        tiled = jnp.tile(prior, (len(METHODS), 1))
        devices = devices._replace(params=label_prior.add_to_classifier(devices.params, tiled))
        linears = label_prior.add_to_classifier(linears, prior)
    weights = np.zeros((len(METHODS) * count, len(METHODS) * count), np.float32)
    for index, method in enumerate(METHODS):
        rows = slice(index * count, (index + 1) * count)
        mixed = np.eye(count) if method in ("no_pruning", "alone") else getattr(mixing, method)
        weights[rows, rows] = mixed
    return Cohort(
        device_tier.refinement(context.header_dims, config).server_init(jnp.asarray(weights)),
        devices,
        linears,
    )


def round_flops(dims: HeaderDims, cell: StaticCell, samples: int) -> float:
    """FLOPs of a round's training: forward and both gradients, all methods and the baseline.

    Args:
      dims: of the headers.
      cell: of the edge's header, counted dense: pruned gates are masked, which saves nothing.
      samples: that all devices together train on, each counted once an epoch.
    """
    linear = 2.0 * dims.embed_dim * dims.num_classes
    return 3.0 * samples * (len(METHODS) * header_layout.num_flops(dims, cell) + linear)


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
      post: counts ACME's messages; its ledger and coded links are checkpointed with the rounds.
      edge: which edge.
      cell: of the edge's header.
      params: of that header in compact form, where every device starts.
      linear: parameters of the linear header, likewise.
      data: the devices' training features, rows [C].
      mixing: from `acme_jax.exchange.compare`.

    Returns:
      The cohort after the last round, every personalised set applied.
    """
    config, compiled = context.config.refine, edge_programs(context)
    count = data.size.shape[0]
    first = METHODS.index("wasserstein") * count
    acme = range(first, first + count)
    gates = header_slots.gate_positions(context.header_dims, cell)
    if (number := gates_per_round(context, cell)) < config.prune_per_round:
        context.session.say(
            f"edge {edge}: the header has {gates.size} gates, so {number} instead of "
            f"{config.prune_per_round} are pruned a round (refine.max_pruned_fraction)"
        )
    senders = [device.id for device in edge_devices(context.devices, edge)]
    ids = jnp.asarray(senders, jnp.int32)
    rows = jnp.arange(len(METHODS) * count, dtype=jnp.int32)
    key = context.stream(Stream.REFINE, edge)
    prior = None
    if config.class_prior is not None:
        prior = label_prior.log_priors(data, context.encoder.num_classes, config.class_prior)
    data = replicate(data, context.mesh)
    tiled = replicate(
        jax.tree.map(lambda leaf: np.concatenate([np.asarray(leaf)] * len(METHODS)), data),
        context.mesh,
    )

    def advance(cohort: Cohort, index: int) -> tuple[Cohort, Rows]:
        cohort = replicate(cohort, context.mesh)
        devices, updates, linear_params, metrics = compiled.local_round(
            cohort, tiled, data, key, jnp.int32(index), ids
        )
        sets, form = np.array(updates), config.importance_format
        for row, sender in zip(acme, senders, strict=True):
            message = ImportanceSet(number_formats.importance(sets[row, gates], form))
            received = post.send_up(message, sender=sender, round=index + 1)
            sets[row, gates] = number_formats.read(received.importance)
        edge_state, _ = compiled.update_edge(cohort.edge, jnp.asarray(sets), tiled.size, rows)
        mixed = np.array(edge_state.personalized)
        for row in acme:
            answer = PersonalizedImportance(number_formats.importance(mixed[row, gates], form))
            read = post.send(answer, tier="edge-device", direction="down", round=index + 1)
            mixed[row, gates] = number_formats.read(read.importance)
        edge_state = edge_state._replace(personalized=jnp.asarray(mixed))
        if index + 1 == config.rounds:
            devices = compiled.receive(devices, edge_state.personalized)
        losses = np.asarray(metrics["loss"], np.float64).reshape(len(METHODS), count).mean(axis=1)
        masks = np.asarray(devices.mask)[first : first + count, gates]
        numbers: dict[str, Any] = {
            "round": index + 1,
            "loss": float(losses[-1]),
            "pruned": float((masks == 0).mean()),
        }
        numbers |= {f"loss_{m}": float(loss) for m, loss in zip(METHODS, losses, strict=True)}
        return Cohort(edge_state, devices, linear_params), [numbers]

    def restored(extra: dict[str, Any]) -> None:
        post.from_records(extra["ledger"])
        post.memories_from_records(extra.get("links", []))  # a checkpoint may be older than links

    def meter() -> RoundMeter:
        samples = config.local_epochs * int(np.sum(np.asarray(data.size)))
        return RoundMeter(
            clients=len(METHODS) * count,
            flops=round_flops(context.header_dims, cell, samples),
            peak_flops_per_second=measured_peak(context.mesh),
            mesh=context.mesh,
        )

    return context.session.loop(
        f"refinement, edge {edge}",
        total=config.rounds,
        every=context.config.compute.checkpoint_every,
        initial=lambda: initial_cohort(context, cell, params, linear, mixing, prior),
        advance=advance,
        extra=lambda: {"ledger": post.to_records(), "links": post.memories_to_records()},
        restored=restored,
        meter=meter,
    )
