"""Where a run starts: the data, and the full network that will become a supernet.

The network is new, of the sizes in the configuration, or pretrained (`model.pretrained`). The data
decide the number of classes, a pretrained text encoder decides how texts become token ids.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from acme_jax import datasets, pretrained, tokens
from acme_jax.blocks import Params
from acme_jax.config import Config, ConfigError, ModelConfig
from acme_jax.datasets import Dataset, RawText
from acme_jax.encoders import EncoderConfig
from acme_jax.image_store import Progress
from acme_jax.vit import ViTConfig


class StartingPoint(NamedTuple):
    """The data set, and the encoder that fits it."""

    dataset: Dataset
    encoder: EncoderConfig
    params: Params | None
    """Pretrained weights; None: drawn at random."""
    tokenizer: bytes | None = None
    """Texts only: the tokenizer.json that their ids come from."""


def make_starting_point(config: Config, progress: Progress | None = None) -> StartingPoint:
    """Reads the data and, where the configuration names one, the pretrained network.

    Args:
      config: `data`, `model` and `seed` are read.
      progress: see `datasets.load`.

    Raises:
      DataError, PretrainedError: data or checkpoint that cannot be used.
      ConfigError: a network that does not fit the data.
    """
    model = config.model
    loaded = datasets.load(config.data, progress)
    if model.pretrained is None:
        if isinstance(loaded, RawText):
            raise ConfigError(
                f"dataset {loaded.name} holds texts, which need a text encoder with its "
                "tokeniser; give a BERT-like checkpoint as --model.pretrained"
            )
        return StartingPoint(loaded, _new_vit(loaded, model), None)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    _check_kind(loaded, model)
    if isinstance(loaded, RawText):
        text_encoder, params = pretrained.load_bert(
            model.pretrained,
            num_classes=loaded.num_classes,
            max_tokens=model.max_tokens,
            key=key,
        )
        encode = tokens.load(model.pretrained, max_tokens=model.max_tokens)
        if encode.vocab_size > text_encoder.vocab_size or encode.pad_id != text_encoder.pad_id:
            raise pretrained.PretrainedError(
                f"the tokeniser of {model.pretrained} has {encode.vocab_size} pieces and pads with "
                f"{encode.pad_id}, but the encoder has {text_encoder.vocab_size} and pads with "
                f"{text_encoder.pad_id}; take the tokeniser that it was trained with"
            )
        return StartingPoint(
            datasets.tokenise(loaded, encode),
            dataclasses.replace(text_encoder, dtype=model.dtype),
            params,
            encode.to_json(),
        )
    encoder, params = pretrained.load_vit(
        model.pretrained, num_classes=loaded.num_classes, image_size=model.image_size, key=key
    )
    return StartingPoint(loaded, _for_images(encoder, loaded, model), params)


def _new_vit(dataset: Dataset, model: ModelConfig) -> ViTConfig:
    height, width, channels = dataset.image_shape
    if model.image_size is not None:
        height = width = model.image_size
    datasets.check_patch((height, width), model.patch_size)
    shape = (height, width, channels)
    return ViTConfig(
        image_shape=shape,
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_neurons=model.num_neurons,
        num_classes=dataset.num_classes,
        source_shape=None if shape == dataset.image_shape else dataset.image_shape,
        dtype=model.dtype,
    )


def _for_images(encoder: ViTConfig, dataset: Dataset, model: ModelConfig) -> ViTConfig:
    """The encoder for images of the data set's shape, resized on the accelerator."""
    channels = dataset.image_shape[2]
    if channels not in (1, encoder.image_shape[2]):
        raise ConfigError(
            f"the images of {dataset.name} have {channels} channels, but {model.pretrained} takes "
            f"{encoder.image_shape[2]}; convert them to RGB or grey"
        )
    same = dataset.image_shape == encoder.image_shape
    source = None if same else dataset.image_shape
    return dataclasses.replace(encoder, source_shape=source, dtype=model.dtype)


def _check_kind(loaded: Dataset | RawText, model: ModelConfig) -> None:
    assert model.pretrained is not None
    is_text = isinstance(loaded, RawText) or loaded.kind == "text"
    kind = pretrained.kind(model.pretrained)
    if (kind == "text") != is_text:
        raise ConfigError(
            f"{model.pretrained} is {'a text' if kind == 'text' else 'an image'} encoder, but "
            f"dataset {loaded.name} holds {'texts' if is_text else 'images'}; choose a checkpoint "
            "or a dataset of the other kind"
        )
    if is_text and model.image_size is not None:
        raise ConfigError(
            f"model.image_size is {model.image_size}, but the data are texts; omit it"
        )
