"""The operations of the header's cells, on grids [B, gh, gw, C] of B examples.

Convolutions are written as matrix products and shifted multiply-adds, because under `vmap` over
per-client kernels a convolution primitive becomes a grouped convolution, which is an order of
magnitude slower on CPU. Pools are shifted too. Every operation keeps the grid's
size and maps a channel that is zero to a channel that is zero, so pruned channels stay exactly
removable.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from acme_jax.blocks import Params
from acme_jax.header_layout import HeaderDims
from nas.cells import OPS

NOISE = 0.5
"""Size of the random part of a near-identity weight, in units of the usual fan-in scale."""

EPSILON = 1e-5
"""Of the headers' LayerNorm."""


def init_norm(shape: tuple[int, ...]) -> Params:
    """Scale one and bias zero; the last axis of `shape` is C."""
    return {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)}


def norm(params: Params, inputs: jax.Array, gate: jax.Array, mask: jax.Array) -> jax.Array:
    """LayerNorm over the active channels, then the gate.

    Statistics take the channels with mask one only, so deleting the others changes nothing.
    Replaces the BatchNorm of the original header, whose statistics leak between samples.

    Args:
      params: scale [C] and bias [C].
      inputs: [..., C].
      gate: [C], multiplies the normalised value; importance is the gradient at one.
      mask: [C], 0/1; no gradient passes through it.

    Returns:
      [..., C], exactly zero where the mask is; no NaN when all of it is.
    """
    mask = lax.stop_gradient(mask)
    wide = tuple(range(inputs.ndim - 1))
    present = jnp.expand_dims(mask, wide)
    count = jnp.maximum(mask.sum(), 1.0)
    mean = (inputs * present).sum(-1, keepdims=True) / count
    centred = (inputs - mean) * present
    variance = (centred * centred).sum(-1, keepdims=True) / count
    normalised = centred * lax.rsqrt(variance + EPSILON)
    scaled = normalised * jnp.expand_dims(params["scale"], wide)
    return (scaled + jnp.expand_dims(params["bias"], wide)) * jnp.expand_dims(gate * mask, wide)


def depthwise(kernel: jax.Array, inputs: jax.Array) -> jax.Array:
    """Depthwise k x k convolution, zero padding: kernel [k, k, C], inputs [B, gh, gw, C].

    On grids with few positions for the kernel's size the taps are spread into one [T, T] mixing
    matrix for each channel, which the matrix units run up to five times faster than k * k shifted
    multiply-adds; on larger grids that matrix grows quadratically, so the shifts win.
    """
    size = kernel.shape[0]
    if size == 1:
        return inputs * kernel[0, 0][None, None, None]
    _, height, width, channels = inputs.shape
    tokens = height * width
    if tokens <= 2 * size * size:
        rows, columns = _shifts(size, height), _shifts(size, width)
        mixing = jnp.einsum("iyu,jxv,ijc->cyxuv", rows, columns, kernel)
        flat = inputs.reshape(-1, tokens, channels)
        mixed = jnp.einsum("cts,bsc->btc", mixing.reshape(channels, tokens, tokens), flat)
        return mixed.reshape(inputs.shape)
    radius = size // 2
    padded = jnp.pad(inputs, ((0, 0), (radius, radius), (radius, radius), (0, 0)))
    total = jnp.zeros_like(inputs)
    for row in range(size):
        for column in range(size):
            window = padded[:, row : row + height, column : column + width]
            total = total + window * kernel[row, column][None, None, None]
    return total


def _shifts(size: int, length: int) -> jax.Array:
    """[k, n, n]: tap i moves position y + i - k // 2 of a line to y."""
    taps = [np.eye(length, k=tap - size // 2, dtype=np.float32) for tap in range(size)]
    return jnp.asarray(np.stack(taps))


def avg_pool3(inputs: jax.Array) -> jax.Array:
    """3 x 3 mean, stride 1, over the positions inside the grid only (padding not counted)."""
    total = inputs
    for axis in (1, 2):
        before, after = _neighbours(total, axis, 0.0)
        total = before + total + after
    height, width = (np.minimum(np.arange(n), 1) + 1 for n in inputs.shape[1:3])
    counts = (height + height[::-1] - 1)[:, None] * (width + width[::-1] - 1)[None]
    return total * jnp.asarray(1.0 / counts, inputs.dtype)[None, :, :, None]


def max_pool3(inputs: jax.Array) -> jax.Array:
    """3 x 3 maximum, stride 1, over the positions inside the grid."""
    for axis in (1, 2):
        before, after = _neighbours(inputs, axis, -jnp.inf)
        inputs = jnp.maximum(jnp.maximum(before, inputs), after)
    return inputs


def _neighbours(inputs: jax.Array, axis: int, fill: float) -> tuple[jax.Array, jax.Array]:
    """`inputs` shifted by one position each way along `axis`."""
    edge = jnp.full_like(lax.slice_in_dim(inputs, 0, 1, axis=axis), fill)
    size = inputs.shape[axis]
    before = jnp.concatenate([edge, lax.slice_in_dim(inputs, 0, size - 1, axis=axis)], axis)
    after = jnp.concatenate([lax.slice_in_dim(inputs, 1, size, axis=axis), edge], axis)
    return before, after


def init_sep(key: jax.Array, leading: tuple[int, ...], size: int, channels: int) -> Params:
    """Weights of separable convolutions, near the identity; `leading` axes, then 2 repetitions.

    Kernels start as a centre tap and pointwise matrices as the identity, each with noise. All
    operations then begin alike, so the shared weights of a search agree with each other from
    the first batch on; with independent random matrices a short search learns nothing.

    Returns:
      depthwise [..., 2, k, k, C], pointwise [..., 2, C, C], scale and bias [..., 2, C].
    """
    shape = (*leading, 2)
    depthwise, pointwise = normals(
        key, (*shape, size, size, channels), (*shape, channels, channels)
    )
    centre = np.zeros((size, size, 1), np.float32)
    centre[size // 2, size // 2] = 1.0
    wide = tuple(range(len(shape)))
    return {
        "depthwise": jnp.expand_dims(centre, wide) + NOISE * depthwise / size,
        "pointwise": near_identity(pointwise),
        **init_norm((*shape, channels)),
    }


def near_identity(noise: jax.Array) -> jax.Array:
    """Square matrices [..., C, C] near the identity, from standard normal noise."""
    channels = noise.shape[-1]
    wide = tuple(range(noise.ndim - 2))
    return jnp.expand_dims(jnp.eye(channels), wide) + NOISE * noise / math.sqrt(channels)


def normals(key: jax.Array, *shapes: tuple[int, ...]) -> list[jax.Array]:
    """Standard normal arrays out of one draw, which compiles once instead of for each shape."""
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    flat = jax.random.normal(key, (int(ends[-1]),))
    pieces = jnp.split(flat, ends[:-1].tolist())
    return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def sep(
    params: Params, inputs: jax.Array, gates: jax.Array, masks: jax.Array, *, unroll: bool = True
) -> jax.Array:
    """Twice [ReLU, depthwise k x k, pointwise 1 x 1, norm, gate] (ENAS; ACME section 4).

    Args:
      params: as `init_sep` without leading axes.
      inputs: [B, gh, gw, C].
      gates: [2, C], one vector after each norm.
      masks: [2, C], 0/1.
      unroll: whether the two repetitions are two pieces of the program (faster to run) or one
        (faster to compile).
    """

    def repetition(grid: jax.Array, step: tuple[Params, jax.Array, jax.Array]) -> Any:
        weights, gate, mask = step
        hidden = depthwise(weights["depthwise"], jax.nn.relu(grid)) @ weights["pointwise"]
        return norm(weights, hidden, gate, mask), None

    return lax.scan(repetition, inputs, (params, gates, masks), unroll=unroll)[0]


def apply_plain(op: int, inputs: jax.Array) -> jax.Array:
    """An operation without weights.

    Raises:
      ValueError: `op` has weights (use `sep`) or does not exist.
    """
    plain = {"avgpool3": avg_pool3, "maxpool3": max_pool3, "identity": lambda grid: grid}
    name = OPS[op]
    if name not in plain:
        raise ValueError(f"operation {name} has weights; expected one of {', '.join(plain)}")
    return plain[name](inputs)


def stem(
    params: Params, dims: HeaderDims, features: jax.Array, gate: jax.Array, mask: jax.Array
) -> jax.Array:
    """Tokens [B, T, D] to the grid [B, gh, gw, C]: 1 x 1 matrix, norm, gate.

    Raises:
      ValueError: features that do not fit `dims`.
    """
    tokens = dims.grid_height * dims.grid_width
    if features.shape[1:] != (tokens, dims.embed_dim):
        raise ValueError(
            f"features have shape {features.shape}; expected [B, {tokens}, {dims.embed_dim}] "
            f"for a grid of {dims.grid_height} x {dims.grid_width} (drop the class token)"
        )
    hidden = norm(params["norm"], features @ params["kernel"], gate, mask)
    return hidden.reshape(-1, dims.grid_height, dims.grid_width, dims.channels)


def linear(params: Params, inputs: jax.Array) -> jax.Array:
    """[..., D] to [..., num_classes]."""
    return inputs @ params["kernel"] + params["bias"][None]


def classify(params: Params, grid: jax.Array) -> jax.Array:
    """The header's end on [B, gh, gw, C]: ReLU, global average pool, linear."""
    return linear(params, jax.nn.relu(grid).mean(axis=(1, 2)))
