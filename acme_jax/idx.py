"""Reader of idx files, the format of MNIST and its relatives."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class DataError(ValueError):
    """Data that cannot be used; the message says what is wrong and how to mend it."""


def read_idx(path: str | Path, *, num_dims: int | None = None) -> np.ndarray:
    """Reads one idx file (the format of MNIST), gzip-compressed or plain.

    Args:
      path: the file; compression is recognised by content, not by name.
      num_dims: expected number of dimensions (3 for images, 1 for labels); None: any.

    Returns:
      The array in native byte order, read-only.

    Raises:
      DataError: missing, truncated, not an idx file, other dimensions, or trailing bytes.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except EOFError:
        raise DataError(f"{path} is truncated (its gzip stream ends early); get it again") from None
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); get it again") from None
    if len(raw) < 4:
        raise DataError(f"{path} is truncated: {len(raw)} bytes, an idx header has at least 4")
    if raw[:2] != b"\0\0" or raw[2] not in _DTYPES or raw[3] == 0:
        raise DataError(
            f"{path} is not an idx file: its magic number is 0x{raw[:4].hex()}, expected "
            "0x0000 followed by a data type and the number of dimensions (0x00000803 for "
            "images, 0x00000801 for labels)"
        )
    dims = raw[3]
    if num_dims is not None and dims != num_dims:
        raise DataError(
            f"{path} has the wrong magic number 0x{raw[:4].hex()}: {dims} dimensions, expected "
            f"{num_dims}; images and labels may be swapped"
        )
    start = 4 + 4 * dims
    if len(raw) < start:
        raise DataError(f"{path} is truncated: {len(raw)} bytes, its header alone has {start}")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", dims, offset=4))
    dtype = np.dtype(_DTYPES[raw[2]])
    expected = start + math.prod(shape) * dtype.itemsize
    if len(raw) < expected:
        raise DataError(
            f"{path} is truncated: {len(raw)} bytes, its header promises {expected} "
            f"(shape {list(shape)}); get it again"
        )
    if len(raw) > expected:
        raise DataError(
            f"{path} has {len(raw) - expected} unexpected bytes after its data "
            f"(shape {list(shape)}); get it again"
        )
    array = np.frombuffer(raw, dtype, offset=start).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)


class IdxParts(NamedTuple):
    """The training part and, after it, the official test part of an MNIST-like directory."""

    images: np.ndarray  # [N, height, width] uint8
    labels: np.ndarray  # [N] int32
    official_test: np.ndarray  # [N] bool


def read_idx_directory(directory: Path, hint: str) -> IdxParts:
    """Reads the four files of MNIST and its relatives, plain or .gz.

    Args:
      directory: holds {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz].
      hint: how to get the files, for the message about a missing one.

    Raises:
      DataError: a file is missing or damaged, or two do not belong together.
    """
    images, labels = [], []
    for part in ("train", "t10k"):
        images.append(read_idx(_idx_file(directory, f"{part}-images-idx3-ubyte", hint), num_dims=3))
        labels.append(read_idx(_idx_file(directory, f"{part}-labels-idx1-ubyte", hint), num_dims=1))
        if len(images[-1]) != len(labels[-1]):
            raise DataError(
                f"{directory}: {len(images[-1])} {part} images but {len(labels[-1])} {part} "
                "labels; the two files do not belong together"
            )
        if images[-1].dtype != np.uint8 or labels[-1].dtype.kind not in "iu":
            raise DataError(
                f"{directory}: {part} images are {images[-1].dtype} and labels "
                f"{labels[-1].dtype}; expected bytes"
            )
    if images[0].shape[1:] != images[1].shape[1:]:
        raise DataError(
            f"{directory}: train images are {list(images[0].shape[1:])} but t10k images "
            f"{list(images[1].shape[1:])} pixels; the files do not belong together"
        )
    pixels = np.concatenate(images)
    return IdxParts(
        pixels,
        np.concatenate(labels).astype(np.int32),
        np.arange(len(pixels)) >= len(images[0]),
    )


def _idx_file(directory: Path, name: str, hint: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{directory / name}.gz is missing. {hint}")
