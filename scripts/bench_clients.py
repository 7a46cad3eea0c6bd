"""Local training of many clients, ours against PyTorch: client-steps a second, memory, start-up.

    python scripts/bench_clients.py [--clients 16 64] [--passes 7] [--contenders loop ...]
        [--out docs/bench_clients.json]

Every client starts from the server's parameters with fresh momentum, takes 10 SGD steps of batch
32 on its own 500 Fashion-MNIST images, and the parameters are averaged. Homogeneous: all train
the full network. Mixed: client c trains sub-network c % 16 of the 4 x 4 grid of uniform ones, and
an entry's mean is over the clients that hold it. Contenders are processes that stay alive and do
one round each in turn; each pass begins with another one. All see the same batches, and must
agree in losses and averaged parameters. PyTorch: pip install -e '.[torch]'. The workers are
`bench_clients_jax.py` and `bench_clients_torch.py`; `client_work.py` has files and protocol.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import client_tables
import client_work
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from client_summary import is_mixed, summarise
from client_workers import Worker, WorkerError, check_losses, check_params, run_passes

from acme_jax import concrete, datasets, run_dir, slicing, supernet
from acme_jax.config import DataConfig
from acme_jax.idx import DataError
from acme_jax.vit import ViTConfig
from fed.clients import batch_indices
from nas.arch import Arch, ArchSpace, full

SCRIPTS = Path(__file__).resolve().parent
VIT = ViTConfig(
    image_shape=(28, 28, 1),
    patch_size=7,
    embed_dim=64,
    num_layers=6,
    num_heads=4,
    num_neurons=256,
    num_classes=10,
)
SPACE = ArchSpace.from_fractions(VIT.num_layers, VIT.num_heads, VIT.num_neurons)
NUM_SAMPLES, NUM_STEPS, BATCH_SIZE, SEED = 500, 10, 32, 0

TORCH = ("plain_loop", "loop", "func", "func_processes", "mixed_plain_loop", "mixed_loop")
CONTENDERS = (
    "bucketed", "plain_loop", "loop", "func", "func_processes", "mixed_bucketed",
    "mixed_4_buckets", "mixed_masked", "mixed_plain_loop", "mixed_loop",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to measure."""

    clients: tuple[int, ...] = (16, 64)
    passes: int = 7
    rounds: int = 3
    """Rounds with batches of their own; pass p does round 1 + p mod rounds."""
    contenders: tuple[str, ...] = CONTENDERS
    chunk: int | None = None
    """Clients in one vmap of ours; None: chosen by backend."""
    num_devices: int | None = None
    """JAX devices of ours; None: every accelerator, or one host device for each core."""
    out: Path | None = None
    """JSON file to write; None prints only."""

    def __post_init__(self) -> None:
        for name, least in (
            ("passes", self.passes), ("rounds", self.rounds), ("chunk", self.chunk),
            ("num-devices", self.num_devices), *(("clients", count) for count in self.clients),
        ):  # fmt: skip
            if least is not None and least < 1:
                raise SystemExit(f"--{name} must be at least 1, got {least}")
        if unknown := set(self.contenders) - set(CONTENDERS):
            raise SystemExit(
                f"unknown contender {', '.join(sorted(unknown))}; expected some of "
                f"{', '.join(CONTENDERS)}"
            )


def step_flops(arch: Arch) -> float:
    """Matmul FLOPs of one client-step: forward and both gradients, for a whole batch.

    Three times the forward pass, but for the patch embedding: nobody needs the gradient with
    respect to the images.
    """
    dims = VIT.dims
    patches = 2 * (dims.num_tokens - 1) * dims.patch_dim * dims.embed_dim
    return BATCH_SIZE * (3.0 * float(concrete.num_flops(dims, arch)) - patches)


def make_work(num_clients: int, num_rounds: int) -> client_work.Work:
    """The work of all contenders; the first clients are the same for every number of them.

    Raises:
      DataError: the images are missing, or too few.
    """
    dataset = datasets.load_images(DataConfig(name="fashion_mnist"))
    assert dataset.official_test is not None
    train = np.flatnonzero(~dataset.official_test)
    if num_clients * NUM_SAMPLES > len(train):
        raise DataError(
            f"{num_clients} clients of {NUM_SAMPLES} images need more than the {len(train)} "
            f"training images; use at most {len(train) // NUM_SAMPLES} clients"
        )
    order = np.random.default_rng(SEED).permutation(train)
    rows = order[: num_clients * NUM_SAMPLES].reshape(num_clients, NUM_SAMPLES)
    key = jax.random.key(SEED)
    settings = client_work.Settings(
        vit=dataclasses.asdict(VIT),
        learning_rate=0.05,
        momentum=0.9,
        seed=SEED,
        num_clients=num_clients,
        num_samples=NUM_SAMPLES,
        num_steps=NUM_STEPS,
        batch_size=BATCH_SIZE,
        num_rounds=num_rounds,
        archs=[sub_network(client) for client in range(num_clients)],
    )
    return client_work.Work(
        settings,
        client_work.flatten(jax.jit(supernet.init, static_argnums=1)(key, VIT)),
        dataset.inputs[rows],
        dataset.labels[rows],
        draw_batches(key, num_rounds, num_clients),
    )


def genome(client: int) -> Arch:
    """The sub-network of a client of the mixed workload, with NumPy leaves."""
    archs = concrete.grid(SPACE)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[client % len(archs.depth)], archs)


def sub_network(client: int) -> client_work.SubNetwork:
    """The same as plain numbers."""
    arch = genome(client)
    blocks = list(slicing.kept_blocks(arch))
    return client_work.SubNetwork(
        int(arch.depth), arch.heads.tolist(), arch.neurons.tolist(), blocks
    )


def draw_batches(key: jax.Array, num_rounds: int, num_clients: int) -> np.ndarray:
    """The samples [R, C, S, B] that `fed.run_clients` draws with this key; ids are 0 to C - 1."""

    def draw(round_index: jax.Array, client: jax.Array) -> jax.Array:
        client_key = jax.random.fold_in(jax.random.fold_in(key, round_index), client)
        _, batch_key = jax.random.split(client_key)
        return batch_indices(
            batch_key,
            NUM_SAMPLES,
            max_size=NUM_SAMPLES,
            num_steps=NUM_STEPS,
            batch_size=BATCH_SIZE,
        ).indices

    every_client = jax.vmap(draw, in_axes=(None, 0))
    every_round = jax.vmap(every_client, in_axes=(0, None))
    return np.asarray(jax.jit(every_round)(jnp.arange(num_rounds), jnp.arange(num_clients)))


def worker_command(arguments: Arguments, form: str, directory: Path, num_clients: int) -> list[str]:
    """How to start a contender."""
    script = SCRIPTS / f"bench_clients_{'torch' if form in TORCH else 'jax'}.py"
    options = ["--form", form, "--work", str(directory), "--clients", str(num_clients)]
    if form not in TORCH:
        for name, value in (("chunk", arguments.chunk), ("num-devices", arguments.num_devices)):
            options += [] if value is None else [f"--{name}", str(value)]
    return [sys.executable, str(script), *options]


def measure(arguments: Arguments, num_clients: int) -> dict[str, Any]:
    """All contenders at one number of clients, summarised.

    Raises:
      WorkerError: a contender fails, or does other work than the rest.
      DataError: there are not enough images.
    """
    load = os.getloadavg()[0]
    if load > 0.5:
        print(
            f"the machine is busy (load {load:.1f}); contenders of several threads suffer most "
            "from that, so the ratios will flatter ours. Measure on an idle machine",
            file=sys.stderr,
        )
    work = make_work(num_clients, 1 + arguments.rounds)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        client_work.write(directory, work)
        workers = []
        for form in arguments.contenders:
            command = worker_command(arguments, form, directory, num_clients)
            workers.append(Worker(form, command, directory / f"{form}.log"))
            stack.callback(workers[-1].close)
            layout = workers[-1].ready["info"].get("layout", "")
            ready = f"{num_clients} clients: {form} ready after {workers[-1].start_s:.1f} s"
            print(f"{ready}{layout and ', '}{layout}")
        groups = [group for mixed in (False, True) if (group := of_workload(workers, mixed))]
        differences: dict[str, float] = {}
        for group in groups:
            check_losses(group[0].form, {w.form: [w.ready["loss"]] for w in group})
            files = {w.form: client_work.load_params(directory / f"{w.form}.npz") for w in group}
            differences |= check_params(group[0].form, files)
        answers = run_passes(workers, arguments.passes, arguments.rounds)
    for group in groups:
        check_losses(group[0].form, {w.form: [a["loss"] for a in answers[w.form]] for w in group})
    rows = [
        {
            "form": worker.form,
            "seconds": [answer["seconds"] for answer in answers[worker.form]],
            "peak_rss_bytes": max(answer["rss_bytes"] for answer in answers[worker.form]),
            "start_s": worker.start_s,
            "warm_up_loss": worker.ready["loss"],
            "difference": differences[worker.form],
            "info": worker.ready["info"],
        }
        for worker in workers
    ]
    archs = [genome(client) for client in range(num_clients)]
    flops = {False: step_flops(full(SPACE)), True: float(np.mean([*map(step_flops, archs)]))}
    return summarise(rows, num_clients, NUM_STEPS, flops) | {"load_before": load}


def of_workload(workers: Sequence[Worker], mixed: bool) -> list[Worker]:
    """Those of one workload, the plain loop first: the others are compared with it."""
    group = [worker for worker in workers if is_mixed(worker.form) == mixed]
    return sorted(group, key=lambda worker: not worker.form.endswith("loop"))


def check_torch(contenders: Sequence[str]) -> None:
    """Says how to get PyTorch if a contender needs it and it is missing.

    Raises:
      SystemExit: it is.
    """
    needing = [form for form in contenders if form in TORCH]
    if needing and importlib.util.find_spec("torch") is None:
        others = " ".join(form for form in CONTENDERS if form not in TORCH)
        raise SystemExit(
            f"PyTorch is not installed, but {', '.join(needing)} need it: pip install -e "
            f"'.[torch]', or measure without: --contenders {others}"
        )


def main() -> None:
    """Measures, prints and writes."""
    arguments = tyro.cli(Arguments)
    check_torch(arguments.contenders)
    document: dict[str, Any] = {
        "command": "python " + shlex.join(sys.argv),
        "date": datetime.date.today().isoformat(),
        **run_dir.versions(),
        "passes": arguments.passes,
        "rounds": arguments.rounds,
        "num_steps": NUM_STEPS,
        "batch_size": BATCH_SIZE,
        "sections": [],
    }
    try:
        for num_clients in arguments.clients:
            document["sections"].append(measure(arguments, num_clients))
            print(client_tables.as_text(document["sections"][-1]), flush=True)
    except (WorkerError, DataError) as error:
        raise SystemExit(str(error)) from None
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
