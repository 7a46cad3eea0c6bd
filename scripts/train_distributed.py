"""Federated training of the full ViT on one device or many, in one process or many.

    python scripts/train_distributed.py --out metrics.jsonl                  # this machine
    python scripts/train_distributed.py --coordinator HOST:PORT --num-processes 2 --process-id 0
    python scripts/train_distributed.py --coordinator auto     # in each process of a TPU VM slice
                                                               # or a Slurm job

All processes are given the same arguments, but for their ids. See docs/DISTRIBUTED.md.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from acme_jax import layout, supernet
from acme_jax.benchmark import matmul_peak, reference_flops
from acme_jax.checkpoint import CheckpointError
from acme_jax.client_images import Name, Pool, load_clients, open_pool
from acme_jax.config import ComputeConfig, ConfigError, ModelConfig
from acme_jax.datasets import check_patch
from acme_jax.idx import DataError
from acme_jax.job_checkpoints import JobCheckpoints, State
from acme_jax.progress import peak_memory_bytes
from acme_jax.vit import ViTConfig
from fed import multihost
from fed.aggregate import weighted_mean
from fed.algorithm import FedAlgorithm
from fed.algorithms.fedavg import fedavg
from fed.algorithms.local import local
from fed.chunks import ChunkPlan, free_bytes, plan_chunk
from fed.clients import Batch, ClientData
from fed.errors import PartitionError
from fed.partition import dirichlet
from fed.simulate import run_round
from nas.arch import ArchSpace

FORESEEN = (ConfigError, DataError, CheckpointError, PartitionError, multihost.MultihostError,
            OSError)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """What is computed; a checkpoint belongs to exactly one such job."""

    data: Name = "fashion_mnist"
    data_path: str | None = None
    """Directory of the idx files (`fashion_mnist`); None: where Debian puts them."""
    algorithm: Literal["fedavg", "local"] = "fedavg"
    """`local`: every client keeps a model of its own, and nothing is shared."""
    clients: int = 32
    samples: int = 64
    """Of a client, at most."""
    alpha: float = 0.5
    """Dirichlet concentration of the labels among the clients."""
    batch_size: int = 16
    epochs: int = 1
    """Of a client's own samples, each round."""
    learning_rate: float = 0.05
    seed: int = 0
    model: ModelConfig = dataclasses.field(default_factory=lambda: ModelConfig(num_layers=4))


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The job, and how it is run; results do not depend on the latter."""

    job: tyro.conf.OmitArgPrefixes[Job] = dataclasses.field(default_factory=Job)
    rounds: int = 10
    chunk: int | None = None
    """Clients in one vmapped chunk; None: one on CPU, on accelerators as many as fit."""
    compilation_cache: str | None = None
    """Directory in which compiled programs are kept for later runs; None: every run compiles."""
    num_devices: int | None = None
    """Host (CPU) devices of this process; None: one a core. Accelerators are all used."""
    coordinator: str | None = None
    """host:port of process 0; `auto`: JAX finds it and the next two; None: a single process."""
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_timeout_s: float = 20.0
    """Silence after which a process counts as gone."""
    connect_timeout_s: float = 120.0
    watch_port: int = 0
    """Port of process 0 for signs of life; 0: any free one."""
    checkpoint_dir: Path | None = None
    """Only the main process reads and writes it."""
    checkpoint_every: int = 1
    """Rounds."""
    resume: bool = False
    """Continue from the newest checkpoint, if there is one."""
    out: Path | None = None
    """JSON lines, one a round, written by the main process."""


def make_algorithm(job: Job, vit: ViTConfig) -> FedAlgorithm:
    """Plain SGD on the full network's cross-entropy."""

    def loss_fn(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        del key
        logits = supernet.apply(params, batch.inputs, vit).logits
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        loss = (batch.weight * losses).sum() / batch.weight.sum()
        return loss, {"loss": loss}

    make = {"fedavg": fedavg, "local": local}[job.algorithm]
    return make(loss_fn, optax.sgd(job.learning_rate))


def make_round(job: Job, algorithm: FedAlgorithm, mesh: Mesh, chunk: int | None) -> Any:
    """Compilable (state, data, round) -> (state, mean loss over all samples)."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def step(state: State, data: ClientData, round_index: Any) -> tuple[State, jax.Array]:
        # One copy of the sizes for all, so that sums over clients do not depend on the mesh.
        size = jax.lax.with_sharding_constraint(data.size, everywhere).astype(jnp.float32)
        server, clients, metrics = run_round(
            algorithm, state.server, state.clients, data, jax.random.key(job.seed), round_index,
            client_ids=jnp.arange(data.size.shape[0], dtype=jnp.int32), weights=size,
            batch_size=job.batch_size, epochs=job.epochs, chunk_size=chunk, mesh=mesh,
        )  # fmt: skip
        losses = jax.lax.with_sharding_constraint(metrics.client["loss"], everywhere)
        return State(server, clients), weighted_mean(size, losses)

    return jax.jit(step, donate_argnums=0, out_shardings=(State(everywhere, spread), everywhere))


def plan_round(
    arguments: Arguments, algorithm: FedAlgorithm, mesh: Mesh, state: State, data: ClientData
) -> ChunkPlan:
    """The compiled round, with as many clients in a chunk as fit into every process's memory.

    Raises:
      ConfigError: the chunk that was asked for does not fit, or nothing does.
    """

    def compile_for(chunk: int) -> jax.stages.Compiled:
        program = make_round(arguments.job, algorithm, mesh, chunk)
        return program.lower(state, data, np.int32(0)).compile()

    free = free_bytes(mesh)
    least = int(multihost.from_all(-1 if free is None else free).min())
    try:
        return plan_chunk(
            compile_for, arguments.job.clients, memory_bytes=None if least < 0 else least,
            requested=arguments.chunk, mesh=mesh, arguments_on_device=True,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"--chunk: {error}") from None


def initial_state(job: Job, vit: ViTConfig, num_rows: int) -> State:
    """Host arrays; client states have `num_rows` clients. All start from the same parameters."""
    params = jax.jit(supernet.init, static_argnums=1)(jax.random.key(job.seed), vit)
    # From one process, because another kind of processor may round the last bit otherwise.
    params = multihost.from_main(params)
    if job.algorithm == "fedavg":
        return State(params, ())
    copies = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (num_rows, *leaf.shape)), params)
    return State((), copies)


def job_peak() -> float:
    """Matrix-product peak [FLOP/s] of all devices, measured in all processes at once."""
    multihost.barrier("peak")
    local_mesh = Mesh(np.array(jax.local_devices()), (layout.AXIS,))
    peak = matmul_peak(local_mesh)
    return float(multihost.from_all(peak).sum())


def device_bytes() -> int:
    """Peak memory of this process's fullest device; 0 where JAX does not count it (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(int(stat.get("peak_bytes_in_use", 0)) for stat in stats)


def open_rows(path: Path | None, done: int) -> Any:
    """The metrics file, holding the rounds up to `done`, open for more; None without a path."""
    if path is None or not multihost.is_main():
        return None
    old = path.read_text().splitlines(keepends=True) if done and path.exists() else []
    path.write_text("".join(row for row in old if row.endswith("\n")
                            and json.loads(row)["round"] <= done))  # fmt: skip
    return path.open("a")


def train(arguments: Arguments, processes: int, checkpoints: JobCheckpoints, mesh: Mesh) -> None:
    """All rounds."""
    job = arguments.job
    pool = open_pool(job.data, job.data_path)
    parts = dirichlet(pool.labels, job.clients, job.alpha,
                      samples_per_client=job.samples, seed=job.seed)  # fmt: skip
    mine = multihost.my_rows(job.clients, mesh)
    data = multihost.from_local(mesh, load_clients(pool, parts, mine), job.clients)
    vit = model_of(job, pool, data.inputs.shape[2:])
    state, done = checkpoints.restore(initial_state(job, vit, job.clients))
    plan = plan_round(arguments, make_algorithm(job, vit), mesh, state, data)
    if multihost.is_main():
        print(plan.text, flush=True)
    program = plan.compiled
    space = ArchSpace.from_fractions(vit.num_layers, vit.num_heads, vit.num_neurons, (1.0,))
    flops = reference_flops(vit, space) * job.epochs * sum(map(len, parts))
    peak = job_peak()
    rows = open_rows(arguments.out, done)
    for index in range(done, arguments.rounds):
        begin = time.perf_counter()
        state, loss = program(state, data, np.int32(index))
        loss = float(loss)
        seconds = time.perf_counter() - begin
        if (index + 1) % arguments.checkpoint_every == 0 or index + 1 == arguments.rounds:
            checkpoints.save(state, index + 1)
        row = {
            "round": index + 1,
            "loss": loss,
            "clients_per_s": job.clients / seconds,
            "flop_fraction": flops / seconds / peak,
            "host_rss_bytes": multihost.from_all(peak_memory_bytes()).tolist(),
            "device_bytes": multihost.from_all(device_bytes()).tolist(),
            "processes": processes,
            "devices": mesh.size,
        }
        if rows is not None:
            rows.write(json.dumps(row) + "\n")
            rows.flush()
        if multihost.is_main():
            print(f"round {index + 1}: loss {loss:.4f}, {row['clients_per_s']:.1f} clients/s, "
                  f"{row['flop_fraction']:.2f} of the matmul peak", flush=True)  # fmt: skip


def model_of(job: Job, pool: Pool, image_shape: tuple[int, ...]) -> ViTConfig:
    """The full network for the images."""
    height, width, channels = image_shape
    check_patch(image_shape, job.model.patch_size)
    return ViTConfig(image_shape=(height, width, channels), num_classes=int(pool.labels.max()) + 1,
                     **dataclasses.asdict(job.model))  # fmt: skip


def check(arguments: Arguments) -> None:
    """Raises ConfigError for what cannot run, before any process waits for another."""
    job = dataclasses.asdict(arguments.job)
    for name in ("clients", "samples", "batch_size", "epochs", "learning_rate"):
        if job[name] <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive, got {job[name]}")
    for name in ("rounds", "checkpoint_every"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.resume and arguments.checkpoint_dir is None:
        raise ConfigError("--resume needs --checkpoint-dir, where the checkpoints are")
    if arguments.coordinator is None and arguments.num_processes not in (None, 1):
        raise ConfigError("--num-processes needs --coordinator HOST:PORT, or --coordinator auto")


def main() -> int:
    """Runs; every foreseen error is one line and status 2."""
    arguments = tyro.cli(Arguments)
    job = multihost.Job()
    try:
        check(arguments)
        layout.configure(ComputeConfig(num_devices=arguments.num_devices,
                                       compilation_cache=arguments.compilation_cache))  # fmt: skip
        if arguments.coordinator is not None:
            found = arguments.coordinator == "auto"
            job = multihost.initialize(
                None if found else arguments.coordinator,
                arguments.num_processes, arguments.process_id,
                heartbeat_timeout_s=arguments.heartbeat_timeout_s,
                connect_timeout_s=arguments.connect_timeout_s, watch_port=arguments.watch_port,
            )  # fmt: skip
        mesh = multihost.client_mesh()
        checkpoints: JobCheckpoints | None = None  # the others may be gone before there are any
        with job.watch(lambda: checkpoints.advice() if checkpoints else "start again"):
            checkpoints = JobCheckpoints(
                arguments.checkpoint_dir, mesh, dataclasses.asdict(arguments.job),
                arguments.job.clients, resume=arguments.resume,
            )  # fmt: skip
            train(arguments, job.num_processes, checkpoints, mesh)
    except FORESEEN as error:
        print(f"error: {error}", file=sys.stderr)
        return job.leave(2)
    except BaseException:
        if job.lifeline is None:
            raise
        traceback.print_exc()
        return job.leave(1)
    return job.leave()


if __name__ == "__main__":
    sys.exit(main())
