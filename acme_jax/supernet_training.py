"""The cloud's training: reference model, reordering, width and depth distillation."""

from __future__ import annotations

from typing import NamedTuple

import jax

from acme_jax import cloud, distill, phases, supernet
from acme_jax.blocks import Params
from acme_jax.context import Context, Stream


class Stages(NamedTuple):
    """The full network after each stage; every one is the start of the next."""

    trained: Params
    """The reference model."""
    reordered: Params
    """The same function, heads and neurons sorted by importance."""
    width_adaptive: Params
    """DynaViT_W, elastic in width."""
    elastic: Params
    """DynaViT, elastic in width and depth: the supernet."""


def train_stages(
    context: Context, *, trained: Params | None = None, reorder: bool = True
) -> Stages:
    """Trains the supernet on the public train split; importance reads the select split.

    Args:
      context: of the run; its session checkpoints every phase.
      trained: a reference model that is ready; None: it is trained here.
      reorder: False leaves heads and neurons as they were trained, for comparisons only.

    Raises:
      NonFiniteLossError, StoppedError: as `Session.loop`.
    """
    config, encoder, public = context.config, context.encoder, context.public
    if trained is None:
        trained = phases.train(
            context,
            "reference model",
            config.reference,
            phases.compiled_epoch(context, distill.reference_grad(encoder), config.reference),
            Stream.REFERENCE,
            initial_params(context),
        )
    reordered = trained
    if reorder:
        with context.session.phase("importance"):
            by_importance = jax.jit(cloud.reorder_by_importance, static_argnums=3)
            reordered = by_importance(trained, public.select_inputs, public.select_labels, encoder)
    space = context.space
    grad_fn = distill.distillation_grad(encoder, space, config.distill.depths_per_step)
    # One program for both distillation phases: they differ in traced values only.
    epoch = phases.compiled_epoch(context, grad_fn, config.distill.depth)
    width_adaptive = phases.train(
        context,
        "width distillation",
        config.distill.width,
        epoch,
        Stream.WIDTH,
        reordered,
        distill.width_lesson(space, reordered, config.distill.width),
    )
    elastic = phases.train(
        context,
        "depth distillation",
        config.distill.depth,
        epoch,
        Stream.DEPTH,
        width_adaptive,
        distill.depth_lesson(space, width_adaptive, config.distill.depth),
    )
    return Stages(trained, reordered, width_adaptive, elastic)


def initial_params(context: Context) -> Params:
    """The full network before its reference phase: pretrained, or drawn at random."""
    if context.pretrained is not None:
        return context.pretrained
    init = jax.jit(supernet.init, static_argnums=1)
    params: Params = init(context.stream(Stream.INIT), context.encoder)
    return params
