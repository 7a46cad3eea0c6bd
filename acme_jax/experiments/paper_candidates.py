"""The paper's own 400 candidate backbones, with its models of what they cost.

A grid of 20 depths by 20 widths of ViT-B. Size, latency and energy are the published code's
(`nas.cost.paper_costs`), the accuracy is a quadratic in depth and width that is fitted to its 16
measured sub-networks. All in NumPy float64, so that the paper's numbers come out to the last digit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from nas import cost

LINEAR_ACCURACY = {
    (1.0, 1.0): 0.9207, (1.0, 0.75): 0.9060, (1.0, 0.5): 0.8677, (1.0, 0.25): 0.7054,
    (0.75, 1.0): 0.8955, (0.75, 0.75): 0.8723, (0.75, 0.5): 0.8075, (0.75, 0.25): 0.6206,
    (0.5, 1.0): 0.7921, (0.5, 0.75): 0.7337, (0.5, 0.5): 0.6401, (0.5, 0.25): 0.4236,
    (0.25, 1.0): 0.4381, (0.25, 0.75): 0.3990, (0.25, 0.5): 0.3375, (0.25, 0.25): 0.2262,
}  # fmt: skip
"""By (depth, width): CIFAR-100 accuracy with the linear header, from the paper's figures."""

NUM_STEPS = 20
"""Depths, and widths, from 0 to 1."""
NUM_UNITS = 12
"""Blocks, and heads of a block, of the full network."""


class Candidates(NamedTuple):
    """Backbones to choose from, [P]; costs run from 0 (the cheapest) to 1 (the dearest)."""

    units: np.ndarray  # [P, 2] int: heads and blocks kept
    accuracy: np.ndarray  # in [0, 1], not normalised
    size: np.ndarray
    latency: np.ndarray
    energy: np.ndarray


def coefficients() -> np.ndarray:
    """Of the accuracy, [6]: 1, m, w, m^2, m w, w^2 of depth m and width w; least squares."""
    depth, width = np.array(list(LINEAR_ACCURACY)).T
    measured = np.array(list(LINEAR_ACCURACY.values()))
    fitted: np.ndarray = np.linalg.lstsq(_terms(depth, width), measured, rcond=None)[0]
    return fitted


def candidates() -> Candidates:
    """All 400, depth-major."""
    steps = np.linspace(0, 1, NUM_STEPS)
    depth, width = (x.ravel() for x in np.meshgrid(steps, steps, indexing="ij"))
    heads, blocks = np.floor(NUM_UNITS * width), np.floor(NUM_UNITS * depth)
    costs = cost.paper_costs(heads, blocks)
    return Candidates(
        np.stack([heads, blocks], axis=1).astype(int),
        np.clip(_terms(depth, width) @ coefficients(), 0, 1),
        *(normalised(x) for x in (costs.size, costs.latency_s, costs.energy_j)),
    )


def normalised(values: np.ndarray) -> np.ndarray:
    """(values - min) / (max - min); 0 where all are equal."""
    span = values.max() - values.min()
    return (values - values.min()) / (span if span > 0 else 1.0)


def _terms(depth: np.ndarray, width: np.ndarray) -> np.ndarray:
    ones = np.ones_like(depth)
    return np.stack([ones, depth, width, depth**2, depth * width, width**2], axis=-1)
