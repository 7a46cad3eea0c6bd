"""Both kinds of encoder behind one set of functions: Vision Transformers and BERT.

Everything outside the blocks that depends on the kind is here: from inputs to tokens, which
tokens count, and what classifiers, headers and feature sketches read. Inputs are images
[B, height, width, channels] or token ids [B, T].

Shape letters: B batch, T tokens, D embedding, H heads, F neurons, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax import bert, vit
from acme_jax.bert import BertConfig
from acme_jax.blocks import Block, Params
from acme_jax.vit import ViTConfig

EncoderConfig = ViTConfig | BertConfig
"""Static sizes of a full network."""

HEADS = ("classifier", "distillation_classifier", "pooler")
"""Parameters that only the full network's own logits need; devices get headers instead."""

_KINDS: dict[str, type[ViTConfig] | type[BertConfig]] = {"vit": ViTConfig, "bert": BertConfig}


def embed(params: Params, inputs: Array, config: EncoderConfig) -> Array:
    """Inputs -> tokens [B, T, D], prefix tokens first."""
    if isinstance(config, BertConfig):
        return bert.embed(params, inputs, config)
    return vit.embed(params, inputs, config)


def key_mask(inputs: Array, config: EncoderConfig) -> Array | None:
    """Bool [B, T]: the tokens that are attended to; None: all are."""
    return bert.is_real(inputs, config) if isinstance(config, BertConfig) else None


def classify(params: Params, final: Array, inputs: Array, config: EncoderConfig) -> Array:
    """Last hidden state [B, T, D] -> logits [B, C], float32."""
    if isinstance(config, BertConfig):
        return bert.classify(params, final, bert.is_real(inputs, config), config)
    return vit.classify(params, final, config)


def summary(params: Params, final: Array, inputs: Array, config: EncoderConfig) -> Array:
    """One vector for each sample [B, D], float32, of the last hidden state [B, T, D].

    The class token after the final LayerNorm, or the mean of a text's real tokens. Devices
    sketch its distribution.
    """
    if isinstance(config, BertConfig):
        vector = bert.summary(final, bert.is_real(inputs, config))
    else:
        vector = vit.summary(params, final, config)
    return _wide(vector)


def header_tokens(final: Array, inputs: Array, config: EncoderConfig) -> Array:
    """What headers read [B, T', D], float32: the last hidden state without prefix tokens.

    The final LayerNorm is not applied (ACME, header generation). Padding of a text becomes
    zero, like the zeros around an image.
    """
    tokens = final[:, config.num_prefix_tokens :]
    if isinstance(config, BertConfig):
        real = bert.is_real(inputs, config)[:, config.num_prefix_tokens :]
        tokens = tokens * real.astype(tokens.dtype)[..., None]
    return _wide(tokens)


def make_block(config: EncoderConfig, num_heads: int, num_neurons: int) -> Block:
    """A block of that many heads and neurons."""
    return Block(
        num_heads, config.dims.head_size, num_neurons, config.post_norm, config.norm_epsilon
    )


def cast(params: Params, config: EncoderConfig) -> Params:
    """The parameters as the network's products read them; gradients come back in float32."""
    if config.dtype == "float32":
        return params
    return jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)


def to_dict(config: EncoderConfig) -> dict[str, Any]:
    """JSON-ready description; `kind` says which encoder it is."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(config, cls))
    return {"kind": kind, **dataclasses.asdict(config)}


def from_dict(plain: dict[str, Any]) -> EncoderConfig:
    """Inverse of `to_dict`, also after a detour through JSON.

    Raises:
      ValueError: an unknown kind, or fields that are not those of that kind.
    """
    fields: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in plain.items() if k != "kind"
    }
    kind = plain.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"unknown encoder kind {kind!r}; expected one of {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"not the description of a {kind} encoder: {error}") from None


def random_inputs(config: EncoderConfig, count: int, seed: int = 0) -> np.ndarray:
    """Inputs that mean nothing, to measure and compare with.

    Returns:
      float32 images [count, height, width, channels] in [0, 1], or int32 token ids [count, T],
      padded at the end.
    """
    rng = np.random.default_rng(seed)
    if isinstance(config, BertConfig):
        ids = rng.integers(0, config.vocab_size, (count, config.max_tokens))
        lengths = rng.integers(1, config.max_tokens + 1, count)
        real = np.arange(config.max_tokens)[None] < lengths[:, None]
        return np.where(real, ids, config.pad_id).astype(np.int32)
    return rng.random((count, *config.input_shape), np.float32)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
