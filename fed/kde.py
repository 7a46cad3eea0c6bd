"""Kernel density estimates with a bandwidth for each kernel, judged by leaving points out.

"Stable training of probabilistic models using the leave-one-out maximum log-likelihood
objective" (arXiv 2310.03556): p(x) = sum_j pi_j N(x; x_j, sigma_j^2 I) has a kernel on every
point, and

    LOO = 1/N sum_i log sum_{j != i} pi_j N(x_i; x_j, sigma_j^2 I)

is the likelihood of each point under the kernels of the others, for which `fed.kde_fit` fits the
bandwidths. It is also an outlier score of every point and a quality of a device's data.

Points are padded: `mask` says which count, and what stands in the others changes nothing.
Everything is in log space, in the dtype of the points (at least float32), and maps over devices
or classes with `vmap`. Kernel centres are raw data: an estimate must not leave its device (see
`fed.kde_device` for what does). Shape letters: N points, D dimensions, Q queries.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Kernels(NamedTuple):
    """What is fitted; every point has one kernel."""

    variance: jax.Array  # [N] sigma_j^2
    weight: jax.Array  # [N] pi_j, sums to 1; 0: no kernel


class Kde(NamedTuple):
    """An estimate; holds the raw points."""

    points: jax.Array  # [N, D], 0 where padded
    mask: jax.Array  # [N] bool
    kernels: Kernels


def check_points(points: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Points [N, D] as floats, 0 where padded, and their mask [N], all True for None.

    Raises:
      ValueError: points or mask of other shapes.
    """
    points = jnp.asarray(points)
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(
            f"points must have shape [N, D] without zeros, got {points.shape}; use jax.vmap over "
            "several devices, padded to one N"
        )
    mask = jnp.ones(points.shape[0], bool) if mask is None else jnp.asarray(mask, bool)
    if mask.shape != points.shape[:1]:
        raise ValueError(f"mask has shape {mask.shape}; expected {points.shape[:1]}")
    points = points.astype(jnp.promote_types(points.dtype, jnp.float32))
    return jnp.where(mask[:, None], points, 0), mask


def squared_distances(queries: jax.Array, points: jax.Array) -> jax.Array:
    """|x_i - y_j|^2 [Q, N] of queries [Q, D] and points [N, D], without cancellation."""
    return jnp.sum((queries[:, None, :] - points[None, :, :]) ** 2, axis=2)


def uniform_kernels(mask: jax.Array, sigma: float | jax.Array, dtype: jnp.dtype) -> Kernels:
    """Equal weights on the points of `mask` [N], all of one bandwidth sigma [] > 0."""
    count = jnp.maximum(jnp.sum(mask), 1).astype(dtype)
    variance = jnp.broadcast_to(jnp.asarray(sigma, dtype) ** 2, mask.shape)
    return Kernels(variance, mask.astype(dtype) / count)


def log_kernels(kernels: Kernels, squared: jax.Array, *, num_dims: int) -> jax.Array:
    """Log of pi_j N(x_i; x_j, sigma_j^2 I) [Q, N] in nats, -inf where pi_j = 0.

    Args:
      kernels: see `Kernels`.
      squared: [Q, N] squared distances of queries and kernel centres.
      num_dims: D.
    """
    normaliser = _log(kernels.weight) - 0.5 * num_dims * jnp.log(2 * jnp.pi * kernels.variance)
    return normaliser[None, :] - squared / (2 * kernels.variance[None, :])


def leave_one_out(
    kernels: Kernels, squared: jax.Array, mask: jax.Array, *, num_dims: int
) -> jax.Array:
    """Log density [N] of each point under the kernels of all others, in nats.

    log sum_{j != i} pi_j N(x_i; x_j, sigma_j^2 I), -inf for padding and for a point alone.
    The weights are not rescaled to sum 1 without pi_i, as in the paper.

    Args:
      kernels: see `Kernels`; weights are 0 where padded.
      squared: [N, N] squared distances of the points.
      mask: [N] bool.
      num_dims: D.
    """
    others = mask[:, None] & ~jnp.eye(mask.shape[0], dtype=bool)
    joint = log_kernels(kernels, squared, num_dims=num_dims)
    return jax.nn.logsumexp(jnp.where(others, joint, -jnp.inf), axis=1)


def mean_over_points(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean [] of [N] over the points of `mask`; -inf without any."""
    count = jnp.sum(mask)
    total = jnp.sum(jnp.where(mask, values, 0))
    return jnp.where(count > 0, total / jnp.maximum(count, 1), -jnp.inf)


def log_density(kde: Kde, queries: jax.Array) -> jax.Array:
    """Log p(x) [Q] in nats at queries [Q, D]; -inf without kernels."""
    squared = squared_distances(queries.astype(kde.points.dtype), kde.points)
    joint = log_kernels(kde.kernels, squared, num_dims=kde.points.shape[1])
    return jax.nn.logsumexp(joint, axis=1)


def sample(key: jax.Array, kde: Kde, num_samples: int) -> jax.Array:
    """Draws [num_samples, D]: j ~ pi, then x_j + sigma_j times standard normal noise.

    Where a bandwidth is small these are nearly raw points. The key is consumed.
    """
    kernel_key, noise_key = jax.random.split(key)
    index = jax.random.categorical(kernel_key, _log(kde.kernels.weight), shape=(num_samples,))
    noise = jax.random.normal(noise_key, (num_samples, kde.points.shape[1]), kde.points.dtype)
    return kde.points[index] + jnp.sqrt(kde.kernels.variance)[index][:, None] * noise


def outlier_score(kde: Kde) -> jax.Array:
    """How little the other points explain each point: minus its LOO log density [N], in nats.

    Padding has -inf (never an outlier), a point without others inf.
    """
    squared = squared_distances(kde.points, kde.points)
    num_dims = kde.points.shape[1]
    explained = leave_one_out(kde.kernels, squared, kde.mask, num_dims=num_dims)
    return jnp.where(kde.mask, -explained, -jnp.inf)


def data_quality(kde: Kde) -> jax.Array:
    """How well a device's points explain each other: mean LOO log density [] a dimension.

    In nats, an estimate of minus the differential entropy: noise and outliers lower it, and so
    does variety. Comparable between devices that share a projection; -inf with fewer than two
    points.
    """
    return mean_over_points(-outlier_score(kde), kde.mask) / kde.points.shape[1]


def scott_sigma(points: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Scott's bandwidth []: N^(-1/(D+4)) times the root mean variance of the dimensions.

    The variances are those of a sample (N - 1), as in `scipy.stats.gaussian_kde`.

    Raises:
      ValueError: points or mask of other shapes.
    """
    points, mask = check_points(points, mask)
    num_dims = points.shape[1]
    count = jnp.maximum(jnp.sum(mask), 2).astype(points.dtype)
    centre = jnp.sum(points, axis=0, keepdims=True) / count
    squares = jnp.sum(jnp.where(mask[:, None], points - centre, 0) ** 2)
    return count ** (-1 / (num_dims + 4)) * jnp.sqrt(squares / ((count - 1) * num_dims))


def _log(values: jax.Array) -> jax.Array:
    """Natural logarithm, -inf at 0, with a gradient of 0 there."""
    return jnp.where(values > 0, jnp.log(jnp.where(values > 0, values, 1)), -jnp.inf)
