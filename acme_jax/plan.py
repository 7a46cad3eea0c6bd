"""What a run will need, before it starts: memory on each device, how it is made to fit, time.

Memory is modelled (`step_memory`), not tried out: compiling the programs of a large network takes
minutes. What does not fit at once is computed in micro-batches, then with blocks computed again in
the backward pass (remat), which costs a third more time. Neither changes what is learned,
except by rounding.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from jax.sharding import Mesh

from acme_jax import step_memory, workload
from acme_jax.config import Config, ConfigError, TrainConfig
from acme_jax.encoders import EncoderConfig
from acme_jax.wording import quantity
from fed import chunks
from nas.arch import ArchSpace

MIN_MICRO_BATCH = 8
"""Samples below which a micro-batch fills an accelerator badly: remat comes first."""
MAX_EVAL_BATCH = 256
"""Samples in one forward pass where not all fit: more are no faster."""
WORTH_TIMING = 1e14
"""FLOPs from which on time is planned: less is not worth measuring the machine."""
CPU_FRACTION, ACCELERATOR_FRACTION = 0.3, 0.35
"""Assumed part of the measured rate of matrix products that a phase reaches."""


class Plan(NamedTuple):
    """How a run is computed; bytes are those of one device."""

    remat: bool
    micro_batch: int
    """Samples of one device whose gradient is computed at once."""
    num_micro: int
    """Micro-batches of a shard of the distillation phases."""
    eval_batch: int | None
    """Samples in one forward pass of an evaluation; None: all of the select split."""
    bytes_needed: int
    bytes_available: int | None
    """Free memory; None: the backend does not say."""
    flops: dict[str, float]
    """Of each phase, on all devices."""
    seconds: dict[str, float | None]
    """Of each phase, compiling left out; None: not planned, for the run is short."""
    lines: list[str]
    """The plan in words."""

    def micro_batches(self, train: TrainConfig) -> int:
        """Micro-batches of each shard of a phase: as few as stay within `micro_batch`."""
        samples = train.batch_size // train.shards
        return samples // _at_most(samples, self.micro_batch)


def make_plan(
    encoder: EncoderConfig,
    space: ArchSpace,
    config: Config,
    mesh: Mesh,
    *,
    num_train: int,
    num_select: int,
    free_bytes: int | None = None,
    sample_bytes: int | None = None,
) -> Plan:
    """Chooses remat, micro-batches and evaluation batches; checks those that are given.

    Call it before the data are on the devices: they are counted here. No remat and whole shards
    if these fit, else micro-batches of at least `MIN_MICRO_BATCH` samples, else remat, else
    smaller micro-batches with it.

    Args:
      encoder: sizes; its `remat` is not read.
      space: the choices.
      config: the schedules; `compute.remat`, `micro_batch` and `eval_batch` are respected.
      mesh: the devices.
      num_train: samples of the public train split.
      num_select: samples of the public select split.
      free_bytes: of each device; None: what is free now.
      sample_bytes: of one sample as it is stored; None: its numbers are 32 bits wide.

    Raises:
      ConfigError: a micro-batch that does not divide a shard, or nothing (or nothing of what is
        asked for) fits; the message says how much is needed and free, and what would mend it.
    """
    available = chunks.free_bytes(mesh) if free_bytes is None else free_bytes
    _check_micro_batch(config)
    if sample_bytes is None:
        sample_bytes = step_memory.default_sample_bytes(encoder)
    data = step_memory.data_bytes(num_train + num_select, sample_bytes)
    needs = _Needs(encoder, space, config, mesh, num_train, num_select, data)
    limit = float("inf") if available is None else chunks.USABLE * available
    candidates = _candidates(config)
    remat, micro_batch = next(
        (each for each in candidates if needs.training(*each) <= limit), candidates[-1]
    )
    eval_batches = _eval_batches(config, num_select)
    eval_batch = next(
        (each for each in eval_batches if needs.evaluation(each) <= limit), eval_batches[-1]
    )
    parts = {
        "training": needs.training(remat, micro_batch),
        "evaluating sub-networks": needs.evaluation(eval_batch),
        "searching and refining headers": needs.headers(),
    }
    needed = max(parts.values())
    for part, size in parts.items():
        if available is not None and size > limit:
            raise ConfigError(_refusal(needs, part, size, available))
    flops = workload.phase_flops(encoder, space, config, mesh, num_train, num_select, eval_batch)
    rate = None
    if sum(flops.values()) > WORTH_TIMING:
        rate = workload.assumed_rate(
            encoder, mesh, CPU_FRACTION if step_memory.on_cpu(mesh) else ACCELERATOR_FRACTION
        )
    seconds = {name: None if rate is None else work / rate for name, work in flops.items()}
    plan = Plan(remat, micro_batch, 1, eval_batch, needed, available, flops, seconds, [])
    plan = plan._replace(num_micro=plan.micro_batches(config.distill.depth))
    return plan._replace(lines=_describe(plan, config, encoder, mesh, num_select))


@dataclasses.dataclass(frozen=True)
class _Needs:
    """Bytes on each device of everything that is in memory at the same time."""

    encoder: EncoderConfig
    space: ArchSpace
    config: Config
    mesh: Mesh
    num_train: int
    num_select: int
    data: int

    def training(self, remat: bool, micro_batch: int) -> int:
        """The largest of the training phases and the importance pass between them."""
        encoder = dataclasses.replace(self.encoder, remat=remat)
        parameters = step_memory.state_bytes(encoder) // 3

        def phase(train: TrainConfig, *, distils: bool) -> int:
            samples = _at_most(train.batch_size // train.shards, micro_batch)
            return step_memory.training_bytes(encoder, train, self.mesh, samples, distils=distils)

        phases = (
            phase(self.config.reference, distils=False),
            phase(self.config.distill.depth, distils=True),
        )
        importance = step_memory.importance_bytes(encoder, self.mesh)
        # A phase's starting point stays until it ends; so does the reference network.
        return self.data + max(max(phases) + parameters, importance)

    def evaluation(self, batch: int | None) -> int:
        """The Pareto search's forward passes, beside the reference network."""
        dense = batch is not None or step_memory.on_cpu(self.mesh)
        size = self.num_select if batch is None else batch
        program = step_memory.evaluation_bytes(
            self.encoder, self.space, self.mesh, size, self.config.search.population_size,
            dense=dense,
        )  # fmt: skip
        return self.data + program + step_memory.state_bytes(self.encoder) // 3

    def headers(self) -> int:
        """At least: the cached features of an edge's data, or of its devices, and two networks."""
        header, fleet = self.config.header, self.config.fleet
        edge = int(self.num_train * header.proxy_fraction) + self.num_select
        devices = int(
            fleet.devices_per_edge * fleet.samples_per_device * (1.0 - fleet.test_fraction)
        )
        features = step_memory.features_bytes(self.encoder, max(edge, devices))
        return self.data + features + step_memory.state_bytes(self.encoder) * 2 // 3


def _check_micro_batch(config: Config) -> None:
    wanted = config.compute.micro_batch
    for name, train in (("reference", config.reference), ("distill", config.distill.depth)):
        if train.batch_size % train.shards:
            raise ConfigError(
                f"{name}.batch_size ({train.batch_size}) must be a multiple of its shards "
                f"({train.shards})"
            )
        samples = train.batch_size // train.shards
        if wanted is not None and wanted < samples and samples % wanted:
            raise ConfigError(
                f"compute.micro_batch is {wanted}, which does not divide the {samples} samples of "
                f"a shard of {name} (batch_size {train.batch_size} / shards {train.shards}); "
                f"choose one of {', '.join(map(str, _divisors(samples)))}"
            )


def _candidates(config: Config) -> list[tuple[bool, int]]:
    """(remat, micro-batch), the most wanted first, the one that needs least memory last."""
    compute = config.compute
    phases = (config.reference, config.distill.depth)
    sizes = {n for train in phases for n in _divisors(train.batch_size // train.shards)}
    micro = [compute.micro_batch] if compute.micro_batch is not None else sorted(sizes)[::-1]
    plain = [(False, n) for n in micro if n >= MIN_MICRO_BATCH or n == micro[0]]
    if compute.remat is None:
        return plain + [(True, n) for n in micro]
    return [(compute.remat, n) for n in micro]


def _eval_batches(config: Config, num_select: int) -> list[int | None]:
    if config.compute.eval_batch is not None:
        return [config.compute.eval_batch]
    smaller = [MAX_EVAL_BATCH >> n for n in range(MAX_EVAL_BATCH.bit_length())]
    return [None, *(n for n in smaller if n < num_select)]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _at_most(samples: int, micro_batch: int) -> int:
    """The largest divisor of `samples` that is at most `micro_batch`."""
    return max(n for n in _divisors(samples) if n <= micro_batch)


def _refusal(needs: _Needs, part: str, needed: int, available: int) -> str:
    config, compute = needs.config, needs.config.compute
    shards = max(config.reference.shards, config.distill.depth.shards)
    mends = ["a device with more memory"]
    if needs.data > 0.2 * needed:
        mends.insert(0, "fewer data.public_train samples")
    if part == "training":
        mends.insert(0, "a smaller model, image_size or max_tokens")
        if needs.encoder.dtype == "float32" and not step_memory.on_cpu(needs.mesh):
            mends.insert(0, "model.dtype bfloat16")
        if needs.mesh.size < shards:
            mends.insert(0, f"up to {shards} devices instead of {needs.mesh.size}")
        if shards > 1:
            mends.insert(0, f"fewer shards than {shards}, since each one's gradient is kept")
        if compute.micro_batch is not None or compute.remat is False:
            mends.insert(0, "compute.micro_batch and compute.remat left to the plan")
    elif part == "evaluating sub-networks":
        mends.insert(0, "a smaller compute.eval_batch, or a smaller model")
    else:
        mends.insert(
            0, "a smaller header.proxy_fraction, data.public_select or fleet.samples_per_device"
        )
    return (
        f"{part} needs {quantity(needed, 'B')} ({needed:,} bytes) on each device, but only "
        f"{chunks.USABLE:.0%} of the {quantity(available, 'B')} ({available:,} bytes) that are "
        f"free may be used; what would help: {'; '.join(mends)}"
    )


def _describe(
    plan: Plan, config: Config, encoder: EncoderConfig, mesh: Mesh, num_select: int
) -> list[str]:
    free = plan.bytes_available
    unknown = "; how much is free the backend does not say, so nothing is checked"
    of = unknown if free is None else f" of {quantity(free, 'B')} that are free"
    train = config.distill.depth
    count = plan.num_micro
    parts = f"{count} micro-batches" if count > 1 else "one piece"
    evaluated = (
        f"all {num_select} select samples" if plan.eval_batch is None else f"{plan.eval_batch}"
    )
    again = "computed again in the backward pass" if plan.remat else "kept for the backward pass"
    lines = [
        f"memory: {quantity(plan.bytes_needed, 'B')}{of}, on each of {mesh.size} device(s)",
        f"gradients: shards of {train.batch_size // train.shards} samples in {parts}, "
        f"blocks {again}, {encoder.dtype}; evaluation of {evaluated} at once",
    ]
    seconds = {name: s for name, s in plan.seconds.items() if s is not None}
    if seconds:
        each = ", ".join(f"{name} {duration(s)}" for name, s in seconds.items())
        fraction = CPU_FRACTION if step_memory.on_cpu(mesh) else ACCELERATOR_FRACTION
        lines.append(
            f"time: about {duration(sum(seconds.values()))} without compiling ({each}), if "
            f"{fraction:.0%} of the measured rate of matrix products is reached"
        )
    return lines


def duration(seconds: float) -> str:
    """Two significant parts: "40 s", "12 min", "3 h 20 min", "2 d 5 h"."""
    if seconds < 99.5:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
