"""How alike clients' data are: distances between feature distributions, and weights.

Wasserstein-1 distances between one-dimensional samples of equal size are the mean absolute
difference of the sorted values, so each client is sorted once, not once a pair.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from fed.pairwise import pairwise_sum

WassersteinMethod = Literal["flat", "per_dimension", "sliced"]

_LARGE = 2**17  # values, from which on sorting in parts pays
_SORT_PARTS = 4


def pairwise_wasserstein(
    samples: jax.Array,
    *,
    method: WassersteinMethod,
    key: jax.Array | None = None,
    num_projections: int = 50,
) -> jax.Array:
    """Wasserstein-1 distances between all pairs of clients.

    `"flat"` compares all N * D scalars of two clients as one sample, as the original ACME
    code does (ICDCS 2025): it forgets which dimension a value came from. `"per_dimension"`
    is the mean over dimensions of the distances of marginals. `"sliced"` is the mean over
    random directions of the distances of projections (Rabin et al. 2012), which also sees
    correlations.

    Args:
      samples: [C, N, D] features without NaN; the same N for every client. Clients of
        different sizes are compared by their `quantile_sketch`es, [C, Q, D].
      method: see above.
      key: for `"sliced"` only; consumed.
      num_projections: for `"sliced"` only.

    Returns:
      float32 [C, C], symmetric, zero diagonal, in the units of the features. Memory is
      linear in the size of `samples`.

    Raises:
      ValueError: samples of another rank, an unknown method, or a missing key.
    """
    _check_samples(samples)
    samples = samples.astype(jnp.float32)
    num_clients, _, num_dims = samples.shape
    if method == "flat":
        values = _sorted(samples.reshape(num_clients, -1, 1))
    elif method == "per_dimension":
        values = _sorted(samples)
    elif method == "sliced":
        if key is None:
            raise ValueError("method 'sliced' draws random directions; give it a key")
        directions = jax.random.normal(key, (num_dims, num_projections))
        directions /= jnp.linalg.norm(directions, axis=0, keepdims=True)
        values = _sorted(jnp.matmul(samples, directions, precision="highest"))
    else:
        raise ValueError(f"unknown method {method!r}; expected 'flat', 'per_dimension' or 'sliced'")
    values = values.reshape(num_clients, -1)
    return pairwise_sum(values, lambda a, b: jnp.abs(a - b)) / values.shape[1]


def quantile_sketch(
    samples: jax.Array, num_quantiles: int, *, size: jax.Array | int | None = None
) -> jax.Array:
    """Summarises a sample by the quantiles of each dimension, at midpoint levels.

    Level q of Q is (q + 0.5) / Q, interpolated linearly between order statistics (Hazen's
    definition, `numpy.quantile(..., method="hazen")`). At these levels the mean absolute
    difference of two sketches approximates the Wasserstein-1 distance of the samples, and a
    sketch with Q = N is the sorted sample itself. ACME sends raw features; a sketch is
    smaller and shows no single sample.

    Args:
      samples: [N, D]; vmap for [C, N, D].
      num_quantiles: Q.
      size: int [], the number of real samples, which come first; None means all N.

    Returns:
      float32 [Q, D], ascending along Q.
    """
    if samples.ndim != 2:
        raise ValueError(f"samples must have shape [N, D], got {samples.shape}")
    length = samples.shape[0]
    size = jnp.asarray(length if size is None else size, jnp.int32)
    keys = _to_ordered_int(samples.astype(jnp.float32))
    real = jnp.arange(length) < size
    ordered = jnp.sort(jnp.where(real[:, None], keys, jnp.iinfo(jnp.int32).max), axis=0)
    values = _from_ordered_int(ordered)
    # Position level * size - 0.5 among the order statistics, in integer steps of 1 / (2 Q).
    last = jnp.maximum(size - 1, 0)
    unit = 2 * num_quantiles
    position = (2 * jnp.arange(num_quantiles, dtype=jnp.int32) + 1) * size - num_quantiles
    position = jnp.clip(position, 0, unit * last)
    lower = position // unit
    upper = jnp.minimum(lower + 1, last)
    fraction = ((position % unit) / unit).astype(jnp.float32)[:, None]
    return values[lower] + fraction * (values[upper] - values[lower])


def pairwise_js(samples: jax.Array, *, num_bins: int = 32) -> jax.Array:
    """Jensen-Shannon divergences between all pairs of clients, averaged over dimensions.

    Each dimension is divided into equal bins over the range of all clients. A client's mass
    in a bin is the increase of its distribution function, which is piecewise linear through
    (value of order i, (i + 0.5) / Q) and reaches 0 and 1 half a step beyond the extremes.
    The original ACME code compares rows of the feature matrices entry by entry and takes
    KL(M || p); this is the divergence 0.5 KL(p || m) + 0.5 KL(q || m) of densities.

    Args:
      samples: [C, Q, D] quantile sketches, or raw features without NaN.
      num_bins: bins in each dimension.

    Returns:
      float32 [C, C] in nats, symmetric, zero diagonal, at most log 2.
    """
    _check_samples(samples)
    values = _sorted(samples.astype(jnp.float32))
    masses = _bin_masses(jnp.moveaxis(values, 2, 1), num_bins)
    num_clients, num_dims, _ = masses.shape
    total = pairwise_sum(masses.reshape(num_clients, -1), js_term)
    return jnp.maximum(total / num_dims, 0.0)


def similarity(distance: jax.Array) -> jax.Array:
    """Turns distances into similarities in (0, 1] (ACME, ICDCS 2025).

    s = 1 / (1 + d), made symmetric by the geometric mean with its transpose.

    Args:
      distance: [..., C, C], not negative.
    """
    score = 1.0 / (1.0 + distance)
    return jnp.sqrt(score * jnp.swapaxes(score, -1, -2))


def weights(distance: jax.Array, *, temperature: float | jax.Array) -> jax.Array:
    """How much each client listens to each other one: softmax over rows of s / temperature.

    ACME uses temperature 1, where the rows are nearly uniform; about 0.02 separates unlike
    clients. Identical clients get exactly uniform rows.

    Args:
      distance: [..., C, C], not negative.
      temperature: tau, positive.

    Returns:
      float32 [..., C, C]; rows sum to 1. Not symmetric in general.

    Raises:
      ValueError: a temperature, known when called, that is not positive.
    """
    if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return jax.nn.softmax(similarity(distance) / temperature, axis=-1)


def _to_ordered_int(values: jax.Array) -> jax.Array:
    """Int32 keys in the order of the float32 values (-0.0 just before 0.0).

    XLA's CPU back end sorts integers several times faster than floats.
    """
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _from_ordered_int(keys: jax.Array) -> jax.Array:
    bits = jnp.where(keys < 0, keys ^ jnp.int32(0x7FFFFFFF), keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _sorted(values: jax.Array) -> jax.Array:
    """Sorts float32 [C, N, D] along N."""
    keys = _to_ordered_int(values)
    # XLA's CPU back end sorts on one core, but runs operations that are independent at once.
    parts = _SORT_PARTS if values.size >= _LARGE and len(values) >= _SORT_PARTS else 1
    ordered = [jnp.sort(part, axis=1) for part in jnp.array_split(keys, parts)]
    return _from_ordered_int(jnp.concatenate(ordered))


def _bin_masses(values: jax.Array, num_bins: int) -> jax.Array:
    """Masses in equal bins over the clients' common range: sorted [C, D, Q] -> [C, D, bins]."""
    num_quantiles = values.shape[2]
    first, last = values[..., :1], values[..., -1:]
    if num_quantiles > 1:
        below = first - 0.5 * (values[..., 1:2] - first)
        above = last + 0.5 * (last - values[..., -2:-1])
    else:
        below, above = first, last
    knots = jnp.concatenate([below, values, above], axis=2)
    inner = (jnp.arange(num_quantiles) + 0.5) / num_quantiles
    levels = jnp.concatenate([jnp.zeros(1), inner, jnp.ones(1)])
    low, high = knots.min(axis=(0, 2)), knots.max(axis=(0, 2))
    steps = jnp.arange(1, num_bins) / num_bins
    edges = low[:, None] + steps[None] * (high - low)[:, None]  # [D, bins - 1], inner ones

    interpolate = jax.vmap(jnp.interp, in_axes=(0, 0, None))  # over D
    inside = jax.vmap(interpolate, in_axes=(None, 0, None))(edges, knots, levels)
    # The outer edges hold all the mass, also where all values of a dimension are equal.
    distribution = jnp.pad(inside, ((0, 0), (0, 0), (1, 0)))
    distribution = jnp.pad(distribution, ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
    return jnp.maximum(jnp.diff(distribution, axis=2), 0.0)


def js_term(own: jax.Array, other: jax.Array) -> jax.Array:
    """What one bin adds to the Jensen-Shannon divergence in nats; exactly 0 for equal masses.

    Args:
      own: float32 [...], masses of one distribution; elementwise.
      other: those of the other one, of the same shape.
    """
    tiny = jnp.finfo(jnp.float32).tiny  # 0 log 0 = 0
    mixture = jnp.maximum(0.5 * (own + other), tiny)
    # Ordered, because a fused multiply-add rounds one of the two products and not the other.
    low, high = jnp.minimum(own, other), jnp.maximum(own, other)
    return 0.5 * (
        low * jnp.log(jnp.maximum(low, tiny) / mixture)
        + high * jnp.log(jnp.maximum(high, tiny) / mixture)
    )


def _check_samples(samples: jax.Array) -> None:
    if samples.ndim != 3 or 0 in samples.shape:
        raise ValueError(f"samples must have shape [C, N, D] without zeros, got {samples.shape}")
