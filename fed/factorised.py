"""Layers as products of a general and a personal factor (Pa3dFL, arXiv 2405.20589).

A layer with T outputs, S inputs and k x k kernels is `theta = theta_u theta_v`. The general factor
theta_u consists of R1 blocks, each k^2 x R2; the personal factor theta_v holds for each of G = T/R1
places in a block an R2 x S matrix. Block a and place g make output channel (a, g):

    theta[(a, g), s, :] = theta_u[a] @ theta_v[:, g, s]

A client of capacity p keeps all of theta_u, and of theta_v the first p G places and the first p S
inputs, and with them p T outputs. Factors and masks keep their full shapes here, so one program
serves all capacities; payloads count the kept entries only.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

_TOLERANCE = 1e-4  # 0.3 * 10 is less than 3 in float32


@dataclasses.dataclass(frozen=True)
class FactorisedLayer:
    """Static description of one layer; hashable.

    Raises:
      ValueError: sizes below 1, or a least capacity outside (0, 1].
    """

    outputs: int  # T
    inputs: int  # S
    kernel_size: int = 1  # k
    min_capacity: float = 0.1
    """p_min, the least capacity of any client; below 0.1 a full client pays several times the plain
    layer."""

    prune_outputs: bool = True  # False for the last layer: every client needs all classes
    prune_inputs: bool = True  # False for the first layer
    input_blocks: int = 1
    """Inputs are kept by whole groups of this many: R1 of the layer that they come from, so that
    no kept input is a pruned output where p G is not whole. Also a head's size, if heads are
    pruned."""

    order: Literal["block", "prefix"] = "prefix"
    """Where output channel (a, g) is. `"block"`: at a G + g, as the paper writes it; kept channels
    are spread out. `"prefix"`: at g R1 + a; kept channels come first, so that the next layer's
    kept inputs are these very channels at every capacity."""

    def __post_init__(self) -> None:
        for name in ("outputs", "inputs", "kernel_size", "input_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.min_capacity <= 1:
            raise ValueError(f"min_capacity must be in (0, 1], got {self.min_capacity}")
        if self.inputs % self.input_blocks:
            raise ValueError(f"the {self.inputs} inputs are no whole groups of {self.input_blocks}")
        if self.order not in ("block", "prefix"):
            raise ValueError(f"unknown order {self.order!r}; expected 'block' or 'prefix'")

    @property
    def num_blocks(self) -> int:
        """R1: T p_min, or the next smaller divisor of T, so that places are whole."""
        most = max(1, int(self.outputs * self.min_capacity + _TOLERANCE))
        return max(d for d in range(1, most + 1) if self.outputs % d == 0)

    @property
    def group_size(self) -> int:
        """G = T / R1, the places in a block."""
        return self.outputs // self.num_blocks

    @property
    def rank(self) -> int:
        """R2: max(min(S, T), k^2) for convolutions, R1 for linear layers (Eq. 5)."""
        if self.kernel_size == 1:
            return self.num_blocks
        return max(min(self.inputs, self.outputs), self.kernel_size**2)

    @property
    def general_shape(self) -> tuple[int, int, int]:
        """(R1, k^2, R2) of theta_u."""
        return self.num_blocks, self.kernel_size**2, self.rank

    @property
    def personal_shape(self) -> tuple[int, int, int]:
        """(R2, G, S) of theta_v."""
        return self.rank, self.group_size, self.inputs


def init(key: jax.Array, layer: FactorisedLayer) -> tuple[jax.Array, jax.Array]:
    """Random factors whose product has variance 2 / (S k^2) (He et al. 2015); consumes the key."""
    general_key, personal_key = jax.random.split(key)
    general = jax.random.normal(general_key, layer.general_shape) * layer.rank**-0.5
    deviation = (2 / (layer.inputs * layer.kernel_size**2)) ** 0.5
    return general, jax.random.normal(personal_key, layer.personal_shape) * deviation


def capacity_mask(layer: FactorisedLayer, capacity: jax.Array | float) -> jax.Array:
    """Which entries of theta_v a client of this capacity keeps.

    Args:
      layer: static.
      capacity: float [] in [p_min, 1], the fraction of channels; may be traced. Fractions of
        places and of inputs are rounded down, but one is always kept.

    Returns:
      float32 [1, G, S] of 0 and 1, to be multiplied with theta_v.
    """
    places, groups = layer.group_size, layer.inputs // layer.input_blocks
    kept_places = _kept(places, capacity) if layer.prune_outputs else places
    kept_groups = _kept(groups, capacity) if layer.prune_inputs else groups
    place = jnp.arange(places) < kept_places
    source = jnp.arange(layer.inputs) < kept_groups * layer.input_blocks
    return (place[:, None] & source[None]).astype(jnp.float32)[None]


def output_mask(layer: FactorisedLayer, mask: jax.Array) -> jax.Array:
    """float32 [T]: 1 for the output channels that a mask [1, G, S] keeps, in the layer's order."""
    kept = (mask[0] > 0).any(1)
    if layer.order == "block":
        return jnp.tile(kept, layer.num_blocks).astype(jnp.float32)
    return jnp.repeat(kept, layer.num_blocks).astype(jnp.float32)


def compose(
    theta_u: jax.Array, theta_v: jax.Array, mask: jax.Array, layer: FactorisedLayer
) -> jax.Array:
    """The layer's weights from its factors (Eq. 3 and 10).

    Args:
      theta_u: [R1, k^2, R2].
      theta_v: [R2, G, S].
      mask: [1, G, S] from `capacity_mask`; pruned channels get weights, and gradients, of 0.
      layer: static.

    Returns:
      [T, S, k, k], for kernels of size 1 [T, S].

    Raises:
      ValueError: factors of other shapes.
    """
    for name, factor, shape in (
        ("theta_u", theta_u, layer.general_shape),
        ("theta_v", theta_v, layer.personal_shape),
    ):
        if factor.shape != shape:
            raise ValueError(f"{name} has shape {factor.shape}; this layer needs {shape}")
    outcome = "agsk" if layer.order == "block" else "gask"
    product = jnp.einsum(f"akr,rgs->{outcome}", theta_u, theta_v * mask, precision="highest")
    size = layer.kernel_size
    if size == 1:
        return product.reshape(layer.outputs, layer.inputs)
    return product.reshape(layer.outputs, layer.inputs, size, size)


def num_floats(layer: FactorisedLayer, capacity: float) -> int:
    """Numbers that travel one way: theta_u and the kept entries of theta_v; exact."""
    kept = int(np.asarray(capacity_mask(layer, capacity)).sum())
    return int(np.prod(layer.general_shape)) + layer.rank * kept


def size_ratio(
    capacity: float, *, outputs: int, inputs: int, kernel_size: int, min_capacity: float
) -> float:
    """Payload over the plain layer's weights, by the paper's formula (Eq. 15).

    `rho(p) = R2 (p_min T k^2 + p^2 S / p_min) / (S T k^2)`, with R1 = T p_min and parts of channels
    as real numbers. It equals `num_floats` over T S k^2 where they are whole.
    """
    square = kernel_size**2
    rank = max(min(inputs, outputs), square) if kernel_size > 1 else outputs * min_capacity
    general = min_capacity * outputs * square
    personal = capacity**2 * inputs / min_capacity
    return rank * (general + personal) / (inputs * outputs * square)


def _kept(count: int, capacity: jax.Array | float) -> jax.Array:
    part = jnp.floor(jnp.asarray(capacity, jnp.float32) * count + _TOLERANCE)
    return jnp.clip(part.astype(jnp.int32), 1, count)
