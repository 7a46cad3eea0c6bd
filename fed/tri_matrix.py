"""Tri-matrix low-rank adaptation: dW = s B C A, of which only the small core C travels.

CE-LoRA (arXiv 2503.23869): A [r, d_in] and B [d_out, r] stay on their device, C [r, r] is sent, so
a module costs r^2 numbers however wide the model is (LoRA: r (d_in + d_out)). Adapters are any
tree with `TriMatrix` nodes, beside which may stand anything else a client trains, such as a
classification head; nodes may hold stacked modules ([..., r, d_in] and so on).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

Start = Literal["trained_basis", "frozen_basis"]

_STD = 1e-3  # of A


class TriMatrix(NamedTuple):
    """One module's factors; any leading axes are stacked modules."""

    a: jax.Array  # [r, d_in]
    b: jax.Array  # [d_out, r]
    c: jax.Array  # [r, r]


def init(
    key: jax.Array, d_in: int, d_out: int, *, rank: int, start: Start = "trained_basis"
) -> TriMatrix:
    """An adapter that does not change the model yet.

    Clients start from the same key: a mean of C means something only as far as they share a basis.

    `"trained_basis"`: A ~ N(0, 1e-3^2), B = 0, C = I, as the public code starts; all three must be
    trained. The public code trains C alone, whose gradient at B = 0 is s B' G A' = 0: nothing
    ever moves. `"frozen_basis"`: A has orthonormal rows and B orthonormal columns, neither is
    trained, and C = 0, so |dW| = s |C|.

    Args:
      key: consumed.
      d_in: inputs of the module.
      d_out: outputs of the module.
      rank: r.
      start: see above.

    Raises:
      ValueError: a rank below 1 or, for orthonormal bases, beyond d_in or d_out; or an unknown
        start.
    """
    largest = min(d_in, d_out)
    if rank < 1 or (start == "frozen_basis" and rank > largest):
        raise ValueError(f"rank must be from 1 to {largest} for {d_in} -> {d_out}, got {rank}")
    if start == "trained_basis":
        a = _STD * jax.random.normal(key, (rank, d_in))
        return TriMatrix(a, jnp.zeros((d_out, rank)), jnp.eye(rank))
    if start == "frozen_basis":
        key_a, key_b = jax.random.split(key)
        a = jax.random.orthogonal(key_a, rank, m=d_in)
        b = jax.random.orthogonal(key_b, d_out, m=rank)
        return TriMatrix(a, b, jnp.zeros((rank, rank)))
    raise ValueError(f"unknown start {start!r}; expected 'trained_basis' or 'frozen_basis'")


def delta(adapter: TriMatrix, scale: float | jax.Array) -> jax.Array:
    """The change s B C A of W in y = W x; a kernel of `x @ kernel` adds its transpose.

    Args:
      adapter: see `TriMatrix`.
      scale: s = alpha / r.

    Returns:
      [..., d_out, d_in].
    """
    return scale * _matmul(_matmul(adapter.b, adapter.c), adapter.a)


def apply(adapter: TriMatrix, inputs: jax.Array, scale: float | jax.Array) -> jax.Array:
    """What the adapter adds to its module's output: s B C A x, without forming dW.

    Args:
      adapter: of one module.
      inputs: [..., d_in].
      scale: s = alpha / r.

    Returns:
      [..., d_out].
    """
    hidden = _matmul(_matmul(inputs, adapter.a.T), adapter.c.T)
    return scale * _matmul(hidden, adapter.b.T)


def cores(adapters: Any) -> jax.Array:
    """What travels: C of all modules, in the order of the tree.

    Returns:
      [M, r, r].

    Raises:
      ValueError: no `TriMatrix` in the tree, or different ranks.
    """
    found = [node.c for node in _nodes(adapters)]
    ranks = {core.shape[-2:] for core in found}
    if len(ranks) != 1:
        raise ValueError(
            f"cores of shapes {sorted(ranks)} cannot travel as one array; give every module the "
            "same rank"
            if found
            else "there is no TriMatrix in the tree, so nothing would travel"
        )
    return jnp.concatenate([core.reshape(-1, *core.shape[-2:]) for core in found])


def with_cores(adapters: Any, new: jax.Array) -> Any:
    """The tree with C [M, r, r] of all modules replaced; the inverse of `cores`."""
    position = 0

    def replace(node: Any) -> Any:
        nonlocal position
        if not isinstance(node, TriMatrix):
            return node
        number = node.c.size // (node.c.shape[-1] * node.c.shape[-2])
        part = new[position : position + number]
        position += number
        return node._replace(c=part.reshape(node.c.shape))

    replaced = jax.tree.map(replace, adapters, is_leaf=_is_node)
    if position != new.shape[0]:
        raise ValueError(f"{new.shape[0]} cores were given for {position} modules")
    return replaced


def payload_bytes(adapters: Any) -> int:
    """Bytes of the cores, one way: 4 r^2 a module in float32. Also of shapes without values."""
    return sum(node.c.size * node.c.dtype.itemsize for node in _nodes(adapters))


def freeze_basis(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimiser for everything but A and B, which it does not touch or keep moments for.

    Their updates are 0, so weight decay does not shrink a frozen basis either.
    """

    def labels(params: Any) -> Any:
        def label(node: Any) -> Any:
            return TriMatrix("frozen", "frozen", "trained") if _is_node(node) else "trained"  # type: ignore[arg-type]

        return jax.tree.map(label, params, is_leaf=_is_node)

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def _nodes(adapters: Any) -> list[TriMatrix]:
    leaves = jax.tree.leaves(adapters, is_leaf=_is_node)
    return [leaf for leaf in leaves if _is_node(leaf)]


def _is_node(node: Any) -> bool:
    return isinstance(node, TriMatrix)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision="highest")
