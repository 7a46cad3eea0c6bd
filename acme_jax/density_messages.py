"""What an edge and its devices say about the densities, and the quality, of the devices' data.

Only these records travel (`acme_jax.densities`, `acme_jax.data_quality`). A device's estimate has
its features as kernel centres and stays on it.

Shape letters: F features, D projected dimensions, M reference points.
"""

from __future__ import annotations

from typing import NamedTuple

from numpy.typing import ArrayLike


class DensityQuestion(NamedTuple):
    """Edge to device, once: where it wants to know the density of the device's data."""

    matrix: ArrayLike
    """float32 [F, D]: the projection from features to the dimensions of the estimate."""
    offset: ArrayLike
    """float32 [D], of the projection."""
    references: ArrayLike
    """float32 [M, D]: points of the edge's shared data, projected."""


class LogDensities(NamedTuple):
    """Device to edge, once: the answer to a `DensityQuestion`."""

    values: ArrayLike
    """float32 [M] nats, at the reference points."""


class DataQuality(NamedTuple):
    """Device to edge, once, if asked: how good its training samples are; None: unknown.

    All are float32 []; see `acme_jax.data_quality` for what they mean and what they do not.
    """

    log_likelihood: ArrayLike | None
    label_entropy: ArrayLike | None
    approximate_entropy: ArrayLike | None
    lempel_ziv_entropy: ArrayLike | None
