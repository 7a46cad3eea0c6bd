"""Numbers that travel in a few bits: logarithmic codes for importances, linear ones for features.

Pure functions of arrays, for `jit` and `vmap`; packing codes into bytes is the transport's
business. An array shares one scale, two float32 numbers. With b bits there are 2^b codes.

Logarithmic: code 0 is exactly zero; the others divide the range of the logarithms of the
nonzero values evenly, ends included, so that the relative error is bounded (`log_error`) however
small a value is: importances are squares that spread over ten orders of magnitude. (The idea of
logarithmic number representation in networks: Miyashita et al. 2016, arXiv 1603.01025; theirs
has a fixed base of 2.) Both codes are monotone: a larger value never gets a smaller code.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

MIN_BITS, MAX_BITS = 2, 8
EXACT_BITS = 32
"""In `log_round_trip`: the values stay as they are, float32."""


class Codes(NamedTuple):
    """An array as it travels."""

    codes: jax.Array  # uint8, of the array's shape
    low: jax.Array  # [] float32, lower end of the scale
    high: jax.Array  # [] float32, its upper end


def log_encode(values: jax.Array, bits: int | jax.Array) -> Codes:
    """Logarithmic codes of values that are not negative.

    Args:
      values: any shape, float32. Numbers below the smallest normal one (1.2e-38) count as that
        or as zero. A value that is negative, NaN or infinite makes the scale NaN or infinite,
        which whoever sends it has to refuse.
      bits: from 2 to 8; may be traced.

    Raises:
      ValueError: other bits, where they are known.
    """
    _check_bits(bits)
    values = values.astype(jnp.float32)
    nonzero = values != 0
    tiny = jnp.finfo(jnp.float32).tiny
    # The maximum with tiny lets NaN through, but not what is negative.
    positive = jnp.where(values < 0, jnp.nan, jnp.maximum(values, tiny))
    logs = jnp.log(positive)
    some = jnp.any(nonzero)
    low = jnp.where(some, jnp.min(jnp.where(nonzero, logs, jnp.inf)), 0.0)
    high = jnp.where(some, jnp.max(jnp.where(nonzero, logs, -jnp.inf)), 0.0)
    codes = 1 + _steps(logs, low, high, _log_intervals(bits))
    return Codes(jnp.where(nonzero, codes, 0).astype(jnp.uint8), low, high)


def log_decode(coded: Codes, bits: int | jax.Array) -> jax.Array:
    """The values, float32, that logarithmic codes stand for; bits as for `log_encode`."""
    _check_bits(bits)
    share = (coded.codes.astype(jnp.float32) - 1.0) / _log_intervals(bits)
    values = jnp.exp(coded.low + share * (coded.high - coded.low))
    return jnp.where(coded.codes == 0, 0.0, values)


def log_error(coded: Codes, bits: int | jax.Array) -> jax.Array:
    """The largest relative error [] of a decoded value, but for float32's rounding (5e-5)."""
    _check_bits(bits)
    return jnp.expm1(0.5 * (coded.high - coded.low) / _log_intervals(bits))


def log_round_trip(values: jax.Array, bits: int | jax.Array) -> jax.Array:
    """What the receiver reads of `values`, float32, sent in so many bits.

    Args:
      values: as for `log_encode`.
      bits: from 2 to 8, or `EXACT_BITS`: as they are. May be traced.
    """
    if not isinstance(bits, jax.Array):
        return values if bits == EXACT_BITS else log_decode(log_encode(values, bits), bits)
    few = jnp.minimum(bits, MAX_BITS)
    return jnp.where(bits == EXACT_BITS, values, log_decode(log_encode(values, few), few))


def linear_encode(values: jax.Array, bits: int) -> Codes:
    """Codes at equal distances from the smallest to the largest value.

    Args:
      values: any shape, float32. One that is NaN or infinite makes the scale NaN or infinite,
        which whoever sends it has to refuse.
      bits: from 2 to 8.

    Raises:
      ValueError: other bits.
    """
    _check_bits(bits)
    values = values.astype(jnp.float32)
    low, high = jnp.min(values), jnp.max(values)
    return Codes(_steps(values, low, high, 2**bits - 1).astype(jnp.uint8), low, high)


def linear_decode(coded: Codes, bits: int) -> jax.Array:
    """The values, float32; off by at most half of (high - low) / (2^bits - 1), and rounding."""
    _check_bits(bits)
    share = coded.codes.astype(jnp.float32) / (2**bits - 1)
    return coded.low + share * (coded.high - coded.low)


def _log_intervals(bits: int | jax.Array) -> int | jax.Array:
    """Between the 2^bits - 1 codes of what is not zero."""
    return 2**bits - 2


def _steps(
    values: jax.Array, low: jax.Array, high: jax.Array, intervals: int | jax.Array
) -> jax.Array:
    """The nearest of the equally spaced marks from low to high, 0 to intervals."""
    span = high - low
    share = jnp.where(span > 0, (values - low) / jnp.where(span > 0, span, 1.0), 0.0)
    return jnp.clip(jnp.round(share * intervals), 0, intervals)


def _check_bits(bits: int | jax.Array) -> None:
    if not isinstance(bits, jax.Array) and not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"codes have from {MIN_BITS} to {MAX_BITS} bits, got {bits}")
