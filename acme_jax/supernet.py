"""A weight-sharing Vision Transformer: one parameter tree, many sub-networks.

Flax linen modules are used functionally: `init` makes one parameter tree whose blocks are
stacked along a leading layer axis, and three pure forms of `apply` read it:

* `apply` takes an `ArchMask`. Every sub-network runs at full size, so one program serves
  all of them, also under `vmap` (the form for accelerators, and the oracle in tests).
* `apply_arch` takes an `Arch` and runs only what the sub-network keeps: blocks are skipped
  by `lax.cond` and widths chosen by `lax.switch` among prefixes. One program serves all
  genomes and does dense work only, but must not be vmapped over genomes.
* `apply_width` is the training form: width static, depth traced.

Blocks run in `lax.scan`, so compile time does not grow with depth. After the importance
reordering the kept heads and neurons are prefixes; the embedding width stays full, so
LayerNorm stays exact. Shape letters: B batch, T tokens (CLS first), D embedding, H heads,
K head size, F neurons, L layers, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from acme_jax.header_ops import normals
from acme_jax.vit import Attention, Block, Mlp, Params, ViTConfig
from nas.arch import Arch, ArchMask, ArchSpace, keep_mask


class Outputs(NamedTuple):
    """What a forward pass returns."""

    logits: Array  # [B, C]
    inputs: Array  # [L, B, T, D] the input of every block (of every kept block, if sliced)
    final: Array  # [B, T, D] the last hidden state, before the final LayerNorm


def full_block(config: ViTConfig) -> Block:
    """The block of the full network."""
    dims = config.dims
    return Block(dims.num_heads, dims.head_size, dims.num_neurons)


def init(key: Array, config: ViTConfig) -> Params:
    """Parameters of the full network; `params["blocks"]` leaves lead with [L].

    Kernels are normal with variance 1 / fan-in, as the modules' own initialisers say; those
    draw leaf by leaf, and each draw costs a second of compilation, so here one serves all.

    Args:
      key: PRNG key, consumed.
      config: static sizes.
    """
    dims, layers = config.dims, config.num_layers
    dummy = jnp.zeros((1, dims.num_tokens, dims.embed_dim))
    block = full_block(config)
    shapes = jax.eval_shape(lambda k: block.init(k, dummy)["params"], key)
    fan_in = {
        "qkv_kernel": dims.embed_dim,
        "out_kernel": dims.num_heads * dims.head_size,
        "up_kernel": dims.embed_dim,
        "down_kernel": dims.num_neurons,
    }
    kernels = {
        name: leaf.shape
        for half in shapes.values()
        for name, leaf in half.items()
        if name in fan_in
    }
    patches, position, classifier, *drawn = normals(
        key,
        (dims.patch_dim, dims.embed_dim),
        (dims.num_tokens, dims.embed_dim),
        (dims.embed_dim, dims.num_classes),
        *((layers, *shape) for shape in kernels.values()),
    )
    scaled = {
        name: noise / math.sqrt(fan_in[name]) for name, noise in zip(kernels, drawn, strict=True)
    }

    def half(leaves: Params) -> Params:
        size = (layers, dims.embed_dim)
        rest = {
            name: scaled[name] if name in scaled else jnp.zeros((layers, *leaf.shape))
            for name, leaf in leaves.items()
            if name != "norm"
        }
        return {**rest, "norm": {"scale": jnp.ones(size), "bias": jnp.zeros(size)}}

    return {
        "embed": {
            "kernel": patches / math.sqrt(dims.patch_dim),
            "bias": jnp.zeros(dims.embed_dim),
        },
        "cls": jnp.zeros((1, dims.embed_dim)),
        "position": 0.02 * position,
        "blocks": {name: half(leaves) for name, leaves in shapes.items()},
        "norm": {"scale": jnp.ones(dims.embed_dim), "bias": jnp.zeros(dims.embed_dim)},
        "classifier": {
            "kernel": classifier / math.sqrt(dims.embed_dim),
            "bias": jnp.zeros(dims.num_classes),
        },
    }


def embed(params: Params, images: Array, config: ViTConfig) -> Array:
    """Images [B, height, width, channels] -> tokens [B, T, D], CLS first."""
    batch, size = images.shape[0], config.patch_size
    rows, columns = config.grid
    patches = images.reshape(batch, rows, size, columns, size, config.image_shape[2])
    patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)
    tokens = patches @ params["embed"]["kernel"] + params["embed"]["bias"][None, None]
    cls = jnp.broadcast_to(params["cls"][None], (batch, 1, config.embed_dim))
    return jnp.concatenate([cls, tokens], axis=1) + params["position"][None]


def normalise(params: Params, hidden: Array) -> Array:
    """The final LayerNorm over the last axis."""
    normed: Array = nn.LayerNorm().apply({"params": params["norm"]}, hidden)
    return normed


def classify(params: Params, final: Array) -> Array:
    """Last hidden state [B, T, D] -> logits [B, C] by the CLS token."""
    return (
        normalise(params, final[:, 0]) @ params["classifier"]["kernel"]
        + params["classifier"]["bias"][None]
    )


def apply(
    params: Params, images: Array, config: ViTConfig, mask: ArchMask | None = None
) -> Outputs:
    """Masked forward pass at full size; `mask=None` is the full network.

    Args:
      params: from `init`.
      images: [B, height, width, channels] in [0, 1].
      config: static sizes.
      mask: block [L], head [L, H] and neuron [L, F] in [0, 1]; relaxed values scale.
    """
    block = full_block(config)
    tokens = embed(params, images, config)
    if mask is None:

        def full_layer(x: Array, weights: Params) -> tuple[Array, Array]:
            return block.apply({"params": weights}, x), x

        final, inputs = lax.scan(full_layer, tokens, params["blocks"])
    else:

        def masked_layer(x: Array, layer: tuple[Params, ArchMask]) -> tuple[Array, Array]:
            weights, m = layer
            y = block.apply({"params": weights}, x, m.head, m.neuron)
            return x + m.block * (y - x), x

        final, inputs = lax.scan(masked_layer, tokens, (params["blocks"], mask))
    return Outputs(classify(params, final), inputs, final)


def prefix_attention(weights: Params, heads: int) -> Params:
    """First `heads` heads of attention parameters, of one block or stacked blocks [L]."""
    return {
        **weights,
        "qkv_kernel": weights["qkv_kernel"][..., :heads, :],
        "qkv_bias": weights["qkv_bias"][..., :heads, :],
        "out_kernel": weights["out_kernel"][..., :heads, :, :],
    }


def prefix_mlp(weights: Params, neurons: int) -> Params:
    """First `neurons` neurons of MLP parameters, of one block or stacked blocks [L]."""
    return {
        **weights,
        "up_kernel": weights["up_kernel"][..., :neurons],
        "up_bias": weights["up_bias"][..., :neurons],
        "down_kernel": weights["down_kernel"][..., :neurons, :],
    }


def prefix_block(weights: Params, heads: int, neurons: int) -> Params:
    """Prefixes of both halves of one block or of stacked blocks [L]."""
    return {
        "attention": prefix_attention(weights["attention"], heads),
        "mlp": prefix_mlp(weights["mlp"], neurons),
    }


def apply_width(
    params: Params, images: Array, config: ViTConfig, heads: int, neurons: int, keep: Array
) -> Outputs:
    """Training form: `heads` and `neurons` static in every block, kept blocks traced.

    A block that is not kept is skipped, not masked, so the work is dense; the program is
    compiled once per width and serves every depth.

    Args:
      params: from `init`.
      images: [B, height, width, channels].
      config: static sizes.
      heads: heads in every block.
      neurons: neurons in every block.
      keep: bool [L], the kept blocks. Not batched: do not vmap over it.
    """
    block = Block(heads, config.dims.head_size, neurons)
    tokens = embed(params, images, config)

    def layer(x: Array, xs: tuple[Params, Array]) -> tuple[Array, Array]:
        weights, kept = xs
        y = lax.cond(kept, lambda v: block.apply({"params": weights}, v), lambda v: v, x)
        return y, x

    blocks = prefix_block(params["blocks"], heads, neurons)
    final, inputs = lax.scan(layer, tokens, (blocks, keep))
    return Outputs(classify(params, final), inputs, final)


def apply_arch(
    params: Params, images: Array, config: ViTConfig, space: ArchSpace, arch: Arch
) -> Array:
    """Logits [B, C] of one genome, doing only the work that the sub-network needs.

    Args:
      params: from `init`.
      images: [B, height, width, channels].
      config: static sizes.
      space: the choices; one switch branch per head choice and per neuron choice.
      arch: depth [], heads [L], neurons [L]. Not batched: under `vmap` a switch would run
        every branch; loop over genomes with `lax.map`, or vmap `apply` with masks.
    """
    head_size = config.dims.head_size
    tokens = embed(params, images, config)

    # Each half of a block switches on its own choice: the number of branches is the sum
    # of the numbers of choices, not their product.
    def attention_branch(heads: int) -> Callable[[Params, Array], Array]:
        half = Attention(heads, head_size)
        return lambda w, v: v + half.apply({"params": prefix_attention(w, heads)}, v)

    def mlp_branch(neurons: int) -> Callable[[Params, Array], Array]:
        half = Mlp(neurons)
        return lambda w, v: v + half.apply({"params": prefix_mlp(w, neurons)}, v)

    attention_branches = [attention_branch(h) for h in space.head_choices]
    mlp_branches = [mlp_branch(f) for f in space.neuron_choices]
    head_choices = jnp.asarray(space.head_choices)
    neuron_choices = jnp.asarray(space.neuron_choices)

    def layer(x: Array, xs: tuple[Params, Array, Array, Array]) -> tuple[Array, None]:
        weights, kept, heads, neurons = xs
        head_index = jnp.searchsorted(head_choices, heads)
        neuron_index = jnp.searchsorted(neuron_choices, neurons)

        def run(v: Array) -> Array:
            v = lax.switch(head_index, attention_branches, weights["attention"], v)
            return lax.switch(neuron_index, mlp_branches, weights["mlp"], v)

        return lax.cond(kept, run, lambda v: v, x), None

    keep = keep_mask(config.num_layers, arch.depth) > 0
    final, _ = lax.scan(layer, tokens, (params["blocks"], keep, arch.heads, arch.neurons))
    return classify(params, final)
