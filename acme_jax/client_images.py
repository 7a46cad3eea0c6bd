"""Reading some clients' images only, for a process that owns only those clients.

All labels are read by every process (a byte a sample), because they decide who owns what; of the
images only the wanted ones are kept, so that a process's memory follows its own clients.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np

from acme_jax.config import DataConfig
from acme_jax.datasets import FASHION_DIRECTORIES, load_images
from acme_jax.idx import DataError, read_idx
from fed.clients import ClientData

Name = Literal["fashion_mnist", "mnist5k"]

_BLOCK = 1024  # images decompressed at a time


class Pool(NamedTuple):
    """Where images come from: their labels, and how to read them."""

    labels: np.ndarray  # [N] int32
    source: Path | np.ndarray
    """An idx file of images, or the images [N, height, width, channels] float32 themselves."""

    def images(self, rows: np.ndarray) -> np.ndarray:
        """float32 [len(rows), height, width, channels] in [0, 1], in the order of the rows.

        Raises:
          DataError: the file is damaged.
        """
        if isinstance(self.source, np.ndarray):
            return self.source[rows]
        return read_idx_images(self.source, rows)[..., None].astype(np.float32) / np.float32(255)


def open_pool(name: Name, path: str | None = None) -> Pool:
    """The training images of a dataset; `mnist5k`, 4 MB, is held in memory whole.

    Args:
      name: of the dataset.
      path: directory of the idx files (`fashion_mnist` only); None: where Debian puts them.

    Raises:
      DataError: files are missing or damaged.
    """
    if name == "mnist5k":
        data = load_images(DataConfig(name="mnist5k", path=path))
        return Pool(data.labels, data.inputs)
    candidates = FASHION_DIRECTORIES if path is None else (path,)
    for directory in map(Path, candidates):
        for ending in ("", ".gz"):
            images = directory / f"train-images-idx3-ubyte{ending}"
            labels = directory / f"train-labels-idx1-ubyte{ending}"
            if images.is_file() and labels.is_file():
                return Pool(read_idx(labels, num_dims=1).astype(np.int32), images)
    raise DataError(
        f"Fashion-MNIST is in none of {', '.join(candidates)}; on Debian: apt-get install "
        "dataset-fashion-mnist. Or give the directory of its idx files, or use mnist5k"
    )


def read_idx_images(path: Path, rows: np.ndarray) -> np.ndarray:
    """uint8 [len(rows), height, width]: these images of an idx file, plain or gzip-compressed.

    The file is read once, in blocks; only the wanted images are kept.

    Raises:
      DataError: not an idx file of images, truncated, or too short for the rows.
    """
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with cast(BinaryIO, gzip.open(raw)) if compressed else raw as file:
                return _pick(path, file, rows)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); get it again") from None


def _pick(path: Path, file: BinaryIO, rows: np.ndarray) -> np.ndarray:
    header = file.read(16)
    if len(header) < 16 or header[:4] != b"\0\0\x08\x03":
        raise DataError(f"{path} is not an idx file of images (magic number 0x00000803)")
    count, height, width = (int(n) for n in np.frombuffer(header, ">u4", 3, offset=4))
    if rows.size and not 0 <= rows.min() <= rows.max() < count:
        raise DataError(f"{path} has {count} images; rows {rows.min()} to {rows.max()} are asked")
    picked = np.empty((rows.size, height, width), np.uint8)
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    for first, block in _blocks(path, file, count, height * width):
        begin, end = np.searchsorted(ascending, [first, first + len(block)])
        places = order[begin:end]
        picked[places] = block[rows[places] - first].reshape(-1, height, width)
    return picked


def _blocks(path: Path, file: BinaryIO, count: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
    for first in range(0, count, _BLOCK):
        number = min(_BLOCK, count - first)
        raw = file.read(number * size)
        if len(raw) < number * size:
            raise DataError(
                f"{path} is truncated: its header promises {count} images; get it again"
            )
        yield first, np.frombuffer(raw, np.uint8).reshape(number, size)


def load_clients(pool: Pool, parts: list[np.ndarray], mine: np.ndarray) -> ClientData:
    """NumPy arrays of some clients, padded as the largest of all is.

    Args:
      pool: of the images.
      parts: for every client of the job, the rows of the pool that it owns.
      mine: the clients to load.

    Returns:
      Leaves [len(mine), ...].
    """
    sizes: Any = np.array([len(parts[client]) for client in mine], np.int32)
    flat = np.concatenate([parts[client] for client in mine] or [np.empty(0, np.int64)])
    slots = np.arange(max(map(len, parts)))[None] < sizes[:, None]  # [len(mine), N]
    images = pool.images(flat)
    inputs: Any = np.zeros((*slots.shape, *images.shape[1:]), np.float32)
    labels: Any = np.zeros(slots.shape, np.int32)
    inputs[slots], labels[slots] = images, pool.labels[flat]
    return ClientData(inputs, labels, sizes)
