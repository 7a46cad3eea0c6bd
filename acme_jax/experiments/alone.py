"""Sub-networks of the grid trained alone from scratch: what the supernet has to be as good as.

A network alone starts as a network of its size does, and trains as the reference model does: the
same public train split, order of samples, augmentation, loss, optimiser and peak learning rate,
with a linear decay of its own length. Two lengths are fair in different ways:

* `same_compute`: all sub-networks of the grid together cost as many training FLOPs as the one
  supernet costs (reference model, width and depth distillation, teachers included; rounded down
  to whole epochs, which on Fashion-MNIST makes 7). It answers what somebody gets who has one
  training budget and needs every size.
* `same_epochs`: a network sees the train split as often as the supernet does in all its phases
  (28 epochs on Fashion-MNIST). It answers what somebody gets who needs one size only and does not
  count what the other sizes cost: all of the grid would take 3.7 times the supernet's FLOPs.
  It is trained at `LONG_POINTS` only, because of that cost.

It runs dense. The full network is trained by the very program of the reference model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from acme_jax import benchmark, distill, slicing, supernet, training
from acme_jax.blocks import Params
from acme_jax.config import TrainConfig
from acme_jax.context import Context, Stream
from acme_jax.encoders import EncoderConfig
from acme_jax.experiments import final
from acme_jax.experiments.study import GridPoint, Study
from acme_jax.layout import replicate
from acme_jax.progress import Stopwatch
from acme_jax.supernet_training import initial_params
from nas.arch import Arch, ArchSpace

Length = Literal["same_compute", "same_epochs"]

LONG_POINTS = ((0.25, 0.25), (0.5, 0.5), (1.0, 1.0))
"""(depth, width) that are also trained with `same_epochs`."""


class Trained(NamedTuple):
    """A network that was trained alone."""

    params: Params  # `blocks` stacked along its own number of blocks, at its own width
    train_seconds: float
    """Without compiling."""


def supernet_epochs(context: Context) -> int:
    """How often the supernet sees the train split, all phases together."""
    config = context.config
    return config.reference.epochs + config.distill.width.epochs + config.distill.depth.epochs


def supernet_flops(context: Context) -> float:
    """Dense training FLOPs of the supernet's three phases; importance, one pass, is left out."""
    config, encoder, space = context.config, context.encoder, context.space
    per_step = functools.partial(
        benchmark.distillation_flops, encoder, space, config.distill.depths_per_step
    )
    phases = (
        (config.reference, benchmark.reference_flops(encoder, space)),
        (config.distill.width, per_step(elastic_depth=False)),
        (config.distill.depth, per_step(elastic_depth=True)),
    )
    return sum(flops * _samples(context, train) * train.epochs for train, flops in phases)


def alone_flops(context: Context, archs: list[Arch], epochs: int) -> float:
    """Dense training FLOPs of uniform sub-networks, each of them alone for so many epochs."""
    samples = epochs * _samples(context, context.config.reference)
    forward = [
        benchmark.forward_flops(context.encoder, context.space, int(arch.depth), *width(arch))
        for arch in archs
    ]
    return 3.0 * samples * sum(forward)


def epochs_of(study: Study, length: Length) -> int:
    """Epochs of a network alone."""
    if length == "same_epochs":
        return supernet_epochs(study.context)
    each = alone_flops(study.context, [point.arch for point in study.grid], epochs=1)
    return max(1, math.floor(supernet_flops(study.context) / each))


def _samples(context: Context, train: TrainConfig) -> int:
    """Samples of an epoch: those of whole batches."""
    return train.batch_size * training.steps_per_epoch(len(context.splits.train), train)


def width(arch: Arch) -> tuple[int, int]:
    """Heads and neurons of a uniform sub-network."""
    return int(arch.heads[0]), int(arch.neurons[0])


def starting_params(context: Context, arch: Arch) -> Params:
    """Where a sub-network alone begins: as large as it is, `blocks` stacked.

    Drawn at random it is a part of the full network's first weights, scaled to its own fan-in;
    pretrained it is that part as it is.
    """
    whole = jax.device_get(initial_params(context))
    heads, neurons = width(arch)
    kept = list(slicing.kept_blocks(arch))
    blocks = jax.tree.map(
        lambda leaf: leaf[kept], supernet.prefix_block(whole["blocks"], heads, neurons)
    )
    if context.pretrained is None:
        encoder = context.encoder
        for half, kernel, full, part in (
            ("attention", "out_kernel", encoder.num_heads, heads),
            ("mlp", "down_kernel", encoder.num_neurons, neurons),
        ):
            scaled = blocks[half][kernel] * np.float32(math.sqrt(full / part))
            blocks[half] = {**blocks[half], kernel: scaled}
    return {**whole, "blocks": blocks}


def train(study: Study, point: GridPoint, epochs: int) -> Trained:
    """Trains one sub-network alone on the public train split.

    Raises:
      NonFiniteLossError: the loss became NaN or infinite.
      StoppedError: a stop was asked for; nothing is kept.
    """
    context, config = study.context, study.context.config.reference
    inputs, labels = context.public.train_inputs, context.public.train_labels
    lasting = dataclasses.replace(config, epochs=epochs)
    schedule = training.make_schedule(lasting, inputs.shape[0])
    size = _Size.of(point.arch, context.space)
    micro = context.plan.micro_batches(config)
    epoch = _epoch(context.encoder, size, config, context.mesh, micro)
    key, name = context.stream(Stream.REFERENCE), f"alone {point.depth:g} x {point.width:g}"
    with Stopwatch() as watch:
        params = replicate(starting_params(context, point.arch), context.mesh)
        state = training.init_state(params, training.make_optimizer(config))
        for index in range(epochs):
            context.session.check_stop(name, index, epochs)
            state, metrics = epoch(
                key, replicate(state, context.mesh), None, schedule, inputs, labels
            )
            if not np.isfinite(np.asarray(metrics["loss"])).all():
                raise training.NonFiniteLossError(
                    f"the loss is not finite in {name}, epoch {index + 1} of {epochs}; lower "
                    "reference.learning_rate"
                )
        jax.block_until_ready(state)
    return Trained(state.params, watch.seconds - watch.compile_seconds)


def classifier(study: Study, params: Params, arch: Arch) -> Callable[[Array], Array]:
    """For `final.network`: inputs [B, ...] -> logits [B, num_classes] of a network alone."""
    size = _Size.of(arch, study.context.space)
    return functools.partial(_logits(study.context.encoder, size), params)


def select_accuracy(study: Study, classify: Callable[[Array], Array]) -> float:
    """Accuracy on the public select split."""
    public = study.context.public
    classes = final.predict(classify, public.select_inputs, study.context.eval_batch)
    return float(np.mean(classes == np.asarray(public.select_labels)))


class _Size(NamedTuple):
    """What a program is compiled for; None: the full network."""

    depth: int
    width: tuple[int, int] | None

    @classmethod
    def of(cls, arch: Arch, space: ArchSpace) -> _Size:
        depth, heads_neurons = int(arch.depth), width(arch)
        full = (depth, *heads_neurons) == (space.num_layers, space.num_heads, space.num_neurons)
        return cls(depth, None if full else heads_neurons)

    @property
    def apply(self) -> distill.Apply:
        """The forward pass of a network of this size."""
        if self.width is None:
            return supernet.apply
        heads, neurons = self.width

        def narrow(params: Params, inputs: Array, config: EncoderConfig) -> supernet.Outputs:
            keep = jnp.ones(self.depth, bool)
            return supernet.apply_width(params, inputs, config, heads, neurons, keep)

        return narrow


@functools.lru_cache(maxsize=32)
def _epoch(
    encoder: EncoderConfig, size: _Size, config: TrainConfig, mesh: Mesh, num_micro: int
) -> Callable[..., Any]:
    grad_fn = distill.reference_grad(encoder, size.apply)
    return jax.jit(training.make_epoch(grad_fn, config, mesh, num_micro), donate_argnums=(1,))


@functools.lru_cache(maxsize=32)
def _logits(encoder: EncoderConfig, size: _Size) -> Callable[[Params, Array], Array]:
    return jax.jit(lambda params, inputs: size.apply(params, inputs, encoder).logits)
