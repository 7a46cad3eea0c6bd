"""The operations of a Transformer block, with gradients written by hand where that pays.

The functions are mathematically those of `jax.nn`; what differs is which arrays the gradient
keeps and in which layout the small matrix products run. On CPU, XLA's own gradients spend
much of the time on transposed copies and badly laid out products. Reverse mode only: there is no
`jax.jvp`, hence no `jax.hessian`, through these.
Shape letters: B batch, T tokens, D embedding, H heads, K head size, F neurons, N rows.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

_SQRT_HALF = math.sqrt(0.5)
_NORMAL_DENSITY_AT_0 = 1.0 / math.sqrt(2.0 * math.pi)
_MASKED = -1e30
"""Score of a token that is not attended to: finite, so that no gradient becomes NaN."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def normalise(x: Array, epsilon: float = 1e-6) -> Array:
    """(x - mean) / standard deviation over the last axis: LayerNorm without scale and bias.

    Moments are taken in at least float32; the default of epsilon is Flax's.
    """
    return _normalise_forward(x, epsilon)[0]


def _normalise_forward(x: Array, epsilon: float) -> tuple[Array, tuple[Array, Array]]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    rate = lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + epsilon)
    unit = (centred * rate).astype(x.dtype)
    return unit, (unit, rate)


def _normalise_backward(epsilon: float, saved: tuple[Array, Array], grad: Array) -> tuple[Array]:
    del epsilon
    unit, rate = saved
    grad_, unit_ = grad.astype(rate.dtype), unit.astype(rate.dtype)
    along = (grad_ * unit_).mean(axis=-1, keepdims=True)
    return (
        (rate * (grad_ - grad_.mean(axis=-1, keepdims=True) - unit_ * along)).astype(unit.dtype),
    )


normalise.defvjp(_normalise_forward, _normalise_backward)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """The exact GELU, x * Phi(x) (Hendrycks & Gimpel 2016).

    By `erf`, which XLA computes branch-free; `jax.nn.gelu` goes through `erfc`, whose two
    branches are both computed. The derivative is worked out in the forward pass, so that the
    backward pass is one product.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    # 1 + erf cancels in the left tail: bfloat16 would keep no digit of it.
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    distribution = 0.5 * (1.0 + lax.erf(wide * _SQRT_HALF))
    derivative = distribution + wide * (_NORMAL_DENSITY_AT_0 * jnp.exp(-0.5 * wide * wide))
    return (wide * distribution).astype(x.dtype), derivative.astype(x.dtype)


def _gelu_backward(derivative: Array, grad: Array) -> tuple[Array]:
    return (grad * derivative,)


gelu.defvjp(_gelu_forward, _gelu_backward)


def project_down(hidden: Array, kernel: Array) -> Array:
    """Product of hidden [N, F] and kernel [F, D], for D much smaller than F.

    On CPU the gradient of the kernel is computed as (grad^T hidden)^T: XLA's product with the
    long side last takes half the time of the other order.
    """
    return _project(hidden, kernel) if jax.default_backend() == "cpu" else hidden @ kernel


@jax.custom_vjp
def _project(hidden: Array, kernel: Array) -> Array:
    return hidden @ kernel


def _project_forward(hidden: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return hidden @ kernel, (hidden, kernel)


def _project_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    hidden, kernel = saved
    transposed = lax.dot_general(grad, hidden, (((0,), (0,)), ((), ())))
    # The barrier keeps XLA from folding the transpose back into the product.
    return grad @ kernel.T, lax.optimization_barrier(transposed).T


_project.defvjp(_project_forward, _project_backward)


def attend(qkv: Array, key_mask: Array | None = None) -> Array:
    """Softmax attention of every head: [B, T, 3, H, K] -> [B, T, H, K].

    Scores are scaled by K^-0.5. On CPU small batched products in the layouts that XLA runs
    fast; elsewhere `jax.nn.dot_product_attention`.

    Args:
      qkv: queries, keys and values.
      key_mask: bool [B, T], which tokens are attended to; None: all. At least one of each row.
    """
    if jax.default_backend() == "cpu":
        return _attend_by_products(qkv, key_mask)
    mask = None if key_mask is None else key_mask[:, None, None]
    return jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask=mask)


@jax.custom_vjp
def _attend_by_products(qkv: Array, key_mask: Array | None = None) -> Array:
    return _attend_forward(qkv, key_mask)[0]


def _rows(x: Array) -> Array:
    """[B, T, H, K] -> [B, H, T, K]."""
    return x.transpose(0, 2, 1, 3)


def _columns(x: Array) -> Array:
    """[B, T, H, K] -> [B, H, K, T]."""
    return x.transpose(0, 2, 3, 1)


def _attend_forward(qkv: Array, key_mask: Array | None) -> tuple[Array, tuple[Array, Array]]:
    query, key, value = (qkv[:, :, i] for i in range(3))
    scores = jnp.matmul(_rows(query) * qkv.shape[-1] ** -0.5, _columns(key))
    if key_mask is not None:
        scores = jnp.where(key_mask[:, None, None], scores, _MASKED)
    probabilities = jax.nn.softmax(scores)
    return _rows(jnp.matmul(probabilities, _rows(value))), (qkv, probabilities)


def _attend_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, None]:
    # Every product contracts the last axis of its left side with the second last of its right
    # one; asking for transposed keys and values instead would take XLA's slow path.
    qkv, probabilities = saved
    query, key, value = (qkv[:, :, i] for i in range(3))
    upstream = jnp.matmul(_rows(grad), _columns(value))
    inner = (upstream * probabilities).sum(axis=-1, keepdims=True)
    scores = probabilities * (upstream - inner) * qkv.shape[-1] ** -0.5
    query_grad = jnp.matmul(scores, _rows(key)).transpose(0, 2, 1, 3)
    key_grad = jnp.matmul(_columns(query), scores).transpose(0, 3, 1, 2)
    value_grad = jnp.matmul(_columns(grad), probabilities).transpose(0, 3, 1, 2)
    # A masked key has probability zero, so its scores' gradient is zero without a mask here.
    return jnp.stack([query_grad, key_grad, value_grad], axis=2), None


_attend_by_products.defvjp(_attend_forward, _attend_backward)
