"""The Vision Transformer's sizes and its building blocks (Flax linen, used functionally).

Shape letters: B batch, T tokens (CLS first), D embedding, H heads, K head size, F neurons.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
from jax import Array

from acme_jax.vit_ops import attend, gelu, normalise, project_down
from nas.cost import ModelDims

Params = dict[str, Any]
"""A tree of arrays in nested dictionaries."""


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Static description of the full network; hashable, so a jit static argument."""

    image_shape: tuple[int, int, int]
    """Height, width, channels."""
    patch_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_neurons: int
    num_classes: int

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
            num_tokens=self.grid[0] * self.grid[1] + 1,
            patch_dim=self.patch_size**2 * self.image_shape[2],
            num_classes=self.num_classes,
        )


_dense_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def layer_norm(weights: Params, x: Array) -> Array:
    """LayerNorm over the last axis with given `scale` [D] and `bias` [D]."""
    leading = (None,) * (x.ndim - 1)
    return normalise(x) * weights["scale"][leading] + weights["bias"][leading]


def _after_norm(norm: Params, y: Array, kernel: Array, bias: Array) -> Array:
    """LayerNorm's scale and bias, then a dense layer: rows [N, D] -> [N, M].

    Scale and bias go into the kernel [D, M], which is smaller than the rows it multiplies.
    """
    shift = (norm["bias"][:, None] * kernel).sum(axis=0)
    return y @ (norm["scale"][:, None] * kernel) + (shift + bias)[None]


def attention_heads(
    weights: Params, norm: Params, y: Array, head_mask: Array | None = None
) -> Array:
    """What some heads add to the residual stream, without the output bias.

    Query, key and value share one kernel: one matmul on the hot path.

    Args:
      weights: qkv_kernel [D, 3, H, K], qkv_bias [3, H, K], out_kernel [H, K, D] of any
        number of heads; contributions of disjoint heads add up.
      norm: scale and bias of the LayerNorm before.
      y: hidden states [B, T, D] from `vit_ops.normalise`.
      head_mask: [H], scales each head.
    """
    batch, tokens, embed = y.shape
    heads, size = weights["out_kernel"].shape[:2]
    kernel, bias = weights["qkv_kernel"].reshape(embed, -1), weights["qkv_bias"].reshape(-1)
    qkv = _after_norm(norm, y.reshape(batch * tokens, embed), kernel, bias)
    context = attend(qkv.reshape(batch, tokens, 3, heads, size))
    if head_mask is not None:
        # Scaling the context equals scaling the probabilities (ACME's xi).
        context = context * head_mask[None, None, :, None]
    context = context.reshape(batch * tokens, heads * size)
    return (context @ weights["out_kernel"].reshape(-1, embed)).reshape(y.shape)


def mlp_neurons(weights: Params, norm: Params, y: Array, neuron_mask: Array | None = None) -> Array:
    """What some neurons add to the residual stream, without the output bias.

    Args:
      weights: up_kernel [D, F], up_bias [F], down_kernel [F, D] of any number of neurons;
        contributions of disjoint neurons add up.
      norm: scale and bias of the LayerNorm before.
      y: hidden states [B, T, D] from `vit_ops.normalise`.
      neuron_mask: [F], scales each activation.
    """
    flat = y.reshape(-1, y.shape[-1])
    hidden = gelu(_after_norm(norm, flat, weights["up_kernel"], weights["up_bias"]))
    if neuron_mask is not None:
        hidden = hidden * neuron_mask[None]
    return project_down(hidden, weights["down_kernel"]).reshape(y.shape)


class Norm(nn.Module):
    """Parameters of a LayerNorm, which the layer after it applies."""

    @nn.compact
    def __call__(self, size: int) -> Params:
        """Scale and bias [size]."""
        return {
            "scale": self.param("scale", nn.initializers.ones, (size,)),
            "bias": self.param("bias", nn.initializers.zeros, (size,)),
        }


class Attention(nn.Module):
    """The attention half of a pre-LN block (without the residual)."""

    num_heads: int
    head_size: int

    @nn.compact
    def __call__(self, x: Array, head_mask: Array | None = None) -> Array:
        """Maps [B, T, D] to [B, T, D]; `head_mask` [H] scales each head's output."""
        embed, heads, size = x.shape[-1], self.num_heads, self.head_size
        qkv_init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=0, out_axis=(1, 2, 3)
        )
        out_init = nn.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=2
        )
        weights = {
            "qkv_kernel": self.param("qkv_kernel", qkv_init, (embed, 3, heads, size)),
            "qkv_bias": self.param("qkv_bias", nn.initializers.zeros, (3, heads, size)),
            "out_kernel": self.param("out_kernel", out_init, (heads, size, embed)),
        }
        out_bias = self.param("out_bias", nn.initializers.zeros, (embed,))
        norm = Norm(name="norm")(embed)
        return attention_heads(weights, norm, normalise(x), head_mask) + out_bias[None, None]


class Mlp(nn.Module):
    """The MLP half of a pre-LN block (without the residual)."""

    num_neurons: int

    @nn.compact
    def __call__(self, x: Array, neuron_mask: Array | None = None) -> Array:
        """Maps [B, T, D] to [B, T, D]; `neuron_mask` [F] scales each activation."""
        embed, neurons = x.shape[-1], self.num_neurons
        weights = {
            "up_kernel": self.param("up_kernel", _dense_init, (embed, neurons)),
            "up_bias": self.param("up_bias", nn.initializers.zeros, (neurons,)),
            "down_kernel": self.param("down_kernel", _dense_init, (neurons, embed)),
        }
        down_bias = self.param("down_bias", nn.initializers.zeros, (embed,))
        norm = Norm(name="norm")(embed)
        return mlp_neurons(weights, norm, normalise(x), neuron_mask) + down_bias[None, None]


class Block(nn.Module):
    """Pre-LN Transformer block with `num_heads` heads and `num_neurons` neurons."""

    num_heads: int
    head_size: int
    num_neurons: int

    @nn.compact
    def __call__(
        self, x: Array, head_mask: Array | None = None, neuron_mask: Array | None = None
    ) -> Array:
        """Maps [B, T, D] to [B, T, D]; masks [H] and [F] scale heads and neurons."""
        x = x + Attention(self.num_heads, self.head_size, name="attention")(x, head_mask)
        return x + Mlp(self.num_neurons, name="mlp")(x, neuron_mask)
