"""Text encoders of the BERT family: their sizes, and token ids to hidden states and logits.

BERT (Devlin et al., NAACL 2019): post-LN blocks, learned positions, padding not attended to. A
sample is one segment, so its token type is folded into the positions.

Shape letters: B batch, T tokens ([CLS] first), D embedding, V vocabulary, C classes.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jax import Array

from acme_jax.blocks import Params, layer_norm
from nas.cost import ModelDims

Pooling = Literal["cls", "mean"]


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Static description of the full network; hashable, so a jit static argument."""

    vocab_size: int
    max_tokens: int
    """T, token ids of a sample: [CLS] first, padded at the end."""
    embed_dim: int
    num_layers: int
    num_heads: int
    num_neurons: int
    num_classes: int
    norm_epsilon: float = 1e-12
    pad_id: int = 0
    pooling: Pooling = "mean"
    """What the classifier reads: "cls", the first token through BERT's tanh pooler; "mean", the
    mean of the tokens that are no padding (Sentence-BERT, Reimers & Gurevych 2019)."""
    dtype: str = "float32"
    """Of activations, and of the weights as products read them."""
    remat: bool = False
    """Compute each block again in the backward pass instead of keeping its activations."""

    num_prefix_tokens = 1  # not fields: [CLS], and post-LN blocks
    post_norm = True

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample: its token ids."""
        return (self.max_tokens,)

    @property
    def grid(self) -> tuple[int, int]:
        """A header's grid: one row of the tokens after [CLS]."""
        return 1, self.max_tokens - 1

    @property
    def dims(self) -> ModelDims:
        """The sizes that `nas.cost` counts with; the pooler belongs to the classifier."""
        return ModelDims(
            num_layers=self.num_layers,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            head_size=self.embed_dim // self.num_heads,
            num_neurons=self.num_neurons,
            num_tokens=self.max_tokens,
            patch_dim=0,
            num_classes=self.num_classes,
            vocab_size=self.vocab_size,
        )


def is_real(ids: Array, config: BertConfig) -> Array:
    """Bool [B, T]: the tokens that are no padding; [CLS] always counts."""
    return (jnp.asarray(ids) != config.pad_id).at[:, 0].set(True)


def embed(params: Params, ids: Array, config: BertConfig) -> Array:
    """Token ids int32 [B, T] -> tokens [B, T, D]."""
    words = jnp.asarray(params["embed"]["word"])[jnp.asarray(ids)].astype(config.dtype)
    return layer_norm(
        params["embed"]["norm"], words + params["position"][None], config.norm_epsilon
    )


def summary(final: Array, real: Array) -> Array:
    """Mean [B, D] of the real tokens of the last hidden state [B, T, D]; real: bool [B, T]."""
    weight = real.astype(final.dtype)[..., None]
    return (final * weight).sum(axis=1) / weight.sum(axis=1)


def classify(params: Params, final: Array, real: Array, config: BertConfig) -> Array:
    """Last hidden state [B, T, D] -> logits [B, C], float32; real: bool [B, T]."""
    if config.pooling == "cls":
        pooler = params["pooler"]
        pooled = jnp.tanh(final[:, 0] @ pooler["kernel"] + pooler["bias"][None])
    else:
        pooled = summary(final, real)
    logits = pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"][None]
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
