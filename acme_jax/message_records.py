"""The records that travel; `acme_jax.messages` says which way, and turns them into bytes.

Of the densities of a device's data only `LogDensities` and `DataQuality` leave it: its estimate has
its features as kernel centres (`acme_jax.densities`, `acme_jax.data_quality`).

Shape letters: N devices of an edge, Q quantiles, D features of a sketch, G gates; in
`DensityQuestion` F features, D projected dimensions, M reference points.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numpy.typing import ArrayLike

from acme_jax.number_formats import CodedArray
from nas.arch import Arch
from nas.cost import DeviceProfile

Params = Any
"""A parameter pytree: nested dictionaries (string keys), lists and tuples of arrays."""


class DeviceProfileMessage(NamedTuple):
    """Device to edge, once: what the device can hold and how fast it is."""

    device: int
    budget_bytes: int
    """Largest model the device accepts."""
    num_samples: int
    profile: DeviceProfile
    """Latency and power constants (floats)."""


class ClusterProfile(NamedTuple):
    """Edge to cloud, once: the summary of the edge's devices."""

    edge: int
    num_devices: int
    limits: ArrayLike
    """int64 [N]: each device's budget in bytes."""
    profile: DeviceProfile
    """Latency and power constants that the search uses for this edge (floats)."""


class BackboneMessage(NamedTuple):
    """Cloud to edge, then edge to device, once: the chosen sub-network, really sliced."""

    arch: Arch
    params: Params


class HeaderMessage(NamedTuple):
    """Edge to device, once: the searched header."""

    cell: tuple[tuple[int, int, int, int], ...]
    """One (x, op_x, y, op_y) a block."""
    params: Params


class FeatureSketch(NamedTuple):
    """Device to edge, once: the distribution of its features, not the features."""

    quantiles: ArrayLike | CodedArray
    """float16 [Q, D], or linear codes: Q quantiles of each of the D features."""


class ImportanceSet(NamedTuple):
    """Device to edge, each round: the importance of every gate of its header."""

    importance: ArrayLike | CodedArray
    """float32 [G], or logarithmic codes."""


class PersonalizedImportance(NamedTuple):
    """Edge to device, each round: the importances mixed for this device."""

    importance: ArrayLike | CodedArray
    """float32 [G], or logarithmic codes."""


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
