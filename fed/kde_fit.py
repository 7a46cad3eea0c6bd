"""Bandwidths and weights of a kernel density estimate, fitted to its leave-one-out likelihood.

Maximum likelihood shrinks each kernel onto its own point and diverges. The modified EM of
arXiv 2310.03556 leaves that point out, which removes the singularity; exact duplicates bring it
back, so bandwidths have a floor. `learn_weights=False` is the paper's A-KDE (equal weights),
`True` its pi-KDE. The paper finds A-KDE better on held-out data. Shape letters as in `fed.kde`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fed.kde import (
    Kde,
    Kernels,
    check_points,
    log_kernels,
    mean_over_points,
    squared_distances,
    uniform_kernels,
)


class Fit(NamedTuple):
    """A fitted estimate and how it went."""

    kde: Kde
    likelihood: jax.Array  # [] LOO in nats a point; -inf with fewer than two points
    num_steps: jax.Array  # [] int32, EM steps taken


class _Columns(NamedTuple):
    """Sums over rows i of the responsibilities r_ij, relative to exp(peak_j)."""

    peak: jax.Array  # [N] the largest log r_ij; -inf: kernel j explains nothing
    mass: jax.Array  # [N] of r_ij
    moment: jax.Array  # [N] of r_ij |x_i - x_j|^2


def em_step(
    kernels: Kernels,
    squared: jax.Array,
    mask: jax.Array,
    *,
    num_dims: int,
    learn_weights: bool = False,
    shared: bool = False,
    min_variance: float = 1e-12,
) -> tuple[Kernels, jax.Array]:
    """One step of the modified EM; the LOO likelihood never falls.

    E: r_ij ~ pi_j N(x_i; x_j, sigma_j^2 I), r_ii = 0, rows sum to 1.
    M: sigma_j^2 = sum_i r_ij |x_i - x_j|^2 / (D sum_i r_ij); pi_j = sum_i r_ij / N.

    A kernel with sum_i r_ij = 0 keeps its bandwidth. Sums are relative to each column's largest
    term, so that is a kernel without weight, never one whose sum underflows. The floor does not
    let the likelihood fall either: the bound that EM climbs has one peak in each bandwidth.

    Args:
      kernels: see `Kernels`; weights are 0 where padded.
      squared: [N, N] squared distances of the points.
      mask: [N] bool.
      num_dims: D.
      learn_weights: pi-KDE; otherwise the weights stay (A-KDE).
      shared: one bandwidth for all kernels, the plain estimate fitted by the same likelihood.
      min_variance: floor of sigma_j^2, positive.

    Returns:
      The new kernels, and the leave-one-out log densities [N] of the old ones.
    """
    rows = jnp.arange(mask.shape[0])
    explained, columns = _collect(kernels, squared, rows, mask, num_dims)
    return _maximise(kernels, columns, num_dims, learn_weights, shared, min_variance), explained


def fit(
    points: jax.Array,
    mask: jax.Array | None = None,
    *,
    learn_weights: bool = False,
    shared: bool = False,
    initial_sigma: float | jax.Array = 0.1,
    min_sigma: float = 0.01,
    max_steps: int = 50,
    tolerance: float = 1e-4,
    rows_at_once: int | None = None,
) -> Fit:
    """Fits the bandwidths to the leave-one-out likelihood by EM.

    Args:
      points: [N, D]; `vmap` for [C, N, D].
      mask: [N] bool, the points that count; None: all.
      learn_weights: pi-KDE, whose weights are fitted too; otherwise they are equal (A-KDE).
      shared: one bandwidth for all kernels.
      initial_sigma: [] in the unit of the points; the paper's 0.1 suits standardised ones.
        `scott_sigma` is another. With `max_steps=0` this is a plain estimate.
      min_sigma: floor of the bandwidths, in the unit of the points.
      max_steps: of EM.
      tolerance: stops when the LOO likelihood changes by no more than this, in nats.
      rows_at_once: None computes the distances once and takes O(N^2) memory; otherwise
        O(rows_at_once N), the distances anew in every step. For N beyond about 10,000.

    Raises:
      ValueError: points or mask of other shapes, or options outside these.
    """
    points, mask = check_points(points, mask)
    if not min_sigma > 0:
        raise ValueError(
            f"min_sigma must be positive, got {min_sigma}; without a floor the likelihood of "
            "exact duplicates has no maximum"
        )
    if max_steps < 0 or (rows_at_once is not None and rows_at_once < 1):
        raise ValueError(
            f"max_steps must be at least 0 and rows_at_once at least 1, got {max_steps} and "
            f"{rows_at_once}"
        )
    num_points, num_dims = points.shape
    if rows_at_once is None:
        squared = squared_distances(points, points)

    def collect(kernels: Kernels) -> tuple[jax.Array, _Columns]:
        if rows_at_once is None:
            return _collect(kernels, squared, jnp.arange(num_points), mask, num_dims)
        return _collect_in_parts(kernels, points, mask, rows_at_once)

    def step(state: tuple) -> tuple:
        kernels, before, _, count = state
        explained, columns = collect(kernels)
        likelihood = mean_over_points(explained, mask)
        kernels = _maximise(kernels, columns, num_dims, learn_weights, shared, min_sigma**2)
        return kernels, likelihood, jnp.abs(likelihood - before), count + 1

    def go_on(state: tuple) -> jax.Array:
        *_, change, count = state
        return (count < max_steps) & (change > tolerance)  # NaN: there is nothing to fit

    start = uniform_kernels(mask, jnp.maximum(initial_sigma, min_sigma), points.dtype)
    unknown = jnp.asarray(jnp.inf, points.dtype)
    state = (start, -unknown, unknown, jnp.int32(0))
    kernels, _, _, num_steps = jax.lax.while_loop(go_on, step, state)
    likelihood = mean_over_points(collect(kernels)[0], mask)
    return Fit(Kde(points, mask, kernels), likelihood, num_steps)


def prune(kernels: Kernels, mask: jax.Array, *, threshold: float = 0.01) -> Kernels:
    """Drops kernels with pi_j < threshold / N; the weights of the others sum to 1 again."""
    count = jnp.maximum(jnp.sum(mask), 1)
    weight = jnp.where(kernels.weight * count >= threshold, kernels.weight, 0)
    total = jnp.sum(weight)
    return kernels._replace(weight=weight / jnp.where(total > 0, total, 1))


def _collect(
    kernels: Kernels, squared: jax.Array, rows: jax.Array, used: jax.Array, num_dims: int
) -> tuple[jax.Array, _Columns]:
    """The E step of some rows: their LOO log densities [Q], and sums over them.

    Args:
      kernels: see `Kernels`.
      squared: [Q, N].
      rows: int [Q], their indices among the points.
      used: bool [Q], the rows that count.
      num_dims: D.
    """
    others = rows[:, None] != jnp.arange(squared.shape[1])[None, :]
    joint = log_kernels(kernels, squared, num_dims=num_dims)
    joint = jnp.where(others & used[:, None], joint, -jnp.inf)
    explained = jax.nn.logsumexp(joint, axis=1)
    known = jnp.where(jnp.isfinite(explained), explained, 0)
    log_part = joint - known[:, None]  # log r_ij
    peak = jnp.max(log_part, axis=0)
    part = _relative(log_part, peak[None, :])
    return explained, _Columns(peak, jnp.sum(part, axis=0), jnp.sum(part * squared, axis=0))


def _collect_in_parts(
    kernels: Kernels, points: jax.Array, mask: jax.Array, size: int
) -> tuple[jax.Array, _Columns]:
    """`_collect` of all points, `size` rows at once."""
    num_points, num_dims = points.shape
    rows = jnp.arange(-(-num_points // size) * size).reshape(-1, size)
    used = jnp.pad(mask, (0, rows.size - num_points)).reshape(rows.shape)

    def add(total: _Columns, part: tuple[jax.Array, jax.Array]) -> tuple[_Columns, jax.Array]:
        rows, used = part
        squared = squared_distances(points[jnp.minimum(rows, num_points - 1)], points)
        explained, new = _collect(kernels, squared, rows, used, num_dims)
        peak = jnp.maximum(total.peak, new.peak)
        old_share, new_share = (_relative(part.peak, peak) for part in (total, new))
        mass = old_share * total.mass + new_share * new.mass
        moment = old_share * total.moment + new_share * new.moment
        return _Columns(peak, mass, moment), explained

    nothing = jnp.zeros(num_points, points.dtype)
    columns, explained = jax.lax.scan(
        add, _Columns(nothing - jnp.inf, nothing, nothing), (rows, used)
    )
    return explained.reshape(-1)[:num_points], columns


def _relative(logs: jax.Array, peak: jax.Array) -> jax.Array:
    """exp(logs - peak), 0 where both are -inf."""
    return jnp.exp(logs - jnp.where(jnp.isfinite(peak), peak, 0))


def _maximise(
    kernels: Kernels,
    columns: _Columns,
    num_dims: int,
    learn_weights: bool,
    shared: bool,
    min_variance: float,
) -> Kernels:
    """The M step."""
    mass, moment, weight = columns.mass, columns.moment, kernels.weight
    scale = jnp.exp(columns.peak)
    if learn_weights:
        explained = scale * mass  # sum_i r_ij
        total = jnp.sum(explained)
        weight = jnp.where(total > 0, explained / jnp.where(total > 0, total, 1), weight)
    if shared:
        mass, moment = (jnp.sum(scale * part, keepdims=True) for part in (mass, moment))
    variance = jnp.maximum(moment / (num_dims * jnp.where(mass > 0, mass, 1)), min_variance)
    return Kernels(jnp.where(mass > 0, variance, kernels.variance), weight)
