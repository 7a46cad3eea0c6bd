"""Before the rounds: devices tell how their data are distributed, the edge makes weights of it.

The post counts what travels: feature sketches, or with `refine.similarity = "kde"` the edge's
question and the devices' log densities.

Shape letters: C devices, N samples, S samples of the edge, D features, M reference points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax import densities, number_formats, refine
from acme_jax.context import Context, Stream
from acme_jax.device import Mixing
from acme_jax.fleet import edge_devices
from acme_jax.message_records import DensityQuestion, FeatureSketch, LogDensities
from acme_jax.post import Post
from fed.clients import ClientData


def compare(
    context: Context, post: Post, edge: int, summaries: ClientData, shared: Array | None = None
) -> Mixing:
    """Every device tells once how its data are distributed; the edge compares them.

    By its feature sketch, or with similarity "kde" by its log densities where the edge asks. The
    baseline "js" compares sketches in any case, which then do not travel.

    Args:
      context: of the run.
      post: counts the messages.
      edge: which edge.
      summaries: one vector for each of the devices' training samples [C, N, D].
      shared: the same of the edge's shared data [S, D]; None: it has none to ask about.

    Raises:
      ConfigError: similarity "kde" without shared data.
    """
    compiled = refine.edge_programs(context)
    ids = [device.id for device in edge_devices(context.devices, edge)]
    form = context.config.refine.sketch_format
    sketches: list[Any] = [
        number_formats.sketch(quantiles, form)
        for quantiles in np.asarray(compiled.sketch(summaries.inputs, summaries.size))
    ]
    log_density = None
    if context.config.refine.similarity != "kde":
        sketches = [
            post.send_up(FeatureSketch(sketch), sender=sender, round=0).quantiles
            for sketch, sender in zip(sketches, ids, strict=True)
        ]
    elif shared is not None:
        log_density = _ask(context, post, edge, ids, summaries, shared)
    read = jnp.asarray(np.stack([number_formats.read(sketch) for sketch in sketches]))
    key = context.stream(Stream.SKETCH, edge)
    mixing = compiled.mix(read, summaries.size, key, log_density=log_density)
    host: Mixing = jax.tree.map(np.asarray, mixing)
    return host


def density_question(context: Context, edge: int, shared: Array) -> DensityQuestion:
    """What an edge asks its devices, the same every time; shared as for `compare`."""
    config = context.config.refine
    return densities.question(
        context.stream(Stream.DENSITY, edge),
        shared,
        num_dims=config.kde_dims,
        num_references=config.num_references,
    )


def _ask(
    context: Context,
    post: Post,
    edge: int,
    senders: Sequence[int],
    summaries: ClientData,
    shared: Array,
) -> Array:
    """The edge asks all devices, each answers [C, M]."""
    asked, count = density_question(context, edge, shared), len(senders)
    read = post.send(asked, tier="edge-device", direction="down", round=0, copies=count)
    found = densities.answers(read, summaries.inputs, summaries.size)
    received = [
        post.send_up(LogDensities(values), sender=sender, round=0).values
        for values, sender in zip(np.asarray(found.log_density), senders, strict=True)
    ]
    return jnp.asarray(np.stack(received))
