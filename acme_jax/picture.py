"""One encoded picture (any format that Pillow reads) -> a square of bytes."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps


class Unreadable(ValueError):
    """A picture that cannot be decoded; the message says why, not which."""


def decode(file: BinaryIO, size: int) -> np.ndarray:
    """Decodes a picture, cuts out its central square and resizes that to size x size.

    The square has the shorter side, so that nothing is distorted and both ends of the longer
    side are lost. Resizing is bilinear with antialiasing; a square smaller than `size` is
    enlarged. A JPEG more than twice too large is decoded at a half, quarter or eighth of its
    size first. The picture is turned upright if it says so (EXIF); of several frames the first
    counts, transparency is dropped, grey is repeated to three channels and 16 bits become 8.

    Returns:
      [size, size, 3] uint8.

    Raises:
      Unreadable: truncated, damaged, not a picture, or so large that it looks like an attack
        (more than twice `PIL.Image.MAX_IMAGE_PIXELS`).
    """
    try:
        with Image.open(file) as opened:
            if min(opened.size) > 2 * size:
                opened.draft(None, (2 * size, 2 * size))
            picture = ImageOps.exif_transpose(opened)
            side = min(picture.size)
            left, top = ((n - side) // 2 for n in picture.size)
            square = _rgb(picture).resize(
                (size, size),
                Image.Resampling.BILINEAR,
                box=(left, top, left + side, top + side),
            )
            return np.asarray(square)
    except MemoryError:
        raise
    # Decoders meet damage with nearly anything: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            text = "not a picture of a known format"
        raise Unreadable(text) from None


def _rgb(picture: Image.Image) -> Image.Image:
    """Eight bits a channel."""
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers without a known range")
    if picture.mode.startswith("I"):
        # Pillow gives 16-bit grey as I;16 or as 32-bit I, and its own conversion cuts off at 255.
        pixels = np.asarray(picture).astype(np.int64)
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError("its grey values have more than 16 bits")
        picture = Image.fromarray((pixels >> 8).astype(np.uint8))
    return picture.convert("RGB")


def readable_suffixes() -> frozenset[str]:
    """File name suffixes, lower case with their dot, of the formats that Pillow decodes."""
    registered = Image.registered_extensions()  # Fills Image.OPEN too.
    return frozenset(suffix for suffix, name in registered.items() if name in Image.OPEN)
