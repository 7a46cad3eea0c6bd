"""Integer-coded test problems of the searchers' benchmarks, for JAX and NumPy alike.

`evaluate(xp, genes)` maps integer genes [P, G] to objectives [P, M] and violation [P] by the
array module `xp`, so that every contender minimises the same function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Evaluate = Callable[[Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A minimisation over integers 0 to high of each gene."""

    high: tuple[int, ...]  # largest value of each gene
    reference: tuple[float, ...]  # of the hypervolume
    evaluate: Evaluate
    kind: str = "ordinal"  # of the genes: ordinal, categorical
    constrained: bool = False


def _zdt(number: int) -> Problem:
    """ZDT (Zitzler, Deb and Thiele 2000), 30 genes of 101 values each."""

    def evaluate(xp: Any, genes: Any) -> tuple[Any, Any]:
        x = genes / 100.0
        first = x[:, 0]
        g = 1 + 9 * xp.mean(x[:, 1:], axis=1)
        ratio = first / g
        shape = {
            1: lambda: 1 - xp.sqrt(ratio),
            2: lambda: 1 - ratio**2,
            3: lambda: 1 - xp.sqrt(ratio) - ratio * xp.sin(10 * np.pi * first),
        }[number]()
        return xp.stack([first, g * shape], axis=1), xp.zeros(first.shape)

    return Problem((100,) * 30, (1.1, 1.1), evaluate)


def _dtlz2() -> Problem:
    """DTLZ2 (Deb et al. 2002), 3 objectives, 12 genes of 101 values each."""

    def evaluate(xp: Any, genes: Any) -> tuple[Any, Any]:
        x = genes / 100.0
        g = 1 + xp.sum((x[:, 2:] - 0.5) ** 2, axis=1)
        # Cosines as sines, which are exactly 0 at the end; in float32 a cosine is below it.
        sin_a, sin_b = (xp.sin(x[:, i] * (np.pi / 2)) for i in (0, 1))
        cos_a, cos_b = (xp.sin((1 - x[:, i]) * (np.pi / 2)) for i in (0, 1))
        columns = [g * cos_a * cos_b, g * cos_a * sin_b, g * sin_a]
        return xp.stack(columns, axis=1), xp.zeros(g.shape)

    return Problem((100,) * 12, (1.1, 1.1, 1.1), evaluate)


def _knapsack() -> Problem:
    """Two knapsacks (Zitzler and Thiele 1999): 100 items, half of the total weight allowed.

    Profits and weights are integers from 10 to 100, drawn once; objectives are the shares of
    the total profit that are left out, violation the weight above the capacities.
    """
    rng = np.random.default_rng(100)
    profit, weight = rng.integers(10, 101, (2, 2, 100)).astype(np.float32)

    total, capacity = weight.sum(1), np.floor(weight.sum(1) / 2)  # whole, hence exact

    def evaluate(xp: Any, genes: Any) -> tuple[Any, Any]:
        taken = genes * np.float32(1)
        missed = 1 - taken @ (profit / profit.sum(1, keepdims=True)).T
        excess = xp.maximum(taken @ weight.T - capacity[None, :], 0.0)
        return missed, xp.sum(excess / total[None, :], axis=1)

    return Problem((1,) * 100, (1.0, 1.0), evaluate, kind="categorical", constrained=True)


def _elastic() -> Problem:
    """A made-up elastic network of 12 layers: error, size and energy.

    Mixed cardinalities: depth (12 values), then heads (4), neurons (16) and bit width (3) of
    each layer; layers above the depth cost nothing and help nothing.
    """
    layers = 12
    high = (layers - 1,) + (3,) * layers + (15,) * layers + (2,) * layers
    gain = np.linspace(1.5, 0.5, layers, dtype=np.float32)[None, :]

    def evaluate(xp: Any, genes: Any) -> tuple[Any, Any]:
        kept = (xp.arange(layers)[None, :] <= genes[:, :1]) * 1.0
        heads = (genes[:, 1 : 1 + layers] + 1) / 4.0
        neurons = (genes[:, 1 + layers : 1 + 2 * layers] + 1) / 16.0
        bits = (genes[:, 1 + 2 * layers :] + 1) / 3.0
        value = kept * (heads**0.5 * 0.4 + neurons**0.5 * 0.6) * (1 - 0.3 * (1 - bits) ** 2)
        error = xp.exp(-3 * xp.mean(gain * value, axis=1))
        size = xp.mean(kept * (heads + 2 * neurons) / 3 * bits, axis=1)
        energy = xp.mean(kept * (0.2 + 0.8 * heads * (0.5 + 0.5 * neurons)) * bits**0.5, axis=1)
        return xp.stack([error, size, energy], axis=1), xp.zeros(error.shape)

    return Problem(high, (1.1, 1.1, 1.1), evaluate)


def _analytic() -> Problem:
    """The objective of the speed benchmark: 36 genes of 4 values, error, size and energy."""

    def evaluate(xp: Any, genes: Any) -> tuple[Any, Any]:
        x = genes / 3.0
        a, b, c = (xp.mean(x[:, start : start + 12], axis=1) for start in (0, 12, 24))
        error = xp.exp(-2 * a) * (0.5 + 0.5 * xp.exp(-2 * b)) + 0.2 * (1 - c)
        size, energy = 0.5 * (a + b * c), 0.3 * a + 0.5 * b**2 + 0.2 * c
        return xp.stack([error, size, energy], axis=1), xp.zeros(a.shape)

    return Problem((3,) * 36, (1.3, 1.1, 1.1), evaluate)


PROBLEMS: dict[str, Problem] = {
    "zdt1": _zdt(1),
    "zdt2": _zdt(2),
    "zdt3": _zdt(3),
    "dtlz2": _dtlz2(),
    "knapsack": _knapsack(),
    "elastic": _elastic(),
    "analytic": _analytic(),
}
