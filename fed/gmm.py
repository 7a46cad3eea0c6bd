"""Mixtures of Gaussians with diagonal covariances, fitted by expectation maximisation.

CE-LoRA's sketch of a client's data (arXiv 2503.23869): for each class a mixture of three on frozen
features, 3 (2 D + 1) numbers a class. Padding is masked, so that clients and classes of
different sizes are fitted by one `vmap`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mixture(NamedTuple):
    """sum_k weights_k N(means_k, diag(variances_k)); leading axes are mixtures."""

    weights: jax.Array  # [K], sums to 1
    means: jax.Array  # [K, D]
    variances: jax.Array  # [K, D]


class Fit(NamedTuple):
    """A fitted mixture and how it came about."""

    mixture: Mixture
    log_likelihood: jax.Array  # [] mean over samples, nats, before the last step
    num_iterations: jax.Array  # [] int32
    converged: jax.Array  # [] bool; False: stopped by max_iterations


class ClassMixtures(NamedTuple):
    """What a client sends: a mixture a class."""

    mixtures: Mixture  # leaves [L, K, ...]; those of absent classes are finite and mean nothing
    counts: jax.Array  # [L] float32, the client's samples of each class


def log_likelihoods(mixture: Mixture, samples: jax.Array) -> jax.Array:
    """Logarithm of the density at each sample, nats: [N, D] -> [N]."""
    return jax.nn.logsumexp(_joint(mixture, samples), axis=1)


def seed(
    key: jax.Array, samples: jax.Array, mask: jax.Array, *, num_components: int, ridge: float = 1e-5
) -> Mixture:
    """A mixture to start from: means by k-means++ (Arthur & Vassilvitskii 2007).

    The first mean is a sample, every next one a sample drawn in proportion to its squared distance
    from the means so far; variances are those of all samples, weights equal.

    Args:
      key: consumed.
      samples: [N, D].
      mask: [N], nonzero for real samples.
      num_components: K. Where there are fewer distinct samples, means coincide.
      ridge: added to the variances.
    """
    _check(samples, mask)
    real, samples = _only_real(samples, mask)

    # A key for each draw, so that padding does not change what a sample draws.
    keys = jax.random.split(key, num_components)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, real.shape, samples.dtype))(keys)

    def add_mean(nearest: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Squared distances from the nearest mean; without a mean, or all at 0, samples are alike.
        far = jnp.where(jnp.isinf(nearest) | (nearest.max() == 0), 1, nearest)
        chance = jnp.log(jnp.where(real, far, 0))
        mean = samples[jnp.argmax(chance + noise)]
        distance = jnp.where(real, ((samples - mean[None]) ** 2).sum(axis=1), 0)
        return jnp.minimum(nearest, distance), mean

    _, means = jax.lax.scan(add_mean, jnp.full(real.shape, jnp.inf, samples.dtype), noise)
    total = jnp.maximum(real.sum(), 1)
    center = samples.sum(axis=0) / total
    spread = jnp.where(real[:, None], samples - center[None], 0)
    variances = (spread**2).sum(axis=0) / total + ridge
    return Mixture(
        weights=jnp.full(num_components, 1 / num_components, samples.dtype),
        means=means,
        variances=jnp.tile(variances[None], (num_components, 1)),
    )


def fit(
    start: Mixture,
    samples: jax.Array,
    mask: jax.Array,
    *,
    ridge: float = 1e-5,
    max_iterations: int = 200,
    tolerance: float = 1e-3,
) -> Fit:
    """Expectation maximisation from a given start; defaults are CE-LoRA's.

    Stops when the mean log-likelihood changes by less than `tolerance`, as scikit-learn's
    `GaussianMixture(covariance_type="diag")` does, from which it differs by rounding only.

    Args:
      start: K components; of `seed`, for example.
      samples: [N, D].
      mask: [N], nonzero for real samples. Without any, the fit is finite and means nothing.
      ridge: added to the variances in every step.
      max_iterations: of the two steps.
      tolerance: nats.

    Raises:
      ValueError: arrays of other shapes.
    """
    _check(samples, mask)
    real, samples = _only_real(samples, mask)
    total = jnp.maximum(real.sum(), 1)

    def step(state: Fit) -> Fit:
        joint = _joint(state.mixture, samples)
        evidence = jax.nn.logsumexp(joint, axis=1)
        share = jnp.where(real[:, None], jnp.exp(joint - evidence[:, None]), 0)
        likelihood = jnp.where(real, evidence, 0).sum() / total
        change = jnp.abs(likelihood - state.log_likelihood)
        mixture = _maximise(share, samples, ridge)
        return Fit(mixture, likelihood, state.num_iterations + 1, change < tolerance)

    def unfinished(state: Fit) -> jax.Array:
        return ~state.converged & (state.num_iterations < max_iterations)

    nothing = jnp.asarray(-jnp.inf, samples.dtype)
    first = Fit(start, nothing, jnp.int32(0), jnp.asarray(False))
    return jax.lax.while_loop(unfinished, step, first)


def fit_classes(
    key: jax.Array,
    features: jax.Array,
    labels: jax.Array,
    size: jax.Array | int,
    *,
    num_classes: int,
    num_components: int = 3,
    ridge: float = 1e-5,
    max_iterations: int = 200,
    tolerance: float = 1e-3,
) -> ClassMixtures:
    """One client's sketch: a mixture for each class, fitted to the samples of that class.

    For clients [C, N, D] vmap with the same key, so that equal data give equal sketches.

    Args:
      key: consumed.
      features: [N, D], padded.
      labels: int [N].
      size: int [], the number of real samples, which come first.
      num_classes: L.
      num_components: K of each class.
      ridge: see `fit`.
      max_iterations: see `fit`.
      tolerance: see `fit`.
    """
    real = jnp.arange(features.shape[0]) < size
    run = partial(fit, ridge=ridge, max_iterations=max_iterations, tolerance=tolerance)

    def one(key: jax.Array, label: jax.Array) -> Mixture:
        mask = real & (labels == label)
        start = seed(key, features, mask, num_components=num_components, ridge=ridge)
        return run(start, features, mask).mixture

    classes = jnp.arange(num_classes, dtype=labels.dtype)
    counts = jnp.where(real[:, None], labels[:, None] == classes[None], False)
    mixtures = jax.vmap(one)(jax.random.split(key, num_classes), classes)
    return ClassMixtures(mixtures, counts.sum(axis=0).astype(features.dtype))


def _joint(mixture: Mixture, samples: jax.Array) -> jax.Array:
    """Logarithm of weights_k N(x; mean_k, variance_k) [N, K]."""

    def one(weight: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
        # Differences before squares: features may be far from 0 and variances small.
        distance = ((samples - mean[None]) ** 2 / variance[None]).sum(axis=1)
        constant = jnp.log(2 * jnp.pi) * samples.shape[1] + jnp.log(variance).sum()
        return jnp.log(weight) - 0.5 * (constant + distance)

    return jax.vmap(one, out_axes=1)(*mixture)


def _maximise(share: jax.Array, samples: jax.Array, ridge: float) -> Mixture:
    """The mixture of largest likelihood, given how much [N, K] belongs to each component."""
    # As scikit-learn: an empty component keeps a positive weight.
    amount = share.sum(axis=0) + 10 * jnp.finfo(samples.dtype).eps

    def one(share: jax.Array, amount: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = (share[:, None] * samples).sum(axis=0) / amount
        squares = share[:, None] * (samples - mean[None]) ** 2
        return mean, squares.sum(axis=0) / amount + ridge

    means, variances = jax.vmap(one, in_axes=(1, 0))(share, amount)
    return Mixture(amount / amount.sum(), means, variances)


def _only_real(samples: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    real = mask != 0
    return real, jnp.where(real[:, None], samples, 0)


def _check(samples: jax.Array, mask: jax.Array) -> None:
    if samples.ndim != 2 or mask.shape != samples.shape[:1]:
        raise ValueError(
            f"samples and mask must have shapes [N, D] and [N], got {samples.shape}, {mask.shape}"
        )
