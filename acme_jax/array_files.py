"""Images and labels as NumPy or idx files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from acme_jax.idx import DataError, read_idx_directory
from acme_jax.labelled import Dataset

_IMAGES = ("images", "x", "inputs")
_LABELS = ("labels", "y")
_LAYOUT = (
    "expected an .npz file with images (or x, inputs) and labels (or y), optionally test_images "
    "and test_labels (or x_test, y_test); or a directory with images.npy and labels.npy, "
    "optionally official_test.npy (true for test images); or one with the four idx files of MNIST"
)


def read_arrays(path: str | None) -> Dataset:
    """Reads images, uint8 or float32 in [0, 1], [N, height, width] or [N, h, w, channels].

    Arrays of an .npz file are loaded, with its test part, and val part where it has one (which
    joins the training part), marked or not. images.npy of a directory stays on disk, as an
    `np.memmap`; which of its images are official test images says official_test.npy, because
    two files cannot be mapped as one.

    Returns:
      A dataset with as many classes as the largest label + 1.

    Raises:
      DataError: files or arrays missing or damaged, a wrong dtype or shape, other numbers of
        labels than of images, or labels that do not begin with 0.
    """
    if path is None:
        raise DataError(f"dataset arrays needs a path: {_LAYOUT}")
    place = Path(path).expanduser()
    if place.is_dir():
        if any(place.glob("train-images-idx3-ubyte*")):
            parts = read_idx_directory(place, "Get the four files again")
            return _dataset(place, parts.images[..., None], parts.labels, parts.official_test)
        return _read_directory(place)
    if not place.exists():
        raise DataError(f"{place} is missing; {_LAYOUT}")
    return _read_npz(place)


def _read_npz(path: Path) -> Dataset:
    try:
        # Opened here, because NumPy leaves a file that is no sound archive open.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise DataError(f"{path} is a single array; {_LAYOUT}")
            parts = {part: _part(path, archive, part) for part in ("train", "val", "test")}
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); write it again: {_LAYOUT}") from None
    found = {part: arrays for part, arrays in parts.items() if arrays is not None}
    if "train" not in found:
        raise DataError(f"{path} has arrays {', '.join(archive.files) or '(none)'}; {_LAYOUT}")
    first = found["train"][0]
    for part, (images, _) in found.items():
        if images.shape[1:] != first.shape[1:] or images.dtype != first.dtype:
            raise DataError(
                f"{path}: {part} images are {images.dtype} {list(images.shape)} but train images "
                f"{first.dtype} {list(first.shape)}; they must differ in number only"
            )
    marked = [np.full(len(labels), part == "test") for part, (_, labels) in found.items()]
    return _dataset(
        path,
        np.concatenate([images for images, _ in found.values()]),
        np.concatenate([labels for _, labels in found.values()]),
        np.concatenate(marked) if "test" in found else None,
    )


def _part(
    path: Path, archive: Mapping[str, np.ndarray], part: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """Images and labels of a part, None if there are none; the training part may go unnamed."""

    def one(kinds: tuple[str, ...]) -> str | None:
        names = [n for kind in kinds for n in (f"{part}_{kind}", f"{kind}_{part}")]
        names += kinds if part == "train" else ()
        present = [name for name in names if name in archive]
        if len(present) > 1:
            raise DataError(f"{path} has {' and '.join(present)}, keep one of them; {_LAYOUT}")
        return present[0] if present else None

    images, labels = one(_IMAGES), one(_LABELS)
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        raise DataError(
            f"{path} has {images or labels} without {'labels' if images else 'images'} of the "
            f"same part; {_LAYOUT}"
        )
    return _checked(path, images, archive[images], labels, archive[labels])


def _read_directory(directory: Path) -> Dataset:
    arrays = {}
    for name in ("images", "labels", "official_test"):
        path = directory / f"{name}.npy"
        if not path.is_file():
            if name == "official_test":
                continue
            raise DataError(f"{path} is missing; {_LAYOUT}")
        try:
            arrays[name] = np.load(path, "r" if name == "images" else None, allow_pickle=False)
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}); write it again") from None
    marked = arrays.get("official_test")
    images, labels = _checked(
        directory, "images.npy", arrays["images"], "labels.npy", arrays["labels"]
    )
    return _dataset(directory, images, labels, marked)


def _checked(
    path: Path, images_name: str, images: np.ndarray, labels_name: str, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, height, width, channels] and labels [N] int32."""
    if images.dtype not in (np.uint8, np.float32):
        raise DataError(
            f"{path}: {images_name} is {images.dtype}; convert it to uint8 (0 to 255) or float32 "
            "(0 to 1)"
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise DataError(
            f"{path}: {images_name} has shape {list(images.shape)}; expected [N, height, width] or "
            "[N, height, width, channels]"
        )
    if images.shape[3] > 4:
        turned = "; move the channels last: transpose(0, 2, 3, 1)" if images.shape[1] <= 4 else ""
        raise DataError(
            f"{path}: {images_name} has shape {list(images.shape)}, so {images.shape[3]} channels; "
            f"expected 1 to 4{turned}"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: {labels_name} is {labels.dtype} {list(labels.shape)}; expected whole numbers "
            "[N], one class number an image"
        )
    if len(images) != len(labels):
        raise DataError(
            f"{path}: {images_name} has {len(images)} images but {labels_name} {len(labels)} "
            "labels; the two do not belong together"
        )
    return images, labels


def _dataset(
    path: Path, images: np.ndarray, labels: np.ndarray, official_test: np.ndarray | None
) -> Dataset:
    if len(labels) == 0:
        raise DataError(f"{path} has no images")
    low, high = int(labels.min()), int(labels.max())
    if low != 0 or high >= len(labels):
        raise DataError(
            f"{path}: labels lie in [{low}, {high}]; they must be class numbers from 0 without "
            "large gaps: np.unique(labels, return_inverse=True)[1] makes such"
        )
    if high == 0:
        raise DataError(f"{path} has one class only (every label is 0), nothing to tell apart")
    return Dataset("arrays", images, labels.astype(np.int32), high + 1, official_test)
