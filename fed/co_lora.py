"""Co-LoRA (FedMosaic, arXiv 2506.11024): adapters whose trained part fits models of any width.

A linear module y = W x becomes y = W x + s B (P A x + Q). The basis A, B is as wide as the model
and frozen once it is aligned with the other models' (`fed.co_lora_alignment`); the core P, Q has
r^2 + r numbers however wide the model is, so cores of narrow and wide models can be averaged. Each
module keeps two cores, a local one that it trains and a shared one that it received, mixed by a
gate.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

_matmul = functools.partial(jnp.matmul, precision="highest")


class Basis(NamedTuple):
    """What a module reads and writes; frozen, never sent after the alignment."""

    a: jax.Array  # [r, d_in]
    b: jax.Array  # [d_out, r]


class Core(NamedTuple):
    """What is trained and sent."""

    p: jax.Array  # [r, r]
    q: jax.Array  # [r]


def init_basis(key: jax.Array, held_in: jax.Array, held_out: jax.Array, *, rank: int) -> Basis:
    """A random basis of a model's own units: A has orthonormal rows, B orthonormal columns.

    Args:
      key: consumed.
      held_in: [d_in] 0/1, the module's inputs that the model has; at least r ones. The others,
        which only wider models have, get zeros.
      held_out: [d_out] 0/1, likewise.
      rank: r.

    Raises:
      ValueError: a rank below 1 or beyond d_in or d_out.
    """
    largest = min(held_in.shape[0], held_out.shape[0])
    if not 1 <= rank <= largest:
        raise ValueError(
            f"rank must be from 1 to {largest} for a module of {held_in.shape[0]} inputs and "
            f"{held_out.shape[0]} outputs, got {rank}"
        )
    keys = jax.random.split(key)
    a, b = (
        orthonormal_rows(jax.random.normal(k, (rank, held.shape[0])) * held[None])
        for k, held in zip(keys, (held_in, held_out), strict=True)
    )
    return Basis(a, b.T)


def zero_core(rank: int) -> Core:
    """P = Q = 0, with which the module's output stays W x."""
    return Core(jnp.zeros((rank, rank)), jnp.zeros(rank))


def orthonormal_rows(matrix: jax.Array) -> jax.Array:
    """The nearest matrix with orthonormal rows, U V' of the decomposition U S V'.

    Args:
      matrix: [r, d] of rank r <= d. Columns of zeros, such as those of units that a model lacks,
        stay zeros.
    """
    left, _, right = jnp.linalg.svd(matrix, full_matrices=False)
    found = _matmul(left, right)
    return jnp.where((matrix != 0).any(axis=0, keepdims=True), found, 0)


def gate_value(gate: jax.Array, inputs: jax.Array) -> jax.Array:
    """How much the shared core counts: beta in (0, 1), 0.5 where the gate is 0.

    Args:
      gate: [d_in], beta = sigmoid(x . gate) as in the public code, or [], beta = sigmoid(gate) as
        in the paper.
      inputs: x [..., d_in] of the module; a sequence's mean token, so that its tokens share beta.

    Returns:
      [..., 1], or [] for a gate that does not look at its input.
    """
    if gate.ndim == 0:
        return jax.nn.sigmoid(gate)
    return jax.nn.sigmoid(_matmul(inputs, gate))[..., None]


def apply(
    basis: Basis,
    local: Core,
    shared: Core,
    beta: jax.Array,
    inputs: jax.Array,
    scale: float | jax.Array,
) -> jax.Array:
    """What the adapter adds to its module's output: (1 - beta) local + beta shared.

    Args:
      basis: of the module.
      local: the client's own core, the one that is trained.
      shared: the core that it received; no gradient reaches it.
      beta: see `gate_value`.
      inputs: [..., d_in].
      scale: s = alpha / r.

    Returns:
      [..., d_out].
    """
    inner = _matmul(inputs, basis.a.T)
    received = jax.lax.stop_gradient(shared)
    mixed = (1 - beta) * _apply_core(local, inner) + beta * _apply_core(received, inner)
    return scale * _matmul(mixed, basis.b.T)


def _apply_core(core: Core, inner: jax.Array) -> jax.Array:
    offset = core.q.reshape(*[1] * (inner.ndim - 1), -1)
    return _matmul(inner, core.p.T) + offset
