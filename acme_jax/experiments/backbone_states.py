"""What a header could see of a backbone beyond its last tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax import cloud, encoders, slicing
from acme_jax.blocks import Params
from acme_jax.encoders import EncoderConfig
from acme_jax.vit_ops import normalise

NUM_STATES = 4
"""The embedding, the middle block's input, the last state, and the class token."""


def wide_tokens(
    backbone: Params, inputs: np.ndarray | Array, encoder: EncoderConfig, batch_size: int
) -> np.ndarray:
    """Tokens [N, T, 4 D] of a frozen backbone's states side by side, each one normalised.

    Args:
      backbone: sliced, with its classifier.
      inputs: samples [N, ...].
      encoder: of the full network.
      batch_size: samples of one forward pass.
    """
    return np.asarray(_program(encoder, batch_size)(backbone, jnp.asarray(inputs)))


@functools.lru_cache(maxsize=4)
def _program(encoder: EncoderConfig, batch_size: int) -> Callable[[Params, Array], Array]:
    def wide(backbone: Params, inputs: Array) -> Array:
        outputs = slicing.apply(backbone, inputs, encoder)
        middle = outputs.inputs[outputs.inputs.shape[0] // 2]
        summary = jnp.broadcast_to(outputs.final[:, :1], outputs.final.shape)
        states = [outputs.inputs[0], middle, outputs.final, summary]
        seen = [encoders.header_tokens(normalise(state, 1e-6), inputs, encoder) for state in states]
        return jnp.concatenate(seen, axis=-1)

    def batches(backbone: Params, inputs: Array) -> Array:
        return cloud.in_batches(lambda rows: wide(backbone, rows), batch_size, inputs)

    return jax.jit(batches)
