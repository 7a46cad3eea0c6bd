"""How much a device's data can teach: entropies of sequences and of labels, in nats.

The Performance Law (arXiv 2412.00430) multiplies the number of tokens by a quality ApEn' to
get its data D'; `data_term` offers the three readings of that prime. Sequences are padded:
`length` items of [n] count. `vmap` over devices.

Trap: a short sequence over a large catalogue hardly repeats, so that its approximate entropy
measures its length. All 50 items distinct give ln(49/48) = 0.0206, next to 0 for a constant
sequence; four equally likely symbols give 0.83 at 50 items and 1.376 at 2,000, where ln 4 =
1.386 is the limit. Compare with `lempel_ziv_entropy` or `label_entropy`, which tell the two
extremes apart.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

DataForm = Literal["entropy", "inverse", "normalised"]


def approximate_entropy(
    sequence: jax.Array,
    length: int | jax.Array | None = None,
    *,
    window: int = 2,
    tolerance: float = 0.2,
) -> jax.Array:
    """ApEn [] = |Phi^(m+1) - Phi^m| of a sequence [n] (Pincus, PNAS 1991), m = `window`.

    Phi^m is the mean over windows of m items of the log of the part of all windows, itself
    included, that lies within `tolerance` in every item. NaN with fewer than m + 1 items.
    O(n^2) memory.

    Args:
      sequence: [n]; of identifiers, any tolerance below 1 asks for equality.
      length: [] items that count, from the first on; None: all n.
      window: m, at least 1.
      tolerance: r, in the unit of the items.

    Raises:
      ValueError: not one sequence, or no window.
    """
    sequence = _one_sequence(sequence)
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    count = sequence.size if length is None else length
    within = jnp.abs(sequence[:, None] - sequence[None, :]) <= tolerance

    def phi(matches: jax.Array, size: int) -> jax.Array:
        num_windows = count - size + 1
        used = jnp.arange(sequence.size, dtype=jnp.int32) < num_windows
        share = jnp.sum(matches & used[None, :], axis=1) / jnp.maximum(num_windows, 1)
        return jnp.sum(jnp.where(used, jnp.log(jnp.where(used, share, 1)), 0)) / num_windows

    matches = within
    for offset in range(1, window):
        matches &= _shifted(within, offset)
    longer = matches & _shifted(within, window)
    value = jnp.abs(phi(longer, window + 1) - phi(matches, window))
    return jnp.where(jnp.asarray(count) > window, value, jnp.nan)


def lempel_ziv_entropy(sequence: jax.Array, length: int | jax.Array | None = None) -> jax.Array:
    """Entropy rate [] of a sequence of identifiers [n]: n ln n / sum of Lambda_i.

    Lambda_i is the length of the shortest run from item i on that does not occur wholly
    before i (Kontoyiannis et al., IEEE Trans. Inf. Theory 1998); where the sequence ends
    first, the run is counted one longer. All items distinct: ln n. NaN without items.
    O(n^2) memory.

    Args:
      sequence: [n] integers.
      length: [] items that count, from the first on; None: all n.

    Raises:
      ValueError: not one sequence.
    """
    sequence = _one_sequence(sequence)
    count = jnp.asarray(sequence.size if length is None else length, jnp.int32)
    rows = jnp.arange(sequence.size, dtype=jnp.int32)
    used = rows < count
    equal = (sequence[:, None] == sequence[None, :]) & used[:, None] & used[None, :]

    def extend(runs: jax.Array, row_equal: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Common runs of items i and j, from those of items i + 1 and j + 1."""
        runs = jnp.where(row_equal, 1 + jnp.append(runs[1:], 0), 0)
        return runs, runs

    _, runs = jax.lax.scan(extend, jnp.zeros_like(rows), equal, reverse=True)
    # The earlier occurrence, from j on, must end before i.
    runs = jnp.minimum(runs, jnp.maximum(rows[:, None] - rows[None, :], 0))
    total = jnp.sum(jnp.where(used, 1 + jnp.max(runs, axis=1), 0))
    return count * jnp.log(count.astype(jnp.float32)) / total


def label_entropy(
    labels: jax.Array, num_labels: int, length: int | jax.Array | None = None
) -> jax.Array:
    """Shannon entropy [] of the labels [n], which says nothing of their order.

    Args:
      labels: [n] integers from 0 to `num_labels` - 1; others are left out.
      num_labels: how many there are; ln of it is the limit.
      length: [] labels that count, from the first on; None: all n.

    Raises:
      ValueError: not one list of labels.
    """
    labels = _one_sequence(labels)
    used = jnp.arange(labels.size, dtype=jnp.int32) < (labels.size if length is None else length)
    hits = labels[:, None] == jnp.arange(num_labels, dtype=labels.dtype)[None, :]
    counts = jnp.sum(hits & used[:, None], axis=0)
    share = counts / jnp.sum(counts)
    return -jnp.sum(jnp.where(counts > 0, share * jnp.log(jnp.where(counts > 0, share, 1)), share))


def data_term(
    num_tokens: jax.Array,
    entropy: jax.Array,
    form: DataForm,
    num_symbols: int | jax.Array | None = None,
) -> jax.Array:
    """D' = tokens times the quality ApEn', of the inputs' shape.

    The paper does not say what its prime does, so there is no default: "entropy" takes ApEn
    as it is, "inverse" 1 / ApEn (infinite for a constant sequence), "normalised" ApEn over
    its limit ln(num_symbols).

    Raises:
      ValueError: an unknown form, or "normalised" without `num_symbols`.
    """
    if form not in get_args(DataForm):
        raise ValueError(f"unknown form {form!r}; expected one of {', '.join(get_args(DataForm))}")
    if form == "entropy":
        return num_tokens * entropy
    if form == "inverse":
        return num_tokens / entropy
    if num_symbols is None:
        raise ValueError('form "normalised" divides by ln(num_symbols); give num_symbols')
    return num_tokens * entropy / jnp.log(jnp.asarray(num_symbols, jnp.float32))


def _shifted(matches: jax.Array, offset: int) -> jax.Array:
    """matches[i + offset, j + offset] at [i, j], False beyond the end."""
    size = matches.shape[0]
    offset = min(offset, size)
    return jnp.pad(matches, (0, offset))[offset : size + offset, offset : size + offset]


def _one_sequence(sequence: jax.Array) -> jax.Array:
    sequence = jnp.asarray(sequence)
    if sequence.ndim != 1 or sequence.size == 0:
        raise ValueError(
            f"a sequence has shape {sequence.shape}; expected [n] with n >= 1. "
            "Use jax.vmap over several, padded to one length"
        )
    return sequence
