"""What a device does with its kernel density estimate, and the little that leaves it.

The edge sends a projection and reference points (`fed.kde_edge`); the device fits an estimate of
its own projected features and answers with its log densities at those points: M numbers, 800
bytes for 200 points. Its features, which are the kernel centres, stay where they are. Maps over
devices with `vmap`. Shape letters: N samples, F features, D projected dimensions, M reference
points.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fed.kde import Kde, data_quality, log_density
from fed.kde_fit import fit


class Projection(NamedTuple):
    """From features to the few dimensions in which densities are estimated; the same for all."""

    matrix: jax.Array  # [F, D]
    offset: jax.Array  # [D]


class Report(NamedTuple):
    """What travels from a device to its edge."""

    log_density: jax.Array  # [M] nats, at the edge's reference points; -inf without samples
    quality: jax.Array  # [] see `fed.kde.data_quality`


def project(projection: Projection, features: jax.Array) -> jax.Array:
    """Features [..., F] in the projection's dimensions [..., D]."""
    product = jnp.matmul(features, projection.matrix, precision="highest")
    return product + jnp.expand_dims(projection.offset, range(product.ndim - 1))


def report(
    projection: Projection,
    references: jax.Array,
    features: jax.Array,
    mask: jax.Array | None = None,
    **options: Any,
) -> tuple[Report, Kde]:
    """Fits the device's estimate and evaluates it where the edge asks.

    Args:
      projection: the edge's.
      references: [M, D], the edge's reference points, already projected.
      features: [N, F], of the device.
      mask: [N] bool, the samples that count; None: all.
      **options: of `fed.kde_fit.fit`.

    Returns:
      What travels, and the estimate, which does not.

    Raises:
      ValueError: as `fed.kde_fit.fit`.
    """
    kde = fit(project(projection, features), mask, **options).kde
    return Report(log_density(kde, references), data_quality(kde)), kde
