"""What each client holds of the server's parameters, and how their results are put together.

NumPy only, for contenders of `bench_clients.py` that have no aggregation of their own. Shape
letters: C clients, L layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from client_work import Flat, SubNetwork, Work


class Share(NamedTuple):
    """What some of the clients add to a round's result; NumPy, so that it travels."""

    params: Flat  # sums over these clients, in the supernet's layout
    loss: float  # sum over these clients of their mean loss


Finish = Callable[[Sequence[Share]], tuple[Flat, float]]
"""Shares -> aggregated parameters and the mean loss."""


def prefix(path: str, heads: int, neurons: int) -> tuple[slice | int, ...]:
    """Which part of a block's leaf a sub-network holds."""
    head, neuron, whole = slice(heads), slice(neurons), slice(None)
    return {
        "qkv_kernel": (whole, whole, head),
        "qkv_bias": (whole, head),
        "out_kernel": (head,),
        "up_kernel": (whole, neuron),
        "up_bias": (neuron,),
        "down_kernel": (neuron,),
    }.get(path.split("/")[-1], ())


def places(params: Flat, arch: SubNetwork) -> dict[str, Any]:
    """Where each leaf of a sub-network lies: its name -> (path in the supernet, index)."""
    found: dict[str, Any] = {}
    for path in params:
        if not path.startswith("blocks/"):
            found[path] = (path, ())
            continue
        for block in arch.blocks:
            index = (block, *prefix(path, arch.heads[block], arch.neurons[block]))
            found[path.replace("blocks/", f"blocks/{block}/")] = (path, index)
    return found


def full_arch(work: Work) -> SubNetwork:
    """The full network as a sub-network."""
    vit = work.settings.vit
    layers = vit["num_layers"]
    heads, neurons = [vit["num_heads"]] * layers, [vit["num_neurons"]] * layers
    return SubNetwork(layers, heads, neurons, list(range(layers)))


def aggregate(work: Work, archs: Sequence[SubNetwork]) -> Finish:
    """The mean of each entry over the clients that hold it; the server's where nobody does.

    Who holds what does not change from round to round, so it is counted once.
    """
    count = {path: np.zeros_like(leaf) for path, leaf in work.params.items()}
    for arch in archs:
        for path, index in places(work.params, arch).values():
            count[path][index] += 1

    def finish(shares: Sequence[Share]) -> tuple[Flat, float]:
        params = {
            path: np.where(held, sum(s.params[path] for s in shares) / np.maximum(held, 1), leaf)
            for (path, leaf), held in zip(work.params.items(), count.values(), strict=True)
        }
        return params, sum(share.loss for share in shares) / len(archs)

    return finish


def parts(num_clients: int, count: int) -> list[range]:
    """The clients in `count` nearly equal ranges."""
    edges = [num_clients * part // count for part in range(count + 1)]
    return [range(low, high) for low, high in itertools.pairwise(edges) if low < high]
