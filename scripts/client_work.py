"""The work that all contenders of `bench_clients.py` do, as files, and how they are driven.

NumPy only, so that a worker imports nothing but its own framework. A work directory has

    work.json    the model's sizes, the optimiser, and each client's sub-network
    params.npz   the server's parameters; names are paths in the supernet's tree, "a/b/c"
    images.npy   [C, N, height, width, channels] float32 in [0, 1]
    labels.npy   [C, N] int32
    batches.npy  [R, C, S, B] int32: the samples of every step, as `fed` draws them

Shape letters: C clients, N samples, R rounds, S steps, B batch, L layers. Round 0 is the
warm-up; every round starts anew from the server's parameters.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Flat = dict[str, np.ndarray]
"""A tree of parameters as one level: path -> array; blocks are stacked along [L]."""

RunRound = Callable[[int], tuple[Flat, float]]
"""Round -> the aggregated parameters and the clients' mean loss; returns when both are done."""


class SubNetwork(NamedTuple):
    """What one client trains: prefixes of heads and neurons in each kept block."""

    depth: int
    heads: list[int]  # [L]
    neurons: list[int]  # [L]
    blocks: list[int]  # the kept blocks


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything of a work that is not an array."""

    vit: dict[str, Any]
    """Arguments of `acme_jax.vit.ViTConfig`; `image_shape` is a list."""
    learning_rate: float
    momentum: float
    seed: int
    """`jax.random.key(seed)` made the parameters and is the key of the experiment."""
    num_clients: int
    num_samples: int
    num_steps: int
    batch_size: int
    num_rounds: int
    """The warm-up included."""
    archs: list[SubNetwork]  # [C], of the mixed workload


@dataclasses.dataclass(frozen=True)
class Work:
    """A work directory's content."""

    settings: Settings
    params: Flat
    images: np.ndarray  # [C, N, height, width, channels] float32
    labels: np.ndarray  # [C, N] int32
    batches: np.ndarray  # [R, C, S, B] int32


def write(directory: Path, work: Work) -> None:
    """Writes a work directory; it must exist."""
    (directory / "work.json").write_text(json.dumps(dataclasses.asdict(work.settings), indent=1))
    save_params(directory / "params.npz", work.params)
    for name in ("images", "labels", "batches"):
        np.save(directory / f"{name}.npy", getattr(work, name))


def read(directory: Path, num_clients: int) -> Work:
    """Reads a work directory.

    Raises:
      SystemExit: the directory is of another number of clients.
    """
    settings = json.loads((directory / "work.json").read_text())
    settings["archs"] = [SubNetwork(*arch) for arch in settings["archs"]]
    if settings["num_clients"] != num_clients:
        raise SystemExit(
            f"{directory} holds the work of {settings['num_clients']} clients, but --clients is "
            f"{num_clients}; give the same number"
        )
    arrays = {name: np.load(directory / f"{name}.npy") for name in ("images", "labels", "batches")}
    return Work(Settings(**settings), load_params(directory / "params.npz"), **arrays)


def save_params(path: Path, params: Mapping[str, Any]) -> None:
    """Writes parameters by path."""
    arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in params.items()}
    np.savez(path, **arrays)


def load_params(path: Path) -> Flat:
    """Reads parameters by path."""
    with np.load(path) as file:
        return dict(file)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Flat:
    """Nested dictionaries to one level."""
    flat: Flat = {}
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            flat |= flatten(leaf, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = np.asarray(leaf)
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """One level to nested dictionaries."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def peak_rss_bytes() -> int:
    """The most memory this process has held so far.

    Of Linux's two counts `VmHWM` is meant: `ru_maxrss` starts at the peak of the process that
    started this one, and the parent of a benchmark may be larger than its workers.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def serve(
    form: str,
    directory: Path,
    start: float,
    run_round: RunRound,
    info: dict[str, Any],
    rss_bytes: Callable[[], int] = peak_rss_bytes,
) -> None:
    """A worker's life: warms up, says so, then runs a round for each line `round R` of stdin.

    Answers are JSON objects, one a line; `quit` or the end of stdin ends. The warm-up's
    parameters are saved under the form's name, for the parent to compare.

    Args:
      form: name of the contender.
      directory: of the work.
      start: `time.perf_counter()` when the worker began.
      run_round: see `RunRound`.
      info: what else the parent shall write down.
      rss_bytes: peak memory of all the contender's processes.
    """
    params, loss = run_round(0)
    save_params(directory / f"{form}.npz", params)
    ready = {"ready": True, "form": form, "start_s": time.perf_counter() - start, "loss": loss}
    print(json.dumps(ready | {"info": info}), flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "quit":
            return
        begin = time.perf_counter()
        _, loss = run_round(int(arguments[0]))
        seconds = time.perf_counter() - begin
        answer = {"seconds": seconds, "loss": loss, "rss_bytes": rss_bytes()}
        print(json.dumps(answer), flush=True)
