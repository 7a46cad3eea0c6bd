"""The hand-made headers that a searched one is compared with: linear, MLP, CNN and mixer.

All of them see what the searched header sees, a frozen backbone's tokens, and all but the linear
one have its frame: a 1 x 1 stem with norm, residual blocks of their own, norm, ReLU, mean over
the positions, linear classifier. `sized` makes them as large as a number of parameters
allows.

The headers of the original code were fed wrongly: its CNN headers took rows of a
[tokens, embedding] matrix for pictures, its ViT header attended across the batch. Here positions
are positions, and no example sees another.
Shape letters: B batch, T tokens, D embedding, C channels.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from acme_jax import header, header_ops
from acme_jax.blocks import Params, layer_norm
from acme_jax.experiments.header_runs import Predict
from acme_jax.header_layout import HeaderDims
from acme_jax.vit_ops import gelu

Kind = Literal["linear", "mlp", "cnn", "mixer"]
KINDS: tuple[Kind, ...] = ("linear", "mlp", "cnn", "mixer")
NUM_BLOCKS = 2
"""Residual blocks: the CNN's have two convolutions each, the mixer's mix tokens, then channels."""
EXPANSION = 2
"""Hidden units of an MLP over channels (or, in the mixer, over tokens), in units of its inputs."""


@dataclasses.dataclass(frozen=True)
class FixedHeader:
    """One kind in one size; hashable."""

    kind: Kind
    dims: HeaderDims
    """Of the grid, the embedding and the classes; what concerns cells is not read."""
    channels: int
    """C; the linear header has none."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.dims.grid_height * self.dims.grid_width


def init(key: Array, spec: FixedHeader) -> Params:
    """Weights drawn at random; a residual block begins as a small change of its input."""
    dims, size = spec.dims, spec.channels
    if spec.kind == "linear":
        return header.init_linear(key, dims.embed_dim, dims.num_classes)
    shapes = _matrices(spec)
    drawn = header_ops.normals(
        key,
        (dims.embed_dim, size),
        (size, dims.num_classes),
        *((NUM_BLOCKS, *shape) for shape in shapes.values()),
    )
    stem, classifier, *blocks = drawn
    scaled = {
        name: noise / math.sqrt(math.prod(shapes[name][:-1]))
        for name, noise in zip(shapes, blocks, strict=True)
    }
    biases = {f"{name}_bias": jnp.zeros((NUM_BLOCKS, shape[-1])) for name, shape in shapes.items()}
    norms = {name: header_ops.init_norm((NUM_BLOCKS, size)) for name in _norms(spec.kind)}
    return {
        "stem": {"kernel": stem / math.sqrt(dims.embed_dim), "norm": _norm(size)},
        "blocks": {**scaled, **biases, **norms},
        "norm": _norm(size),
        "classifier": {
            "kernel": classifier / math.sqrt(size),
            "bias": jnp.zeros(dims.num_classes),
        },
    }


@functools.lru_cache(maxsize=64)
def initialiser(spec: FixedHeader) -> Callable[[Array], Params]:
    """`init`, compiled once for each header."""
    return jax.jit(lambda key: init(key, spec))


@functools.lru_cache(maxsize=64)
def predictor(spec: FixedHeader) -> Predict:
    """For `header_runs.train`; the choice is not read."""

    def predict(params: Params, choice: Any, tokens: Array) -> Array:
        del choice
        return apply(params, spec, tokens)

    return predict


def apply(params: Params, spec: FixedHeader, tokens: Array) -> Array:
    """Logits [B, num_classes] of tokens [B, T, D], row-major over the grid."""
    if spec.kind == "linear":
        return header.apply_linear(params, tokens)
    hidden = layer_norm(params["stem"]["norm"], tokens @ params["stem"]["kernel"])
    block = {"mlp": _mlp_block, "cnn": _cnn_block, "mixer": _mixer_block}[spec.kind]
    for index in range(NUM_BLOCKS):
        weights = jax.tree.map(lambda leaf, i=index: leaf[i], params["blocks"])
        hidden = block(weights, spec, hidden)
    pooled = jax.nn.relu(layer_norm(params["norm"], hidden)).mean(axis=1)
    return header_ops.linear(params["classifier"], pooled)


def _mlp_block(weights: Params, spec: FixedHeader, hidden: Array) -> Array:
    """An MLP at every position; positions meet only in the mean."""
    return hidden + _mlp(weights, "channel", layer_norm(weights["norm"], hidden))


def _mixer_block(weights: Params, spec: FixedHeader, hidden: Array) -> Array:
    """MLP-Mixer (Tolstikhin et al. 2021): an MLP over tokens, then one over channels."""
    across = layer_norm(weights["token_norm"], hidden).swapaxes(1, 2)
    hidden = hidden + _mlp(weights, "token", across).swapaxes(1, 2)
    return hidden + _mlp(weights, "channel", layer_norm(weights["norm"], hidden))


def _cnn_block(weights: Params, spec: FixedHeader, hidden: Array) -> Array:
    """A residual block (pre-activation, He et al. 2016) of two full 3 x 3 convolutions."""
    shape = (-1, spec.dims.grid_height, spec.dims.grid_width, spec.channels)
    grid = hidden.reshape(shape)
    for name, norm in (("first", "norm"), ("second", "second_norm")):
        grid = jax.nn.relu(layer_norm(weights[norm], grid))
        grid = _convolve3(weights[name], grid) + weights[f"{name}_bias"][None, None, None]
    return hidden + grid.reshape(hidden.shape)


def _mlp(weights: Params, name: str, inputs: Array) -> Array:
    up, down = weights[f"{name}_up"], weights[f"{name}_down"]
    hidden = gelu(inputs @ up + weights[f"{name}_up_bias"][None, None])
    return hidden @ down + weights[f"{name}_down_bias"][None, None]


def _convolve3(kernel: Array, grid: Array) -> Array:
    """3 x 3 convolution, zero padding: kernel [3, 3, C, C], grid [B, gh, gw, C].

    One matrix product of all nine shifted copies side by side, which on grids this small is
    faster on CPU than the convolution primitive and its gradient.
    """
    _, height, width, size = grid.shape
    padded = jnp.pad(grid, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = [
        padded[:, row : row + height, column : column + width]
        for row, column in itertools.product(range(3), repeat=2)
    ]
    return jnp.concatenate(windows, axis=-1) @ kernel.reshape(9 * size, -1)


def _matrices(spec: FixedHeader) -> dict[str, tuple[int, ...]]:
    """Shapes of one block's kernels; all axes but the last are inputs."""
    size, wide = spec.channels, EXPANSION * spec.channels
    channel: dict[str, tuple[int, ...]] = {"channel_up": (size, wide), "channel_down": (wide, size)}
    if spec.kind == "cnn":
        return {"first": (3, 3, size, size), "second": (3, 3, size, size)}
    if spec.kind == "mixer":
        tokens, many = spec.num_tokens, EXPANSION * spec.num_tokens
        return {"token_up": (tokens, many), "token_down": (many, tokens), **channel}
    return channel


def _norms(kind: Kind) -> tuple[str, ...]:
    return {"mlp": ("norm",), "cnn": ("norm", "second_norm"), "mixer": ("norm", "token_norm")}[kind]


def _norm(size: int) -> Params:
    return header_ops.init_norm((size,))


def num_params(spec: FixedHeader) -> int:
    """Parameters."""
    shapes = jax.eval_shape(lambda key: init(key, spec), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def num_flops(spec: FixedHeader) -> int:
    """Forward FLOPs for one example, multiply-add = 2; matrix products and convolutions only."""
    dims, size, tokens = spec.dims, spec.channels, spec.num_tokens
    if spec.kind == "linear":
        return 2 * dims.embed_dim * dims.num_classes
    products = tokens * dims.embed_dim * size + size * dims.num_classes
    for name, shape in _matrices(spec).items():
        # a matrix over tokens is applied to every channel, the others at every position
        repeats = size if name.startswith("token") else tokens
        products += NUM_BLOCKS * repeats * math.prod(shape)
    return 2 * products


def sized(kind: Kind, dims: HeaderDims, max_params: int) -> FixedHeader:
    """The largest header of a kind with at most so many parameters, one channel at least."""
    if kind == "linear":
        return FixedHeader(kind, dims, 0)
    channels = bisect.bisect_right(
        range(1, max_params), max_params, key=lambda size: num_params(FixedHeader(kind, dims, size))
    )
    return FixedHeader(kind, dims, max(channels, 1))
