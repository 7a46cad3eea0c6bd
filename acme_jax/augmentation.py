"""Random changes of training images, inside the compiled step."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from acme_jax.config import TrainConfig

_LOG_ASPECT = math.log(4.0 / 3.0)


def augment(key: Array, inputs: Array, config: TrainConfig) -> Array:
    """A batch as a training step sees it; token ids [B, T] stay as they are.

    In this order, each where the configuration asks for it: shift, crop, mirror.

    Args:
      key: consumed.
      inputs: images [B, height, width, channels], float or uint8, or token ids.
      config: `max_shift`, `min_crop` and `flip` are read.
    """
    if inputs.ndim != 4:
        return inputs
    # The shift draws from the key itself, so that runs with it alone keep their numbers.
    images = random_shift(key, inputs, config.max_shift)
    if config.min_crop < 1.0:
        images = random_crop(jax.random.fold_in(key, 1), images, config.min_crop)
    if config.flip:
        images = random_flip(jax.random.fold_in(key, 2), images)
    return images


def random_shift(key: Array, images: Array, max_shift: int) -> Array:
    """Moves each image [B, height, width, channels] by up to `max_shift` pixels, zero-filled."""
    if max_shift == 0:
        return images
    pad = ((max_shift, max_shift), (max_shift, max_shift), (0, 0))
    offsets = jax.random.randint(key, (images.shape[0], 2), 0, 2 * max_shift + 1)

    def shift(image: Array, offset: Array) -> Array:
        start = (offset[0], offset[1], jnp.int32(0))
        return lax.dynamic_slice(jnp.pad(image, pad), start, image.shape)

    return jax.vmap(shift)(images, offsets)


def random_flip(key: Array, images: Array) -> Array:
    """Mirrors each image [B, height, width, channels] left to right with probability 1/2."""
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0],))
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def random_crop(key: Array, images: Array, min_area: float) -> Array:
    """Enlarges a random part of each image [B, height, width, channels] to the whole image.

    The part has between `min_area` and all of the area and an aspect ratio from 3:4 to 4:3
    relative to the image's own (Szegedy et al. 2015), clipped to the image; bilinear. uint8
    images come back as float32 in [0, 1].
    """
    if jnp.issubdtype(images.dtype, jnp.integer):
        images = images.astype(jnp.float32) / 255.0
    count, size = images.shape[0], jnp.asarray(images.shape[1:3], jnp.float32)
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    area = jax.random.uniform(area_key, (count,), minval=min_area)
    aspect = jnp.exp(jax.random.uniform(aspect_key, (count,), minval=-_LOG_ASPECT,
                                        maxval=_LOG_ASPECT))  # fmt: skip
    sides = jnp.sqrt(jnp.stack([area / aspect, area * aspect], axis=1))
    parts = jnp.minimum(sides, 1.0)  # [B, 2] of height and width
    start = jax.random.uniform(place_key, (count, 2)) * (1.0 - parts) * size[None]

    def enlarge(image: Array, part: Array, start: Array) -> Array:
        resized = jax.image.scale_and_translate(
            image, image.shape, (0, 1), 1.0 / part, -start / part, "linear", antialias=False
        )
        return jnp.clip(resized, 0.0, 1.0)

    return jax.vmap(enlarge)(images, parts, start)
