"""What the edge does with the devices' log densities: how alike their data are.

The edge draws a projection and reference points from features it may see (public ones, or drawn
by the devices: `fed.kde.sample`), and gets from each device the log density of its data at those
points (`fed.kde_device`). Distances are Monte Carlo sums over the points; `similarity.weights`
makes a row-stochastic matrix of them:

    projection = kde_edge.make_projection(key, public_features, 8)
    references = kde_device.project(projection, public_features[:200])
    reports, _ = jax.vmap(partial(kde_device.report, projection, references))(features, masks)
    distance = kde_edge.pairwise_kde(reports.log_density)
    mixing = similarity.weights(distance, temperature=0.02)

Shape letters: C devices, M reference points, F features, D projected dimensions.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

from fed.kde_device import Projection
from fed.pairwise import pairwise_sum
from fed.similarity import js_term

KdeDistance = Literal["js", "gap"]

_LOWEST = -1e30  # instead of the logarithm of no mass, so that differences stay numbers


def make_projection(key: jax.Array, features: jax.Array, num_dims: int) -> Projection:
    """Random orthonormal directions, scaled so that these features have mean 0 and variance 1.

    A direction in which they do not vary is only centred. The key is consumed.

    Args:
      key: of the directions.
      features: [M, F], the edge's own.
      num_dims: D; 8 to 16.

    Raises:
      ValueError: features of another rank, or more dimensions than features.
    """
    if features.ndim != 2 or not 1 <= num_dims <= features.shape[1]:
        raise ValueError(
            f"features must have shape [M, F] and num_dims be from 1 to F, got {features.shape} "
            f"and {num_dims}"
        )
    matrix, _ = jnp.linalg.qr(jax.random.normal(key, (features.shape[1], num_dims)))
    projected = jnp.matmul(features, matrix, precision="highest")
    deviation = jnp.std(projected, axis=0)
    scale = 1 / jnp.where(deviation > 0, deviation, 1)
    return Projection(matrix * scale[None, :], -jnp.mean(projected, axis=0) * scale)


def reference_log_masses(
    log_density: jax.Array, log_reference: jax.Array | None = None
) -> jax.Array:
    """Each device's distribution over the reference points, as logarithms.

    Importance weights: mass_c(m) ~ p_c(r_m) / q(r_m), normalised over m, where the points come
    from the density q. By default q is the mean of the devices' densities, right for points drawn
    from their pooled data and for any others the share of device c at r_m, which is at most C
    whatever the dimension. Without a q, the few points of highest density would get all mass.

    Args:
      log_density: [C, M] nats; a row of -inf only: a device without an estimate.
      log_reference: [M] log q in nats, up to a constant.

    Returns:
      [C, M] log masses, each row's masses sum to 1; -1e30 where there is none.
    """
    known = _has_estimate(log_density)
    if log_reference is None:
        log_reference = jax.nn.logsumexp(log_density, axis=0)
    reachable = jnp.isfinite(log_reference)
    ratio = log_density - jnp.where(reachable, log_reference, 0)[None, :]
    ratio = jnp.where(known[:, None] & reachable[None, :], ratio, _LOWEST)
    return jnp.maximum(jax.nn.log_softmax(ratio, axis=1), _LOWEST)


def pairwise_kde(
    log_density: jax.Array,
    *,
    method: KdeDistance = "js",
    log_reference: jax.Array | None = None,
) -> jax.Array:
    """Distances between all pairs of devices, from their log densities at reference points.

    `"js"` is the Jensen-Shannon divergence, at most log 2; `"gap"` the symmetrised gap of cross
    log-likelihoods, 0.5 E_k[log p_k - log p_j] + 0.5 E_j[log p_j - log p_k], half of Jeffreys'
    divergence, without bound. Expectations are sums with the masses of `reference_log_masses`;
    because both sides of a pair use the same points, no distance is negative.

    Args:
      log_density: [C, M] nats, what the devices sent.
      method: see above.
      log_reference: [M], see `reference_log_masses`.

    Returns:
      float32 [C, C] nats, symmetric, zero diagonal; infinite to a device without an estimate
      (fewer than two samples), to which `similarity.weights` gives the lowest weight.

    Raises:
      ValueError: log densities of another rank, or an unknown method.
    """
    if log_density.ndim != 2 or 0 in log_density.shape:
        raise ValueError(
            f"log_density must have shape [C, M] without zeros, got {log_density.shape}"
        )
    log_mass = reference_log_masses(log_density, log_reference).astype(jnp.float32)
    if method == "js":
        distance = pairwise_sum(jnp.exp(log_mass), js_term)
    elif method == "gap":
        distance = 0.5 * pairwise_sum(log_mass, _gap_term)
    else:
        raise ValueError(f"unknown method {method!r}; expected one of {get_args(KdeDistance)}")
    known = _has_estimate(log_density)
    distance = jnp.where(known[:, None] & known[None, :], jnp.maximum(distance, 0.0), jnp.inf)
    return jnp.where(jnp.eye(len(known), dtype=bool), 0.0, distance)


def _gap_term(own: jax.Array, other: jax.Array) -> jax.Array:
    """(p - q) (log p - log q) of log masses: never negative, and constants cancel in the sum."""
    return (jnp.exp(own) - jnp.exp(other)) * (own - other)


def _has_estimate(log_density: jax.Array) -> jax.Array:
    return jnp.isfinite(log_density).any(axis=1)
