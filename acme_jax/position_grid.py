"""Position embeddings of another image size, by bicubic interpolation over the patch grid."""

from __future__ import annotations

import numpy as np

_A = -0.75  # torch's choice of the cubic kernel's free parameter (Keys 1981)


def resize_positions(
    position: np.ndarray, old: tuple[int, int], new: tuple[int, int], num_prefix_tokens: int
) -> np.ndarray:
    """Interpolates the patches' rows; prefix tokens keep theirs.

    The same as `interpolate_pos_encoding` of transformers (torch's bicubic interpolation, corners
    not aligned, no antialiasing), which handles square `old` only.

    Args:
      position: [prefix + old rows * old columns, D], prefix tokens first.
      old: rows and columns of patches that `position` is for.
      new: rows and columns of patches wanted.
      num_prefix_tokens: rows before the patches'.

    Returns:
      [prefix + new rows * new columns, D] of the same dtype.
    """
    if old == new:
        return position
    prefix, patches = np.split(position, [num_prefix_tokens])
    grid = patches.reshape(*old, -1).astype(np.float64)
    rows, columns = (_weights(*sizes) for sizes in zip(old, new, strict=True))
    resized = np.einsum("io,jp,opd->ijd", rows, columns, grid, optimize=True)
    return np.concatenate([prefix, resized.reshape(-1, position.shape[1])]).astype(position.dtype)


def _weights(old: int, new: int) -> np.ndarray:
    """[new, old]: what each old place adds to each new one along one axis."""
    weights = np.zeros((new, old))
    where = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(where).astype(int)
    for tap in range(-1, 3):
        distance = np.abs(where - (first + tap))
        near = ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
        far = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
        # Beyond the border the outermost place is repeated.
        place = np.clip(first + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), place), np.where(distance <= 1, near, far))
    return weights
