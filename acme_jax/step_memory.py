"""How many bytes the programs of the cloud need on one device, without compiling anything.

An analytic model: it counts the arrays that the code keeps (see `vit_ops` for what each gradient
saves) and adds XLA's transients by factors fitted to `memory_analysis()` of the real programs on
CPU, which tests compare it with; docs/bench_full_size.json has ViT-B/16.

Shape letters: B batch, T tokens, D embedding, H heads, K head size, F neurons, L layers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from jax.sharding import Mesh

from acme_jax.bert import BertConfig
from acme_jax.config import TrainConfig
from acme_jax.encoders import EncoderConfig
from nas.arch import ArchSpace
from nas.cost import ModelDims

_WIDE = 4
"""Bytes of a float32: parameters, gradients and moments at rest."""

# Fitted to XLA's numbers, in units of what the comments say.
_TRANSIENT = 1.5  # of one block's saved activations: the backward pass of a block
_REFERENCE_WEIGHTS = 1.25  # of the parameters: their gradient on the way
_DISTILL_WEIGHTS = 2.4  # of the parameters: the sum of gradients and the one on the way
_DISTILL_STATES = 6.3  # of the hidden states: student, teachers, their gradients
_DISTILL_STATES_REMAT = 5.2
_OPTIMISER = 1.5  # of the parameters: flat gradient and direction
_EVALUATION = 1.1  # of the arrays that live in the worst moment of a block's forward pass
_IMPORTANCE_WEIGHTS = 0.75  # of the parameters: gradients of the MLPs only


class Weights(NamedTuple):
    """Numbers of the full network, not bytes."""

    blocks: int
    total: int


def count_weights(encoder: EncoderConfig) -> Weights:
    """The parameters of the full network, as `supernet.init` makes them."""
    d = encoder.dims
    inner = d.num_heads * d.head_size
    block = 4 * d.embed_dim * inner + 3 * inner + 2 * d.embed_dim  # attention, output biases
    block += 2 * d.embed_dim * d.num_neurons + d.num_neurons + 4 * d.embed_dim  # MLP, norms
    outer = (d.vocab_size or d.patch_dim) * d.embed_dim + d.num_tokens * d.embed_dim
    outer += 2 * d.embed_dim + (d.embed_dim + 1) * d.num_classes  # a norm, the classifier
    if isinstance(encoder, BertConfig):
        outer += (d.embed_dim + 1) * d.embed_dim if encoder.pooling == "cls" else 0
    else:
        outer += d.embed_dim * (1 + d.num_prefix_tokens)  # bias of the patches, prefix tokens
    return Weights(d.num_layers * block, d.num_layers * block + outer)


def item_bytes(encoder: EncoderConfig, mesh: Mesh) -> int:
    """Bytes of one activation; XLA computes in float32 on CPU, also what should be bfloat16."""
    return 2 if encoder.dtype == "bfloat16" and not on_cpu(mesh) else _WIDE


def on_cpu(mesh: Mesh) -> bool:
    """Whether the mesh is of host devices."""
    return mesh.devices.flat[0].platform == "cpu"


def default_sample_bytes(encoder: EncoderConfig) -> int:
    """Bytes of one sample at rest, if its numbers are 32 bits wide."""
    return _WIDE * math.prod(encoder.input_shape)


def data_bytes(num_samples: int, sample_bytes: int) -> int:
    """Bytes of that many samples and their labels."""
    return num_samples * (sample_bytes + _WIDE)


def state_bytes(encoder: EncoderConfig) -> int:
    """Parameters and Adam's two moments."""
    return 3 * _WIDE * count_weights(encoder).total


def training_bytes(
    encoder: EncoderConfig, train: TrainConfig, mesh: Mesh, micro_batch: int, *, distils: bool
) -> int:
    """What an epoch needs on each device beyond its data: state, teacher and temporaries.

    Args:
      encoder: sizes; `encoder.remat` counts.
      train: the batch and its shards.
      mesh: among whose devices the shards are divided.
      micro_batch: samples whose gradient is computed at once.
      distils: a distillation phase (its teacher counts); False: the reference phase.
    """
    weights, item = count_weights(encoder), item_bytes(encoder, mesh)
    total, blocks = _WIDE * weights.total, item * weights.blocks
    # A device computes its shards in turn and keeps their gradients; then it gathers those of all.
    own = -(-train.shards // mesh.size)
    stacked = own if own > 1 else 0
    gathered = own * mesh.size if mesh.size > 1 else max(stacked, 0.5)
    added_up = int(micro_batch * train.shards < train.batch_size)
    gradient = _DISTILL_WEIGHTS if distils else _REFERENCE_WEIGHTS
    working = (stacked + added_up + gradient) * total
    if encoder.dtype == "bfloat16":
        # The weights as products read them, and their gradient before it is widened.
        working += (3 if distils else 1) * item * weights.total
    if not encoder.remat:
        # The kernels that each block's backward pass reads are saved with its activations;
        # a LayerNorm before them makes new ones.
        saved = 0.4 if encoder.post_norm else 1.0
        working += (1.5 if distils else 1.0) * saved * blocks
    working += micro_batch * _sample_bytes(encoder, mesh, distils=distils)
    updating = (gathered + _OPTIMISER) * total
    return state_bytes(encoder) + int(distils) * total + int(max(working, updating))


def importance_bytes(encoder: EncoderConfig, mesh: Mesh, batch_size: int = 8) -> int:
    """What `cloud.reorder_by_importance` needs beyond its data: parameters twice, gradients."""
    weights = count_weights(encoder)
    saved = 0 if encoder.remat else item_bytes(encoder, mesh) * weights.blocks
    activations = batch_size * _sample_bytes(encoder, mesh, distils=False)
    return int((2 + _IMPORTANCE_WEIGHTS) * _WIDE * weights.total) + saved + activations


def evaluation_bytes(
    encoder: EncoderConfig,
    space: ArchSpace,
    mesh: Mesh,
    batch_size: int,
    population: int,
    *,
    dense: bool,
) -> int:
    """What `cloud.accuracy` needs beyond its data: parameters and a forward pass.

    Args:
      encoder: sizes.
      space: the choices, which fix the groups of heads and neurons of the dense form.
      mesh: the devices.
      batch_size: samples in one forward pass.
      population: sub-networks that are evaluated together.
      dense: one sub-network after the other (`supernet.apply_arch`); False: all at once.
    """
    d, item = encoder.dims, item_bytes(encoder, mesh)
    if dense:
        heads = math.gcd(d.num_heads, *space.head_choices)
        neurons, copies = math.gcd(d.num_neurons, *space.neuron_choices), 1
    else:
        heads, neurons, copies = d.num_heads, d.num_neurons, population
    per_sample = _EVALUATION * item * _forward_numbers(d, heads, neurons)
    casts = item * count_weights(encoder).total if encoder.dtype == "bfloat16" else 0
    # The dense form regroups the blocks' weights; masks are small.
    regrouped = item * count_weights(encoder).blocks if dense else 0
    pixels = batch_size * _input_bytes(encoder, item) // 2
    activations = int(batch_size * copies * per_sample)
    return _WIDE * count_weights(encoder).total + casts + regrouped + pixels + activations


def features_bytes(encoder: EncoderConfig, num_samples: int) -> int:
    """Cached header tokens of that many samples; always float32."""
    rows, columns = encoder.grid
    return _WIDE * num_samples * rows * columns * encoder.embed_dim


def _block_bytes(d: ModelDims, item: int, *, cpu: bool) -> int:
    """Activations of one sample that a block's gradient keeps."""
    rows = d.num_tokens
    inner = d.num_heads * d.head_size
    # `jax.nn.dot_product_attention` keeps its probabilities in float32 as well.
    scores = d.num_heads * rows * rows * (item if cpu else item + _WIDE)
    attention = rows * (d.embed_dim + 3 * inner + inner)
    mlp = rows * (d.embed_dim + 2 * d.num_neurons)
    return scores + item * (attention + mlp + rows * d.embed_dim)  # and the block's input


def _sample_bytes(encoder: EncoderConfig, mesh: Mesh, *, distils: bool) -> int:
    """Bytes of one sample in the forward and backward pass of the full network."""
    d, item = encoder.dims, item_bytes(encoder, mesh)
    block = _block_bytes(d, item, cpu=on_cpu(mesh))
    state = item * d.num_tokens * d.embed_dim
    kept = d.num_layers * (state if encoder.remat else block)
    copies = _DISTILL_STATES_REMAT if encoder.remat else _DISTILL_STATES
    states = copies * (d.num_layers + 1) * state if distils else 0.0
    return int(kept + _TRANSIENT * block + states) + _input_bytes(encoder, item)


def _forward_numbers(d: ModelDims, heads: int, neurons: int) -> int:
    """Numbers of one sample alive at once in a forward pass: the worse half of a block."""
    rows, inner = d.num_tokens, heads * d.head_size
    attention = rows * 4 * inner + 2 * heads * rows * rows
    return rows * 4 * d.embed_dim + max(attention, 2 * rows * neurons)


def _input_bytes(encoder: EncoderConfig, item: int) -> int:
    """Bytes of one sample on its way into the network: resized, and cut into patches."""
    d = encoder.dims
    if isinstance(encoder, BertConfig):
        return _WIDE * d.num_tokens
    return 2 * _WIDE * math.prod(encoder.image_shape) + item * d.num_tokens * d.patch_dim
