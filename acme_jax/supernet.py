"""A weight-sharing Transformer encoder: one parameter tree, many sub-networks.

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
LayerNorm stays exact. Vision Transformers (pre-LN) and BERT (post-LN) differ only in
`acme_jax.encoders` and in where a block normalises. Shape letters: B batch, T tokens (CLS first),
D embedding, H heads, K head size, F neurons, L layers, C classes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from acme_jax.bert import BertConfig
from acme_jax.blocks import Params, attention_heads, layer_norm, mlp_neurons
from acme_jax.encoders import EncoderConfig, cast, classify, embed, key_mask, make_block
from acme_jax.header_ops import normals
from acme_jax.vit_ops import normalise
from nas.arch import Arch, ArchMask, ArchSpace, keep_mask


class Outputs(NamedTuple):
    """What a forward pass returns."""

    logits: Array  # [B, C]
    inputs: Array  # [L, B, T, D] the input of every block (of every kept block, if sliced)
    final: Array  # [B, T, D] the last hidden state, before the final LayerNorm


def init(key: Array, config: EncoderConfig) -> Params:
    """Parameters of the full network; `params["blocks"]` leaves lead with [L].

    Kernels are normal with variance 1 / fan-in, as the modules' own initialisers say; those
    draw leaf by leaf, and each draw costs a second of compilation, so here one serves all.

    Args:
      key: PRNG key, consumed.
      config: static sizes.
    """
    dims, layers = config.dims, config.num_layers
    dummy = jnp.zeros((1, dims.num_tokens, dims.embed_dim))
    block = make_block(config, config.num_heads, config.num_neurons)
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
    text = isinstance(config, BertConfig)
    table, position, classifier, *drawn = normals(
        key,
        (config.vocab_size if isinstance(config, BertConfig) else dims.patch_dim, dims.embed_dim),
        (dims.num_tokens, dims.embed_dim),
        (dims.embed_dim, dims.num_classes),
        *((layers, *shape) for shape in kernels.values()),
    )
    scaled = {
        name: noise / math.sqrt(fan_in[name]) for name, noise in zip(kernels, drawn, strict=True)
    }

    def norm(*leading: int) -> Params:
        size = (*leading, dims.embed_dim)
        return {"scale": jnp.ones(size), "bias": jnp.zeros(size)}

    def half(leaves: Params) -> Params:
        rest = {
            name: scaled[name] if name in scaled else jnp.zeros((layers, *leaf.shape))
            for name, leaf in leaves.items()
            if name != "norm"
        }
        return {**rest, "norm": norm(layers)}

    def dense(kernel: Array) -> Params:
        return {
            "kernel": kernel / math.sqrt(kernel.shape[0]),
            "bias": jnp.zeros(kernel.shape[1]),
        }

    outer: Params = (
        {"embed": {"word": 0.02 * table, "norm": norm()}}
        if text
        else {
            "embed": dense(table),
            "cls": jnp.zeros((config.num_prefix_tokens, dims.embed_dim)),
            "norm": norm(),
        }
    )
    if isinstance(config, BertConfig) and config.pooling == "cls":
        outer["pooler"] = dense(jnp.eye(dims.embed_dim) * math.sqrt(dims.embed_dim))
    return {
        **outer,
        "position": 0.02 * position,
        "blocks": {name: half(leaves) for name, leaves in shapes.items()},
        "classifier": dense(classifier),
    }


def apply(
    params: Params, inputs: Array, config: EncoderConfig, mask: ArchMask | None = None
) -> Outputs:
    """Masked forward pass at full size; `mask=None` is the full network.

    Args:
      params: from `init`.
      inputs: images [B, height, width, channels] or token ids [B, T].
      config: static sizes.
      mask: block [L], head [L, H] and neuron [L, F] in [0, 1]; relaxed values scale.
    """
    block = make_block(config, config.num_heads, config.num_neurons)
    params, keys = cast(params, config), key_mask(inputs, config)
    tokens = embed(params, inputs, config)
    if mask is None:

        def full_layer(x: Array, weights: Params) -> tuple[Array, Array]:
            return jnp.asarray(block.apply({"params": weights}, x, key_mask=keys)), x

        final, states = lax.scan(_remat(full_layer, config), tokens, params["blocks"])
    else:

        def masked_layer(x: Array, layer: tuple[Params, ArchMask]) -> tuple[Array, Array]:
            weights, m = layer
            y = jnp.asarray(block.apply({"params": weights}, x, m.head, m.neuron, keys))
            return x + m.block * (y - x), x

        # Masks in the activations' type, or they would widen them.
        masks = jax.tree.map(lambda leaf: leaf.astype(tokens.dtype), mask)
        layers = (params["blocks"], masks)
        final, states = lax.scan(_remat(masked_layer, config), tokens, layers)
    return Outputs(classify(params, final, inputs, config), states, final)


def _remat(layer: Callable[..., Any], config: EncoderConfig) -> Callable[..., Any]:
    """The layer of a scan, computed again in the backward pass where the configuration says so."""
    # Inside a scan nothing can be merged with the first computation anyway.
    return jax.checkpoint(layer, prevent_cse=False) if config.remat else layer


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
    params: Params, inputs: Array, config: EncoderConfig, heads: int, neurons: int, keep: Array
) -> Outputs:
    """Training form: `heads` and `neurons` static in every block, kept blocks traced.

    A block that is not kept is skipped, not masked, so the work is dense; the program is
    compiled once per width and serves every depth.

    Args:
      params: from `init`.
      inputs: images [B, height, width, channels] or token ids [B, T].
      config: static sizes.
      heads: heads in every block.
      neurons: neurons in every block.
      keep: bool [L], the kept blocks. Not batched: do not vmap over it.
    """
    block = make_block(config, heads, neurons)
    params, keys = cast(params, config), key_mask(inputs, config)
    tokens = embed(params, inputs, config)

    def layer(x: Array, xs: tuple[Params, Array]) -> tuple[Array, Array]:
        weights, kept = xs
        run = lambda v: block.apply({"params": weights}, v, key_mask=keys)  # noqa: E731
        return lax.cond(kept, run, lambda v: v, x), x

    blocks = prefix_block(params["blocks"], heads, neurons)
    final, states = lax.scan(_remat(layer, config), tokens, (blocks, keep))
    return Outputs(classify(params, final, inputs, config), states, final)


GroupFn = Callable[[Params, Params | None, Array], Array]
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
    params: Params, inputs: Array, config: EncoderConfig, space: ArchSpace, arch: Arch
) -> Outputs:
    """Forward pass of one genome that does only the work the sub-network needs.

    Heads and neurons are cut into the largest equal groups that every choice is a multiple
    of, and a group that the genome leaves out is skipped by `lax.cond`. So one small program
    serves every genome of a search.

    Args:
      params: from `init`.
      inputs: images [B, height, width, channels] or token ids [B, T].
      config: static sizes.
      space: the choices, which fix the groups.
      arch: depth [], heads [L], neurons [L]. Not batched: under `vmap` nothing would be
        skipped; loop over genomes with `lax.map`, or vmap `apply` with masks.

    Returns:
      Outputs; `inputs` of a block that is not kept repeat the next kept block's.
    """
    head_group = math.gcd(config.num_heads, *space.head_choices)
    neuron_group = math.gcd(config.num_neurons, *space.neuron_choices)
    params, keys = cast(params, config), key_mask(inputs, config)
    groups = _group(params["blocks"], head_group, neuron_group)
    keep = keep_mask(config.num_layers, arch.depth) > 0

    def add_groups(
        part: GroupFn, weights: Params, norm: Params | None, y: Array, count: Array
    ) -> Array:
        number = jax.tree.leaves(weights)[0].shape[0]

        def add(total: Array, xs: tuple[Params, Array]) -> tuple[Array, None]:
            group, active = xs
            return lax.cond(active, lambda t: t + part(group, norm, y), lambda t: t, total), None

        total, _ = lax.scan(add, jnp.zeros_like(y), (weights, jnp.arange(number) < count))
        return total

    def half(
        x: Array, part: GroupFn, weights: Params, norm: Params, bias: Array, kept: Array,
        count: Array,
    ) -> Array:  # fmt: skip
        """Adds the active groups and the bias of one half of a block, if the block is kept."""
        before = None if config.post_norm else norm
        y = x if config.post_norm else normalise(x, config.norm_epsilon)
        added = x + add_groups(part, weights, before, y, kept * count)
        added = added + kept.astype(x.dtype) * bias[None, None]
        if not config.post_norm:
            return added
        return jnp.where(kept, layer_norm(norm, added, config.norm_epsilon), x)

    attend = functools.partial(attention_heads, key_mask=keys)

    def layer(x: Array, xs: tuple[_Groups, Array, Array, Array]) -> tuple[Array, Array]:
        block, kept, heads, neurons = xs
        frame = block.attention
        middle = half(
            x, attend, block.heads, frame["norm"], frame["out_bias"], kept, heads // head_group
        )
        frame = block.mlp
        final = half(
            middle, mlp_neurons, block.neurons, frame["norm"], frame["down_bias"], kept,
            neurons // neuron_group,
        )  # fmt: skip
        return final, x

    tokens = embed(params, inputs, config)
    final, states = lax.scan(layer, tokens, (groups, keep, arch.heads, arch.neurons))
    return Outputs(classify(params, final, inputs, config), states, final)
