"""Mean and variance of features by class: what a client may tell about data it keeps.

Statistics of parts are merged without the data: the variance of a union is the mean of the
parts' variances plus the variance of their means, both weighted by counts (Chan et al. 1983;
the pooled variance of FedVTC, arXiv 2508.01669). Leaving the second part out, as an average of
deviations does, makes the merged class too narrow.

Shape letters here: Y classes, D features, N samples, K parts (clients, batches), B a batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

Kind = Literal["shared", "diagonal", "full"]


class ClassStatistics(NamedTuple):
    """Sizes, means and variances within the classes; a stack of parts has a leading [K].

    The rank of `variance` tells the kind: `"shared"` is one variance a feature for all classes
    (around their own means), `"diagonal"` one a class and feature, `"full"` a covariance a class.
    """

    size: jax.Array  # [Y] float32, samples of each class; weights may make it fractional
    mean: jax.Array  # [Y, D] float32; 0 where the size is 0
    variance: jax.Array  # [D], [Y, D] or [Y, D, D] float32, mean of squares (not n - 1)


def empty(num_classes: int, num_features: int, kind: Kind) -> ClassStatistics:
    """Statistics of no samples, all 0.

    Raises:
      ValueError: an unknown kind.
    """
    shapes = {
        "shared": (num_features,),
        "diagonal": (num_classes, num_features),
        "full": (num_classes, num_features, num_features),
    }
    if kind not in shapes:
        raise ValueError(f"unknown kind {kind!r}; expected one of {get_args(Kind)}")
    return ClassStatistics(
        jnp.zeros(num_classes), jnp.zeros((num_classes, num_features)), jnp.zeros(shapes[kind])
    )


def from_samples(
    features: jax.Array, labels: jax.Array, weight: jax.Array, *, num_classes: int, kind: Kind
) -> ClassStatistics:
    """Statistics of one client's or one batch's samples.

    Args:
      features: [N, D]; rows of weight 0 may hold anything, also NaN.
      labels: int [N] in [0, Y).
      weight: [N], not negative; 0 for padding.
      num_classes: Y, static.
      kind: of the variance; static.

    Raises:
      ValueError: features of another rank, or an unknown kind.
    """
    if features.ndim != 2:
        raise ValueError(f"features must be [N, D], got shape {features.shape}")
    nothing = empty(num_classes, features.shape[1], kind)
    features = jnp.where(weight[:, None] > 0, features, 0).astype(jnp.float32)
    member = jax.nn.one_hot(labels, num_classes, axis=0) * weight[None].astype(jnp.float32)
    count = member.sum(1)
    mean = jnp.matmul(member, features, precision="highest") / _or_one(count)[:, None]
    apart = features - mean[labels]
    if kind == "full":
        total = jax.lax.map(
            lambda one: jnp.matmul((apart * one[:, None]).T, apart, precision="highest"), member
        )
        return ClassStatistics(count, mean, total / _or_one(count)[:, None, None])
    squares = jnp.matmul(member, apart**2, precision="highest")
    if kind == "shared":
        return ClassStatistics(count, mean, squares.sum(0) / _or_one(count.sum()))
    return nothing._replace(size=count, mean=mean, variance=squares / _or_one(count)[:, None])


def merge(parts: ClassStatistics, weights: jax.Array | None = None) -> ClassStatistics:
    """The statistics of the union of parts (FedVTC's server step).

    Mean `c = sum_k n_k c_k / n`, variance `sum_k n_k (s_k + (c_k - c)^2) / n` for each class,
    and for `"shared"` the same sums over all classes.

    Args:
      parts: leaves with a leading [K].
      weights: [K], not negative, factors for the parts' counts; None: 1. A part of weight 0 must
        still be finite.
    """
    count = parts.size if weights is None else parts.size * weights[:, None]  # [K, Y]
    total = count.sum(0)
    mean = (count[..., None] * parts.mean).sum(0) / _or_one(total)[:, None]
    apart = parts.mean - mean[None]  # [K, Y, D]
    kind = _kind(parts)
    if kind == "full":
        outer = parts.variance + apart[..., :, None] * apart[..., None, :]
        variance = (count[..., None, None] * outer).sum(0) / _or_one(total)[:, None, None]
    elif kind == "diagonal":
        variance = (count[..., None] * (parts.variance + apart**2)).sum(0)
        variance = variance / _or_one(total)[:, None]
    else:
        within = (count.sum(1)[:, None] * parts.variance).sum(0)
        between = (count[..., None] * apart**2).sum((0, 1))
        variance = (within + between) / _or_one(total.sum())
    return ClassStatistics(total, mean, variance)


def prefer(new: ClassStatistics, old: ClassStatistics) -> ClassStatistics:
    """The new statistics, the old ones for classes (or, if shared, a variance) without counts."""
    seen = new.size > 0

    def choose(new: jax.Array, old: jax.Array, seen: jax.Array) -> jax.Array:
        return jnp.where(seen.reshape(*seen.shape, *[1] * (new.ndim - seen.ndim)), new, old)

    return ClassStatistics(
        choose(new.size, old.size, seen),
        choose(new.mean, old.mean, seen),
        choose(new.variance, old.variance, seen.any() if _kind(new) == "shared" else seen),
    )


def class_variances(statistics: ClassStatistics, floor: float) -> jax.Array:
    """[Y, D] variances of each class, at least `floor`; of a covariance its diagonal."""
    kind = _kind(statistics)
    variance = statistics.variance
    if kind == "full":
        variance = jnp.diagonal(variance, axis1=-2, axis2=-1)
    elif kind == "shared":
        variance = jnp.broadcast_to(variance[None], statistics.mean.shape)
    return jnp.maximum(variance, floor)


def deviations(statistics: ClassStatistics, floor: float) -> jax.Array:
    """What `sample` multiplies unit noise with; computed once for many samples.

    Args:
      statistics: of the classes.
      floor: least variance; it is added to a covariance's diagonal, and bounds the others below.

    Returns:
      [Y, D] standard deviations, or [Y, D, D] lower Cholesky factors of covariances.
    """
    if _kind(statistics) != "full":
        return jnp.sqrt(class_variances(statistics, floor))
    ridge = floor * jnp.eye(statistics.mean.shape[-1])
    return jnp.linalg.cholesky(statistics.variance + ridge[None])


def sample(key: jax.Array, mean: jax.Array, deviation: jax.Array, labels: jax.Array) -> jax.Array:
    """Draws features [B, D] of the given classes from N(mean, deviation deviation^T).

    Args:
      key: consumed.
      mean: [Y, D].
      deviation: from `deviations`.
      labels: int [B].
    """
    noise = jax.random.normal(key, (labels.shape[0], mean.shape[-1]))
    if deviation.ndim == 3:
        scaled = jnp.einsum("bde,be->bd", deviation[labels], noise, precision="highest")
    else:
        scaled = deviation[labels] * noise
    return mean[labels] + scaled


def num_floats(num_classes: int, num_features: int, kind: Kind) -> int:
    """Numbers in a message of these statistics, counts included.

    `"shared"`: (Y + 1) D + Y; `"diagonal"`: 2 Y D + Y. A covariance is counted by its triangle:
    Y D (D + 3) / 2 + Y.

    Raises:
      ValueError: an unknown kind.
    """
    variance = {
        "shared": num_features,
        "diagonal": num_classes * num_features,
        "full": num_classes * num_features * (num_features + 1) // 2,
    }
    if kind not in variance:
        raise ValueError(f"unknown kind {kind!r}; expected one of {get_args(Kind)}")
    return num_classes * (1 + num_features) + variance[kind]


def _kind(statistics: ClassStatistics) -> Kind:
    kinds: dict[int, Kind] = {-1: "shared", 0: "diagonal", 1: "full"}
    return kinds[statistics.variance.ndim - statistics.mean.ndim]


def _or_one(count: jax.Array) -> jax.Array:
    """Divisors: where there are no samples the sums are 0, too."""
    return jnp.where(count > 0, count, 1.0)
