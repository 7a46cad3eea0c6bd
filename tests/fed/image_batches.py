"""Small images for the tests of their coding."""

import numpy as np

from fed.neural_coding import Settings

SMALL = Settings(
    alphabet=17, batch_size=6, hidden=8, components=2, reach=1, steps=1, learning_rate=0.01
)


def blobs(number, seed=0, size=4, level=8.0):
    """Smooth images [number, size, size, 1] of 17 levels."""
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, 3, (number, 1, 1, 1))
    slope = np.linspace(-1, 1, size)[:, None, None] * rng.normal(0, 4, (number, 1, 1, 1))
    noise = rng.normal(0, 1, (number, size, size, 1))
    return np.clip(np.rint(level + shift + slope + noise), 0, 16).astype(np.uint8)


def batches(images, settings=SMALL):
    return [
        images[at : at + settings.batch_size] for at in range(0, len(images), settings.batch_size)
    ]
