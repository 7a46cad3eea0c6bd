"""How skewed the clients' labels are: Jensen-Shannon divergences of label histograms, base 2.

FedDHAD (arXiv 2507.10430), part FedDH, step 1: each client sends its number of samples n_k and
its label histogram P_k once; the server forms P = sum_k n_k P_k / n and the degree of skew
d_k = JS(P_k, P), in [0, 1] because logarithms are base 2. Histograms travel as counts, which hold
n_k too. Shape letters: C clients, N samples, Y labels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fed.pairwise import pairwise_sum
from fed.similarity import js_term

_LOG_2 = float(np.log(2))


def label_counts(
    labels: jax.Array, num_labels: int, size: jax.Array | int | None = None
) -> jax.Array:
    """How often each label occurs, float32 [Y].

    Args:
      labels: int [N], from 0 to Y - 1; others are left out. `vmap` for [C, N].
      num_labels: Y.
      size: int [], the number of real samples, which come first; None: all N.

    Raises:
      ValueError: labels of another rank, or no labels.
    """
    if labels.ndim != 1 or num_labels < 1:
        raise ValueError(
            f"labels must have shape [N] and num_labels be at least 1, got {labels.shape} and "
            f"{num_labels}; use jax.vmap over clients"
        )
    real = jnp.arange(labels.shape[0]) < (labels.shape[0] if size is None else size)
    hits = labels[:, None] == jnp.arange(num_labels, dtype=labels.dtype)[None, :]
    return jnp.sum(hits & real[:, None], axis=0).astype(jnp.float32)


def js_divergence(own: jax.Array, other: jax.Array) -> jax.Array:
    """Jensen-Shannon divergence [...] of distributions [..., Y], base 2: from 0 to 1."""
    terms = js_term(own.astype(jnp.float32), other.astype(jnp.float32))
    return jnp.clip(jnp.sum(terms, axis=-1) / _LOG_2, 0.0, 1.0)


def skew_degree(counts: jax.Array) -> jax.Array:
    """d_k = JS(P_k, P) [C] of each client's labels against all clients' together.

    Args:
      counts: [C, Y], how often each label occurs at each client. A client without samples has
        degree 0.
    """
    total = jnp.sum(counts, axis=0, keepdims=True)
    degree = js_divergence(_shares(counts), jnp.broadcast_to(_shares(total), counts.shape))
    return jnp.where(jnp.sum(counts, axis=1) > 0, degree, 0.0)


def pairwise_skew(counts: jax.Array) -> jax.Array:
    """Jensen-Shannon divergences of all pairs of clients' labels: a cheap distance.

    For `similarity.weights`, where labels may be told, as a reference for distances of features.

    Args:
      counts: [C, Y]. A client without samples is at distance 1 from all others.

    Returns:
      float32 [C, C] in [0, 1], symmetric, zero diagonal.
    """
    known = jnp.sum(counts, axis=1) > 0
    distance = jnp.clip(pairwise_sum(_shares(counts), js_term) / _LOG_2, 0.0, 1.0)
    distance = jnp.where(known[:, None] & known[None, :], distance, 1.0)
    return jnp.where(jnp.eye(len(counts), dtype=bool), 0.0, distance)


def _shares(counts: jax.Array) -> jax.Array:
    """Counts [C, Y] as parts of their row's sum; 0 in a row without counts."""
    total = jnp.sum(counts, axis=1, keepdims=True)
    return (counts / jnp.where(total > 0, total, 1)).astype(jnp.float32)
