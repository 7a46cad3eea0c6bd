"""Ranks and orders of rows, made of sorts of one integer array each.

XLA's sort on CPU is some eight times faster on a single integer operand than on several, or on
floats, so a key and the row it belongs to are packed into one word. Shape letter: N rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_LARGEST = 2**16  # two numbers below this fit one word of 32 bits


def sort_key(values: jax.Array) -> jax.Array:
    """Integers whose order is that of the numbers [...]; NaN is the largest, -0 equals 0."""
    if jnp.issubdtype(values.dtype, jnp.integer):
        return values
    if values.dtype.itemsize < 4:
        values = values.astype(jnp.float32)
    values = jnp.where(values == 0, 0, jnp.where(jnp.isnan(values), jnp.nan, values))
    integer = jnp.int64 if values.dtype == jnp.float64 else jnp.int32
    bits = jax.lax.bitcast_convert_type(values, integer)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(integer).max, bits)


def ranks(*keys: jax.Array) -> jax.Array:
    """How many rows are smaller than each: int32 [N]; equal rows share a rank.

    Rows compare by the first key [N], of integers, then by the second, and so on.
    """
    rank = _rank(keys[0])
    for key in keys[1:]:
        rank = _rank(pack(rank, _rank(key)))
    return rank


def order(*keys: jax.Array) -> jax.Array:
    """The rows from the smallest to the largest, int32 [N]; equal rows keep their order.

    Rows compare as for `ranks`.
    """
    return order_of_ranks(ranks(*keys))


def order_of_ranks(rank: jax.Array) -> jax.Array:
    """As `order`, of integers from 0 to N - 1."""
    num_rows = rank.shape[0]
    packed = pack(rank, jnp.arange(num_rows, dtype=jnp.int32))
    return unpack(jax.lax.sort(packed, is_stable=False), num_rows)[1]


def levels(key: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Ranks without gaps among the masked rows, int32 [N], and how many there are, [].

    Equal keys [N], of integers, share a rank. The other rows get any number.
    """
    lowest = jnp.iinfo(key.dtype).min
    key = jnp.where(mask, key, lowest)  # so that the other rows come first, as level -1
    ordered = jax.lax.sort(key, is_stable=False)
    previous = jnp.concatenate([jnp.full((1,), lowest, key.dtype), ordered[:-1]])
    level = jnp.cumsum(ordered > previous, dtype=jnp.int32)
    return level[jnp.searchsorted(ordered, key)] - 1, level[-1]


def shuffle(bits: jax.Array) -> jax.Array:
    """A random order of the rows, int32 [N], from random bits, uint32 [N].

    Exact enough for breeding, not for statistics: the bits are cut to those that a word holds
    beside the row, so that two rows keep their order with a chance of about N / 2^32.
    """
    num_rows = bits.shape[0]
    rows = jnp.arange(num_rows, dtype=jnp.uint32)
    mask = jnp.uint32((1 << _num_bits(num_rows)) - 1)
    return (jax.lax.sort((bits & ~mask) | rows, is_stable=False) & mask).astype(jnp.int32)


def inverse(order: jax.Array) -> jax.Array:
    """The place of every row in an order: int32 [N]."""
    rows = jnp.arange(order.shape[0], dtype=jnp.int32)
    return jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)


def pack(first: jax.Array, second: jax.Array) -> jax.Array:
    """One unsigned integer a row that sorts by the first, then the second; both below N.

    Raises:
      ValueError: more than 65,536 rows without 64-bit integers.
    """
    num_rows = first.shape[0]
    wide = num_rows > _LARGEST
    if wide and jnp.arange(0).dtype != jnp.int64:
        raise ValueError(
            f"{num_rows} rows are more than the {_LARGEST} that can be ranked with 32-bit "
            "integers; give fewer rows or set jax_enable_x64"
        )
    dtype = jnp.uint64 if wide else jnp.uint32
    return (first.astype(dtype) << _num_bits(num_rows)) | second.astype(dtype)


def unpack(packed: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """The two int32 that `pack` made one of."""
    bits = _num_bits(num_rows)
    return (packed >> bits).astype(jnp.int32), (packed & ((1 << bits) - 1)).astype(jnp.int32)


def _num_bits(num_rows: int) -> int:
    return max(1, (num_rows - 1).bit_length())


def _rank(key: jax.Array) -> jax.Array:
    ordered = jax.lax.sort(key, is_stable=False)
    return jnp.searchsorted(ordered, key).astype(jnp.int32)
