"""Folders of pictures, one directory a class."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from acme_jax.config import DataConfig
from acme_jax.idx import DataError
from acme_jax.image_store import Progress, file_sources, open_store
from acme_jax.labelled import Dataset
from acme_jax.picture import readable_suffixes

_TEST_PARTS = ("test", "val", "valid", "validation")
"""The first of these that is there is the official test part; the others are trained on."""
_LAYOUT = (
    "expected <path>/<class>/<pictures>, or <path>/train/<class>/<pictures> and test/ or val/ "
    "the same"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """Picture files and their labels, before anything is decoded."""

    root: Path
    files: Sequence[str]  # N, relative to root, with forward slashes
    labels: np.ndarray  # [N] int32
    class_names: tuple[str, ...]  # by label
    official_test: np.ndarray | None = None  # [N] bool


def read_image_folder(config: DataConfig, progress: Progress | None = None) -> Dataset:
    """Reads `config.path`: one directory a class, or such directories in train/ and test/.

    Classes are the names of the directories, sorted; files are taken in sorted order, from
    deeper directories too. Hidden files and those whose suffix names no format that Pillow
    reads are not looked at. With test/ and val/ both, val/ counts as training data, because
    the library divides that itself; without test/, val/ is the official test part.

    Returns:
      uint8 images [N, image_size, image_size, 3], memory-mapped.

    Raises:
      DataError: another layout, no pictures, one class only, or as of `image_store.open_store`.
    """
    if config.path is None:
        raise DataError(f"dataset image_folder needs a directory as --data.path; {_LAYOUT}")
    return decoded("image_folder", list_folder(Path(config.path).expanduser()), config, progress)


def decoded(
    name: str, listing: Listing, config: DataConfig, progress: Progress | None = None
) -> Dataset:
    """Decodes the listed pictures; the rows of those that are left out are dropped.

    Raises:
      DataError: as of `image_store.open_store` and `Dataset`.
    """
    store = open_store(file_sources(listing.root, listing.files), config, progress)
    marked = listing.official_test
    return Dataset(
        name,
        store.images,
        listing.labels[store.kept],
        len(listing.class_names),
        None if marked is None else marked[store.kept],
        listing.class_names,
    )


def list_folder(root: Path) -> Listing:
    """Lists the pictures of an image folder.

    Raises:
      DataError: as of `read_image_folder`, before decoding.
    """
    top = _directories(root)
    if "train" in top and _directories(root / "train"):
        tests = [part for part in _TEST_PARTS if part in top]
        others = sorted(set(top) - {"train", *tests})
        if others:
            raise DataError(
                f"{root} has train/ and also {', '.join(others)}; move those elsewhere: {_LAYOUT}"
            )
        parts = {"train": False}
        parts.update({part: part == tests[0] for part in tests})
    else:
        parts = {"": False}
    files: list[str] = []
    classes: list[str] = []
    is_test: list[bool] = []
    for part, official in parts.items():
        for name in _directories(root / part):
            found = _pictures(root, root / part / name)
            if not found:
                raise DataError(
                    f"class directory {root / part / name} has no pictures (suffixes such as "
                    ".jpg or .png); fill or remove it"
                )
            files += found
            classes += [name] * len(found)
            is_test += [official] * len(found)
    if not files:
        raise DataError(f"{root} has no class directories; {_LAYOUT}")
    known = {c for c, test in zip(classes, is_test, strict=True) if not test}
    unknown = sorted(set(classes) - known)
    if unknown:
        raise DataError(f"{root}: class {unknown[0]} is in the test part but not in train/")
    if len(known) < 2:
        raise DataError(
            f"{root} has one class only ({classes[0]}), nothing to tell apart; {_LAYOUT}"
        )
    class_names = tuple(sorted(known))
    labels = np.array([class_names.index(c) for c in classes], np.int32)
    return Listing(root, files, labels, class_names, np.array(is_test) if any(is_test) else None)


def _directories(root: Path) -> list[str]:
    """Names of the directories in it that are not hidden, sorted."""
    try:
        with os.scandir(root) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__"))]
    except FileNotFoundError:
        raise DataError(f"{root} is missing; {_LAYOUT}") from None
    except OSError as error:
        raise DataError(f"{root} cannot be listed ({error.strerror}); {_LAYOUT}") from None
    return sorted(names)


def _pictures(root: Path, directory: Path) -> list[str]:
    """Pictures below a directory, relative to root, sorted."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed ({error.strerror})") from None

    suffixes = readable_suffixes()
    return sorted(
        (Path(where) / name).relative_to(root).as_posix()
        for where, _, names in os.walk(directory, onerror=fail)
        for name in names
        if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes
    )
