"""The Vision Transformer: its sizes, and images to tokens and tokens to logits.

ViT (Dosovitskiy et al., ICLR 2021) with one class token, or DeiT (Touvron et al., ICML 2021) with a
distillation token beside it. Images are resized and normalised here, inside the compiled
program, so that data sets stay small bytes on the host and on the accelerator.

Shape letters: B batch, T tokens (prefix tokens first), D embedding, C classes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from acme_jax.blocks import Params, layer_norm
from nas.cost import ModelDims


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Static description of the full network; hashable, so a jit static argument."""

    image_shape: tuple[int, int, int]
    """Height, width, channels that the network sees."""
    patch_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_neurons: int
    num_classes: int
    num_prefix_tokens: int = 1
    """1: the class token; 2: DeiT's distillation token as well."""
    norm_epsilon: float = 1e-6
    source_shape: tuple[int, int, int] | None = None
    """Height, width, channels of the images that are given, where they are others: they are
    resized (bilinear, antialiased) and one channel is repeated."""
    pixel_mean: tuple[float, ...] = ()
    """Of each channel, subtracted from pixels in [0, 1]; empty: nothing is."""
    pixel_std: tuple[float, ...] = ()
    """Of each channel, divided by; empty: nothing is."""
    dtype: str = "float32"
    """Of activations, and of the weights as products read them."""
    remat: bool = False
    """Compute each block again in the backward pass instead of keeping its activations."""

    post_norm = False  # not a field: the blocks are pre-LN

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one image as it is given."""
        return self.source_shape or self.image_shape

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.image_shape[0] // self.patch_size, self.image_shape[1] // self.patch_size

    @property
    def dims(self) -> ModelDims:
        """The sizes that `nas.cost` counts with."""
        return ModelDims(
            num_layers=self.num_layers,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            head_size=self.embed_dim // self.num_heads,
            num_neurons=self.num_neurons,
            num_tokens=self.grid[0] * self.grid[1] + self.num_prefix_tokens,
            patch_dim=self.patch_size**2 * self.image_shape[2],
            num_classes=self.num_classes,
            num_prefix_tokens=self.num_prefix_tokens,
        )


def prepare(images: Array, config: ViTConfig) -> Array:
    """Images as they are given -> pixels as the network sees them [B, height, width, channels].

    Args:
      images: [B, *config.input_shape], float in [0, 1] or uint8.
      config: static sizes.
    """
    if jnp.issubdtype(images.dtype, jnp.integer):
        images = images.astype(jnp.float32) / 255.0
    height, width, channels = config.image_shape
    if images.shape[1:3] != (height, width):
        shape = (images.shape[0], height, width, images.shape[3])
        images = jax.image.resize(images, shape, "bilinear", precision=jax.lax.Precision.HIGHEST)
    if images.shape[3] != channels:
        images = jnp.broadcast_to(images, (*images.shape[:3], channels))
    if config.pixel_mean:
        images = images - jnp.asarray(config.pixel_mean, images.dtype)[None, None, None]
    if config.pixel_std:
        images = images / jnp.asarray(config.pixel_std, images.dtype)[None, None, None]
    return images.astype(config.dtype)


def embed(params: Params, images: Array, config: ViTConfig) -> Array:
    """Images [B, *config.input_shape] -> tokens [B, T, D], prefix tokens first."""
    images = prepare(images, config)
    batch, size, prefix = images.shape[0], config.patch_size, config.num_prefix_tokens
    rows, columns = config.grid
    patches = images.reshape(batch, rows, size, columns, size, config.image_shape[2])
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
    # Empty patches in the places of the prefix tokens: all tokens are one product, and the
    # gradient needs no slices of the tokens.
    padded = jnp.pad(patches, ((0, 0), (prefix, 0), (0, 0))).reshape(-1, patches.shape[2])
    tokens = (padded @ params["embed"]["kernel"]).reshape(batch, -1, config.embed_dim)
    bias = jnp.broadcast_to(params["embed"]["bias"][None], (rows * columns, config.embed_dim))
    return tokens + (jnp.concatenate([params["cls"], bias]) + params["position"])[None]


def summary(params: Params, final: Array, config: ViTConfig) -> Array:
    """The normalised class token [B, D] of the last hidden state [B, T, D]."""
    return layer_norm(params["norm"], final[:, 0], config.norm_epsilon)


def classify(params: Params, final: Array, config: ViTConfig) -> Array:
    """Last hidden state [B, T, D] -> logits [B, C], float32.

    By the class token; DeiT's classifiers of both prefix tokens are averaged (its section 4).
    """
    logits = _linear(params["classifier"], summary(params, final, config))
    if "distillation_classifier" in params:
        token = layer_norm(params["norm"], final[:, 1], config.norm_epsilon)
        logits = (logits + _linear(params["distillation_classifier"], token)) / 2.0
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _linear(weights: Params, x: Array) -> Array:
    return x @ weights["kernel"] + weights["bias"][None]
