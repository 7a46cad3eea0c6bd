r"""Packs uint8 images without loss into one file, and unpacks them.

    python scripts/pack_images.py pack IMAGES.npy OUT.osoa [--mode neural]
    python scripts/pack_images.py unpack OUT.osoa IMAGES.npy

`IMAGES.npy` holds uint8 [N, H, W] or [N, H, W, channels]; `digits` in its place takes
scikit-learn's. Prints the bytes beside those of raw images, zlib and PNG. "minimal" (the default)
adapts integer tables and reads everywhere; "neural" is smaller and slower, and its files can be
read only by the same binary on the same type of device (`fed.neural_coding`): packing therefore
ends with unpacking in this process, and nothing is written unless the images come back.

Digits (1,797 of 8 x 8): raw 115,008 bytes, zlib 44,077, PNG 56,948, minimal 36,173, neural 30,585
(JAX 0.10.2, CPU). The defaults of the neural mode were chosen on these images.
"""

from __future__ import annotations

import dataclasses
import io
import sys
import zlib
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray

from fed.image_file import Mode, pack, unpack


@dataclasses.dataclass(frozen=True)
class Pack:
    """Images into a file."""

    images: Annotated[Path, tyro.conf.Positional]
    """An .npy file, or the word `digits`."""
    out: Annotated[Path, tyro.conf.Positional]
    mode: Mode = "minimal"
    batch_size: int | None = None
    """Images between two updates; neural mode only, as the following."""
    steps: int | None = None
    """Optimiser steps on every batch."""
    learning_rate: float | None = None
    hidden: int | None = None
    """Width of the network."""

    @property
    def settings(self) -> dict[str, float]:
        """Those that were given."""
        names = ("batch_size", "steps", "learning_rate", "hidden")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclasses.dataclass(frozen=True)
class Unpack:
    """A file into images."""

    packed: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]


def read_images(path: Path) -> NDArray[np.uint8]:
    """The images of an .npy file, or scikit-learn's digits.

    Raises:
      ValueError: not an .npy file of numbers.
    """
    if str(path) == "digits":
        from sklearn.datasets import load_digits

        return load_digits().images.astype(np.uint8)
    try:
        images = np.load(path, allow_pickle=False)
    except (EOFError, ValueError):
        images = None
    if not isinstance(images, np.ndarray):
        raise ValueError(f"{path} is not an .npy file of numbers; write one with numpy.save")
    return images


def png_bytes(images: NDArray[np.uint8]) -> int | None:
    """Bytes of all images in one PNG, below one another; None without Pillow, or other channels."""
    try:
        from PIL import Image
    except ImportError:
        return None
    strip = images.reshape(-1, *images.shape[2:])
    if strip.ndim == 3 and strip.shape[-1] == 1:
        strip = strip[..., 0]
    if strip.ndim == 3 and strip.shape[-1] not in (3, 4):
        return None
    file = io.BytesIO()
    Image.fromarray(strip).save(file, "png", optimize=True)
    return file.tell()


def report(images: NDArray[np.uint8], packed: int, mode: str) -> str:
    """A line for each way to store the images."""
    sizes = {"raw": images.size, "zlib": len(zlib.compress(images.tobytes(), 9))}
    png = png_bytes(images)
    if png is not None:
        sizes["png"] = png
    sizes[mode] = packed
    return "\n".join(
        f"{name:8} {size:12,} bytes {100 * size / images.size:6.1f} %"
        for name, size in sizes.items()
    )


def main() -> None:
    """Packs or unpacks."""
    arguments = tyro.cli(Pack | Unpack)
    try:
        if isinstance(arguments, Unpack):
            images = unpack(arguments.packed.read_bytes())
            with arguments.out.open("wb") as file:
                np.save(file, images)
            print(f"{arguments.out}: uint8 {images.shape}, checksums right")
            return
        images = read_images(arguments.images)
        data = pack(images, arguments.mode, arguments.settings)
        if not np.array_equal(unpack(data), images):
            raise ValueError("the images do not come back; nothing was written")
        arguments.out.write_bytes(data)
        print(report(images, len(data), arguments.mode))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
