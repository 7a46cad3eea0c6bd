"""Hugging Face ViT and DeiT checkpoints: names, settings and layout.

ViT: Dosovitskiy et al., ICLR 2021; DeiT: Touvron et al., ICML 2021. transformers 5 calls the parts
of a block otherwise than all versions before; files with either names are read.

Shape letters: T tokens (prefix tokens first), D embedding, C classes.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

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
from acme_jax.checkpoint_tensors import CheckpointTensors, PretrainedError, read_json
from acme_jax.position_grid import resize_positions
from acme_jax.vit import ViTConfig

_TEACHER = ("cls_classifier", "distillation_classifier")
ARCHITECTURES: dict[str, dict[str, tuple[str, ...]]] = {
    "vit": {"ViTForImageClassification": ("classifier",), "ViTModel": ()},
    "deit": {
        "DeiTForImageClassification": ("classifier",),
        "DeiTForImageClassificationWithTeacher": _TEACHER,
        "DeiTModel": (),
    },
}
"""Model type -> classes of transformers that are read, with their classification layers."""

_NAMES = BlockNames(
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    out="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    attention_norm="layernorm_before",
    mlp_norm="layernorm_after",
)
_SINCE_5 = {
    "attention.q_proj": _NAMES.query,
    "attention.k_proj": _NAMES.key,
    "attention.v_proj": _NAMES.value,
    "attention.o_proj": _NAMES.out,
    "mlp.fc1": _NAMES.up,
    "mlp.fc2": _NAMES.down,
}
_LAYER = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.*)\.(weight|bias)")
_UNUSED = ("embeddings.mask_token", "embeddings.position_ids", "pooler.dense.weight",
           "pooler.dense.bias")  # fmt: skip
_PREPROCESSOR = "preprocessor_config.json"


def rename(name: str) -> str:
    """A tensor's name without the model's prefix and as versions before transformers 5 had it.

    Args:
      name: in the file.
    """
    name = re.sub(r"^(vit|deit)\.", "", name)
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    number, part, ending = layer.groups()
    return f"encoder.layer.{number}.{_SINCE_5.get(part, part)}.{ending}"


def read_vit(
    directory: Path,
    *,
    num_classes: int | None,
    image_size: int | tuple[int, int] | None,
    key: Array,
) -> tuple[ViTConfig, Params]:
    """Reads a checkpoint; see `acme_jax.pretrained.load_vit`.

    Args:
      directory: with config.json and the weights.
      num_classes: C of the result; None: the checkpoint's.
      image_size: of the images the network will see (height, width); None: the checkpoint's.
      key: PRNG key of a new classification layer, consumed.

    Raises:
      PretrainedError: see `acme_jax.pretrained.load_vit`.
    """
    fields = CheckpointConfig(directory)
    kind, architecture = fields.architecture(ARCHITECTURES)
    given = _config(fields, directory, num_prefix_tokens=2 if kind == "deit" else 1)
    wanted = _resized(fields, given, image_size)
    tensors = CheckpointTensors(directory, rename)
    heads = held_classifiers(ARCHITECTURES[kind], architecture, tensors)
    held = fields.num_held_classes(tensors, heads)
    given = dataclasses.replace(given, num_classes=held)
    wanted = dataclasses.replace(wanted, num_classes=fields.num_classes(num_classes, held))
    qkv_bias = fields.flag("qkv_bias", True)
    tensors.check(_shapes(given, heads, qkv_bias=qkv_bias), lambda name: name in _UNUSED)

    read, dims = tensors.read, given.dims
    prefix = ["cls_token", "distillation_token"][: given.num_prefix_tokens]
    position = resize_positions(
        read("embeddings.position_embeddings")[0], given.grid, wanted.grid, len(prefix)
    )
    # torch: [D, channels, rows, columns]; here rows, columns and channels of a patch, then D.
    kernel = read("embeddings.patch_embeddings.projection.weight").transpose(2, 3, 1, 0)
    params = {
        "embed": {
            "kernel": jnp.array(kernel.reshape(dims.patch_dim, dims.embed_dim)),
            "bias": jnp.array(read("embeddings.patch_embeddings.projection.bias")),
        },
        "cls": jnp.array(np.concatenate([read(f"embeddings.{name}")[0] for name in prefix])),
        "position": jnp.array(position),
        "blocks": read_blocks(read, _NAMES, dims, qkv_bias=qkv_bias),
        "norm": read_norm(read, "layernorm"),
    }
    keys = jax.random.split(key, 2)
    for name, drawn in zip(heads or ("classifier",), keys, strict=False):
        params[name.removeprefix("cls_")] = (
            read_dense(read, name)
            if held == wanted.num_classes
            else new_dense(drawn, dims.embed_dim, wanted.num_classes)
        )
    return wanted, params


def _config(fields: CheckpointConfig, directory: Path, num_prefix_tokens: int) -> ViTConfig:
    """The network that was saved, still without classes."""
    fields.require(hidden_act="gelu", is_decoder=False, add_cross_attention=False)
    height, width = fields.pair("image_size", 224)
    patch = fields.pair("patch_size", 16)
    if patch[0] != patch[1]:
        raise fields.error("patch_size", "square patches")
    channels = fields.size("num_channels", 3)
    embed_dim = fields.size("hidden_size")
    mean, std = _normalisation(directory, channels)
    return ViTConfig(
        image_shape=(height, width, channels),
        patch_size=patch[0],
        embed_dim=embed_dim,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=fields.heads(embed_dim),
        num_neurons=fields.size("intermediate_size"),
        num_classes=0,
        num_prefix_tokens=num_prefix_tokens,
        norm_epsilon=fields.epsilon(1e-12),
        pixel_mean=mean,
        pixel_std=std,
    )


def _resized(
    fields: CheckpointConfig, config: ViTConfig, image_size: int | tuple[int, int] | None
) -> ViTConfig:
    """The network for images of another size, which must be divisible into patches."""
    height, width, channels = config.image_shape
    if image_size is not None:
        height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
    patch = config.patch_size
    if min(height, width) <= 0 or height % patch or width % patch:
        raise PretrainedError(
            f"{fields.path}: images of {height} x {width} pixels cannot be divided into patches "
            f"of {patch} x {patch}; give image_size as multiples of {patch}"
        )
    return dataclasses.replace(config, image_shape=(height, width, channels))


def _shapes(config: ViTConfig, heads: tuple[str, ...], *, qkv_bias: bool) -> Shapes:
    """Of every tensor that is read."""
    dims, embed, patch = config.dims, config.embed_dim, config.patch_size
    prefix = {"embeddings.cls_token": (1, 1, embed)}
    if config.num_prefix_tokens == 2:
        prefix["embeddings.distillation_token"] = (1, 1, embed)
    shapes: Shapes = {
        **prefix,
        "embeddings.position_embeddings": (1, dims.num_tokens, embed),
        "embeddings.patch_embeddings.projection.weight": (
            embed,
            config.image_shape[2],
            patch,
            patch,
        ),
        "embeddings.patch_embeddings.projection.bias": (embed,),
        **block_shapes(_NAMES, dims, qkv_bias=qkv_bias),
        **norm_shapes("layernorm", embed),
    }
    for name in heads:
        shapes |= dense_shapes(name, embed, config.num_classes)
    return shapes


def _normalisation(directory: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, on pixels in [0, 1]."""
    path = directory / _PREPROCESSOR
    # Without the file: what transformers' image processors of both models start with.
    fields = read_json(path) if path.is_file() else {}
    if not fields.get("do_normalize", True):
        return (), ()
    found = []
    for name in ("image_mean", "image_std"):
        value = fields.get(name, 0.5)
        numbers = [value] * channels if isinstance(value, int | float) else value
        if (
            not isinstance(numbers, list)
            or len(numbers) != channels
            or not all(isinstance(n, int | float) for n in numbers)
            or (name == "image_std" and min(numbers) <= 0)
        ):
            raise PretrainedError(
                f"{path}: {name} is {value!r}, expected {channels} numbers"
                + (" above 0" if name == "image_std" else "")
            )
        found.append(tuple(float(n) for n in numbers))
    return found[0], found[1]
