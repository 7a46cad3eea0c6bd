"""Fits the cost models of `nas.cost` to measured latencies, and says how well they predict.

On the host, in NumPy float64. All fits minimise the squared *relative* error under the
constraint that no constant is negative (Lawson and Hanson, "Solving Least Squares Problems",
1974), because a small network's error counts as much as a large one's. Shape letters:
P networks, L layers, A and B points of a table's grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from nas import cost
from nas.arch import Arch, keep_mask
from nas.cost import DeviceProfile, ModelDims, PaperConstants
from nas.latency_table import LatencyTable, grid_weights, latency_table
from nas.rank_correlation import kendall_tau, spearman_rho

_TOLERANCE = 1e-10


class PredictionError(NamedTuple):
    """How far predicted latencies are from measured ones."""

    mape: float
    """Mean of |predicted / measured - 1|."""
    worst: float
    """Largest |predicted / measured - 1|."""
    bias: float
    """Mean of predicted / measured - 1."""
    kendall: float
    """Kendall's tau-b, ties counted; NaN where all predictions or measurements are equal."""
    spearman: float
    """Correlation of the ranks, ties sharing their mean rank; NaN likewise."""


def prediction_error(predicted: ArrayLike, measured: ArrayLike) -> PredictionError:
    """Relative errors and rank correlations of predictions [P] against measurements [P].

    Raises:
      ValueError: unequal lengths, fewer than 2, or measurements that are not positive.
    """
    predicted, measured = np.asarray(predicted, np.float64), _checked(measured)
    if predicted.shape != measured.shape or measured.size < 2:
        raise ValueError(
            f"expected at least 2 predictions and as many measurements, got {predicted.shape} "
            f"and {measured.shape}"
        )
    relative = predicted / measured - 1.0
    return PredictionError(
        mape=float(np.abs(relative).mean()),
        worst=float(np.abs(relative).max()),
        bias=float(relative.mean()),
        kendall=_rank(kendall_tau, predicted, measured),
        spearman=_rank(spearman_rho, predicted, measured),
    )


def fit_roofline(
    dims: ModelDims, archs: Arch, measured_s: ArrayLike, power: DeviceProfile
) -> DeviceProfile:
    """The roofline whose latencies are nearest to the measured ones.

    A network is bound by compute where its operations per byte exceed the machine's, so every
    split of the networks in that order is tried, so that no starting point is needed. If no
    network is bound by memory (or none by compute) that rate is not determined; it is then
    the least that the data admit, where the two roofs would just touch.

    Args:
      dims: of the full network.
      archs: genomes with leading [P].
      measured_s: [P] seconds of one example.
      power: whose power constants the result takes; latency says nothing about them.

    Raises:
      ValueError: latencies that are not positive and finite, fewer than 3 of them, or all
        explained by overhead alone, which would make both rates infinite.
    """
    seconds = _checked(measured_s)
    flops, size, blocks = (
        np.asarray(jax.jit(jax.vmap(count))(archs), np.float64)
        for count in (
            lambda arch: cost.num_flops(dims, arch),
            lambda arch: cost.size_bytes(dims, arch),
            lambda arch: jnp.sum(keep_mask(dims.num_layers, arch.depth)),
        )
    )
    if seconds.size < 3 or seconds.size != flops.size:
        raise ValueError(
            f"a roofline has 3 constants; expected at least 3 measurements, one for each of the "
            f"{flops.size} networks, got {seconds.size}"
        )
    order = np.argsort(flops / size)
    best, best_loss = (0.0, 0.0, 0.0), np.inf
    for num_memory_bound in range(seconds.size + 1):
        memory_bound = np.zeros(seconds.size, bool)
        memory_bound[order[:num_memory_bound]] = True
        matrix = np.stack([flops * ~memory_bound, size * memory_bound, blocks], axis=1)
        per_flop, per_byte, overhead = _fit(matrix, seconds)
        predicted = np.maximum(flops * per_flop, size * per_byte) + overhead * blocks
        loss = float(np.sum((predicted / seconds - 1.0) ** 2))
        if loss < best_loss:
            best, best_loss = (per_flop, per_byte, overhead), loss
    per_flop, per_byte, overhead = best
    if per_flop <= 0 and per_byte <= 0:
        raise ValueError(
            "the measured latencies do not grow with the networks' operations or bytes; "
            "measure networks of more widths"
        )
    if per_byte <= 0:
        per_byte = per_flop * float(np.min(flops / size))
    elif per_flop <= 0:
        per_flop = per_byte * float(np.min(size / flops))
    return power._replace(
        flops_per_s=1.0 / per_flop, bytes_per_s=1.0 / per_byte, overhead_s=float(overhead)
    )


def fit_paper(
    dims: ModelDims,
    archs: Arch,
    measured_s: ArrayLike,
    constants: PaperConstants = cost.PAPER_CONSTANTS,
) -> PaperConstants:
    """ACME's form of latency, base and seconds per kept head, with measured constants.

    Args:
      dims: of the full network.
      archs: genomes with leading [P].
      measured_s: [P] seconds of one example.
      constants: the other constants, kept.

    Raises:
      ValueError: latencies that are not positive and finite.
    """
    seconds = _checked(measured_s)
    unit = PaperConstants(base_latency_s=0.0, latency_per_unit_s=1.0)
    heads = jax.jit(jax.vmap(lambda arch: cost.latency_s(dims, arch, unit)))(archs)
    matrix = np.stack([np.ones_like(seconds), np.asarray(heads, np.float64)], axis=1)
    base, slope = (float(x) for x in _fit(matrix, seconds))
    return constants._replace(base_latency_s=base, latency_per_unit_s=slope)


def fit_latency_table(
    dims: ModelDims,
    archs: Arch,
    measured_s: ArrayLike,
    head_counts: ArrayLike,
    neuron_counts: ArrayLike,
    power: DeviceProfile,
) -> LatencyTable:
    """The table, on a given grid, whose latencies are nearest to the measured ones.

    Whole networks are measured, not blocks, so that a block pays for the caches and the calls
    that it meets there; the blocks' seconds and the rest follow by least squares. Uniform
    networks of two depths at every point of the grid determine them.

    Args:
      dims: of the full network.
      archs: genomes with leading [P].
      measured_s: [P] seconds of one example.
      head_counts: [A] the grid's heads.
      neuron_counts: [B] the grid's neurons.
      power: whose power constants the result takes.

    Raises:
      ValueError: latencies that are not positive and finite, or networks that leave some entry
        of the table open.
    """
    seconds = _checked(measured_s)
    grids = [jnp.asarray(counts, jnp.result_type(float)) for counts in (head_counts, neuron_counts)]

    def weights(arch: Arch) -> jax.Array:
        keep = keep_mask(dims.num_layers, arch.depth)
        by_head, by_neuron = (
            grid_weights(counts, grid)
            for counts, grid in zip((arch.heads, arch.neurons), grids, strict=True)
        )
        return jnp.einsum("l,la,lb->ab", keep, by_head, by_neuron).reshape(-1)

    blocks = np.asarray(jax.jit(jax.vmap(weights))(archs), np.float64)
    matrix = np.concatenate([np.ones((seconds.size, 1)), blocks], axis=1)
    rank = int(np.linalg.matrix_rank(matrix))
    if rank < matrix.shape[1]:
        raise ValueError(
            f"the {seconds.size} networks determine only {rank} of the table's "
            f"{matrix.shape[1]} numbers; measure uniform networks of two depths at every point "
            "of the grid"
        )
    base, *entries = _fit(matrix, seconds)
    return latency_table(
        head_counts,
        neuron_counts,
        np.reshape(entries, [grid.size for grid in grids]),
        float(base),
        idle_power_w=float(power.idle_power_w),
        energy_per_flop_j=float(power.energy_per_flop_j),
        energy_per_byte_j=float(power.energy_per_byte_j),
    )


def nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises |matrix x - target|, by Lawson and Hanson's active sets.

    Args:
      matrix: [N, K]; give its columns similar scales.
      target: [N].
    """
    num = matrix.shape[1]
    x, free = np.zeros(num), np.zeros(num, bool)
    for _ in range(3 * num):  # their bound in practice; each round lowers the residual
        slope = np.where(free, -np.inf, matrix.T @ (target - matrix @ x))
        if free.all() or slope.max() <= _TOLERANCE * np.abs(matrix.T @ target).max():
            break
        free[np.argmax(slope)] = True
        while True:
            trial = np.zeros(num)
            trial[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            if trial[free].min() > 0:
                break
            # Walk towards the trial until the first constant reaches zero; that one is fixed.
            below = free & (trial <= 0)
            step = np.min(x[below] / (x[below] - trial[below]))
            x = x + step * (trial - x)
            free &= x > _TOLERANCE * np.abs(x).max()
            x[~free] = 0.0
            if not free.any():
                trial = x
                break
        x = trial
    return x


def _fit(matrix: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Constants [K] >= 0 with the least squared relative error of `matrix` @ constants."""
    relative = matrix / seconds[:, None]
    scale = np.linalg.norm(relative, axis=0)
    scale[scale == 0] = 1.0  # nothing to determine: the constant stays 0
    return nonnegative_least_squares(relative / scale[None], np.ones(len(seconds))) / scale


def _checked(measured_s: ArrayLike) -> np.ndarray:
    seconds = np.asarray(measured_s, np.float64)
    bad = np.flatnonzero(~(np.isfinite(seconds) & (seconds > 0)))
    if seconds.ndim != 1 or bad.size:
        which = f"entry {bad[0]} is {seconds.flat[bad[0]]}" if bad.size else f"{seconds.ndim} axes"
        raise ValueError(f"measured latencies must be [P], positive and finite; got {which}")
    return seconds


def _rank(
    correlation: Callable[[jax.Array, jax.Array], jax.Array],
    predicted: np.ndarray,
    measured: np.ndarray,
) -> float:
    dtype = jnp.result_type(float)
    return float(jax.jit(correlation)(jnp.asarray(predicted, dtype), jnp.asarray(measured, dtype)))
