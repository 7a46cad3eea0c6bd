"""CIFAR-10 and CIFAR-100 from the official archives, python or binary, or from their directories.

Formats: https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky, 2009). The archives are read
in place, without unpacking them to disk. The python ones hold pickles; those are programs, and
are read by `acme_jax.plain_pickle`, which runs none of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from acme_jax.idx import DataError
from acme_jax.labelled import Dataset
from acme_jax.plain_pickle import load_plain

_SIDE, _CHANNELS = 32, 3
_PIXELS = _SIDE * _SIDE * _CHANNELS


@dataclasses.dataclass(frozen=True)
class Archive:
    """One of the official archives: what it is called and what lies in it."""

    file: str
    md5: str
    directory: str  # that it unpacks to
    train: tuple[str, ...]  # files of train_rows images each
    test: str  # file of test_rows images
    names: str  # file of the class names
    num_classes: int
    train_rows: int
    test_rows: int

    @property
    def is_binary(self) -> bool:
        """Whether its files are records of bytes; otherwise they are pickles."""
        return self.test.endswith(".bin")


ARCHIVES: Mapping[str, tuple[Archive, ...]] = {
    "cifar10": (
        Archive(
            "cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            "cifar-10-batches-py",
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            "test_batch",
            "batches.meta",
            num_classes=10,
            train_rows=10_000,
            test_rows=10_000,
        ),
        Archive(
            "cifar-10-binary.tar.gz",
            "c32a1d4ab5d03f1284b67883e8d87530",
            "cifar-10-batches-bin",
            tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            "test_batch.bin",
            "batches.meta.txt",
            num_classes=10,
            train_rows=10_000,
            test_rows=10_000,
        ),
    ),
    "cifar100": (
        Archive(
            "cifar-100-python.tar.gz",
            "eb9058c3a382ffc7106e4002c42a8d85",
            "cifar-100-python",
            ("train",),
            "test",
            "meta",
            num_classes=100,
            train_rows=50_000,
            test_rows=10_000,
        ),
        Archive(
            "cifar-100-binary.tar.gz",
            "03b5dce01913d631647c71ecec9e9cb8",
            "cifar-100-binary",
            ("train.bin",),
            "test.bin",
            "fine_label_names.txt",
            num_classes=100,
            train_rows=50_000,
            test_rows=10_000,
        ),
    ),
}
"""The official archives by dataset; the md5 sums are those of the page above."""


def read_cifar(
    name: Literal["cifar10", "cifar100"],
    path: str | None,
    archives: Mapping[str, tuple[Archive, ...]] = ARCHIVES,
) -> Dataset:
    """Reads CIFAR-10, or CIFAR-100 with its 100 fine labels.

    An archive is checked by its md5 sum, files of a directory by their numbers of images.

    Args:
      name: which of the two.
      path: an official archive, the directory it unpacks to, or a directory with either.
      archives: what is official.

    Returns:
      uint8 images [60000, 32, 32, 3], the last 10,000 marked as official test images.

    Raises:
      DataError: no such file, another md5 sum, or a file missing or damaged.
    """
    archive, place = _locate(name, path, archives)
    num_train = archive.train_rows * len(archive.train)
    num = num_train + archive.test_rows
    images = np.empty((num, _SIDE, _SIDE, _CHANNELS), np.uint8)
    labels = np.empty(num, np.int32)
    rows = {
        file: slice(i * archive.train_rows, (i + 1) * archive.train_rows)
        for i, file in enumerate(archive.train)
    }
    rows[archive.test] = slice(num_train, num)
    missing = {*rows, archive.names}
    class_names: tuple[str, ...] = ()
    for file, raw in _archived(place) if place.is_file() else _in_directory(place, missing):
        if file not in missing:
            continue
        missing.discard(file)
        where = f"{place}: {file}"
        if file == archive.names:
            class_names = _class_names(raw, archive, where)
            continue
        expected = rows[file].stop - rows[file].start
        parse = _parse_records if archive.is_binary else _parse_pickle
        pixels, labels[rows[file]] = parse(raw, archive, where, expected)
        images[rows[file]] = pixels.reshape(-1, _CHANNELS, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    if missing:
        raise DataError(
            f"{place} lacks {', '.join(sorted(missing))}; {_how_to_get(name, archives)}"
        )
    return Dataset(
        name, images, labels, archive.num_classes, np.arange(num) >= num_train, class_names
    )


def _how_to_get(name: str, archives: Mapping[str, tuple[Archive, ...]]) -> str:
    choices = " or ".join(f"{a.file} (md5 {a.md5})" for a in archives[name])
    return (
        f"get {choices} from https://www.cs.toronto.edu/~kriz/cifar.html and give it as --data.path"
    )


def _locate(
    name: str, path: str | None, archives: Mapping[str, tuple[Archive, ...]]
) -> tuple[Archive, Path]:
    """Returns which archive it is and where: the archive itself or the unpacked directory."""
    how_to_get = _how_to_get(name, archives)
    if path is None:
        raise DataError(f"dataset {name} needs a path: {how_to_get}")
    place = Path(path).expanduser()
    if place.is_file():
        return _checked(place, name, archives), place
    if not place.is_dir():
        raise DataError(f"{place} is missing; {how_to_get}")
    for archive in archives[name]:
        for directory in (place / archive.directory, place):
            if any((directory / file).is_file() for file in (*archive.train, archive.test)):
                return archive, directory
    for archive in archives[name]:
        if (place / archive.file).is_file():
            return _checked(place / archive.file, name, archives), place / archive.file
    raise DataError(
        f"directory {place} holds neither {' nor '.join(a.file for a in archives[name])}, nor "
        f"what they unpack to; {how_to_get}"
    )


def _checked(path: Path, name: str, archives: Mapping[str, tuple[Archive, ...]]) -> Archive:
    """The official archive that the file is, by its md5 sum."""
    try:
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    for other, known in archives.items():
        for archive in known:
            if archive.md5 == md5:
                if other == name:
                    return archive
                raise DataError(f"{path} is {archive.file}; choose --data.name {other} for it")
    raise DataError(
        f"{path} ({path.stat().st_size} bytes) has md5 {md5}, so it is truncated, damaged or "
        f"another file; {_how_to_get(name, archives)}"
    )


def _archived(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name without directories, content) of each file, in the archive's order."""
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if member.isfile():
                    content = archive.extractfile(member)
                    assert content is not None  # for a file, never
                    yield PurePosixPath(member.name).name, content.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); get it again") from None


def _in_directory(directory: Path, files: set[str]) -> Iterator[tuple[str, bytes]]:
    for file in sorted(files):
        path = directory / file
        if not path.is_file():
            continue  # The caller reports everything that is missing at once.
        try:
            yield file, path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror})") from None


def _parse_records(
    raw: bytes, archive: Archive, where: str, num: int
) -> tuple[np.ndarray, np.ndarray]:
    """Records of label bytes (CIFAR-100: coarse, fine) and 3,072 pixels, plane by plane."""
    num_label_bytes = 2 if archive.num_classes == 100 else 1
    record = num_label_bytes + _PIXELS
    if len(raw) != num * record:
        raise DataError(
            f"{where} has {len(raw)} bytes, expected {num * record} ({num} records of {record}); "
            "it is truncated or another file, get it again"
        )
    table = np.frombuffer(raw, np.uint8).reshape(num, record)
    labels = table[:, num_label_bytes - 1].astype(np.int32)
    _check_labels(labels, archive, where)
    return table[:, num_label_bytes:], labels


def _parse_pickle(
    raw: bytes, archive: Archive, where: str, num: int
) -> tuple[np.ndarray, np.ndarray]:
    """A dictionary with data [num, 3072] uint8, plane by plane, and a list of labels."""
    content = _dictionary(raw, where)
    key = "fine_labels" if archive.num_classes == 100 else "labels"
    pixels, labels = content.get("data"), content.get(key)
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list):
        raise DataError(
            f"{where} must hold an array 'data' and a list '{key}'; it has "
            f"{', '.join(sorted(content)) or 'nothing'}"
        )
    if pixels.shape != (num, _PIXELS) or pixels.dtype != np.uint8:
        raise DataError(
            f"{where} has data {pixels.dtype} {list(pixels.shape)}, expected uint8 "
            f"[{num}, {_PIXELS}]; get it again"
        )
    if len(labels) != num:
        raise DataError(f"{where} has {num} images but {len(labels)} labels; get it again")
    if not all(isinstance(label, int) for label in labels):
        raise DataError(f"{where} has labels that are not whole numbers; get it again")
    _check_labels(np.array(labels), archive, where)
    return pixels, np.array(labels, np.int32)


def _check_labels(labels: np.ndarray, archive: Archive, where: str) -> None:
    bad = np.flatnonzero((labels < 0) | (labels >= archive.num_classes))
    if bad.size:
        raise DataError(
            f"{where} has {bad.size} labels out of range, first labels[{bad[0]}] = "
            f"{labels[bad[0]]}; expected 0 to {archive.num_classes - 1}"
        )


def _class_names(raw: bytes, archive: Archive, where: str) -> tuple[str, ...]:
    if archive.is_binary:
        names = [line for line in raw.decode(errors="replace").splitlines() if line.strip()]
    else:
        key = "fine_label_names" if archive.num_classes == 100 else "label_names"
        found = _dictionary(raw, where).get(key, [])
        names = [n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in found]
    if len(set(names)) != archive.num_classes:
        raise DataError(
            f"{where} has {len(set(names))} class names, expected {archive.num_classes}; "
            "get it again"
        )
    return tuple(names)


def _dictionary(raw: bytes, where: str) -> dict[str, Any]:
    content = load_plain(raw, where)
    if not isinstance(content, dict):
        raise DataError(f"{where} holds a {type(content).__name__}, expected a dictionary")
    return {
        key.decode(errors="replace") if isinstance(key, bytes) else str(key): value
        for key, value in content.items()
    }
