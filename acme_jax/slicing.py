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

from acme_jax import supernet
from acme_jax.vit import Block, Params, ViTConfig
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


def apply(sliced: Params, images: Array, config: ViTConfig) -> supernet.Outputs:
    """Forward pass of a sliced network; sizes are read from its weights.

    Args:
      sliced: from `slice_params`.
      images: [B, height, width, channels].
      config: of the full network (patch size and embedding are shared).
    """
    inputs, final = _run_blocks(sliced, images, config)
    return supernet.Outputs(supernet.classify(sliced, final), jnp.stack(inputs), final)


def final_state(sliced: Params, images: Array, config: ViTConfig) -> Array:
    """Last hidden state [B, T, D] before the final LayerNorm; needs no classifier."""
    return _run_blocks(sliced, images, config)[1]


def features(sliced: Params, images: Array, config: ViTConfig) -> Array:
    """Tokens for headers [B, T - 1, D]: `final_state` without CLS, row-major over patches."""
    return final_state(sliced, images, config)[:, 1:]


def _run_blocks(sliced: Params, images: Array, config: ViTConfig) -> tuple[list[Array], Array]:
    """The input of every block, and the last hidden state."""
    x = supernet.embed(sliced, images, config)
    inputs = []
    for weights in sliced["blocks"]:
        heads, head_size = weights["attention"]["out_kernel"].shape[:2]
        block = Block(heads, head_size, weights["mlp"]["up_bias"].shape[0])
        inputs.append(x)
        x = jnp.asarray(block.apply({"params": weights}, x))
    return inputs, x
