"""A small autoregressive model of images, for coding pixel by pixel (`fed.neural_coding`).

A value (one channel of one pixel) has a mixture of logistic distributions whose parameters a
perceptron computes from causal neighbours: values before it in raster order, at most `reach`
pixels away; the pixel's place and channel. The density is summed over each level's interval, the
lowest and the highest level taking the tails (as PixelCNN++, arXiv 1701.05517). The published
codecs are large flows and VAEs; this one is small because the decoder evaluates it once a value,
for all images of a batch at the same time.

Shape letters: B images of a batch, V = H W Ch values of an image in raster order, D inputs of the
perceptron, K components, A levels.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpy.typing import NDArray

from fed.range_coder import TOTAL

_WAVES = 3  # cosines of a pixel's place, for each axis


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of model and adaptation; both ends need the same ones.

    Defaults were chosen by the bytes of scikit-learn's digits, coded once from an untrained
    start.

    Raises:
      ValueError: a number out of its range.
    """

    alphabet: int = 256
    """A: values are 0 ... A - 1; from 2 to 256."""

    batch_size: int = 32
    """B: images between two updates of theta."""

    hidden: int = 64
    """Width of the perceptron's two hidden layers."""

    components: int = 4
    """K, of the mixture."""

    reach: int = 2
    """Rows above and columns to both sides that a value depends on."""

    learning_rate: float = 0.003
    """Of Adam. 0: no adaptation."""

    steps: int = 16
    """Optimiser steps on every batch; the paper has one, and more as an extension. From an
    untrained start the digits need 30.4 kB with 16 steps, 34.2 kB with one (rate 0.01)."""

    seed: int = 0
    """Of theta_0, where none is given."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("alphabet", 2, 256),
            ("batch_size", 1, 4096),
            ("hidden", 1, 4096),
            ("components", 1, 64),
            ("reach", 1, 16),
            ("learning_rate", 0, 1),
            ("steps", 1, 1000),
            ("seed", 0, 2**31 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:  # also false for NaN
                raise ValueError(f"{name} must be from {low} to {high}, got {value}")


class Theta(NamedTuple):
    """The perceptron: two hidden layers, and a linear path beside them."""

    first: Array  # [D, hidden]
    first_bias: Array  # [hidden]
    second: Array  # [hidden, hidden]
    second_bias: Array  # [hidden]
    last: Array  # [hidden, 3 K]
    direct: Array  # [D, 3 K]
    bias: Array  # [3 K] of logits of weights, means and logarithms of widths


@partial(jax.jit, static_argnums=(0, 1))
def init_theta(settings: Settings, num_channels: int) -> Theta:
    """An untrained theta_0 by the settings' seed: nearly the same distribution everywhere."""
    hidden, components = settings.hidden, settings.components
    num_inputs = _num_inputs(settings, num_channels)
    keys = jax.random.split(jax.random.key(settings.seed), 2)
    means = np.linspace(-1, 1, 2 * components + 1, dtype=np.float32)[1::2]
    widths = np.full(components, np.log(0.5 / components), np.float32)
    return Theta(
        jax.random.normal(keys[0], (num_inputs, hidden), jnp.float32) / num_inputs**0.5,
        jnp.zeros(hidden, jnp.float32),
        jax.random.normal(keys[1], (hidden, hidden), jnp.float32) / hidden**0.5,
        jnp.zeros(hidden, jnp.float32),
        jnp.zeros((hidden, 3 * components), jnp.float32),
        jnp.zeros((num_inputs, 3 * components), jnp.float32),
        jnp.concatenate([jnp.zeros(components, jnp.float32), means, widths]),
    )


def inputs_at(
    settings: Settings, images: NDArray[np.uint8], row: int, column: int, channel: int
) -> NDArray[np.float32]:
    """What the value at a place depends on.

    Args:
      settings: of the model.
      images: [B, H, W, Ch]; values at the place and after it are not read.
      row: of the place.
      column: of the place.
      channel: of the place.

    Returns:
      [B, D]. NumPy, and element by element: the same for one value and for all of them.
    """
    batch, height, width, num_channels = images.shape
    reach = settings.reach
    # [B, reach + 1, 2 reach + 1, Ch]; outside the image and not yet known: 0, the middle level.
    window = np.zeros((batch, reach + 1, 2 * reach + 1, num_channels), np.float32)
    top, left, right = max(row - reach, 0), max(column - reach, 0), min(column + reach + 1, width)
    part = images[:, top : row + 1, left:right].astype(np.float32)
    scale = np.float32(2 / (settings.alphabet - 1))
    first = left - column + reach
    window[:, top - row - 1 :, first : first + right - left] = part * scale - np.float32(1)
    window[:, reach, reach, channel:] = 0
    window[:, reach, reach + 1 :] = 0
    turns = np.arange(1, _WAVES + 1) * np.pi
    place = [np.cos(turns * (at + 0.5) / size) for at, size in ((row, height), (column, width))]
    fixed = np.concatenate([*place, np.arange(num_channels) == channel]).astype(np.float32)
    return np.concatenate(
        [window.reshape(batch, -1), np.broadcast_to(fixed, (batch, fixed.size))], axis=1
    )


def places(shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Row, column and channel of every value of an image [H, W, Ch], in the order of coding."""
    return [(int(row), int(column), int(channel)) for row, column, channel in np.ndindex(shape)]


@partial(jax.jit, static_argnums=0)
def frequencies(settings: Settings, theta: Theta, inputs: Array) -> Array:
    """Integer tables of some values.

    Args:
      settings: of the model.
      theta: its weights.
      inputs: [B, D]. Coding calls it always with the settings' batch size: another shape is
        another program, whose last bits may differ.

    Returns:
      uint32 [B, A], at least 1, the sum of each row 2^16: 1 + the difference of
      floor((2^16 - A) F) at a level's ends, with F the distribution function.
    """
    free = TOTAL - settings.alphabet
    below = _distribution(settings, theta, inputs)
    edges = jnp.clip(jnp.floor(below * free), 0, free).astype(jnp.int32)
    # In floats F may fall by a last bit; edges must not.
    edges = jax.lax.cummax(edges, axis=1)
    edges = jnp.pad(edges, ((0, 0), (1, 0)))
    edges = jnp.pad(edges, ((0, 0), (0, 1)), constant_values=free)
    return (1 + jnp.diff(edges, axis=1)).astype(jnp.uint32)


def init_optimizer(settings: Settings, theta: Theta) -> optax.OptState:
    """The optimiser's state before the first batch."""
    return _optimizer(settings).init(theta)


@partial(jax.jit, static_argnums=0)
def update(
    settings: Settings,
    theta: Theta,
    state: optax.OptState,
    inputs: Array,
    values: Array,
    weights: Array,
) -> tuple[Theta, optax.OptState]:
    """theta_t = f(theta_{t-1}, batch t): steps of Adam on the mean of -log p.

    Args:
      settings: of the model.
      theta: before.
      state: of the optimiser.
      inputs: [V, B, D].
      values: int32 [V, B].
      weights: [B], 0 for images that only fill the batch.
    """

    def cost(theta: Theta) -> Array:
        rows = inputs.reshape(-1, inputs.shape[-1])
        each = _negative_log(settings, theta, rows, values.ravel()).reshape(values.shape)
        return jnp.sum(each * weights[None]) / (jnp.sum(weights) * values.shape[0])

    def step(_: int, both: tuple[Theta, optax.OptState]) -> tuple[Theta, optax.OptState]:
        theta, state = both
        updates, state = _optimizer(settings).update(jax.grad(cost)(theta), state, theta)
        return optax.apply_updates(theta, updates), state

    return jax.lax.fori_loop(0, settings.steps, step, (theta, state))


def _optimizer(settings: Settings) -> optax.GradientTransformation:
    return optax.adam(settings.learning_rate)


def _num_inputs(settings: Settings, num_channels: int) -> int:
    window = (settings.reach + 1) * (2 * settings.reach + 1)
    return (window + 1) * num_channels + 2 * _WAVES


def _mixture(theta: Theta, inputs: Array) -> tuple[Array, Array, Array]:
    """Logits of weights, means and logarithms of widths, [B, K] each; levels are in [-1, 1]."""
    hidden = jnp.tanh(inputs @ theta.first + theta.first_bias[None])
    hidden = jnp.tanh(hidden @ theta.second + theta.second_bias[None])
    outputs = hidden @ theta.last + inputs @ theta.direct + theta.bias[None]
    logits, means, widths = jnp.split(outputs, 3, axis=1)
    return logits, means, jnp.clip(widths, -7, 3)


def _distribution(settings: Settings, theta: Theta, inputs: Array) -> Array:
    """The distribution function between neighbouring levels, [B, A - 1]."""
    logits, means, widths = _mixture(theta, inputs)
    between = (2 * jnp.arange(1, settings.alphabet, dtype=jnp.float32) - 1) / (
        settings.alphabet - 1
    ) - 1
    scaled = (between[None, None] - means[..., None]) * jnp.exp(-widths)[..., None]  # [B, K, A - 1]
    return jnp.sum(jax.nn.softmax(logits)[..., None] * jax.nn.sigmoid(scaled), axis=1)


def _negative_log(settings: Settings, theta: Theta, inputs: Array, values: Array) -> Array:
    """-log of the probability of values [B], in nats, as the tables have it but not rounded."""
    logits, means, widths = _mixture(theta, inputs)
    half = 1 / (settings.alphabet - 1)
    centre = 2 * half * values[:, None].astype(jnp.float32) - 1 - means
    upper, lower = ((centre + side) * jnp.exp(-widths) for side in (half, -half))
    top, bottom = values[:, None] == settings.alphabet - 1, values[:, None] == 0
    inside = jnp.where(top, 1, jax.nn.sigmoid(upper)) - jnp.where(bottom, 0, jax.nn.sigmoid(lower))
    probability = jnp.sum(jax.nn.softmax(logits) * inside, axis=1)
    free = 1 - settings.alphabet / TOTAL
    return -jnp.log(free * probability + 1 / TOTAL)
