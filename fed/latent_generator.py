"""Small decoders from latent features to samples, and the variational loss that trains them.

FedVTC (arXiv 2508.01669) decodes class-wise Gaussian latents with transposed convolutions.
`image_generator` is such a decoder, `dense_generator` its counterpart where the samples are
features themselves (a frozen backbone's, say). Clients are mapped over their own decoders, and a
`vmap` over kernels turns convolutions into slow grouped ones; so a transposed convolution is
written here as one matrix product and shifted sums.

Shape letters: B batch, D latent features, H and W pixels, I and O channels, Y classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_SLOPE = 0.2  # of the leaky rectifier
_GROUPS = 8  # of channels that are normalised together


class Generator(NamedTuple):
    """Two pure functions; closed over, never passed through jit."""

    init: Callable[[jax.Array], Any]
    """key -> parameters."""

    apply: Callable[[Any, jax.Array], jax.Array]
    """(parameters, latents [B, D]) -> samples [B, ...]."""


def dense_generator(num_features: int, *, hidden: int) -> Generator:
    """`v + W2 gelu(W1 v + b1) + b2`: features from latents of the same width.

    W2 and b2 start at 0, so that an untrained generator returns the latents: class-wise
    Gaussian features.
    """

    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {
            "w1": jax.random.normal(key, (num_features, hidden)) * num_features**-0.5,
            "b1": jnp.zeros(hidden),
            "w2": jnp.zeros((hidden, num_features)),
            "b2": jnp.zeros(num_features),
        }

    def apply(params: dict[str, jax.Array], latents: jax.Array) -> jax.Array:
        hidden = jax.nn.gelu(latents @ params["w1"] + params["b1"][None])
        return latents + hidden @ params["w2"] + params["b2"][None]

    return Generator(init, apply)


def image_generator(
    num_features: int, image_shape: tuple[int, int, int], *, channels: tuple[int, int] = (64, 32)
) -> Generator:
    """Linear to a quarter of the image's size, then two transposed convolutions, then tanh.

    Args:
      num_features: D.
      image_shape: (H, W, O); pixels are expected in [-1, 1].
      channels: before the first and the second transposed convolution; multiples of 8, which
        is the number of groups of the group normalisation.

    Raises:
      ValueError: sides that are no multiples of 4, or such channels.
    """
    height, width, colours = image_shape
    if height % 4 or width % 4:
        raise ValueError(f"the image's sides must be multiples of 4, got {height} x {width}")
    if channels[0] % _GROUPS or channels[1] % _GROUPS:
        raise ValueError(f"channels must be multiples of {_GROUPS}, got {channels}")
    first = (height // 4, width // 4, channels[0])
    size = first[0] * first[1] * first[2]

    def init(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, 3)

        def kernel(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
            # Four of the sixteen taps meet in each output pixel.
            return jax.random.normal(key, (inputs, 4, 4, outputs)) * (4 * inputs) ** -0.5

        return {
            "dense": jax.random.normal(keys[0], (num_features, size)) * num_features**-0.5,
            "scales": [jnp.ones(c) for c in channels],
            "offsets": [jnp.zeros(c) for c in channels],
            "kernels": [kernel(keys[1], *channels), kernel(keys[2], channels[1], colours)],
            "bias": jnp.zeros(colours),
        }

    def apply(params: dict[str, Any], latents: jax.Array) -> jax.Array:
        x = (latents @ params["dense"]).reshape(-1, *first)
        for scale, offset, kernel in zip(
            params["scales"], params["offsets"], params["kernels"], strict=True
        ):
            x = jax.nn.leaky_relu(_group_norm(x, scale, offset), _SLOPE)
            x = transposed_convolution(x, kernel)
        return jnp.tanh(x + params["bias"][None, None, None])

    return Generator(init, apply)


def transposed_convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Kernel 4, stride 2, padding 1, without a convolution: doubles both sides.

    `y[2i + a - 1, 2j + b - 1] += x[i, j] kernel[:, a, b]`, the convention of PyTorch.

    Args:
      x: [B, H, W, I].
      kernel: [I, 4, 4, O].

    Returns:
      [B, 2 H, 2 W, O].
    """
    batch, height, width, inputs = x.shape
    outputs = kernel.shape[-1]
    taps = (x.reshape(-1, inputs) @ kernel.reshape(inputs, -1)).reshape(
        batch, height, width, 4, 4, outputs
    )
    # Along each side, the even output 2m gets tap 1 of m and tap 3 of m - 1, the odd output
    # 2m + 1 gets tap 2 of m and tap 0 of m + 1.
    rows = _interleave(taps, side=1, tap=3)  # [B, 2 H, W, 4, O]
    return _interleave(rows, side=2, tap=3)


def _interleave(taps: jax.Array, *, side: int, tap: int) -> jax.Array:
    """Sums the four taps (axis `tap`) of one side into twice as many places along it."""
    at = [jnp.take(taps, index, axis=tap) for index in range(4)]
    none = jnp.zeros_like(jax.lax.slice_in_dim(at[0], 0, 1, axis=side))
    before = jnp.concatenate([none, jax.lax.slice_in_dim(at[3], 0, -1, axis=side)], side)
    after = jnp.concatenate([jax.lax.slice_in_dim(at[0], 1, None, axis=side), none], side)
    pairs = jnp.stack([at[1] + before, at[2] + after], side + 1)
    shape = pairs.shape
    return pairs.reshape(*shape[:side], 2 * shape[side], *shape[side + 2 :])


def _group_norm(x: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
    groups = x.reshape(*x.shape[:-1], _GROUPS, -1)
    axes = (1, 2, 4)
    centred = groups - groups.mean(axes, keepdims=True)
    normed = centred * jax.lax.rsqrt((centred**2).mean(axes, keepdims=True) + 1e-5)
    return normed.reshape(x.shape) * scale[None, None, None] + offset[None, None, None]


def gaussian_kl(
    mean: jax.Array, variance: jax.Array, other_mean: jax.Array, other_variance: jax.Array
) -> jax.Array:
    """KL(N(mean, variance) || N(other_mean, other_variance)) in nats, summed over the last axis.

    `0.5 sum [log(s^2 / s_k^2) + (s_k^2 + (z - c)^2) / s^2 - 1]`; shapes [..., D] -> [...].
    """
    ratio = variance / other_variance
    distance = (mean - other_mean) ** 2 / other_variance
    return 0.5 * (ratio - jnp.log(ratio) + distance - 1).sum(-1)


class Prior(NamedTuple):
    """The classes' Gaussians that all clients share."""

    mean: jax.Array  # [Y, D]
    variance: jax.Array  # [Y, D], positive
    known: jax.Array  # [Y] bool: classes of which anything is known


class Terms(NamedTuple):
    """The parts of the variational loss; float32 []."""

    reconstruction: jax.Array
    kl: jax.Array
    matching: jax.Array


class Variational(NamedTuple):
    """What the variational loss trains."""

    generator: Any
    log_ratio: jax.Array  # [D], of the posterior's deviation to the prior's; starts at 0


def variational_terms(
    params: Variational,
    apply: Callable[[Any, jax.Array], jax.Array],
    extract: Callable[[jax.Array], jax.Array],
    inputs: jax.Array,
    labels: jax.Array,
    weight: jax.Array,
    prior: Prior,
    key: jax.Array,
    *,
    num_matching: int,
) -> Terms:
    """Reconstruction, KL and distribution matching of FedVTC's generator.

    With z = extract(x), c and s the prior of x's class, s_k = s exp(log_ratio) and
    v = z + s_k eps: `|apply(v) - x|^2`, `KL(N(z, s_k^2) || N(c, s^2))`, both means over samples,
    and `|mean extract(apply(v)) - c|^2` over `num_matching` draws v ~ N(c, s^2).

    Deviations: the paper's s_k is taken to be what the variational bound trains (a fixed one
    would make its KL constant), as a ratio to s, which makes it free of units. The matching term's
    exact form is not public; each call draws one known class for it and many samples, because
    with few samples a class it would mostly punish their spread.

    Args:
      params: differentiated.
      apply: the generator's.
      extract: inputs [B, ...] -> features [B, D], with parameters that are held fixed.
      inputs: [B, ...]; rows of weight 0 may hold anything.
      labels: int [B].
      weight: [B], not negative. Samples of classes that are not known do not count either.
      prior: of all classes.
      key: consumed.
      num_matching: draws for the matching term.
    """
    noise_key, class_key, draw_key = jax.random.split(key, 3)
    weight = weight * prior.known[labels]
    real = weight > 0
    inputs = jnp.where(real.reshape(-1, *[1] * (inputs.ndim - 1)), inputs, 0)
    features = jax.lax.stop_gradient(extract(inputs))
    mean, variance = prior.mean[labels], prior.variance[labels]  # [B, D]
    own_variance = variance * jnp.exp(2 * params.log_ratio)[None]
    noise = jax.random.normal(noise_key, features.shape)
    decoded = apply(params.generator, features + jnp.sqrt(own_variance) * noise)
    errors = ((decoded - inputs) ** 2).reshape(inputs.shape[0], -1).sum(1)
    divergence = gaussian_kl(features, own_variance, mean, variance)
    total = jnp.maximum(weight.sum(), 1e-6)

    label = jax.random.categorical(class_key, jnp.where(prior.known, 0.0, -jnp.inf))
    noise = jax.random.normal(draw_key, (num_matching, prior.mean.shape[1]))
    latents = prior.mean[label][None] + jnp.sqrt(prior.variance[label])[None] * noise
    drift = extract(apply(params.generator, latents)).mean(0) - prior.mean[label]
    matching = jnp.where(prior.known.any(), (drift**2).sum(), 0.0)
    return Terms((weight * errors).sum() / total, (weight * divergence).sum() / total, matching)
