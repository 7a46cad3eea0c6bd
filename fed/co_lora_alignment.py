"""Making the cores of Co-LoRA mean the same in models of different width (arXiv 2506.11024).

Done once, before the first round, on public samples that both a small reference model and a larger
one see. A of the larger model is fitted so that it reads what the small one's A reads; B of the
small model is carried into the larger model's outputs by their canonical correlations. Units that a
model lacks are zeros in its samples and get zeros in its basis, so masked models of different
widths go through one program; with `lax.map`, not `vmap`: batches of decompositions of some 100
dimensions have been seen to block each other for ever on CPU (JAX 0.10.2, two threads).

Deviations from the paper: A is fitted by least squares, which solves most of the problem at
once, and then by plain gradient descent on the paper's loss (the public code: AdamW); the ridge is
a part of the largest variance, so that it does not depend on units; outputs are centred; pairs of
directions that hardly correlate are left out, since what they would be mapped to is arbitrary.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fed.co_lora import Basis, orthonormal_rows

_matmul = functools.partial(jnp.matmul, precision="highest")

_NO_CORRELATION = 0.01  # that of unrelated directions in thousands of samples


class ModuleSamples(NamedTuple):
    """A module's inputs and outputs, before its nonlinearity, on the public samples."""

    inputs: jax.Array  # [N, d_in]
    outputs: jax.Array  # [N, d_out]


def align(
    reference: Basis, small: ModuleSamples, large: ModuleSamples, *, ridge: float = 1e-4
) -> Basis:
    """The larger model's basis, with which a core does there what it does in the small model.

    Args:
      reference: of the small model.
      small: the small model's samples.
      large: the larger model's, of the same samples row by row.
      ridge: see `match_a` and `canonical_map`.
    """
    targets = _matmul(small.inputs, reference.a.T)
    mapped = canonical_map(small.outputs, large.outputs, ridge=ridge)
    return Basis(match_a(large.inputs, targets, ridge=ridge), _matmul(mapped, reference.b))


def match_a(
    inputs: jax.Array,
    targets: jax.Array,
    *,
    ridge: float = 1e-4,
    penalty: float = 0.5,
    num_steps: int = 200,
) -> jax.Array:
    """A with orthonormal rows whose outputs A x are near given ones.

    Minimises mean (A x - target)^2 + penalty * mean squared cosine of two different rows, then
    takes the nearest matrix with orthonormal rows.

    Args:
      inputs: x [N, d_in]; where an input is always 0, so is its column of A.
      targets: [N, r], of rank r; beyond it rows are arbitrary.
      ridge: of least squares, a part of the inputs' largest eigenvalue.
      penalty: of rows that are not orthogonal.
      num_steps: of gradient descent.

    Returns:
      [r, d_in].
    """
    count, rank = targets.shape
    second = _matmul(inputs.T, inputs) / count
    cross = _matmul(inputs.T, targets) / count
    largest = jnp.maximum(jnp.linalg.eigvalsh(second)[-1], jnp.finfo(second.dtype).tiny)
    regular = second + ridge * largest * jnp.eye(second.shape[0], dtype=second.dtype)
    fitted = jnp.linalg.solve(regular, cross).T

    def loss(a: jax.Array) -> jax.Array:
        # The mean squared error but for a constant.
        error = ((_matmul(a, second) - 2 * cross.T) * a).sum() / rank
        return error + penalty * _mean_squared_cosine(a)

    # One over the largest curvature: of the error 2 largest / r, of the cosines about
    # 4 / (r |a|^2).
    smallest_row = jnp.maximum((fitted**2).sum(axis=1).min(), jnp.finfo(second.dtype).eps)
    rate = rank / (2 * largest + 8 * penalty / smallest_row)
    found = jax.lax.fori_loop(0, num_steps, lambda _, a: a - rate * jax.grad(loss)(a), fitted)
    return orthonormal_rows(found)


def canonical_map(small: jax.Array, large: jax.Array, *, ridge: float = 1e-4) -> jax.Array:
    """The linear map from one model's outputs to another's, through canonical correlations.

    With covariances S11 of the small, S33 of the large model and S31 between them:
    S33^1/2 U V' S11^-1/2, where U Sig V' = S33^-1/2 S31 S11^-1/2. It is R if the large outputs are
    R times the small ones for an R with orthonormal columns.

    Args:
      small: [N, d_small].
      large: [N, d_large], of the same samples.
      ridge: added to the variances, a part of the largest eigenvalue of each model's.

    Returns:
      [d_large, d_small]; 0 for outputs that do not vary.
    """
    count = small.shape[0]
    small, large = (x - x.mean(axis=0, keepdims=True) for x in (small, large))
    varies = (large != 0).any(axis=0)[:, None] & (small != 0).any(axis=0)[None]
    root, inverse = _roots(_matmul(large.T, large) / count, ridge)
    _, small_inverse = _roots(_matmul(small.T, small) / count, ridge)
    whitened = _matmul(_matmul(inverse, _matmul(large.T, small) / count), small_inverse)
    left, correlation, right = jnp.linalg.svd(whitened, full_matrices=False)
    left = jnp.where((correlation > _NO_CORRELATION)[None], left, 0)
    found = _matmul(_matmul(root, _matmul(left, right)), small_inverse)
    return jnp.where(varies, found, 0)


def _mean_squared_cosine(a: jax.Array) -> jax.Array:
    """Over pairs of different rows of A [r, d]."""
    rank = a.shape[0]
    norms = jnp.maximum((a**2).sum(axis=1), jnp.finfo(a.dtype).eps)
    squares = _matmul(a, a.T) ** 2 / (norms[:, None] * norms[None])
    others = 1 - jnp.eye(rank, dtype=a.dtype)
    return (squares * others).sum() / max(rank * (rank - 1), 1)


def _roots(covariance: jax.Array, ridge: float) -> tuple[jax.Array, jax.Array]:
    """The square root of a covariance with a ridge, and the root's inverse; [d, d] each."""
    values, vectors = jnp.linalg.eigh(covariance)
    largest = jnp.maximum(values[-1], jnp.finfo(values.dtype).tiny)
    roots = jnp.sqrt(jnp.maximum(values, 0) + ridge * largest)
    return (
        _matmul(vectors * roots[None], vectors.T),
        _matmul(vectors / roots[None], vectors.T),
    )
