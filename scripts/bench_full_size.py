"""Proof that the supernet takes real training steps at full size: ViT-B/16 at 224 x 224.

    python scripts/bench_full_size.py [--batch-size 2] [--steps 3] [--dtype float32] \
        [--remat both] [--pretrained DIR] [--out docs/bench_full_size.json]

Runs the programs of a run (`training.make_epoch`, state donated) on a few random images: steps of
the reference model, of width distillation and of depth distillation (one program for the two).
Reports seconds a step, compile time, the part of the measured matmul rate, and three counts of
memory: planned (`step_memory`), XLA's own, and how much the process grew. About 5 minutes and
6 GB on 2 CPU cores. On an accelerator: `--dtype bfloat16 --batch-size 32 --steps 50`.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array

from acme_jax import (
    benchmark,
    distill,
    layout,
    performance,
    pretrained,
    step_memory,
    supernet,
    training,
)
from acme_jax.blocks import Params
from acme_jax.config import TrainConfig
from acme_jax.distill import Lesson
from acme_jax.run_dir import versions, write_json
from acme_jax.vit import ViTConfig
from nas.arch import ArchSpace

NUM_CLASSES = 100
FRACTIONS = (0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to run."""

    batch_size: int = 2
    shards: int = 1
    micro_batches: int = 1
    """Of each shard."""
    steps: int = 3
    """Steps of each phase that are timed, after one epoch of as many that is not."""
    depths_per_step: int = 4
    """Depths that each width trains in one step; the paper's 4 is all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["off", "on", "both"] = "both"
    pretrained: str | None = None
    """A Hugging Face ViT; None: random weights of ViT-B/16."""
    warm: bool = True
    """Run an epoch before the timed one; not needed where a step takes seconds."""
    seed: int = 0
    out: Path | None = None


def network(arguments: Arguments) -> tuple[ViTConfig, Params]:
    """ViT-B/16 at 224 x 224, or the given one."""
    if arguments.pretrained is not None:
        vit, params = pretrained.load_vit(arguments.pretrained, num_classes=NUM_CLASSES)
    else:
        vit = ViTConfig((224, 224, 3), 16, 768, 12, 12, 3072, NUM_CLASSES)
        params = jax.jit(supernet.init, static_argnums=1)(jax.random.key(arguments.seed), vit)
    return dataclasses.replace(vit, dtype=arguments.dtype), params


@contextmanager
def peak_growth() -> Iterator[dict[str, int | None]]:
    """How far the process's resident memory rises in the body, sampled every 10 ms."""
    found: dict[str, int | None] = {"bytes": None}
    start, done = performance.resident_bytes(), threading.Event()
    if start is None:
        yield found
        return
    highest = [start]

    def watch() -> None:
        while not done.wait(0.01):
            highest[0] = max(highest[0], performance.resident_bytes() or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found["bytes"] = highest[0] - start


def measure(
    arguments: Arguments,
    vit: ViTConfig,
    params: Params,
    peak: float,
    phases: dict[str, Lesson | None],
) -> list[dict[str, Any]]:
    """Compiles the program that the phases share and runs each of them."""
    mesh, distils = layout.make_mesh(1), all(lesson is not None for lesson in phases.values())
    space = _space(vit)
    train = TrainConfig(
        batch_size=arguments.batch_size, shards=arguments.shards, learning_rate=2e-5,
        weight_decay=0.0, warmup_fraction=0.0, max_shift=0, epochs=2,
    )  # fmt: skip
    grad_fn = (
        distill.distillation_grad(vit, space, arguments.depths_per_step)
        if distils
        else distill.reference_grad(vit)
    )
    epoch = training.make_epoch(grad_fn, train, mesh, arguments.micro_batches)
    optimizer, count = training.make_optimizer(train), arguments.batch_size * arguments.steps
    rng = np.random.default_rng(arguments.seed)
    images = jnp.asarray(rng.integers(0, 256, (count, *vit.input_shape), dtype=np.uint8))
    labels = jnp.asarray(rng.integers(0, vit.num_classes, count), jnp.int32)
    schedule = training.make_schedule(train, count)
    key, rows, compiled = jax.random.key(arguments.seed), [], None
    for phase, lesson in phases.items():
        with peak_growth() as growth:
            state = layout.replicate(training.init_state(params, optimizer), mesh)
            begin = time.perf_counter()
            if compiled is None:
                lowered = jax.jit(epoch, donate_argnums=(1,)).lower(
                    key, state, lesson, schedule, images, labels
                )
                compiled = lowered.compile()
                compile_seconds = time.perf_counter() - begin
            for _ in range(2 if arguments.warm else 1):
                begin = time.perf_counter()
                state, metrics = jax.block_until_ready(
                    compiled(key, state, lesson, schedule, images, labels)
                )
                seconds = time.perf_counter() - begin
        flops = _flops(vit, space, arguments, phase) * count
        stats = compiled.memory_analysis()
        assert stats is not None  # CPU and GPU backends have it
        rows.append(
            {
                "phase": phase,
                "remat": vit.remat,
                "seconds_per_step": seconds / arguments.steps,
                "compile_seconds": compile_seconds,
                "flops_per_step": flops / arguments.steps,
                "flop_fraction": flops / seconds / peak,
                "planned_bytes": step_memory.training_bytes(
                    vit, train, mesh,
                    arguments.batch_size // arguments.shards // arguments.micro_batches,
                    distils=distils,
                ) + step_memory.data_bytes(count, images.nbytes // count),
                "xla_bytes": stats.argument_size_in_bytes + stats.output_size_in_bytes
                + stats.temp_size_in_bytes - stats.alias_size_in_bytes,
                # Compiling included; what was there before (start, teacher, program) is not.
                "process_growth_bytes": growth["bytes"],
                "losses": [float(loss) for loss in metrics["loss"]],
                "largest_change": _largest_change(params, state.params),
            }
        )  # fmt: skip
        show(rows[-1])
        state = metrics = None
    return rows


def _space(vit: ViTConfig) -> ArchSpace:
    return ArchSpace.from_fractions(vit.num_layers, vit.num_heads, vit.num_neurons, FRACTIONS)


def _flops(vit: ViTConfig, space: ArchSpace, arguments: Arguments, phase: str) -> float:
    if phase == "reference model":
        return benchmark.reference_flops(vit, space)
    return benchmark.distillation_flops(
        vit, space, arguments.depths_per_step, elastic_depth=phase == "depth distillation"
    )


def _largest_change(before: Params, after: Params) -> float:
    """Largest change of a parameter: 0 or NaN would mean that nothing was learned."""

    def change(first: Array, second: Array) -> Array:
        return jnp.abs(first - second).max()

    return float(max(jax.tree.leaves(jax.tree.map(change, before, after))))


def show(row: dict[str, Any]) -> None:
    """One line for each phase."""
    grown = row["process_growth_bytes"]
    print(
        f"{row['phase']:<20}remat {'on ' if row['remat'] else 'off'} "
        f"{row['seconds_per_step']:8.2f} s/step  compile {row['compile_seconds']:6.1f} s  "
        f"{row['flop_fraction']:5.1%} of peak  planned {row['planned_bytes'] / 1e9:5.2f} GB  "
        f"XLA {row['xla_bytes'] / 1e9:5.2f} GB  "
        f"process +{'?' if grown is None else format(grown / 1e9, '.2f')} GB  "
        f"losses {row['losses'][0]:.4f} .. {row['losses'][-1]:.4f}",
        flush=True,
    )


def main() -> None:
    """Measures, prints and writes."""
    arguments = tyro.cli(Arguments)
    load_before = os.getloadavg()[0]
    peak = benchmark.matmul_peak(layout.make_mesh(1), dtype=arguments.dtype, size=2048)
    print(f"matmul peak {peak / 1e9:,.0f} GFLOP/s in {arguments.dtype}")
    vit, params = network(arguments)
    space, train, rows = _space(vit), TrainConfig(hidden_loss=0.1), []
    for remat in {"off": (False,), "on": (True,), "both": (False, True)}[arguments.remat]:
        sizes = dataclasses.replace(vit, remat=remat)
        rows += measure(arguments, sizes, params, peak, {"reference model": None})
        lessons: dict[str, Lesson | None] = {
            "width distillation": distill.width_lesson(space, params, train),
            "depth distillation": distill.depth_lesson(space, params, train),
        }
        rows += measure(arguments, sizes, params, peak, lessons)
        jax.clear_caches()
    facts = versions()
    report = {
        "command": shlex.join(["python", "scripts/bench_full_size.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "commit": facts.pop("commit"),
        "hardware": facts.pop("hardware"),
        "load_before": round(load_before, 2),
        "load_after": round(os.getloadavg()[0], 2),
        "versions": facts,
        "network": dataclasses.asdict(vit),
        "weights": step_memory.count_weights(vit).total,
        "matmul_peak_flops_per_second": peak,
        "arguments": {k: v for k, v in dataclasses.asdict(arguments).items() if k != "out"},
        "phases": rows,
    }
    if arguments.out is not None:
        write_json(arguments.out, report)


if __name__ == "__main__":
    main()
