"""RELA (FedMosaic, arXiv 2506.11024): how relevant clients' tasks are to each other.

All clients hold the same small frozen model. Its gradient on a client's own samples, with respect
to the last linear layer before the classifier, tells what the client's task asks of the model: it
depends on the labels too, unlike distances of features. The gradient has a closed form, needs no
backward pass, and only some of its rows travel, with noise.

Shape letters here: B rows of a batch (samples or tokens), D outputs of the layer, Y classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Between = Callable[[jax.Array], tuple[jax.Array, Callable[[jax.Array], jax.Array]]]
"""What stands between the layer and the classifier, row by row: outputs [B, D] -> (activations
[B, D], pull-back of a cotangent [B, D] to the outputs)."""


def relu(outputs: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """A rectifier between layer and classifier, see `Between`."""
    return jax.nn.relu(outputs), lambda cotangent: jnp.where(outputs > 0, cotangent, 0)


def rms_norm(scale: jax.Array, epsilon: float = 1e-6) -> Between:
    """The final RMSNorm of a language model, see `Between`.

    Args:
      scale: [D].
      epsilon: added to the mean square.
    """

    def between(outputs: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        square = (outputs**2).mean(axis=-1, keepdims=True)
        inverse = jax.lax.rsqrt(square + epsilon)
        normal = outputs * inverse

        def pull_back(cotangent: jax.Array) -> jax.Array:
            scaled = cotangent * scale[None]
            along = (scaled * normal).mean(axis=-1, keepdims=True)
            return inverse * (scaled - normal * along)

        return normal * scale[None], pull_back

    return between


def num_rows(num_outputs: int, share: float) -> int:
    """Rows of the gradient that travel, the first ones: a share of D, at least one."""
    return max(1, math.floor(share * num_outputs))


def task_vector(
    inputs: jax.Array,
    outputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    labels: jax.Array,
    weight: jax.Array,
    *,
    between: Between,
    rows: int,
) -> jax.Array:
    """The gradient of the mean cross-entropy with respect to the layer's W, in closed form.

    The layer is y = W x + rest, where the rest may be a bias or a residual stream.

    Args:
      inputs: x [B, d_in] of the layer.
      outputs: y [B, D].
      kernel: of the classifier, [D, Y].
      bias: of the classifier, [Y].
      labels: int [B].
      weight: [B], 0 for fillers.
      between: `relu`, `rms_norm(scale)`, or anything of that kind.
      rows: of W that are wanted, from the first on; see `num_rows`.

    Returns:
      [rows, d_in].
    """
    activations, pull_back = between(outputs)
    logits = activations @ kernel + bias[None]
    right = jax.nn.one_hot(labels, kernel.shape[1], dtype=logits.dtype)
    share = (weight / jnp.maximum(weight.sum(), 1.0))[:, None]
    error = (jax.nn.softmax(logits, axis=-1) - right) * share
    gradient = pull_back(error @ kernel.T)
    return gradient[:, :rows].T @ inputs


def smooth(past: jax.Array, new: jax.Array, rounds: jax.Array, decay: float) -> jax.Array:
    """The exponential mean of a client's task vectors; the first one counts fully.

    Args:
      past: the mean so far.
      new: of this round, of the same shape.
      rounds: int [], how many rounds `past` is of.
      decay: what the past counts.
    """
    return jnp.where(rounds > 0, decay * past + (1 - decay) * new, new)


def column_similarity(sketches: jax.Array) -> jax.Array:
    """Cosines of two clients' columns, averaged over the columns.

    Args:
      sketches: [C, R, d_in].

    Returns:
      [C, C], symmetric, in [-1, 1]. A column of zeros is like no other: 0.
    """
    norms = jnp.linalg.norm(sketches, axis=1, keepdims=True)
    unit = sketches / jnp.where(norms > 0, norms, 1)
    cosines = jnp.tensordot(unit, unit, axes=((1, 2), (1, 2)), precision="highest")
    return cosines / sketches.shape[2]


def relevance_weights(
    similarity: jax.Array, known: jax.Array, *, temperature: float = 0.5
) -> jax.Array:
    """How much each client listens to every other: softmax(S / temperature) without oneself.

    Args:
      similarity: [C, C].
      known: bool [C], clients that have sent something; the others count for nobody.
      temperature: of the softmax.

    Returns:
      [C, C], row-stochastic, with a diagonal of 0. A client without others listens to itself.
    """
    own = jnp.eye(similarity.shape[0], dtype=bool)
    others = known[None] & ~own
    scores = jnp.where(others, similarity / temperature, -jnp.inf)
    alone = ~others.any(axis=1, keepdims=True)
    return jax.nn.softmax(jnp.where(alone & own, 0.0, scores), axis=1)
