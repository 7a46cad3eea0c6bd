"""From a genome to a dense, really smaller network.

After the importance reordering a sub-network is a set of kept blocks and, in each, prefixes
of heads and neurons; slicing copies exactly those weights. `apply` of the sliced network
equals the masked supernet to 1e-5 (tested), and its size is what a device stores.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax import encoders, supernet
from acme_jax.blocks import Params
from acme_jax.encoders import EncoderConfig
from nas.arch import Arch, keep_mask


def kept_blocks(arch: Arch) -> tuple[int, ...]:
    """Indices of the blocks that a concrete genome keeps."""
    mask = np.asarray(keep_mask(arch.heads.shape[-1], np.int32(arch.depth)))
    return tuple(int(i) for i in np.flatnonzero(mask > 0))


def slice_params(params: Params, arch: Arch) -> Params:
    """Weights of one sub-network.

    Args:
      params: of the supernet, `blocks` stacked along [L]; NumPy leaves give NumPy leaves, which
        saves the host a small program for every slice.
      arch: a concrete genome: depth [], heads [L], neurons [L].

    Returns:
      The same tree, except that `blocks` is a list with one dense dictionary for each kept
      block.

    Raises:
      ValueError: a population instead of one genome, or more heads or neurons than there are.
    """
    if np.ndim(arch.depth) != 0:
        raise ValueError(
            f"expected one genome with scalar depth, got depth of shape {np.shape(arch.depth)}; "
            "index the population first"
        )
    kernel_shape = params["blocks"]["attention"]["out_kernel"].shape
    num_neurons = params["blocks"]["mlp"]["up_bias"].shape[-1]
    heads, neurons = np.asarray(arch.heads), np.asarray(arch.neurons)
    if heads.max() > kernel_shape[1] or neurons.max() > num_neurons:
        raise ValueError(
            f"the genome keeps up to {heads.max()} heads and {neurons.max()} neurons, but the "
            f"network has {kernel_shape[1]} and {num_neurons}"
        )
    layers = kept_blocks(arch)
    return slice_blocks(
        params, layers, heads[list(layers)].tolist(), neurons[list(layers)].tolist()
    )


def slice_blocks(
    params: Params, layers: Sequence[int], heads: Sequence[int], neurons: Sequence[int]
) -> Params:
    """Some blocks at given widths, all static; the parameters may be traced.

    Args:
      params: of the supernet, `blocks` stacked along [L].
      layers: which blocks, in order.
      heads: kept in each of those, a prefix.
      neurons: likewise.

    Returns:
      The same tree, except that `blocks` is a list of dense dictionaries.
    """
    blocks = []
    for layer, num_heads, num_neurons in zip(layers, heads, neurons, strict=True):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        blocks.append(supernet.prefix_block(block, num_heads, num_neurons))
    return {**params, "blocks": blocks}


def apply(sliced: Params, inputs: Array, config: EncoderConfig) -> supernet.Outputs:
    """Forward pass of a sliced network; sizes are read from its weights.

    Args:
      sliced: from `slice_params`.
      inputs: images [B, height, width, channels] or token ids [B, T].
      config: of the full network (patch size and embedding are shared).
    """
    states, final = _run_blocks(sliced, inputs, config)
    logits = encoders.classify(encoders.cast(sliced, config), final, inputs, config)
    return supernet.Outputs(logits, jnp.stack(states), final)


def final_state(sliced: Params, inputs: Array, config: EncoderConfig) -> Array:
    """Last hidden state [B, T, D] before the final LayerNorm; needs no classifier."""
    return _run_blocks(sliced, inputs, config)[1]


def features(sliced: Params, inputs: Array, config: EncoderConfig) -> Array:
    """Tokens for headers [B, T', D] (`encoders.header_tokens`), row-major over patches."""
    return encoders.header_tokens(final_state(sliced, inputs, config), inputs, config)


def _run_blocks(sliced: Params, inputs: Array, config: EncoderConfig) -> tuple[list[Array], Array]:
    """The input of every block, and the last hidden state."""
    sliced, keys = encoders.cast(sliced, config), encoders.key_mask(inputs, config)
    x = encoders.embed(sliced, inputs, config)
    states = []
    for weights in sliced["blocks"]:
        heads = weights["attention"]["out_kernel"].shape[0]
        block = encoders.make_block(config, heads, weights["mlp"]["up_bias"].shape[0])
        states.append(x)
        x = jnp.asarray(block.apply({"params": weights}, x, key_mask=keys))
    return states, x
