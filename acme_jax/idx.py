"""Reader of idx files, the format of MNIST and its relatives."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

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
