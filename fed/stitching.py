"""Stitches: one dense layer between two layers whose widths do not fit.

pFedHR (Wang et al., NeurIPS 2023, arXiv 2308.08643) joins layers of different models by
ReLU(W' X + b). The paper leaves open where W and b start before they are trained on public data.
Here they start as the ridge regression (Csiszarik et al., NeurIPS 2021, start theirs by least
squares) of what the next layer read in its own model, so that little training remains.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

RIDGE = 1.0
"""Of `fit`, in mean variances of the inputs. With much less the stitch follows rounding; on the
digits 0.01, 0.1 and 1 differ by less than random seeds do."""

TOLERANCE = 1e-6
"""Of the residual, as a part of the right-hand side, in the fit's conjugate gradients."""
MAX_STEPS = 200


class Stitch(NamedTuple):
    """Parameters of a stitch from width P to width Q."""

    kernel: jax.Array  # [P, Q]
    bias: jax.Array  # [Q]


def apply(stitch: Stitch, inputs: jax.Array) -> jax.Array:
    """ReLU(W' X + b): [N, P] -> [N, Q]."""
    return jax.nn.relu(inputs @ stitch.kernel + stitch.bias[None])


def fit(inputs: jax.Array, targets: jax.Array) -> Stitch:
    """The stitch that is nearest to the targets before its ReLU.

    Columns that are 0 everywhere, padding, get weights of exactly 0 and change nothing else.

    Args:
      inputs: [N, P], what a layer gives on public samples.
      targets: [N, Q], what the next layer reads in its own model, on the same samples.

    Raises:
      ValueError: arrays of other ranks, or with different N.
    """
    if inputs.ndim != 2 or targets.ndim != 2 or inputs.shape[0] != targets.shape[0]:
        raise ValueError(
            "inputs and targets must have shapes [N, P] and [N, Q], got "
            f"{inputs.shape}, {targets.shape}"
        )
    means = [matrix.mean(axis=0, keepdims=True) for matrix in (inputs, targets)]
    x, y = inputs - means[0], targets - means[1]
    products = jnp.matmul(x.T, x, precision="highest")
    used = jnp.maximum(jnp.sum(jnp.diag(products) > 0), 1)
    ridge = jnp.maximum(RIDGE * jnp.trace(products) / used, jnp.finfo(x.dtype).tiny)
    # Conjugate gradients, as the ridge bounds the condition number by P / RIDGE: batched LAPACK
    # calls inside a program for several host devices can wait for each other's threads for ever.
    kernel, _ = jax.scipy.sparse.linalg.cg(
        lambda z: jnp.matmul(products, z, precision="highest") + ridge * z,
        jnp.matmul(x.T, y, precision="highest"),
        tol=TOLERANCE,
        maxiter=MAX_STEPS,
    )
    return Stitch(kernel, (means[1] - means[0] @ kernel)[0])
