"""A file of images at rest, coded without loss in one pass (OSOA, arXiv 2111.01662).

    data = pack(images, "neural")          # uint8 [N, H, W] or [N, H, W, Ch]
    images = unpack(data)

Three modes: "neural" learns a network while it codes and is the smallest, but can be read only by
the same binary on the same type of device (`fed.neural_coding`); "minimal" adapts integer tables
and reads everywhere (`fed.adaptive_coding`); "none" stores.

The file, integers big-endian: `OSOA`; 1 byte version; 2 bytes length of the header; the header,
JSON with mode, shape, dtype, the model's settings and what wrote it; its CRC-32 (4 bytes); then for
every batch of images 3 bytes of length and the segment, which ends in its own checksum.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fed import adaptive_coding
from fed.adaptive_tables import Rules
from fed.errors import SegmentError

Mode = Literal["minimal", "neural", "none"]

_MAGIC, _VERSION = b"OSOA", 1
_LENGTH = 3  # bytes of a segment's length
_BATCH_BYTES = 1 << 20  # of a batch without a network
_FEW_LEVELS = 32
"""Up to here a table for every level above learns soon enough; else differences are coded."""


class _Codec(NamedTuple):
    """One mode; states are those after the batches before."""

    batch_size: int
    start: Any
    write: Callable[[Any, NDArray[np.uint8]], tuple[Any, bytes]]
    read: Callable[[Any, bytes, int], tuple[Any, NDArray[np.uint8]]]


def pack(images: ArrayLike, mode: Mode, settings: dict[str, Any] | None = None) -> bytes:
    """Images as the bytes of a file.

    Args:
      images: uint8 [N, H, W] or [N, H, W, Ch].
      mode: how.
      settings: for "neural", fields of `fed.pixel_model.Settings` that shall differ from the
        default. The alphabet is always that of the images.

    Raises:
      ValueError: images of another dtype or rank or none at all, an unknown mode, or settings out
        of range or in a mode that has none.
    """
    array = np.asarray(images)
    if array.dtype != np.uint8:
        raise ValueError(
            f"images must be uint8, got {array.dtype}; convert them without loss first"
        )
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise ValueError(
            f"images must be [N, H, W] or [N, H, W, channels], none of them 0, got {array.shape}"
        )
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if settings and mode != "neural":
        raise ValueError(f"mode {mode!r} has no settings, got {', '.join(settings)}")
    if mode == "neural":
        from fed.neural_coding import Settings

        unknown = set(settings or {}) - {field.name for field in dataclasses.fields(Settings)}
        if unknown:
            raise ValueError(f"unknown settings {', '.join(sorted(unknown))} of mode 'neural'")
    alphabet = max(2, int(array.max()) + 1)
    header: dict[str, Any] = {
        "mode": mode,
        "shape": array.shape,
        "dtype": "uint8",
        "settings": (settings or {}) | {"alphabet": alphabet},
        "writer": _here(mode),
    }
    if mode == "neural":  # all of them: a later version's defaults may differ
        header["settings"] = dataclasses.asdict(Settings(**header["settings"]))
    text = json.dumps(header, separators=(",", ":")).encode()
    start = _MAGIC + bytes([_VERSION]) + len(text).to_bytes(2, "big") + text
    parts = [start, zlib.crc32(start).to_bytes(4, "big")]
    codec = _codec(header)
    state, batches = codec.start, _with_channels(array)
    for part in _batches(len(batches), codec.batch_size):
        state, segment = codec.write(state, batches[part])
        parts += [len(segment).to_bytes(_LENGTH, "big"), segment]
    return b"".join(parts)


def unpack(data: bytes) -> NDArray[np.uint8]:
    """The images of a file.

    Args:
      data: what `pack` gave.

    Returns:
      uint8, of the shape that was packed; exactly those images.

    Raises:
      SegmentError: not such a file, of another version, damaged, cut off, or (neural mode) read
        where floats are others than where it was written.
    """
    header, rest = _header(data)
    codec = _codec(header)
    shape = tuple(header["shape"])
    images = np.zeros(shape, np.uint8)
    view, state = _with_channels(images), codec.start
    for index, part in enumerate(_batches(len(images), codec.batch_size)):
        length = int.from_bytes(rest[:_LENGTH], "big")
        segment, rest = bytes(rest[_LENGTH : _LENGTH + length]), rest[_LENGTH + length :]
        try:
            state, view[part] = codec.read(state, segment, part.stop - part.start)
        except SegmentError as error:
            writer, here = header["writer"], _here(header["mode"])
            raise SegmentError(
                f"batch {index} (images {part.start} to {part.stop - 1}): {error}"
                + (f" (written by {writer}, this is {here})" if writer != here else "")
            ) from None
    if rest:
        raise SegmentError(f"{len(rest)} bytes follow the last batch; the file is damaged")
    return images


def _header(data: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header, and what follows it."""
    if data[:4] != _MAGIC:
        raise SegmentError(f"not a file of packed images: it begins with {data[:4]!r}")
    if data[4:5] != bytes([_VERSION]):
        raise SegmentError(
            f"version {data[4:5].hex()} of the file format, but this program reads {_VERSION}"
        )
    end = 7 + int.from_bytes(data[5:7], "big")
    if zlib.crc32(data[:end]).to_bytes(4, "big") != data[end : end + 4]:
        raise SegmentError("the file's header fails its checksum; the file is damaged")
    return json.loads(data[7:end]), memoryview(data)[end + 4 :]


def _codec(header: dict[str, Any]) -> _Codec:
    """By the header alone, so the same at both ends."""
    _, *shape = _with_channels_shape(tuple(header["shape"]))
    if header["mode"] == "neural":
        return _neural(header["settings"], tuple(shape))
    size = max(1, _BATCH_BYTES // int(np.prod(shape)))
    if header["mode"] == "minimal":
        return _minimal(header["settings"]["alphabet"], shape, size)
    return _stored(shape, size)


def _neural(settings: dict[str, Any], shape: tuple[int, ...]) -> _Codec:
    from fed import neural_coding  # imports JAX, which the other modes do not need

    own = neural_coding.Settings(**settings)
    return _Codec(
        own.batch_size,
        neural_coding.start(own, shape),
        lambda state, batch: neural_coding.encode(own, state, batch),
        lambda state, segment, number: neural_coding.decode(own, state, segment, number),
    )


def _minimal(alphabet: int, shape: list[int], batch_size: int) -> _Codec:
    height, width, channels = shape
    few = alphabet <= _FEW_LEVELS
    rules = Rules(alphabet, "none" if few else "previous", num_contexts=alphabet if few else 1)

    def read(state: Any, segment: bytes, number: int) -> tuple[Any, NDArray[np.uint8]]:
        rows = (number * height, width * channels)
        state, symbols = adaptive_coding.decode(rules, state, segment, rows)
        return state, symbols.reshape(number, *shape)

    return _Codec(
        batch_size,
        adaptive_coding.start(rules),
        lambda state, batch: adaptive_coding.encode(
            rules, state, batch.reshape(-1, width * channels)
        ),
        read,
    )


def _stored(shape: list[int], batch_size: int) -> _Codec:
    """Raw bytes, each batch with a CRC-32 over everything so far."""

    def write(digest: int, batch: NDArray[np.uint8]) -> tuple[int, bytes]:
        digest = zlib.crc32(batch.tobytes(), digest)
        return digest, batch.tobytes() + digest.to_bytes(4, "big")

    def read(digest: int, segment: bytes, number: int) -> tuple[int, NDArray[np.uint8]]:
        raw = segment[:-4]
        digest = zlib.crc32(raw, digest)
        if len(raw) != number * int(np.prod(shape)) or digest.to_bytes(4, "big") != segment[-4:]:
            raise SegmentError(f"a segment of {len(segment)} bytes fails its checksum")
        return digest, np.frombuffer(raw, np.uint8).reshape(number, *shape)

    return _Codec(batch_size, 0, write, read)


def _batches(number: int, size: int) -> Iterator[slice]:
    for first in range(0, number, size):
        yield slice(first, min(first + size, number))


def _with_channels(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A view [N, H, W, Ch] of images."""
    return images.reshape(_with_channels_shape(images.shape))


def _with_channels_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 4 else (*shape, 1)


def _here(mode: Mode) -> str:
    """What writes or reads; only floats depend on it."""
    if mode != "neural":
        return "any"
    import jax

    return f"jax {jax.__version__} {jax.devices()[0].device_kind} {platform.machine()}"
