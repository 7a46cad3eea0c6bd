"""Pictures decoded once into a file of equal squares, which is then mapped, never loaded.

A store is a directory of the cache named by a fingerprint of what was decoded and how:
`images.npy`, uint8 [M, size, size, 3], and `meta.json`. It is written under another name and
renamed when whole.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from acme_jax.config import DataConfig
from acme_jax.idx import DataError
from acme_jax.picture import Unreadable, decode

Progress = Callable[[int, int], None]
"""Called with (pictures decoded, pictures in all)."""

DEFAULT_IMAGE_SIZE = 224
VERSION = 1
"""Part of the fingerprint: raised whenever decoding changes."""
_AT_ONCE = 64
_HEADER_BYTES = 128
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Sources(NamedTuple):
    """Encoded pictures."""

    names: Sequence[str]  # N, for messages
    open: Callable[[int], BinaryIO]  # of picture i; called by several threads
    fingerprint: str  # changes when any picture does


class Store(NamedTuple):
    """Decoded pictures."""

    images: np.ndarray  # [M, size, size, 3] uint8, memory-mapped, M <= N
    kept: np.ndarray  # [M] int64, which of the N pictures they are
    skipped: tuple[str, ...]  # names of the N - M that cannot be decoded


def file_sources(root: Path, files: Sequence[str]) -> Sources:
    """Files as sources, identified by relative path, size and time of change.

    Raises:
      DataError: files are missing.
    """
    digest = hashlib.sha256()
    missing = []
    for name in files:
        try:
            status = (root / name).stat()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:
            missing.append(name)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} pictures are missing or cannot be read in {root}, "
            f"first {missing[0]}"
        )
    return Sources(files, lambda i: (root / files[i]).open("rb"), digest.hexdigest())


def open_store(sources: Sources, config: DataConfig, progress: Progress | None = None) -> Store:
    """Decodes the pictures, or opens the store of an earlier run that did.

    Each is cut to its central square and resized to `config.image_size` (see
    `acme_jax.picture`). Pictures that are left out are named in a warning.

    Args:
      sources: the pictures.
      config: image_size, cache and on_corrupt.
      progress: called now and then while decoding.

    Raises:
      DataError: a picture that cannot be decoded (unless on_corrupt is "skip"), no picture
        that can, no room on the disk, or a damaged store.
    """
    size = config.image_size or DEFAULT_IMAGE_SIZE
    key = hashlib.sha256(f"{VERSION} {size} {sources.fingerprint}".encode()).hexdigest()[:24]
    directory = _cache(config.cache) / key
    if not directory.exists():
        _decode_all(sources, directory, size, config.on_corrupt == "skip", progress)
    store = _read(directory, sources, size)
    if store.skipped:
        what = (
            f"{len(store.skipped)} of {len(sources.names)} pictures cannot be decoded: "
            f"{', '.join(store.skipped[:10])}{', ...' if len(store.skipped) > 10 else ''}"
        )
        if config.on_corrupt == "refuse":
            raise DataError(f"{what}; repair or remove them, or give --data.on_corrupt skip")
        warnings.warn(f"{what}; they and their labels are left out", stacklevel=2)
    return store


def _cache(cache: str | None) -> Path:
    if cache is not None:
        return Path(cache).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "acme_jax"


def _decode_all(
    sources: Sources, directory: Path, size: int, skip: bool, progress: Progress | None
) -> None:
    num, row_bytes = len(sources.names), size * size * 3
    skipped: list[int] = []
    with _whole_or_nothing(directory, num * row_bytes) as temporary:
        # Written by ordinary writes: where a disk is full they raise, a mapped page kills.
        with (temporary / "images.npy").open("wb") as file:
            file.write(bytes(_HEADER_BYTES))
            for i, picture in enumerate(_decoded(sources, size)):
                if isinstance(picture, Unreadable):
                    if not skip:
                        raise DataError(
                            f"{sources.names[i]} cannot be decoded ({picture}); repair or remove "
                            "it, or give --data.on_corrupt skip"
                        )
                    skipped.append(i)
                else:
                    file.write(picture.tobytes())
                if progress is not None and ((i + 1) % _AT_ONCE == 0 or i + 1 == num):
                    progress(i + 1, num)
            if len(skipped) == num:
                raise DataError(
                    f"none of the {num} pictures can be decoded, first {sources.names[0]}"
                )
            file.seek(0)
            file.write(_npy_header((num - len(skipped), size, size, 3)))
            file.flush()
            os.fsync(file.fileno())
        meta = {"num_sources": num, "skipped": skipped}
        (temporary / "meta.json").write_text(json.dumps(meta))


def _decoded(sources: Sources, size: int) -> Iterator[np.ndarray | Unreadable]:
    """The pictures in order, decoded by several threads a few at a time."""

    def one(i: int) -> np.ndarray | Unreadable:
        try:
            with sources.open(i) as file:
                return decode(file, size)
        except Unreadable as error:
            return error
        except OSError as error:
            return Unreadable(error.strerror or str(error))

    num = len(sources.names)
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, num, _AT_ONCE):
            yield from pool.map(one, range(start, min(start + _AT_ONCE, num)))


@contextlib.contextmanager
def _whole_or_nothing(directory: Path, num_bytes: int) -> Iterator[Path]:
    """A temporary directory that becomes `directory` at the end, or vanishes on any error."""
    temporary = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(directory.parent).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        temporary = Path(
            tempfile.mkdtemp(prefix=f"{directory.name}.partial-", dir=directory.parent)
        )
        yield temporary
        # Another process may have been faster; what it wrote is the same.
        with contextlib.suppress(FileExistsError):
            _rename(temporary, directory)
    except OSError as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if error.errno in _FULL:
            free = shutil.disk_usage(directory.parent).free
            raise DataError(
                f"no room for decoded pictures in {directory.parent}: {num_bytes / 1e6:.1f} MB "
                f"needed, {free / 1e6:.1f} MB free; free some, or name another disk with "
                "--data.cache"
            ) from None
        raise DataError(
            f"decoded pictures cannot be written to {directory.parent} ({error.strerror}); name "
            "another directory with --data.cache"
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, directory: Path) -> None:
    try:
        temporary.rename(directory)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError from None
        raise


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """Format 1.0 of numpy.lib.format, always of the same length."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    start = b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little")
    return start + text.ljust(_HEADER_BYTES - 11).encode("ascii") + b"\n"


def _read(directory: Path, sources: Sources, size: int) -> Store:
    try:
        meta: dict[str, Any] = json.loads((directory / "meta.json").read_text())
        images = np.load(directory / "images.npy", mmap_mode="r", allow_pickle=False)
        kept = np.setdiff1d(np.arange(meta["num_sources"]), np.array(meta["skipped"], np.int64))
        sound = meta["num_sources"] == len(sources.names) and images.dtype == np.uint8
        if not sound or images.shape != (len(kept), size, size, 3):
            raise ValueError("its parts do not fit together")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the decoded pictures in {directory} are damaged ({error}); delete that directory, "
            "the next run decodes them again"
        ) from None
    return Store(images, kept, tuple(sources.names[i] for i in meta["skipped"]))
