"""How much there is to compute in each phase of a run, and how fast the machine may be.

Matrix products only, like `nas.cost.num_flops`. Upper bounds where the size is not known before
the run (headers, sub-networks of the edges).
"""

from __future__ import annotations

import functools
import math

from jax.sharding import Mesh

from acme_jax import benchmark, step_memory
from acme_jax.config import Config, TrainConfig
from acme_jax.encoders import EncoderConfig
from acme_jax.header_layout import HeaderDims, num_flops
from acme_jax.training import steps_per_epoch
from nas.arch import ArchSpace
from nas.cells import OPS

_REFINED = 5
"""Headers that each device trains: one for each method of pruning, one unpruned."""
_ACCELERATOR_SIZE = 4096
_SECONDS = 0.2


def phase_flops(
    encoder: EncoderConfig,
    space: ArchSpace,
    config: Config,
    mesh: Mesh,
    num_train: int,
    num_select: int,
    eval_batch: int | None,
) -> dict[str, float]:
    """FLOPs of each phase, all devices together.

    Args:
      encoder: sizes.
      space: the choices.
      config: the schedules.
      mesh: the devices.
      num_train: samples of the public train split.
      num_select: samples of the public select split.
      eval_batch: of `plan.Plan`; None and an accelerator: masked sub-networks at full size.
    """
    depths_per_step = config.distill.depths_per_step

    def distillation(*, elastic_depth: bool) -> float:
        return benchmark.distillation_flops(
            encoder, space, depths_per_step, elastic_depth=elastic_depth
        )

    def samples(train: TrainConfig) -> int:
        return train.epochs * train.batch_size * steps_per_epoch(num_train, train)

    full = benchmark.reference_flops(encoder, space) / 3.0
    search, header, fleet = config.search, config.header, config.fleet
    evaluated = (1 + search.num_generations) * search.population_size * num_select
    dense = eval_batch is not None or step_memory.on_cpu(mesh)
    each = _mean_flops(encoder, space) if dense else full
    proxy = int(num_train * header.proxy_fraction)
    devices = fleet.num_edges * fleet.devices_per_edge * fleet.samples_per_device
    head = _header_flops(encoder, config)
    searched = 3.0 * proxy * (header.search_epochs + header.final_epochs)
    searched += header.search_epochs * header.controller_steps * header.batch_size
    searched += header.num_candidates * num_select
    passes = config.refine.rounds * config.refine.local_epochs
    trained = (1.0 - fleet.test_fraction) * devices * passes
    return {
        "reference model": benchmark.reference_flops(encoder, space) * samples(config.reference),
        "importance": 3.0 * full * num_select,
        "width distillation": distillation(elastic_depth=False) * samples(config.distill.width),
        "depth distillation": distillation(elastic_depth=True) * samples(config.distill.depth),
        "pareto search": each * evaluated,
        "features": full * (fleet.num_edges * (proxy + num_select) + devices),
        "header search": head * fleet.num_edges * searched,
        "refinement": 3.0 * _REFINED * head * trained,
    }


def assumed_rate(encoder: EncoderConfig, mesh: Mesh, fraction: float) -> float:
    """FLOP/s that a phase may reach: a fraction of what matrix products reach (measured once)."""
    return fraction * _peak(mesh, encoder.dtype)


@functools.lru_cache(maxsize=4)
def _peak(mesh: Mesh, dtype: str) -> float:
    if step_memory.on_cpu(mesh):
        return benchmark.matmul_peak(mesh, _SECONDS, dtype=dtype)
    return benchmark.matmul_peak(mesh, _SECONDS, dtype=dtype, size=_ACCELERATOR_SIZE)


def _mean_flops(encoder: EncoderConfig, space: ArchSpace) -> float:
    """Of a forward pass, over the uniform sub-networks."""
    flops = [
        benchmark.forward_flops(encoder, space, depth, heads, neurons)
        for heads, neurons in space.widths
        for depth in space.depth_choices
    ]
    return math.fsum(flops) / len(flops)


def _header_flops(encoder: EncoderConfig, config: Config) -> float:
    """Of a forward pass of the largest header."""
    rows, columns = encoder.grid
    header = config.header
    dims = HeaderDims(
        grid_height=rows,
        grid_width=columns,
        embed_dim=encoder.embed_dim,
        channels=header.channels,
        num_classes=encoder.num_classes,
        blocks=header.blocks,
        num_layers=header.repeats + 2,
    )
    largest = OPS.index("sep5x5")
    return float(num_flops(dims, ((0, largest, 1, largest),) * header.blocks))
