"""Lossless coding of images at rest with a model that learns while it codes (OSOA, neural mode).

One-pass adaptation (arXiv 2111.01662): both ends start from theta_0; for t = 1, 2, ... batch t is
coded with p(. | theta_{t-1}), then theta_t = f(theta_{t-1}, batch t) at both ends. One epoch, and
no model is stored. Here theta is a small network (`fed.pixel_model`), f some steps of Adam, and
the coder is first in, first out (`fed.range_coder`).

A batch is a segment: its code, then 4 bytes of checksum over everything so far: the settings,
theta_0, and of every segment the code, the values and theta after it.

    settings = Settings(alphabet=17)                   # the same at both ends
    sender = receiver = start(settings, (8, 8, 1))
    sender, segment = encode(settings, sender, images)         # uint8 [B, 8, 8, 1]
    receiver, images = decode(settings, receiver, segment, len(images))

**Both ends must be the same binary on the same type of device**: version of JAX, XLA's flags, CPU
or GPU model, number of threads. The tables are integers, but floats make them, and XLA
promises equal floats only to the same program on the same hardware; on GPUs also switch autotuning
off (`--xla_gpu_autotune_level=0 --xla_gpu_deterministic_ops=true`). Other ends than that may agree
or not: if theta or values differ anywhere, `decode` raises `SegmentError` and never returns wrong
images. Files that must be readable elsewhere need the integer tables of `fed.adaptive_coding`.

The decoder evaluates the network once a value, for all images of the batch together, so decoding
takes H W Ch small steps a batch; the encoder runs the same steps to get the same floats.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike, NDArray

from fed.errors import SegmentError
from fed.pixel_model import (
    Settings,
    Theta,
    frequencies,
    init_optimizer,
    init_theta,
    inputs_at,
    places,
    update,
)
from fed.range_coder import TOTAL, Decoder
from fed.range_coder import encode as encode_intervals

__all__ = ["Settings", "State", "code_length", "decode", "encode", "start"]

_CHECKSUM = 4  # bytes
_MOST_VALUES = 1 << 23
"""Of a batch: its code is then below 2^24 bytes, and its inputs fit into memory."""


class State(NamedTuple):
    """One end between two batches."""

    shape: tuple[int, int, int]  # of an image [H, W, Ch]
    theta: Theta
    optimizer: optax.OptState
    digest: int  # the last segment's checksum


def start(settings: Settings, shape: tuple[int, ...], theta: Theta | None = None) -> State:
    """The state before the first batch.

    Args:
      settings: of the stream.
      shape: of one image, [H, W, Ch].
      theta: theta_0, for example the one after other images; the decoder needs it, too. None:
        untrained, by the settings' seed.

    Raises:
      ValueError: a shape of another rank or too large for the batch size, or another theta's.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"an image must have shape [H, W, channels], none of them 0, got {shape}")
    height, width, channels = shape
    if settings.batch_size * height * width * channels > _MOST_VALUES:
        raise ValueError(
            f"{settings.batch_size} images of shape {shape} are more than {_MOST_VALUES:,} values; "
            "choose a smaller batch_size or cut the images into tiles"
        )
    fresh = init_theta(settings, channels)
    theta = fresh if theta is None else theta
    for name, own, wanted in zip(Theta._fields, theta, fresh, strict=True):
        if own.shape != wanted.shape or own.dtype != wanted.dtype:
            raise ValueError(
                f"theta.{name} must be {wanted.dtype} {wanted.shape}, got {own.dtype} {own.shape}; "
                "hidden, components, reach and channels must be those it was trained with"
            )
    digest = zlib.crc32(repr((dataclasses.astuple(settings), tuple(shape))).encode())
    return State(
        (height, width, channels),
        theta,
        init_optimizer(settings, theta),
        zlib.crc32(_bytes(theta), digest),
    )


def encode(settings: Settings, state: State, images: ArrayLike) -> tuple[State, bytes]:
    """Codes one batch; pure.

    Args:
      settings: of the stream.
      state: after the batches before.
      images: integers [n, H, W, Ch] below the alphabet's size, n at most the batch size.

    Returns:
      The state for the next batch, and the segment: less than 6 bytes (4 of them checksum) above
      the ideal `code_length`. Neither its own length nor n is in it.

    Raises:
      ValueError: images that are not integers, of another shape, outside the alphabet or too
        many; or weights that are no longer finite.
    """
    batch = _checked(settings, state, images)
    sizes, starts, inputs = _intervals(settings, state, batch)
    code = encode_intervals(starts.ravel(), sizes.ravel())
    after = _adapt(settings, state, code, batch, inputs)
    if not all(np.isfinite(leaf).all() for leaf in after.theta):
        raise ValueError(
            "the model's weights are no longer finite; lower learning_rate from "
            f"{settings.learning_rate}"
        )
    return after, code + after.digest.to_bytes(_CHECKSUM, "big")


def decode(
    settings: Settings, state: State, segment: bytes, num_images: int
) -> tuple[State, NDArray[np.uint8]]:
    """Reads one batch; pure.

    Args:
      settings: of the stream.
      state: after the batches before.
      segment: of `encode`.
      num_images: n, at most the batch size.

    Returns:
      The state for the next batch, and the images, uint8 [n, H, W, Ch].

    Raises:
      SegmentError: the segment is damaged, is not the next one of this stream, was written with
        other settings, theta_0 or number of images, or on a machine whose floats are others.
      ValueError: more images than a batch holds.
    """
    batch = _checked(settings, state, np.zeros((num_images, *state.shape), np.uint8))
    decoder = Decoder(segment[:-_CHECKSUM])
    which = np.arange(num_images)

    def read(place: int, edges: NDArray[np.int64]) -> None:
        row, column, channel = order[place]
        batch[:, row, column, channel] = decoder.decode(list(edges), which)

    order = places(state.shape)
    inputs = _walk(settings, state, batch, read)
    after = _adapt(settings, state, segment[:-_CHECKSUM], batch, inputs)
    if after.digest.to_bytes(_CHECKSUM, "big") != segment[-_CHECKSUM:]:
        raise SegmentError(
            f"a segment of {len(segment)} bytes for {num_images} images fails its checksum: it is "
            "damaged, not the next one of its stream, written with other settings or another "
            "theta_0, or with another type of device, version of JAX or XLA_FLAGS; decode all "
            "segments in order, where they were written"
        )
    return after, batch


def code_length(settings: Settings, state: State, images: ArrayLike) -> float:
    """The ideal length of a batch in bits: sum of -log2 p(value | theta_{t-1}), p as in the tables.

    Arguments and errors as for `encode`.
    """
    sizes, _, _ = _intervals(settings, state, _checked(settings, state, images))
    return float(-np.log2(sizes / TOTAL).sum())


def _checked(settings: Settings, state: State, images: ArrayLike) -> NDArray[np.uint8]:
    """A batch as uint8 [n, H, W, Ch]."""
    array = np.asarray(images)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"images must be integers, got {array.dtype}")
    if array.ndim != 4 or array.shape[1:] != state.shape:
        height, width, channels = state.shape
        raise ValueError(f"images must be [n, {height}, {width}, {channels}], got {array.shape}")
    if not 1 <= len(array) <= settings.batch_size:
        raise ValueError(f"a batch has 1 to {settings.batch_size} images, got {len(array)}")
    if not 0 <= array.min() <= array.max() < settings.alphabet:
        raise ValueError(
            f"values must be from 0 to {settings.alphabet - 1}, got {array.min()} to {array.max()}"
        )
    return array.astype(np.uint8)


def _walk(
    settings: Settings,
    state: State,
    batch: NDArray[np.uint8],
    visit: Callable[[int, NDArray[np.int64]], None],
) -> NDArray[np.float32]:
    """Goes through the places of a batch in order, at both ends; returns all inputs [V, B, D].

    `visit(place, edges [n, A + 1])` may set the batch's values at the place.
    """
    every = []
    for index, place in enumerate(places(state.shape)):
        here = inputs_at(settings, batch, *place)
        # Always the full batch size, so always the same program.
        here = np.pad(here, ((0, settings.batch_size - len(batch)), (0, 0)))
        sizes = np.asarray(frequencies(settings, state.theta, here))[: len(batch)]
        visit(index, np.pad(np.cumsum(sizes, axis=1, dtype=np.int64), ((0, 0), (1, 0))))
        every.append(here)
    return np.stack(every)


def _intervals(
    settings: Settings, state: State, batch: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Sizes and starts of all values' intervals, [V, n], and the model's inputs."""
    values = _values(batch).astype(np.int64)
    sizes, starts = np.zeros((2, *values.shape), np.int64)

    def look(place: int, edges: NDArray[np.int64]) -> None:
        ends = np.stack([values[place], values[place] + 1], axis=1)
        first, last = np.take_along_axis(edges, ends, axis=1).T
        starts[place], sizes[place] = first, last - first

    inputs = _walk(settings, state, batch, look)
    return sizes, starts, inputs


def _adapt(
    settings: Settings,
    state: State,
    code: bytes,
    batch: NDArray[np.uint8],
    inputs: NDArray[np.float32],
) -> State:
    """theta_t = f(theta_{t-1}, batch t), and the checksum of all up to here."""
    values = np.zeros(inputs.shape[:2], np.int32)
    values[:, : len(batch)] = _values(batch)
    weights = np.arange(settings.batch_size) < len(batch)
    theta, optimizer = update(
        settings, state.theta, state.optimizer, inputs, values, jnp.float32(weights)
    )
    digest = state.digest
    for part in (code, str(batch.shape).encode(), batch.tobytes(), _bytes((theta, optimizer))):
        digest = zlib.crc32(part, digest)
    return State(state.shape, theta, optimizer, digest)


def _values(batch: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, H, W, Ch] -> [V, n], in the order of coding."""
    return batch.reshape(len(batch), -1).T


def _bytes(tree: object) -> bytes:
    """Every leaf's bytes."""
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))
