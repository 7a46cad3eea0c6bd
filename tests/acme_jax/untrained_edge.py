"""One edge of the tiny preset with networks that nobody has trained, for tests of refinement."""

import contextlib
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from acme_jax import encoders, exchange, header, refine, slicing, supernet, system
from acme_jax.config import Config
from acme_jax.context import Context, make_context, proxy_indices
from acme_jax.device import Mixing
from acme_jax.experiments.settings import settings
from acme_jax.fleet import edge_devices
from acme_jax.progress import Reporter, StopFlag
from acme_jax.run_dir import RunDirectory
from acme_jax.session import Session
from nas.arch import full
from nas.cells import OPS

CELL = ((0, OPS.index("sep1x1"), 1, OPS.index("identity")),) * 2


class Setting(NamedTuple):
    """What an edge has before its devices tell of their data."""

    context: Context
    summaries: Any  # ClientData [C, N, D]
    tokens: Any  # ClientData [C, N, T, D]
    shared: jax.Array  # [S, D]
    header: Any
    linear: Any


def configuration(**changes) -> Config:
    """The tiny preset with small headers and devices, and fields of `refine` changed."""
    config = settings("tiny")
    return dataclasses.replace(
        config,
        header=dataclasses.replace(config.header, channels=4),
        fleet=dataclasses.replace(config.fleet, samples_per_device=40),
        refine=dataclasses.replace(config.refine, **changes),
        compute=dataclasses.replace(config.compute, checkpoint_every=1),
    )


@contextlib.contextmanager
def opened(config, directory, stop=None):
    """The setting in a run directory, new or continued."""
    run = RunDirectory.create_or_open(directory, config, resume=True)
    try:
        with Reporter() as reporter:
            yield _setting(make_context(config, Session(run, reporter, stop or StopFlag())))
    finally:
        run.close()


def refined(setting, post) -> tuple[Mixing, refine.Cohort]:
    """The run's own exchange and refinement of edge 0."""
    context, data = setting.context, setting.tokens
    mixing = exchange.compare(context, post, 0, setting.summaries, setting.shared)
    cohort = refine.run_edge(context, post, 0, CELL, setting.header, setting.linear, data, mixing)
    return mixing, cohort


def _setting(context) -> Setting:
    whole = supernet.init(jax.random.key(0), context.encoder)
    sliced = slicing.slice_params(jax.device_get(whole), full(context.space))
    backbone = {name: leaf for name, leaf in sliced.items() if name not in encoders.HEADS}
    devices = edge_devices(context.devices, 0)
    features = [system.compute_features(context, backbone, d.train.inputs) for d in devices]
    labels = [device.train.labels for device in devices]
    tokens, summaries = (
        system.stack_devices(context, part, labels) for part in zip(*features, strict=True)
    )
    proxy = context.splits.train.inputs[proxy_indices(context)]
    shared = jnp.asarray(system.compute_features(context, backbone, proxy)[1])
    dims = context.header_dims
    linear = header.init_linear(jax.random.key(2), dims.embed_dim, dims.num_classes)
    return Setting(
        context, summaries, tokens, shared, header.init(jax.random.key(1), CELL, dims), linear
    )
