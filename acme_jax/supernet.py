"""A weight-sharing Vision Transformer: one parameter tree, many sub-networks.

Flax linen modules are used functionally: `init` makes one parameter tree whose blocks are
stacked along a leading layer axis, and three pure forms of `apply` read it:

* `apply` takes an `ArchMask`. Every sub-network runs at full size, so one program serves
  all of them, also under `vmap` (the form for accelerators, and the oracle in tests).
* `apply_arch` takes an `Arch` and skips, by `lax.cond`, every group of heads or neurons that
  the sub-network leaves out. One program serves all genomes, forward and backward, and does
  dense work only, but must not be vmapped over genomes (the form for searching on CPU).
* `apply_width` has a static width and a traced depth: larger matrix products, more to
  compile (the form for training).

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
from jax import Array, lax

from acme_jax.header_ops import normals
from acme_jax.vit import Block, Params, ViTConfig, attention_heads, layer_norm, mlp_neurons
from acme_jax.vit_ops import normalise
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
    # An empty patch in the place of CLS: all tokens are one product, and the gradient needs
    # no slices of the tokens.
    padded = jnp.pad(patches, ((0, 0), (1, 0), (0, 0))).reshape(-1, patches.shape[2])
    tokens = (padded @ params["embed"]["kernel"]).reshape(batch, -1, config.embed_dim)
    bias = jnp.broadcast_to(params["embed"]["bias"][None], (rows * columns, config.embed_dim))
    return tokens + (jnp.concatenate([params["cls"], bias]) + params["position"])[None]


def classify(params: Params, final: Array) -> Array:
    """Last hidden state [B, T, D] -> logits [B, C] by the CLS token."""
    return (
        layer_norm(params["norm"], final[:, 0]) @ params["classifier"]["kernel"]
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
            return jnp.asarray(block.apply({"params": weights}, x)), x

        final, inputs = lax.scan(full_layer, tokens, params["blocks"])
    else:

        def masked_layer(x: Array, layer: tuple[Params, ArchMask]) -> tuple[Array, Array]:
            weights, m = layer
            y = jnp.asarray(block.apply({"params": weights}, x, m.head, m.neuron))
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


GroupFn = Callable[[Params, Params, Array], Array]
"""What a group of heads or neurons adds to the residual stream: (weights, norm, y) -> like y."""


class _Groups(NamedTuple):
    """Blocks cut into equal groups of heads and of neurons, for a scan over groups."""

    heads: Params  # leaves [L, groups, ...]
    neurons: Params  # leaves [L, groups, ...]
    attention: Params  # norm and output bias, leaves [L, ...]
    mlp: Params


def _group(blocks: Params, head_group: int, neuron_group: int) -> _Groups:
    attention, mlp = dict(blocks["attention"]), dict(blocks["mlp"])

    def cut(leaf: Array, axis: int, size: int) -> Array:
        shape = (*leaf.shape[:axis], leaf.shape[axis] // size, size, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(leaf.reshape(shape), axis, 1)

    heads = {
        "qkv_kernel": cut(attention.pop("qkv_kernel"), 3, head_group),
        "qkv_bias": cut(attention.pop("qkv_bias"), 2, head_group),
        "out_kernel": cut(attention.pop("out_kernel"), 1, head_group),
    }
    neurons = {
        "up_kernel": cut(mlp.pop("up_kernel"), 2, neuron_group),
        "up_bias": cut(mlp.pop("up_bias"), 1, neuron_group),
        "down_kernel": cut(mlp.pop("down_kernel"), 1, neuron_group),
    }
    return _Groups(heads, neurons, attention, mlp)


def apply_arch(
    params: Params, images: Array, config: ViTConfig, space: ArchSpace, arch: Arch
) -> Outputs:
    """Forward pass of one genome that does only the work the sub-network needs.

    Heads and neurons are cut into the largest equal groups that every choice is a multiple
    of, and a group that the genome leaves out is skipped by `lax.cond`. So one small program
    serves every genome of a search.

    Args:
      params: from `init`.
      images: [B, height, width, channels].
      config: static sizes.
      space: the choices, which fix the groups.
      arch: depth [], heads [L], neurons [L]. Not batched: under `vmap` nothing would be
        skipped; loop over genomes with `lax.map`, or vmap `apply` with masks.

    Returns:
      Outputs; `inputs` of a block that is not kept repeat the next kept block's.
    """
    head_group = math.gcd(config.num_heads, *space.head_choices)
    neuron_group = math.gcd(config.num_neurons, *space.neuron_choices)
    groups = _group(params["blocks"], head_group, neuron_group)
    keep = keep_mask(config.num_layers, arch.depth) > 0

    def add_groups(part: GroupFn, weights: Params, norm: Params, y: Array, count: Array) -> Array:
        number = jax.tree.leaves(weights)[0].shape[0]

        def add(total: Array, xs: tuple[Params, Array]) -> tuple[Array, None]:
            group, active = xs
            return lax.cond(active, lambda t: t + part(group, norm, y), lambda t: t, total), None

        total, _ = lax.scan(add, jnp.zeros_like(y), (weights, jnp.arange(number) < count))
        return total

    def layer(x: Array, xs: tuple[_Groups, Array, Array, Array]) -> tuple[Array, Array]:
        block, kept, heads, neurons = xs
        scale = kept.astype(x.dtype)
        norm, count = block.attention["norm"], kept * heads // head_group
        attention = add_groups(attention_heads, block.heads, norm, normalise(x), count)
        middle = x + attention + scale * block.attention["out_bias"][None, None]
        norm, count = block.mlp["norm"], kept * neurons // neuron_group
        mlp = add_groups(mlp_neurons, block.neurons, norm, normalise(middle), count)
        return middle + mlp + scale * block.mlp["down_bias"][None, None], x

    tokens = embed(params, images, config)
    final, inputs = lax.scan(layer, tokens, (groups, keep, arch.heads, arch.neurons))
    return Outputs(classify(params, final), inputs, final)
