"""Crops and mirrors; shifts are tested with training, which had them first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from acme_jax import augmentation
from acme_jax.config import TrainConfig

KEY = jax.random.key(5)
PLAIN = TrainConfig(max_shift=0)
IMAGES = jnp.asarray(np.random.default_rng(0).random((64, 8, 6, 2)), jnp.float32)


def test_nothing_asked_for_nothing_done_and_texts_stay_as_they_are():
    np.testing.assert_array_equal(augmentation.augment(KEY, IMAGES, PLAIN), IMAGES)
    everything = dataclasses.replace(PLAIN, max_shift=2, flip=True, min_crop=0.2)
    ids = jnp.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(augmentation.augment(KEY, ids, everything), ids)


def test_about_half_of_the_images_are_mirrored_and_no_other_thing_happens():
    made = np.asarray(augmentation.augment(KEY, IMAGES, dataclasses.replace(PLAIN, flip=True)))
    same = [np.array_equal(a, b) for a, b in zip(made, IMAGES, strict=True)]
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(made, IMAGES, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 16 < sum(same) < 48


def test_a_crop_is_a_linear_enlargement_of_a_part():
    """A picture of its own coordinates tells which part each pixel comes from."""
    rows, columns = np.meshgrid(np.arange(64.0), np.arange(48.0), indexing="ij")
    picture = np.stack([rows / 64, columns / 48], axis=-1)
    images = jnp.asarray(np.tile(picture, (100, 1, 1, 1)), jnp.float32)
    made = np.asarray(augmentation.random_crop(KEY, images, 0.25))
    inner = made[:, 8:-8, 8:-8]  # away from the border, where sampling is clamped
    steps = np.diff(inner[..., 0], axis=1), np.diff(inner[..., 1], axis=2)
    heights, widths = (step.mean(axis=(1, 2)) * n for step, n in zip(steps, (64, 48), strict=True))
    for step, part, n in zip(steps, (heights, widths), (64, 48), strict=True):
        np.testing.assert_allclose(step, np.broadcast_to((part / n)[:, None, None], step.shape),
                                   atol=1e-4)  # fmt: skip
    areas = heights * widths
    assert areas.min() > 0.2 and areas.max() <= 1.0 + 1e-3
    assert np.ptp(areas) > 0.5
    aspect = widths / heights
    assert aspect.min() > 0.74 and aspect.max() < 1.35 and np.ptp(aspect) > 0.3
    assert made.min() >= 0 and made.max() <= 1


def test_bytes_are_cropped_as_floats():
    pixels = jnp.asarray(np.random.default_rng(1).integers(0, 256, (4, 8, 6, 1)), jnp.uint8)
    made = augmentation.random_crop(KEY, pixels, 0.5)
    floats = augmentation.random_crop(KEY, pixels.astype(jnp.float32) / 255, 0.5)
    assert made.dtype == jnp.float32
    np.testing.assert_allclose(made, floats, atol=1e-6)
