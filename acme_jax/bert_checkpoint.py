"""Hugging Face BERT checkpoints (also MiniLM and other models of its architecture).

BERT: Devlin et al., NAACL 2019. The classifier of a checkpoint for sequence classification reads
the tanh pooler of [CLS]; an encoder alone is summarised by the mean of its tokens, as
sentence-transformers does (Reimers & Gurevych, EMNLP 2019), and its pooler stays unread.

Shape letters: T tokens, D embedding, V vocabulary, C classes.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp
from jax import Array

from acme_jax.bert import BertConfig
from acme_jax.blocks import Params
from acme_jax.checkpoint_blocks import (
    BlockNames,
    Shapes,
    block_shapes,
    dense_shapes,
    held_classifiers,
    new_dense,
    norm_shapes,
    read_blocks,
    read_dense,
    read_norm,
)
from acme_jax.checkpoint_config import CheckpointConfig
from acme_jax.checkpoint_tensors import CheckpointTensors, PretrainedError

ARCHITECTURES: dict[str, dict[str, tuple[str, ...]]] = {
    "bert": {
        "BertForSequenceClassification": ("classifier",),
        "BertModel": (),
        "BertForMaskedLM": (),
        "BertForPreTraining": (),
    },
}
"""Model type -> classes of transformers that are read, with their classification layers."""

_NAMES = BlockNames(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    attention_norm="attention.output.LayerNorm",
    mlp_norm="output.LayerNorm",
)
# Buffers of older versions, the pooler where nothing reads it, and the layers of pre-training
# (masked words, next sentence), which a classifier does not have.
_UNUSED = re.compile(
    r"embeddings\.(position_ids|token_type_ids)|pooler\.dense\.(weight|bias)"
    r"|cls\.(predictions|seq_relationship)\..*"
)


def rename(name: str) -> str:
    """A tensor's name without the model's prefix, LayerNorms as in today's files.

    Args:
      name: in the file.
    """
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name.removeprefix("bert."))
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)


def read_bert(
    directory: Path, *, num_classes: int | None, max_tokens: int, key: Array
) -> tuple[BertConfig, Params]:
    """Reads a checkpoint; see `acme_jax.pretrained.load_bert`.

    Args:
      directory: with config.json and the weights.
      num_classes: C of the result; None: the checkpoint's.
      max_tokens: T, at most as many as the checkpoint has positions.
      key: PRNG key of a new classification layer, consumed.

    Raises:
      PretrainedError: see `acme_jax.pretrained.load_bert`.
    """
    fields = CheckpointConfig(directory)
    kind, architecture = fields.architecture(ARCHITECTURES)
    given = _config(fields)
    if not 2 <= max_tokens <= given.max_tokens:
        raise PretrainedError(
            f"max_tokens is {max_tokens}, but {fields.path} has positions for at most "
            f"{given.max_tokens} tokens; give a number from 2 to {given.max_tokens}"
        )
    tensors = CheckpointTensors(directory, rename)
    heads = held_classifiers(ARCHITECTURES[kind], architecture, tensors)
    held = fields.num_held_classes(tensors, heads)
    given = dataclasses.replace(given, num_classes=held, pooling="cls" if heads else "mean")
    wanted = dataclasses.replace(
        given, num_classes=fields.num_classes(num_classes, held), max_tokens=max_tokens
    )
    num_types = fields.size("type_vocab_size", 2)
    tensors.check(_shapes(given, num_types), lambda name: _UNUSED.fullmatch(name) is not None)

    read = tensors.read
    token_type = read("embeddings.token_type_embeddings.weight")[:1]
    position = read("embeddings.position_embeddings.weight")[:max_tokens]
    params = {
        "embed": {
            "word": jnp.array(read("embeddings.word_embeddings.weight")),
            "norm": read_norm(read, "embeddings.LayerNorm"),
        },
        "position": jnp.array(position + token_type),
        "blocks": read_blocks(read, _NAMES, given.dims, qkv_bias=True),
    }
    if wanted.pooling == "cls":
        params["pooler"] = read_dense(read, "pooler.dense")
    if held == wanted.num_classes:
        params["classifier"] = read_dense(read, "classifier")
    else:
        params["classifier"] = new_dense(key, given.embed_dim, wanted.num_classes)
    return wanted, params


def _config(fields: CheckpointConfig) -> BertConfig:
    """The network that was saved, still without classes."""
    fields.require(
        hidden_act="gelu",
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
    )
    embed_dim = fields.size("hidden_size")
    fields.require(embedding_size=embed_dim)
    vocab_size = fields.size("vocab_size")
    pad_id = fields.index("pad_token_id", 0, vocab_size)
    return BertConfig(
        vocab_size=vocab_size,
        max_tokens=fields.size("max_position_embeddings"),
        embed_dim=embed_dim,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=fields.heads(embed_dim),
        num_neurons=fields.size("intermediate_size"),
        num_classes=0,
        norm_epsilon=fields.epsilon(1e-12),
        pad_id=pad_id,
    )


def _shapes(config: BertConfig, num_types: int) -> Shapes:
    """Of every tensor that is read."""
    embed = config.embed_dim
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (config.vocab_size, embed),
        "embeddings.position_embeddings.weight": (config.max_tokens, embed),
        "embeddings.token_type_embeddings.weight": (num_types, embed),
        **norm_shapes("embeddings.LayerNorm", embed),
        **block_shapes(_NAMES, config.dims, qkv_bias=True),
    }
    if config.pooling == "cls":
        shapes |= dense_shapes("pooler.dense", embed, embed)
        shapes |= dense_shapes("classifier", embed, config.num_classes)
    return shapes
