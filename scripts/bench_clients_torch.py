"""One PyTorch contender of `bench_clients.py`, which starts it and drives it line by line.

    python scripts/bench_clients_torch.py --form FORM --work DIR --clients C

Forms: `plain_loop`, clients and steps as loops over `nn.Module`s; `loop`, the same tuned;
`func`, all clients at once by `torch.func`; `func_processes`, the same in one process of one
thread for each core; `mixed_plain_loop` and `mixed_loop`, the loops over dense sub-networks. But
for the plain loops one model, a function of its parameters, serves all, so that `torch.func`
needs no `functional_call`. Shape letters: B batch, T tokens, D embedding, H heads,
K head size, F neurons, L layers, C clients.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import client_shares
import client_work

START = time.perf_counter()  # before PyTorch is imported

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
    from torch.func import vmap
    from torch_modules import VisionTransformer
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; this contender needs PyTorch: pip install -e '.[torch]'") from None

Params = dict[str, Tensor]
"""Path -> tensor as in the supernet, but block l stands alone: "blocks/l/..."."""

EPSILON = 1e-6  # of Flax's LayerNorm

RunShare = Callable[[int], client_shares.Share]
"""A round of some of the clients."""

FORMS = ("plain_loop", "loop", "func", "func_processes", "mixed_plain_loop", "mixed_loop")

CHUNK = 8
"""Clients in one `vmap`; fastest with one thread, see `func`."""

# --- the model -----------------------------------------------------------------------------


def linear(params: Params, kernel: str, bias: str, x: Tensor) -> Tensor:
    """Rows [rows, in] times a kernel, flattened to [in, out], plus a bias."""
    weights = params[kernel]
    return torch.addmm(params[bias].flatten(), x, weights.reshape(x.shape[-1], -1))


def layer_norm(params: Params, name: str, x: Tensor) -> Tensor:
    """Over the last axis."""
    scale, bias = params[f"{name}/scale"], params[f"{name}/bias"]
    return F.layer_norm(x, x.shape[-1:], scale, bias, EPSILON)


def attention(params: Params, name: str, x: Tensor, batch: int) -> Tensor:
    """Multi-head self-attention of rows [B * T, D]."""
    heads, size, _ = params[f"{name}/out_kernel"].shape
    y = layer_norm(params, f"{name}/norm", x)
    qkv = linear(params, f"{name}/qkv_kernel", f"{name}/qkv_bias", y)
    query, key, value = qkv.reshape(batch, -1, 3, heads, size).permute(2, 0, 3, 1, 4).unbind()
    scores = torch.softmax((query * size**-0.5) @ key.transpose(-1, -2), -1)
    context = (scores @ value).transpose(1, 2).reshape(-1, heads * size)
    return linear(params, f"{name}/out_kernel", f"{name}/out_bias", context)


def mlp(params: Params, name: str, x: Tensor) -> Tensor:
    """The MLP of rows [B * T, D]."""
    y = layer_norm(params, f"{name}/norm", x)
    hidden = F.gelu(linear(params, f"{name}/up_kernel", f"{name}/up_bias", y))
    return linear(params, f"{name}/down_kernel", f"{name}/down_bias", hidden)


def loss_fn(params: Params, images: Tensor, labels: Tensor, blocks: Sequence[int]) -> Tensor:
    """Mean cross-entropy [] of images [B, height, width, channels], labels [B]."""
    batch, height, width, channels = images.shape
    embed_dim = params["cls"].shape[-1]
    side = math.isqrt(params["embed/kernel"].shape[0] // channels)
    patches = images.reshape(batch, height // side, side, width // side, side, channels)
    patches = patches.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side * channels)
    tokens = linear(params, "embed/kernel", "embed/bias", patches).reshape(batch, -1, embed_dim)
    tokens = torch.cat([params["cls"].expand(batch, 1, embed_dim), tokens], 1) + params["position"]
    x = tokens.reshape(-1, embed_dim)
    for block in blocks:
        x = x + attention(params, f"blocks/{block}/attention", x, batch)
        x = x + mlp(params, f"blocks/{block}/mlp", x)
    cls = layer_norm(params, "norm", x.reshape(batch, -1, embed_dim)[:, 0])
    return F.cross_entropy(linear(params, "classifier/kernel", "classifier/bias", cls), labels)


# --- parameters and data -------------------------------------------------------------------


def add(total: dict[str, Tensor], params: Params, where: dict[str, Any]) -> None:
    """Adds one sub-network to sums in the supernet's layout."""
    for name, (path, index) in where.items():
        total[path][index] += params[name].detach()


# --- the contenders ------------------------------------------------------------------------


def loop(work: client_work.Work, archs: Sequence[client_work.SubNetwork]) -> RunShare:
    """Clients one after the other, steps one after the other; client c has `archs[c]`.

    Tried as well: SGD with `foreach` (slower) and products with a separate bias (slower than
    `addmm`); scaled_dot_product_attention (as fast); one thread (slower on two cores).
    """
    settings = work.settings
    server = {path: torch.from_numpy(leaf) for path, leaf in work.params.items()}
    images, labels = torch.from_numpy(work.images), torch.from_numpy(work.labels).long()
    batches = torch.from_numpy(work.batches).long()

    def run(index: int) -> client_shares.Share:
        total = {path: torch.zeros_like(leaf) for path, leaf in server.items()}
        losses = []
        for client, arch in enumerate(archs):
            where = client_shares.places(work.params, arch)
            params = {
                name: server[path][i].clone(memory_format=torch.contiguous_format).requires_grad_()
                for name, (path, i) in where.items()
            }
            optimizer = torch.optim.SGD(
                params.values(), settings.learning_rate, settings.momentum, fused=True
            )
            for rows in batches[index, client]:
                optimizer.zero_grad()
                loss = loss_fn(params, images[client, rows], labels[client, rows], arch.blocks)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            add(total, params, where)
        return share(total, losses, settings.num_steps)

    return run


def plain_loop(work: client_work.Work, archs: Sequence[client_work.SubNetwork]) -> RunShare:
    """The same with `nn.Module`s and an optimiser by its defaults, as one writes it first."""
    settings = work.settings
    images, labels = torch.from_numpy(work.images), torch.from_numpy(work.labels).long()
    batches = torch.from_numpy(work.batches).long()
    places = [client_shares.places(work.params, arch) for arch in archs]
    starts = [
        {name: work.params[path][index] for name, (path, index) in where.items()}
        for where in places
    ]
    models = [
        VisionTransformer(start, list(arch.blocks))
        for start, arch in zip(starts, archs, strict=True)
    ]

    def run(index: int) -> client_shares.Share:
        total = {path: torch.zeros(leaf.shape) for path, leaf in work.params.items()}
        losses = []
        for client, (model, where) in enumerate(zip(models, places, strict=True)):
            model.load(starts[client])
            optimizer = torch.optim.SGD(
                model.parameters(), settings.learning_rate, settings.momentum
            )
            for rows in batches[index, client]:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images[client, rows]), labels[client, rows])
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            own = {
                name: leaf.detach().reshape(starts[client][name].shape)
                for name, leaf in model.places().items()
            }
            add(total, own, where)
        return share(total, losses, settings.num_steps)

    return run


def func(work: client_work.Work, clients: range, chunk: int) -> RunShare:
    """Some of the clients by `torch.func.vmap`, `chunk` at a time for all their steps.

    Tried as well: `torch.func.grad` inside the `vmap` (a tenth slower than one backward pass
    through the mapped loss); separate bias, LayerNorm without scale and bias (no gain); chunks
    of 1, 2, 4 and 16 (slower than 8). scaled_dot_product_attention has no batching rule.
    """
    settings, arch = work.settings, client_shares.full_arch(work)
    where = client_shares.places(work.params, arch)
    server = {name: torch.from_numpy(work.params[p][i].copy()) for name, (p, i) in where.items()}
    picked = slice(clients.start, clients.stop)
    images = torch.from_numpy(work.images[picked])
    labels = torch.from_numpy(work.labels[picked]).long()
    batches = torch.from_numpy(work.batches[:, picked]).long()
    losses_fn = vmap(lambda params, x, y: loss_fn(params, x, y, arch.blocks))

    def run(index: int) -> client_shares.Share:
        total = {path: torch.zeros(leaf.shape) for path, leaf in work.params.items()}
        losses = []
        for rows in torch.arange(len(clients)).split(chunk):
            params = {
                name: leaf.expand(len(rows), *leaf.shape).clone().requires_grad_()
                for name, leaf in server.items()
            }
            optimizer = torch.optim.SGD(
                params.values(), settings.learning_rate, settings.momentum, fused=True
            )
            for step in range(settings.num_steps):
                batch = batches[index, rows, step]
                optimizer.zero_grad()
                loss = losses_fn(params, images[rows[:, None], batch], labels[rows[:, None], batch])
                loss.sum().backward()  # no client's loss depends on another's parameters
                optimizer.step()
                losses.append(loss.detach())
            add(total, {name: leaf.sum(0) for name, leaf in params.items()}, where)
        return share(total, losses, settings.num_steps)

    return run


def share(
    total: dict[str, Tensor], losses: Sequence[Tensor], num_steps: int
) -> client_shares.Share:
    """Sums of a round; `losses` are of every client and step, each [] or [clients]."""
    loss = sum(float(value.sum()) for value in losses) / num_steps
    return client_shares.Share({path: leaf.numpy() for path, leaf in total.items()}, loss)


def work_for_another(
    pipe: Connection, directory: Path, num_clients: int, clients: range, chunk: int
) -> None:
    """A further process of `func_processes`: rounds in, shares and peak memory out."""
    torch.set_num_threads(1)
    run = func(client_work.read(directory, num_clients), clients, chunk)
    try:
        while True:
            pipe.send((run(pipe.recv()), client_work.peak_rss_bytes()))
    except EOFError:  # the other end is closed
        return


class Processes:
    """The clients divided over processes of one thread each; this one takes the first part."""

    def __init__(self, work: client_work.Work, directory: Path, count: int, chunk: int) -> None:
        torch.set_num_threads(1)
        num_clients = work.settings.num_clients
        mine, *others = client_shares.parts(num_clients, count)
        context = multiprocessing.get_context("spawn")  # a fork would share PyTorch's threads
        self._pipes: list[Connection] = []
        for clients in others:
            here, there = context.Pipe()
            arguments = (there, directory, num_clients, clients, chunk)
            context.Process(target=work_for_another, args=arguments, daemon=True).start()
            there.close()
            self._pipes.append(here)
        self._run = func(work, mine, chunk)
        self._rss_bytes = [0] * len(others)

    def run(self, index: int) -> list[client_shares.Share]:
        """A round of all clients."""
        for pipe in self._pipes:
            pipe.send(index)
        shares = [self._run(index)]
        for other, pipe in enumerate(self._pipes):
            result, self._rss_bytes[other] = pipe.recv()
            shares.append(result)
        return shares

    def rss_bytes(self) -> int:
        """Peak memory, all processes together."""
        return client_work.peak_rss_bytes() + sum(self._rss_bytes)


class Contender(NamedTuple):
    """A form ready to run."""

    archs: list[client_work.SubNetwork]  # [C]
    run: Callable[[int], list[client_shares.Share]]
    rss_bytes: Callable[[], int]
    info: dict[str, Any]


def build(form: str, work: client_work.Work, directory: Path, cores: int) -> Contender:
    """One contender, using all cores."""
    archs = [client_shares.full_arch(work)] * work.settings.num_clients
    info: dict[str, Any] = {"torch": torch.__version__, "processes": 1, "threads": cores}
    if form == "func_processes":
        processes = Processes(work, directory, cores, CHUNK)
        info |= {"processes": cores, "threads": 1, "chunk": CHUNK}
        return Contender(archs, processes.run, processes.rss_bytes, info)
    torch.set_num_threads(cores)
    if form == "func":
        info["chunk"] = CHUNK
        run_share = func(work, range(len(archs)), CHUNK)
    else:
        archs = work.settings.archs if form.startswith("mixed") else archs
        run_share = plain_loop(work, archs) if "plain" in form else loop(work, archs)
    return Contender(archs, lambda index: [run_share(index)], client_work.peak_rss_bytes, info)


def main() -> None:
    """Builds the contender and serves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--form", choices=FORMS, required=True)
    parser.add_argument("--work", type=Path, required=True, help="work directory")
    parser.add_argument("--clients", type=int, required=True)
    arguments = parser.parse_args()
    work = client_work.read(arguments.work, arguments.clients)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    contender = build(arguments.form, work, arguments.work, cores or 1)
    finish = client_shares.aggregate(work, contender.archs)
    client_work.serve(
        arguments.form,
        arguments.work,
        START,
        lambda index: finish(contender.run(index)),
        contender.info,
        contender.rss_bytes,
    )


if __name__ == "__main__":
    main()
