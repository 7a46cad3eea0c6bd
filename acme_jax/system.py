"""The bidirectional single loop, from the first byte to the report.

Down: the cloud trains a supernet and searches it, each edge gets the backbone that fits its
devices and searches a header, each device gets both. Up: profiles, one feature sketch (or log
densities where the edge asks) and an importance set a round. Read `run` from top to bottom.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax import cloud, data_quality, encoders, exchange, phases, refine, slicing
from acme_jax.blocks import Params
from acme_jax.cloud import Choice
from acme_jax.config import Config
from acme_jax.context import Context, make_context, proxy_indices
from acme_jax.device import Mixing
from acme_jax.encoders import EncoderConfig
from acme_jax.fleet import REFERENCE_PROFILE, Device, edge_devices
from acme_jax.messages import (
    BackboneMessage,
    ClusterProfile,
    DataQuality,
    DeviceProfileMessage,
    HeaderMessage,
)
from acme_jax.phases import EdgeHeader, SearchProgress
from acme_jax.post import Post
from acme_jax.progress import Reporter, stop_on_signals
from acme_jax.results import finish
from acme_jax.run_dir import RunDirectory
from acme_jax.session import Session
from acme_jax.supernet_training import train_stages
from fed.clients import ClientData, stack_clients

FEATURE_BATCH = 500
"""Images per call when features are computed; only memory depends on it."""


class Cloud(NamedTuple):
    """What the cloud made."""

    reference: Params  # reordered; the same function as trained
    supernet: Params
    search: SearchProgress
    choices: list[Choice]  # one for each edge
    limits: list[float]  # bytes for each edge's backbone


class Edge(NamedTuple):
    """What one edge made, and its devices after refinement."""

    backbone: Params  # sliced
    header: EdgeHeader
    mixing: Mixing
    cohort: refine.Cohort
    quality: list[DataQuality] | None  # of the devices' data, if asked for


def run(
    config: Config,
    run_dir: str | Path,
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Runs everything that the configuration says and writes the run directory.

    Args:
      config: of the run; see `acme_jax.presets`.
      run_dir: a new or empty directory, or with `resume` the directory of the same run.
      resume: continue where a killed run stopped; results equal an uninterrupted run's.
      reporter: shows progress; None: live on a terminal, plain lines elsewhere.

    Returns:
      The results, as in `results.json`.

    Raises:
      ConfigError, DataError, RunError: bad input, before long work starts.
      NonFiniteLossError: training diverged; the last good checkpoint is kept.
      StoppedError: SIGTERM or Ctrl-C; the state is saved.
    """
    directory = RunDirectory.create_or_open(run_dir, config, resume=resume)
    try:
        with reporter or Reporter() as shown, stop_on_signals() as stop:
            session = Session(directory, shown, stop)
            with session.phase("data and devices"):
                try:
                    context = make_context(config, session)
                except (ValueError, OSError):
                    session.abandon()
                    raise
            post = Post(config.refine.coding)
            clusters = register_devices(context, post)
            made = cloud_tier(context, clusters)
            edges = [
                edge_tier(context, post, edge, made.choices[edge], made.supernet)
                for edge in range(config.fleet.num_edges)
            ]
            session.finish()
            return finish(context, post, made, edges)
    finally:
        directory.close()


def register_devices(context: Context, post: Post) -> list[ClusterProfile]:
    """Up: every device sends its profile to its edge, every edge its cluster's to the cloud."""
    clusters = []
    for edge in range(context.config.fleet.num_edges):
        received = [
            post.send(
                DeviceProfileMessage(d.id, d.budget_bytes, len(d.train), d.profile),
                tier="edge-device",
                direction="up",
                round=0,
            )
            for d in edge_devices(context.devices, edge)
        ]
        limits = np.array([message.budget_bytes for message in received], np.int64)
        cluster = ClusterProfile(edge, len(received), limits, REFERENCE_PROFILE)
        clusters.append(post.send(cluster, tier="cloud-edge", direction="up", round=0))
    return clusters


def cloud_tier(context: Context, clusters: list[ClusterProfile]) -> Cloud:
    """Reference model, reordering, width and depth distillation, Pareto search, choice."""
    stages = train_stages(context)
    reference, elastic = stages.reordered, stages.elastic
    del stages  # the search has no use for the other weights, but for their memory
    limits = [float(np.min(c.limits)) - context.header_reserve_bytes for c in clusters]
    search = phases.search(context, elastic, max(limits))
    choices = cloud.choose_backbones(search.state, limits, context.config.search)
    return Cloud(reference, elastic, search, choices, limits)


def edge_tier(
    context: Context, post: Post, edge: int, choice: Choice, supernet_params: Params
) -> Edge:
    """One edge: receive the backbone, search a header, send both down, refine with devices."""
    devices = edge_devices(context.devices, edge)
    sliced = slicing.slice_params(jax.device_get(supernet_params), choice.arch)
    sliced = {name: leaf for name, leaf in sliced.items() if name not in encoders.HEADS}
    backbone = _as_jax(
        post.send(
            BackboneMessage(choice.arch, sliced), tier="cloud-edge", direction="down", round=0
        ).params
    )
    with context.session.phase(f"features, edge {edge}"):
        proxy = context.splits.train.inputs[proxy_indices(context)]
        train_features, shared = compute_features(context, backbone, proxy)
        select_features, _ = compute_features(context, backbone, context.splits.select.inputs)
        device_features = [
            compute_features(context, backbone, device.train.inputs) for device in devices
        ]
    found = phases.search_header(context, edge, train_features, select_features)
    received = send_models(post, choice, sliced, found, devices)
    labels = [device.train.labels for device in devices]
    tokens, summaries = zip(*device_features, strict=True)
    sketched = stack_devices(context, summaries, labels)
    features = jnp.asarray(shared)
    mixing = exchange.compare(context, post, edge, sketched, features)
    quality = None
    if context.config.refine.data_quality:
        quality = data_quality.collect(context, post, edge, sketched, features)
    data = stack_devices(context, tokens, labels)
    cohort = refine.run_edge(context, post, edge, found.cell, received, found.linear, data, mixing)
    return Edge(backbone, found, mixing, cohort, quality)


def stack_devices(
    context: Context, inputs: Sequence[np.ndarray], labels: Sequence[np.ndarray]
) -> ClientData:
    """Stacks an edge's devices, padded to the longest of the whole fleet.

    Padding changes nothing, and equal shapes let all edges share their programs.
    """
    data = stack_clients(list(zip(inputs, labels, strict=True)))
    longest = max(max(len(d.train), len(d.test)) for d in context.devices)
    extra = longest - data.labels.shape[1]
    rows = ((0, 0), (0, extra))
    padded = np.pad(np.asarray(data.inputs), rows + ((0, 0),) * (data.inputs.ndim - 2))
    return ClientData(
        jnp.asarray(padded), jnp.asarray(np.pad(np.asarray(data.labels), rows)), data.size
    )


def send_models(
    post: Post,
    choice: Choice,
    sliced: Params,
    found: EdgeHeader,
    devices: list[Device],
) -> Params:
    """Down: backbone and header to every device; returns the header as devices read it."""
    count = len(devices)
    backbone = BackboneMessage(choice.arch, sliced)
    post.send(backbone, tier="edge-device", direction="down", round=0, copies=count)
    message = HeaderMessage(found.cell, found.params)
    read = post.send(message, tier="edge-device", direction="down", round=0, copies=count)
    return _as_jax(read.params)


def compute_features(
    context: Context, backbone: Params, inputs: np.ndarray | Array
) -> tuple[np.ndarray, np.ndarray]:
    """Header tokens [N, T, D] and summaries [N, D] (`encoders.summary`) of samples.

    Computed once, because the backbone is frozen; in batches of one shape, so that an edge
    compiles once.
    """
    count, size = inputs.shape[0], min(FEATURE_BATCH, context.eval_batch)
    padding = -count % size
    padded = np.pad(np.asarray(inputs), ((0, padding), *[(0, 0)] * (inputs.ndim - 1)))
    outputs = [
        _features(backbone, jnp.asarray(padded[start : start + size]), context.encoder)
        for start in range(0, count + padding, size)
    ]
    tokens, summaries = (
        np.concatenate([np.asarray(part) for part in parts])[:count]
        for parts in zip(*outputs, strict=True)
    )
    return tokens, summaries


def _features_of(backbone: Params, inputs: Array, encoder: EncoderConfig) -> tuple[Array, Array]:
    final = slicing.final_state(backbone, inputs, encoder)
    tokens = encoders.header_tokens(final, inputs, encoder)
    return tokens, encoders.summary(backbone, final, inputs, encoder)


_features = jax.jit(_features_of, static_argnums=2)


def _as_jax(params: Params) -> Params:
    return jax.tree.map(jnp.asarray, params)
