"""Centred kernel alignment: how alike two sets of representations or weights are."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def linear_cka(x: jax.Array, y: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """Linear CKA (Kornblith et al. 2019, equation 5 with linear kernels).

    |Y' X|^2 / (|X' X| |Y' Y|) in Frobenius norms, columns centred. Rotations of the columns and
    scales do not change it: CKA(X, a X R) = 1. It is computed from the Gram matrices X X'.

    Args:
      x: [N, p]; N examples.
      y: [N, q].
      mask: [N], nonzero for real examples; None: all are.

    Returns:
      [] in [0, 1]. A matrix with equal rows (0, for one) has no structure to compare: 1 with
      another such matrix, 0 with any else.

    Raises:
      ValueError: arrays of other ranks, or with different N.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[0] != y.shape[0]:
        raise ValueError(f"x and y must have shapes [N, p] and [N, q], got {x.shape}, {y.shape}")
    grams = [_unit_gram(matrix, mask) for matrix in (x, y)]
    return _alignment(*grams[0], *grams[1])


def pairwise_cka(matrices: jax.Array) -> jax.Array:
    """Linear CKA between all pairs of clients, averaged over modules.

    CE-LoRA's similarity of models (arXiv 2503.23869), where the matrices are the clients' C.

    Args:
      matrices: [C, M, p, q], M modules of each client; rows are the examples.

    Returns:
      [C, C], symmetric, with a diagonal of 1.

    Raises:
      ValueError: an array of another rank.
    """
    if matrices.ndim != 4:
        raise ValueError(f"matrices must have shape [C, M, p, q], got {matrices.shape}")
    grams, flat = jax.vmap(jax.vmap(lambda matrix: _unit_gram(matrix, None)))(matrices)

    def row(gram: jax.Array, own: jax.Array) -> jax.Array:
        return jax.vmap(lambda g, f: jax.vmap(_alignment)(gram, own, g, f).mean())(grams, flat)

    return jax.vmap(row)(grams, flat)


def _unit_gram(matrix: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The centred Gram matrix [N, N] at norm 1, and whether there is none (all rows equal)."""
    real = jnp.ones(matrix.shape[0], bool) if mask is None else mask != 0
    matrix = jnp.where(real[:, None], matrix, 0)
    mean = matrix.sum(axis=0, keepdims=True) / jnp.maximum(real.sum(), 1)
    centred = jnp.where(real[:, None], matrix - mean, 0)
    # What rounding leaves of equal rows is not structure.
    rounding = (matrix.shape[0] * jnp.finfo(matrix.dtype).eps) ** 2
    flat = (centred**2).sum() <= rounding * (matrix**2).sum()
    # At norm 1 before squaring, so that small matrices do not underflow.
    centred /= jnp.where(flat, 1, jnp.sqrt((centred**2).sum()))
    gram = jnp.matmul(centred, centred.T, precision="highest")
    return gram / jnp.where(flat, 1, jnp.sqrt((gram**2).sum())), flat


def _alignment(x: jax.Array, x_flat: jax.Array, y: jax.Array, y_flat: jax.Array) -> jax.Array:
    aligned = jnp.clip((x * y).sum(), 0, 1)
    return jnp.where(x_flat | y_flat, (x_flat & y_flat).astype(x.dtype), aligned)
