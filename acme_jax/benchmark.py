"""How fast the machine is, and what fraction of it training reaches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from acme_jax import concrete
from acme_jax.encoders import EncoderConfig
from acme_jax.layout import AXIS
from acme_jax.progress import PhaseTime
from acme_jax.training import steps_per_epoch
from nas.arch import Arch, ArchSpace, full

if TYPE_CHECKING:
    from acme_jax.context import Context

_SIZE = 512
_REPEATS = 20


def matmul_peak(
    mesh: Mesh, seconds: float = 0.5, *, dtype: str = "float32", size: int = _SIZE
) -> float:
    """Largest matmul rate [FLOP/s] seen over all devices of the mesh at once.

    Every device multiplies matrices of `size` x `size`, twenty in a row, over and over for
    about `seconds`; the best of these measurements counts.
    """
    count = mesh.devices.size

    def chain(left: Array, right: Array) -> Array:
        product = lax.fori_loop(0, _REPEATS, lambda _, x: x @ right[0] * 1e-3, left[0])
        return product[None]

    spec = PartitionSpec(AXIS)
    program = jax.jit(
        jax.shard_map(chain, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    )
    left = jnp.ones((count, size, size), dtype)
    program(left, left).block_until_ready()
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        program(left, left).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2.0 * size**3 * _REPEATS * count / best


def training_rates(context: Context, phases: Sequence[PhaseTime]) -> dict[str, float]:
    """Dense FLOP/s of the cloud's training phases, compile time left out.

    A phase that was read back or continued has no rate, because its units were not all run.
    """
    config = context.config
    full_epochs = context.session.complete_phases
    work = {
        "reference model": reference_flops(context.encoder, context.space),
        "width distillation": distillation_flops(
            context.encoder, context.space, config.distill.depths_per_step, elastic_depth=False
        ),
        "depth distillation": distillation_flops(
            context.encoder, context.space, config.distill.depths_per_step, elastic_depth=True
        ),
    }
    settings = {
        "reference model": config.reference,
        "width distillation": config.distill.width,
        "depth distillation": config.distill.depth,
    }
    rates = {}
    for record in phases:
        if record.phase in work and record.phase in full_epochs:
            train = settings[record.phase]
            steps = train.epochs * steps_per_epoch(len(context.splits.train), train)
            flops = work[record.phase] * train.batch_size * steps
            rates[record.phase] = flops / max(record.seconds - record.compile_seconds, 1e-9)
    return rates


def reference_flops(encoder: EncoderConfig, space: ArchSpace) -> float:
    """FLOPs per image and step of the full network: forward and both gradients."""
    return 3.0 * float(concrete.num_flops(encoder.dims, full(space)))


def distillation_flops(
    encoder: EncoderConfig, space: ArchSpace, depths_per_step: int, *, elastic_depth: bool
) -> float:
    """Dense FLOPs per image and step of a distillation phase, students and teachers.

    With fewer depths a step than there are, the expectation over the draw.
    """
    depths = space.depth_choices if elastic_depth else (space.num_layers,)
    total = (
        0.0 if elastic_depth else forward_flops(encoder, space, space.num_layers, *space.widths[-1])
    )
    for heads, neurons in space.widths:
        students = [forward_flops(encoder, space, depth, heads, neurons) for depth in depths]
        total += 3.0 * sum(students) * depths_per_step / len(depths)
        if elastic_depth:
            total += forward_flops(encoder, space, space.num_layers, heads, neurons)
    return total


def forward_flops(
    encoder: EncoderConfig, space: ArchSpace, depth: int, heads: int, neurons: int
) -> float:
    """Forward FLOPs of one image through a uniform sub-network."""
    layers = space.num_layers
    arch = Arch(
        jnp.int32(depth),
        jnp.full(layers, heads, jnp.int32),
        jnp.full(layers, neurons, jnp.int32),
    )
    return float(concrete.num_flops(encoder.dims, arch))
