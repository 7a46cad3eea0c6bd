"""A device's model as an ONNX graph, written operation by operation.

jax2onnx, the general converter, holds orbax-checkpoint below 0.11.37 since 0.14, which would hold
back this package's core. 0.13 installs beside it and converts these models correctly, but is a
dead end, and its graph for a device of the main job has 1,852 nodes instead of 238 and takes 2.7
times as long (docs/EXPORT.md). The models consist of few kinds of operation, so they are written
here directly, with ONNX's own LayerNormalization, Gelu, Conv and pools. The arithmetic must be
that of `slicing.features` and `dense_header.apply`: tests compare all encoders and operations to
1e-4.

Everything is float32, whatever the encoder's dtype.
"""

from __future__ import annotations

import json

import jax
import numpy as np

from acme_jax.bert import BertConfig
from acme_jax.blocks import Params
from acme_jax.device_model import DeviceModel
from acme_jax.encoders import EncoderConfig
from acme_jax.onnx_graph import Graph, dense, layer_norm
from acme_jax.onnx_header import HeaderWriter
from acme_jax.vit import ViTConfig

_MASKED = -1e30  # as `vit_ops.attend`


def to_onnx(model: DeviceModel, input_dtype: str = "float32") -> bytes:
    """The model from raw inputs to logits, for any batch size.

    Args:
      model: sliced backbone and dense header.
      input_dtype: of images: "float32" in [0, 1] or "uint8". Token ids are int32.

    Raises:
      ExportError: the package onnx is missing, or the file would be too large.
    """
    graph, encoder = Graph(), model.encoder
    inputs, x, real = _encode(graph, model.backbone, encoder, input_dtype)
    first, last = graph.integers(encoder.num_prefix_tokens), graph.integers(2**31 - 1)
    tokens = graph.add("Slice", x, first, last, graph.integers(1), scope="tokens")
    if real is not None:
        kept = graph.add("Slice", real, first, last, graph.integers(1), scope="tokens")
        kept = graph.add("Cast", kept, to=1, scope="tokens")
        tokens = graph.add("Mul", tokens, graph.add("Unsqueeze", kept, graph.integers(2)))
    logits = HeaderWriter(graph, model).run(tokens)
    facts = {"class_names": json.dumps(model.class_names)}
    return graph.finish(inputs, ("logits", logits, (model.header_dims.num_classes,)), facts)


def backbone_to_onnx(
    backbone: Params, encoder: EncoderConfig, input_dtype: str = "float32"
) -> bytes:
    """A sliced backbone alone, to the last hidden state [B, T, D]; as `slicing.final_state`.

    Arguments and errors as `to_onnx`.
    """
    graph = Graph()
    inputs, x, _ = _encode(graph, backbone, encoder, input_dtype)
    shape = (encoder.dims.num_tokens, encoder.embed_dim)
    return graph.finish(inputs, ("final", x, shape), {})


def _encode(
    graph: Graph, backbone: Params, encoder: EncoderConfig, input_dtype: str
) -> tuple[tuple[str, str, tuple[int, ...]], str, str | None]:
    """Name, type and shape of the inputs; the last hidden state; which tokens are real."""
    params, real = jax.tree.map(np.asarray, backbone), None
    if isinstance(encoder, BertConfig):
        inputs = ("ids", "int32", encoder.input_shape)
        x, real = _embed_ids(graph, params, "ids", encoder)
    else:
        inputs = ("images", input_dtype, encoder.input_shape)
        pixels = _prepare(graph, "images", input_dtype, encoder)
        x = _embed_images(graph, params, pixels, encoder)
    for number, block in enumerate(params["blocks"]):
        x = _attention(graph, f"block{number}", block["attention"], x, encoder, real)
        x = _mlp(graph, f"block{number}", block["mlp"], x, encoder)
    return inputs, x, real


def _prepare(graph: Graph, x: str, dtype: str, config: ViTConfig) -> str:
    """As `vit.prepare`."""
    if dtype != "float32":
        x = graph.add("Cast", x, to=1, scope="pixels")
        x = graph.add("Div", x, graph.constant(255.0), scope="pixels")
    height, width, channels = config.image_shape
    source = config.input_shape
    if source[0] != height:
        x = graph.reshape(x, -1, source[0], source[1] * source[2], scope="resize")
        x = graph.add("MatMul", graph.weight("resize.rows", _resize(source[0], height)), x)
    if source[1] != width:
        x = graph.reshape(x, -1, height, source[1], source[2], scope="resize")
        x = graph.add("MatMul", graph.weight("resize.columns", _resize(source[1], width)), x)
    if source[2] != channels:
        x = graph.reshape(x, -1, height, width, source[2], scope="pixels")
        x = graph.add("Concat", *[x] * channels, axis=-1, scope="pixels")
    x = graph.reshape(x, -1, height, width, channels, scope="pixels")
    if config.pixel_mean:
        x = graph.add("Sub", x, graph.constant(config.pixel_mean), scope="pixels")
    if config.pixel_std:
        x = graph.add("Div", x, graph.constant(config.pixel_std), scope="pixels")
    return x


def _resize(source: int, target: int) -> np.ndarray:
    """Bilinear, antialiased resizing of a line as a matrix [target, source]."""
    return np.asarray(
        jax.image.resize(
            np.eye(source, dtype=np.float32),
            (target, source),
            "bilinear",
            precision=jax.lax.Precision.HIGHEST,
        )
    )


def _embed_images(graph: Graph, params: Params, x: str, config: ViTConfig) -> str:
    """As `vit.embed`: prefix tokens take part as empty patches."""
    size, (rows, columns), prefix = config.patch_size, config.grid, config.num_prefix_tokens
    channels = config.image_shape[2]
    x = graph.reshape(x, -1, rows, size, columns, size, channels, scope="embed")
    x = graph.add("Transpose", x, perm=[0, 1, 3, 2, 4, 5], scope="embed")
    x = graph.reshape(x, -1, rows * columns, size * size * channels, scope="embed")
    x = graph.add("Pad", x, graph.integers(0, prefix, 0, 0, 0, 0), scope="embed")
    x = graph.add("MatMul", x, graph.weight("embed.kernel", params["embed"]["kernel"]))
    bias = np.broadcast_to(params["embed"]["bias"], (rows * columns, config.embed_dim))
    added = np.concatenate([params["cls"], bias]) + params["position"]
    result: str = graph.add("Add", x, graph.weight("embed.position", added), scope="embed")
    return result


def _embed_ids(graph: Graph, params: Params, ids: str, config: BertConfig) -> tuple[str, str]:
    """As `bert.embed`; also which tokens are real, bool [B, T]."""
    pad = graph.constant(config.pad_id, np.int32)
    first = np.arange(config.max_tokens)[None] == 0
    real = graph.add("Not", graph.add("Equal", ids, pad, scope="embed"), scope="embed")
    real = graph.add("Or", real, graph.constant(first, bool), scope="embed")
    x = graph.add("Gather", graph.weight("embed.word", params["embed"]["word"]), ids, scope="embed")
    x = graph.add("Add", x, graph.weight("embed.position", params["position"]), scope="embed")
    return layer_norm(graph, "embed.norm", params["embed"]["norm"], x, config.norm_epsilon), real


def _attention(
    graph: Graph, block: str, weights: Params, x: str, config: EncoderConfig,
    real: str | None,
) -> str:  # fmt: skip
    name = f"{block}.attention"
    heads, size, embed = weights["out_kernel"].shape
    tokens = config.dims.num_tokens
    y = x if config.post_norm else layer_norm(
        graph, f"{name}.norm", weights["norm"], x, config.norm_epsilon
    )  # fmt: skip
    # The scale of the scores goes into the queries' weights.
    scale = np.array([size**-0.5, 1.0, 1.0], np.float32)[:, None, None]
    kernel = (weights["qkv_kernel"] * scale).reshape(embed, -1)
    y = dense(graph, f"{name}.qkv", kernel, (weights["qkv_bias"] * scale).reshape(-1), y)
    parts = graph.add("Split", y, axis=-1, num_outputs=3, outputs=3, scope=name)
    query, key, value = (
        graph.add("Transpose", graph.reshape(part, -1, tokens, heads, size), perm=perm, scope=name)
        for part, perm in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
    )
    scores = graph.add("MatMul", query, key, scope=name)
    if real is not None:
        mask = graph.add("Unsqueeze", real, graph.integers(1, 2), scope=name)
        scores = graph.add("Where", mask, scores, graph.constant(_MASKED), scope=name)
    mixed = graph.add("MatMul", graph.add("Softmax", scores, axis=-1, scope=name), value)
    mixed = graph.add("Transpose", mixed, perm=[0, 2, 1, 3], scope=name)
    mixed = graph.reshape(mixed, -1, tokens, heads * size, scope=name)
    out = weights["out_kernel"].reshape(-1, embed)
    x = graph.add("Add", x, dense(graph, f"{name}.out", out, weights["out_bias"], mixed))
    if config.post_norm:
        return layer_norm(graph, f"{name}.norm", weights["norm"], x, config.norm_epsilon)
    return x


def _mlp(graph: Graph, block: str, weights: Params, x: str, config: EncoderConfig) -> str:
    name = f"{block}.mlp"
    y = x if config.post_norm else layer_norm(
        graph, f"{name}.norm", weights["norm"], x, config.norm_epsilon
    )  # fmt: skip
    hidden = dense(graph, f"{name}.up", weights["up_kernel"], weights["up_bias"], y)
    hidden = graph.add("Gelu", hidden, approximate="none", scope=name)
    down = dense(graph, f"{name}.down", weights["down_kernel"], weights["down_bias"], hidden)
    x = graph.add("Add", x, down, scope=name)
    if config.post_norm:
        return layer_norm(graph, f"{name}.norm", weights["norm"], x, config.norm_epsilon)
    return x
