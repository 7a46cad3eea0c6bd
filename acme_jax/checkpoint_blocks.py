"""The Transformer blocks of a Hugging Face checkpoint, stacked along a leading layer axis.

torch keeps a dense layer's kernel as [outputs, inputs] and each head's outputs side by side.

Shape letters: L layers, D embedding, H heads, K head size, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax.blocks import Params
from acme_jax.checkpoint_tensors import CheckpointTensors, Read
from nas.cost import ModelDims

LAYERS = "encoder.layer"
NEW_KERNEL = 0.02  # standard deviation, as Hugging Face and BERT initialise

Shapes = dict[str, tuple[int, ...]]
"""Name of a tensor -> shape."""


class BlockNames(NamedTuple):
    """What the parts of one block are called, after "encoder.layer.<number>."."""

    query: str
    key: str
    value: str
    out: str
    up: str
    down: str
    attention_norm: str
    mlp_norm: str


def dense_shapes(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Shapes:
    """Of a dense layer's tensors, as torch keeps them.

    Args:
      name: of the layer.
      inputs: number of inputs.
      outputs: number of outputs.
      bias: whether it has one.
    """
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def norm_shapes(name: str, size: int) -> Shapes:
    """Of a LayerNorm's tensors.

    Args:
      name: of the layer.
      size: of what it normalises.
    """
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def block_shapes(names: BlockNames, dims: ModelDims, *, qkv_bias: bool) -> Shapes:
    """Of the tensors of all blocks.

    Args:
      names: of one block's parts.
      dims: the network's sizes.
      qkv_bias: whether query, key and value have a bias.
    """
    embed, inner, neurons = dims.embed_dim, dims.num_heads * dims.head_size, dims.num_neurons
    shapes: Shapes = {}
    for layer in range(dims.num_layers):
        start = f"{LAYERS}.{layer}."
        for name in (names.query, names.key, names.value):
            shapes |= dense_shapes(start + name, embed, inner, bias=qkv_bias)
        shapes |= dense_shapes(start + names.out, inner, embed)
        shapes |= dense_shapes(start + names.up, embed, neurons)
        shapes |= dense_shapes(start + names.down, neurons, embed)
        for name in (names.attention_norm, names.mlp_norm):
            shapes |= norm_shapes(start + name, embed)
    return shapes


def read_dense(read: Read, name: str) -> Params:
    """A dense layer: kernel [inputs, outputs] and bias [outputs].

    Args:
      read: reads one tensor.
      name: of the layer.
    """
    return {
        "kernel": jnp.array(read(f"{name}.weight").T),
        "bias": jnp.array(read(f"{name}.bias")),
    }


def read_norm(read: Read, name: str) -> Params:
    """A LayerNorm: scale and bias.

    Args:
      read: reads one tensor.
      name: of the layer.
    """
    return {"scale": jnp.array(read(f"{name}.weight")), "bias": jnp.array(read(f"{name}.bias"))}


def read_blocks(read: Read, names: BlockNames, dims: ModelDims, *, qkv_bias: bool) -> Params:
    """All blocks: "attention" and "mlp" as `acme_jax.blocks` has them, leaves [L, ...].

    Args:
      read: reads one tensor.
      names: of one block's parts.
      dims: the network's sizes.
      qkv_bias: whether query, key and value have a bias; without, it is zero.
    """
    embed, heads, size, neurons = dims.embed_dim, dims.num_heads, dims.head_size, dims.num_neurons

    def stacked(fill: Callable[[str], np.ndarray], *shape: int) -> Array:
        # One leaf at a time lives twice, on the host and as JAX's array.
        leaf = np.empty((dims.num_layers, *shape), np.float32)
        for layer in range(dims.num_layers):
            leaf[layer] = fill(f"{LAYERS}.{layer}.")
        return jnp.array(leaf)

    def qkv(start: str, ending: str) -> list[np.ndarray]:
        return [read(f"{start}{name}.{ending}") for name in (names.query, names.key, names.value)]

    def qkv_kernel(start: str) -> np.ndarray:
        parts = [part.T.reshape(embed, heads, size) for part in qkv(start, "weight")]
        return np.stack(parts, axis=1)

    def qkv_biases(start: str) -> np.ndarray:
        if not qkv_bias:
            return np.zeros((3, heads, size), np.float32)
        return np.stack(qkv(start, "bias")).reshape(3, heads, size)

    def norm(name: str) -> Params:
        return {
            "scale": stacked(lambda start: read(f"{start}{name}.weight"), embed),
            "bias": stacked(lambda start: read(f"{start}{name}.bias"), embed),
        }

    def kernel(name: str, *shape: int) -> Array:
        return stacked(lambda start: read(f"{start}{name}.weight").T.reshape(shape), *shape)

    def bias(name: str, length: int) -> Array:
        return stacked(lambda start: read(f"{start}{name}.bias"), length)

    return {
        "attention": {
            "qkv_kernel": stacked(qkv_kernel, embed, 3, heads, size),
            "qkv_bias": stacked(qkv_biases, 3, heads, size),
            "out_kernel": kernel(names.out, heads, size, embed),
            "out_bias": bias(names.out, embed),
            "norm": norm(names.attention_norm),
        },
        "mlp": {
            "up_kernel": kernel(names.up, embed, neurons),
            "up_bias": bias(names.up, neurons),
            "down_kernel": kernel(names.down, neurons, embed),
            "down_bias": bias(names.down, embed),
            "norm": norm(names.mlp_norm),
        },
    }


def held_classifiers(
    classes: Mapping[str, tuple[str, ...]], architecture: str, tensors: CheckpointTensors
) -> tuple[str, ...]:
    """Names of the classification layers that a checkpoint must have.

    Args:
      classes: supported classes -> names of their classification layers.
      architecture: the class; "": config.json does not say, so the tensors decide.
      tensors: the checkpoint's.
    """
    if architecture:
        return classes[architecture]
    named = (names for names in classes.values() if names)
    return next((names for names in named if f"{names[0]}.weight" in tensors.shapes), ())


def new_dense(key: Array, inputs: int, outputs: int) -> Params:
    """A classification layer to be trained: small normal kernel, zero bias.

    Args:
      key: PRNG key, consumed.
      inputs: number of inputs.
      outputs: number of outputs.
    """
    kernel = NEW_KERNEL * jax.random.normal(key, (inputs, outputs), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(outputs, jnp.float32)}
