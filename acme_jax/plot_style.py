"""Colours and small helpers that all pictures share.

The colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.image import AxesImage

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#8a8a8a"
WIDTH = 9.6
"""Inches of a picture as wide as the page."""
RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 12,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
"""matplotlib's settings while pictures are drawn and saved."""


def edge_colour(edge: int) -> str:
    """The colour that an edge has in every picture."""
    return COLOURS[edge % len(COLOURS)]


def ink(image: AxesImage, value: float) -> str:
    """Black or white, whichever reads better on the image's colour for `value`."""
    red, green, blue, _ = image.to_rgba(np.array([value]))[0]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
