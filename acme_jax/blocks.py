"""The building blocks of the Transformer encoders (Flax linen, used functionally).

Pre-LN blocks (Vision Transformers) normalise what a half reads; post-LN blocks (BERT) normalise
the residual sum after it. Both have one parameter tree: each half's `norm` is the one before
it, or after it.

Shape letters: B batch, T tokens, D embedding, H heads, K head size, F neurons.
"""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jax import Array

from acme_jax.vit_ops import attend, gelu, normalise, project_down

Params = dict[str, Any]
"""A tree of arrays in nested dictionaries."""

_dense_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def layer_norm(weights: Params, x: Array, epsilon: float = 1e-6) -> Array:
    """LayerNorm over the last axis with given `scale` [D] and `bias` [D]."""
    leading = (None,) * (x.ndim - 1)
    return normalise(x, epsilon) * weights["scale"][leading] + weights["bias"][leading]


def _after_norm(norm: Params | None, y: Array, kernel: Array, bias: Array) -> Array:
    """LayerNorm's scale and bias, then a dense layer: rows [N, D] -> [N, M].

    Scale and bias go into the kernel [D, M], which is smaller than the rows it multiplies.
    """
    if norm is None:
        return y @ kernel + bias[None]
    shift = (norm["bias"][:, None] * kernel).sum(axis=0)
    return y @ (norm["scale"][:, None] * kernel) + (shift + bias)[None]


def attention_heads(
    weights: Params,
    norm: Params | None,
    y: Array,
    head_mask: Array | None = None,
    key_mask: Array | None = None,
) -> Array:
    """What some heads add to the residual stream, without the output bias.

    Query, key and value share one kernel: one matmul on the hot path.

    Args:
      weights: qkv_kernel [D, 3, H, K], qkv_bias [3, H, K], out_kernel [H, K, D] of any
        number of heads; contributions of disjoint heads add up.
      norm: scale and bias of the LayerNorm before; None (post-LN): there is none.
      y: hidden states [B, T, D], after `vit_ops.normalise` where there is a LayerNorm before.
      head_mask: [H], scales each head.
      key_mask: bool [B, T], the tokens that are attended to; None: all.
    """
    batch, tokens, embed = y.shape
    heads, size = weights["out_kernel"].shape[:2]
    kernel, bias = weights["qkv_kernel"].reshape(embed, -1), weights["qkv_bias"].reshape(-1)
    qkv = _after_norm(norm, y.reshape(batch * tokens, embed), kernel, bias)
    context = attend(qkv.reshape(batch, tokens, 3, heads, size), key_mask)
    if head_mask is not None:
        # Scaling the context equals scaling the probabilities (ACME's xi).
        context = context * head_mask[None, None, :, None]
    context = context.reshape(batch * tokens, heads * size)
    return (context @ weights["out_kernel"].reshape(-1, embed)).reshape(y.shape)


def mlp_neurons(
    weights: Params, norm: Params | None, y: Array, neuron_mask: Array | None = None
) -> Array:
    """What some neurons add to the residual stream, without the output bias.

    Args:
      weights: up_kernel [D, F], up_bias [F], down_kernel [F, D] of any number of neurons;
        contributions of disjoint neurons add up.
      norm: as in `attention_heads`.
      y: as in `attention_heads`.
      neuron_mask: [F], scales each activation.
    """
    flat = y.reshape(-1, y.shape[-1])
    hidden = gelu(_after_norm(norm, flat, weights["up_kernel"], weights["up_bias"]))
    if neuron_mask is not None:
        hidden = hidden * neuron_mask[None]
    return project_down(hidden, weights["down_kernel"]).reshape(y.shape)


class Norm(nn.Module):
    """Parameters of a LayerNorm, which the layer after it (pre-LN) or `Block` applies."""

    @nn.compact
    def __call__(self, size: int) -> Params:
        """Scale and bias [size]."""
        return {
            "scale": self.param("scale", nn.initializers.ones, (size,)),
            "bias": self.param("bias", nn.initializers.zeros, (size,)),
        }


class Attention(nn.Module):
    """The attention half of a block, residual included."""

    num_heads: int
    head_size: int
    post_norm: bool
    epsilon: float

    @nn.compact
    def __call__(self, x: Array, head_mask: Array | None, key_mask: Array | None) -> Array:
        """Maps [B, T, D] to [B, T, D]; masks as in `attention_heads`."""
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
        out_bias = self.param("out_bias", nn.initializers.zeros, (embed,))[None, None]
        norm = Norm(name="norm")(embed)
        if self.post_norm:
            added = attention_heads(weights, None, x, head_mask, key_mask) + out_bias
            return layer_norm(norm, x + added, self.epsilon)
        y = normalise(x, self.epsilon)
        return x + (attention_heads(weights, norm, y, head_mask, key_mask) + out_bias)


class Mlp(nn.Module):
    """The MLP half of a block, residual included."""

    num_neurons: int
    post_norm: bool
    epsilon: float

    @nn.compact
    def __call__(self, x: Array, neuron_mask: Array | None) -> Array:
        """Maps [B, T, D] to [B, T, D]; `neuron_mask` [F] scales each activation."""
        embed, neurons = x.shape[-1], self.num_neurons
        weights = {
            "up_kernel": self.param("up_kernel", _dense_init, (embed, neurons)),
            "up_bias": self.param("up_bias", nn.initializers.zeros, (neurons,)),
            "down_kernel": self.param("down_kernel", _dense_init, (neurons, embed)),
        }
        down_bias = self.param("down_bias", nn.initializers.zeros, (embed,))[None, None]
        norm = Norm(name="norm")(embed)
        if self.post_norm:
            added = mlp_neurons(weights, None, x, neuron_mask) + down_bias
            return layer_norm(norm, x + added, self.epsilon)
        return x + (mlp_neurons(weights, norm, normalise(x, self.epsilon), neuron_mask) + down_bias)


class Block(nn.Module):
    """Transformer block with `num_heads` heads and `num_neurons` neurons."""

    num_heads: int
    head_size: int
    num_neurons: int
    post_norm: bool = False
    epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self,
        x: Array,
        head_mask: Array | None = None,
        neuron_mask: Array | None = None,
        key_mask: Array | None = None,
    ) -> Array:
        """Maps [B, T, D] to [B, T, D].

        Masks [H] and [F] scale heads and neurons; `key_mask` bool [B, T] says which tokens are
        attended to.
        """
        attention = Attention(
            self.num_heads, self.head_size, self.post_norm, self.epsilon, name="attention"
        )
        mlp = Mlp(self.num_neurons, self.post_norm, self.epsilon, name="mlp")
        return mlp(attention(x, head_mask, key_mask), neuron_mask)
