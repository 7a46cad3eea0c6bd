"""Pretrained networks in: Hugging Face checkpoints, read without torch or transformers.

    config, params = pretrained.load_vit("google/vit-base-patch16-224", num_classes=100)
    config, params = pretrained.load_bert("MiniLM-L6", num_classes=4)

What comes out is what `acme_jax.supernet.apply` and everything after it takes. Forward passes
equal transformers' own: logits within 1e-4, hidden states within 1e-3, in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import jax
from jax import Array

from acme_jax import bert_checkpoint, vit_checkpoint
from acme_jax.bert import BertConfig
from acme_jax.blocks import Params
from acme_jax.checkpoint_config import CheckpointConfig
from acme_jax.checkpoint_tensors import PretrainedError
from acme_jax.encoders import EncoderConfig
from acme_jax.hub import find_directory
from acme_jax.vit import ViTConfig

__all__ = ["PretrainedError", "kind", "load", "load_bert", "load_vit"]

MAX_TOKENS = 128


def load_vit(
    path_or_hub_id: str | Path,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    key: Array | None = None,
) -> tuple[ViTConfig, Params]:
    """Reads a ViT or DeiT checkpoint.

    Read are config.json, model.safetensors (one file, or shards with their index; float16 and
    bfloat16 are widened) and, for the normalisation of pixels, preprocessor_config.json (without
    it: mean 0.5, standard deviation 0.5). Ignored are `embeddings.mask_token`,
    `embeddings.position_ids` and `pooler`; any other tensor too many is an error.

    Args:
      path_or_hub_id: a directory, or an id of the Hugging Face hub, which is downloaded with
        `huggingface_hub` (HF_HUB_OFFLINE: from its cache).
      num_classes: C of the result. None: the checkpoint's. If it has another number or no
        classification layer, a new one is made: kernel normal with standard deviation 0.02,
        bias 0.
      image_size: height and width in pixels (one number: both) of what the network will see,
        multiples of the patch size. None: the checkpoint's. For another size the position
        embeddings are interpolated (bicubic).
      key: PRNG key of a new classification layer, consumed; None: key 0.

    Returns:
      The configuration, and the parameters in float32.

    Raises:
      PretrainedError: nothing there, another architecture, unsupported settings, pytorch_model.bin
        only; missing, extra, misshapen, truncated or non-finite tensors; or arguments that do not
        fit the checkpoint. Everything but the values is checked before weights are read.
    """
    return vit_checkpoint.read_vit(
        find_directory(path_or_hub_id),
        num_classes=num_classes,
        image_size=image_size,
        key=_or_default(key),
    )


def load_bert(
    path_or_hub_id: str | Path,
    *,
    num_classes: int | None = None,
    max_tokens: int = MAX_TOKENS,
    key: Array | None = None,
) -> tuple[BertConfig, Params]:
    """Reads a checkpoint of a BERT, or of a model of its architecture such as MiniLM.

    With a classification layer of its own the result pools as `BertForSequenceClassification`
    ("cls"), otherwise as sentence-transformers ("mean"). Positions beyond `max_tokens` are cut
    off. Ignored are position and token-type buffers, the pooler where nothing reads it, and the
    layers of pre-training (`cls.predictions`, `cls.seq_relationship`); any other tensor too many
    is an error.

    Args:
      path_or_hub_id: as in `load_vit`.
      num_classes: as in `load_vit`.
      max_tokens: T of the result.
      key: as in `load_vit`.

    Returns:
      The configuration, and the parameters in float32.

    Raises:
      PretrainedError: as `load_vit`.
    """
    return bert_checkpoint.read_bert(
        find_directory(path_or_hub_id),
        num_classes=num_classes,
        max_tokens=max_tokens,
        key=_or_default(key),
    )


def load(
    path_or_hub_id: str | Path,
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    max_tokens: int | None = None,
    key: Array | None = None,
) -> tuple[EncoderConfig, Params]:
    """Reads a checkpoint of any supported kind, as the model_type of its config.json says.

    Args:
      path_or_hub_id: as in `load_vit`.
      num_classes: as in `load_vit`.
      image_size: as in `load_vit`; for images only.
      max_tokens: as in `load_bert` (None: its default); for texts only.
      key: as in `load_vit`.

    Returns:
      The configuration, and the parameters in float32.

    Raises:
      PretrainedError: as `load_vit`, or an argument of the other kind.
    """
    directory = find_directory(path_or_hub_id)
    model_type, is_text = _model_type(directory)
    if (image_size if is_text else max_tokens) is not None:
        name = "image_size" if is_text else "max_tokens"
        raise PretrainedError(
            f"{directory} holds a {model_type} encoder, which has no {name}; omit it"
        )
    if is_text:
        return load_bert(
            directory, num_classes=num_classes, max_tokens=max_tokens or MAX_TOKENS, key=key
        )
    return load_vit(directory, num_classes=num_classes, image_size=image_size, key=key)


def kind(path_or_hub_id: str | Path) -> Literal["image", "text"]:
    """What a checkpoint encodes, by its config.json alone.

    Raises:
      PretrainedError: there is none, or it describes another architecture.
    """
    return "text" if _model_type(find_directory(path_or_hub_id))[1] else "image"


def _model_type(directory: Path) -> tuple[str, bool]:
    """The checkpoint's model_type, and whether that encodes texts."""
    fields = CheckpointConfig(directory)
    name, _ = fields.architecture(vit_checkpoint.ARCHITECTURES | bert_checkpoint.ARCHITECTURES)
    return name, name in bert_checkpoint.ARCHITECTURES


def _or_default(key: Array | None) -> Array:
    return jax.random.key(0) if key is None else key
