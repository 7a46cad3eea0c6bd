"""How well one list of numbers orders another: Kendall's tau-b and Spearman's rho.

Both compare all pairs, O(N^2) in time and memory: traceable with masks, and meant for up to
some thousand rows. They agree with SciPy's. Rows that are masked, or not a number in either
list, are left out; without two different values in each list the answer is NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def kendall_tau(first: jax.Array, second: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Kendall's tau-b [] of two lists [N] (Kendall, "The Treatment of Ties", 1945).

    (concordant - discordant pairs) / sqrt(pairs untied in first * pairs untied in second).

    Raises:
      ValueError: shapes other than [N].
    """
    first, second, mask = _clean(first, second, mask)
    pair = mask[:, None] & mask[None, :]
    a = jnp.where(pair, _order(first), 0)
    b = jnp.where(pair, _order(second), 0)
    score, untied_a, untied_b = (jnp.sum(value) for value in (a * b, jnp.abs(a), jnp.abs(b)))
    # Two roots, because the product of the counts may overflow.
    scale = jnp.sqrt(untied_a.astype(first.dtype)) * jnp.sqrt(untied_b.astype(first.dtype))
    return jnp.where(scale > 0, score / jnp.where(scale > 0, scale, 1), jnp.nan)


def spearman_rho(first: jax.Array, second: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Spearman's rank correlation [] of two lists [N]; ties share their mean rank.

    Raises:
      ValueError: shapes other than [N].
    """
    first, second, mask = _clean(first, second, mask)
    pair = mask[:, None] & mask[None, :]
    count = jnp.maximum(jnp.sum(mask), 1)

    def centered_rank(values: jax.Array) -> jax.Array:
        """Mean rank less the middle one: half of (rows below - rows above)."""
        return jnp.sum(jnp.where(pair, _order(values), 0), axis=1) / (2 * count)

    a, b = centered_rank(first), centered_rank(second)
    scale = jnp.sqrt(jnp.sum(a * a)) * jnp.sqrt(jnp.sum(b * b))
    return jnp.where(scale > 0, jnp.sum(a * b) / jnp.where(scale > 0, scale, 1), jnp.nan)


def _order(values: jax.Array) -> jax.Array:
    """Sign of values[i] - values[j], int32 [N, N]; by comparison, so infinities count."""
    above = (values[:, None] > values[None, :]).astype(jnp.int32)
    return above - above.T


def _clean(
    first: jax.Array, second: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    first, second = jnp.asarray(first), jnp.asarray(second)
    mask = jnp.ones(first.shape, bool) if mask is None else jnp.asarray(mask, bool)
    if first.ndim != 1 or not first.shape == second.shape == mask.shape:
        raise ValueError(
            f"lists {first.shape} and {second.shape} and mask {mask.shape} do not belong "
            "together; expected three of [N]. Use jax.vmap over several lists"
        )
    dtype = jnp.zeros(()).dtype
    first, second = first.astype(dtype), second.astype(dtype)
    return first, second, mask & ~jnp.isnan(first) & ~jnp.isnan(second)
