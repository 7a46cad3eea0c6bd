"""Lossless coding of a client's messages with tables that both ends adapt (OSOA).

One-pass adaptation (arXiv 2111.01662): both ends start from theta_0; for t = 1, 2, ... batch t is
coded with p(. | theta_{t-1}), then theta_t = f(theta_{t-1}, batch t) at both ends, so no model
is ever sent. Here theta are counts of symbols and f integer arithmetic (the specification's
minimal mode), hence equal on every machine; the coder is first in, first out
(`fed.range_coder`).

A message is a segment: its batches' code, then 4 bytes of checksum over everything sent so far
and theta. A damaged, lost or reordered segment, or another theta_0, raises `SegmentError` and
leaves the receiver's state as it was, so the right segment can still be read:

    rules = Rules()                        # the same at both ends
    sender, receiver = start(rules), start(rules)
    sender, segment = encode(rules, sender, importance)            # uint8 [N]
    receiver, importance = decode(rules, receiver, segment, (N,))

What is coded is, by default, the difference to the message before, place by place and modulo
the alphabet: importances smoothed over rounds hardly change. Rows of a message [R, N] follow
one another in the same way, so a sketch of ascending quantiles is coded by its increments.
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fed.adaptive_tables import Model, Rules, State
from fed.errors import SegmentError
from fed.range_coder import TOTAL, Decoder
from fed.range_coder import encode as encode_intervals

_CHECKSUM = 4  # bytes


def start(rules: Rules, counts: ArrayLike | None = None) -> State:
    """The state before the first message.

    Args:
      rules: of the stream.
      counts: theta_0, int [1 + K, A], at least 1, for example the `counts` after another
        client's messages; None: all symbols alike.

    Raises:
      ValueError: counts of another shape, below 1, or with rows that sum to more than the limit.
    """
    shape = (1 + rules.num_contexts, rules.alphabet)
    table = np.ones(shape, np.int64) if counts is None else np.array(counts, np.int64)
    if table.shape != shape or (table < 1).any() or (table.sum(axis=1) > rules.limit).any():
        raise ValueError(
            f"counts must have shape {shape}, be at least 1 and sum to at most {rules.limit} a "
            f"table, got shape {table.shape}"
        )
    digest = zlib.crc32(repr(dataclasses.astuple(rules)).encode())
    return State(table, np.zeros(0, np.uint8), zlib.crc32(_bytes(table), digest))


def encode(
    rules: Rules, state: State, symbols: ArrayLike, *, expected: ArrayLike | None = None
) -> tuple[State, bytes]:
    """Codes one message; pure.

    Args:
      rules: of the stream.
      state: after the messages before; unchanged.
      symbols: integers [N] or [R, N] below the alphabet's size.
      expected: the same shape: what both ends expect, in place of the rows above. For symbols
        whose meaning changes from message to message (a scale of its own), the old values in the
        new symbols; or a mean of all old ones.

    Returns:
      The state for the next message, and the segment: less than 6 bytes (4 of them checksum)
      above the ideal `code_length`. Its own length and the message's shape are not in it.

    Raises:
      ValueError: symbols that are not integers, of another rank or outside the alphabet, or
        expectations of another shape.
    """
    model, rows = _begin(rules, state, symbols, expected)
    starts, sizes = _intervals(model, rows)
    code = encode_intervals(starts, sizes)
    digest = _digest(state, code, rows, model)
    return model.state(digest), code + digest.to_bytes(_CHECKSUM, "big")


def decode(
    rules: Rules,
    state: State,
    segment: bytes,
    shape: tuple[int, ...],
    *,
    expected: ArrayLike | None = None,
) -> tuple[State, NDArray[np.uint8]]:
    """Reads one message; pure.

    Args:
      rules: of the stream.
      state: after the messages before; unchanged.
      segment: of `encode`.
      shape: of the message, (N,) or (R, N).
      expected: what `encode` was given.

    Returns:
      The state for the next message, and the symbols, uint8 of the shape given.

    Raises:
      SegmentError: the segment is damaged, is not the next one of this stream, or was written
        with other rules, theta_0, expectations or another number of symbols.
    """
    model, rows = _begin(rules, state, np.zeros(shape, np.uint8), expected)
    code, checksum = segment[:-_CHECKSUM], segment[-_CHECKSUM:]
    decoder = Decoder(code)
    for index, row in enumerate(rows):
        contexts = model.contexts(index, row.size)
        for part in model.batches(row.size):
            symbols = decoder.decode(model.tables(contexts[part]), contexts[part])
            row[part] = model.update(symbols, contexts[part], part)
        model.above = row
    digest = _digest(state, code, rows, model)
    if digest.to_bytes(_CHECKSUM, "big") != checksum:
        raise SegmentError(
            f"a segment of {len(segment)} bytes for {rows.size} symbols fails its checksum: it is "
            "damaged, not the next one of its stream, or written from another start or with other "
            "rules; ask for it again, or start both ends anew"
        )
    return model.state(digest), rows.reshape(shape)


def code_length(
    rules: Rules, state: State, symbols: ArrayLike, *, expected: ArrayLike | None = None
) -> float:
    """The ideal length of a message in bits: sum_t -log2 p(batch t | theta_{t-1}).

    Arguments and errors as for `encode`.
    """
    _, sizes = _intervals(*_begin(rules, state, symbols, expected))
    return float(-np.log2(sizes / TOTAL).sum())


def _intervals(
    model: Model, rows: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and sizes of all symbols' intervals; leaves the model after the message."""
    starts, sizes = ([np.zeros(0, np.int64)] for _ in range(2))
    for index, row in enumerate(rows):
        contexts = model.contexts(index, row.size)
        coded = model.differences(row)
        for part in model.batches(row.size):
            which, symbols = contexts[part], coded[part]
            first, last = np.zeros((2, symbols.size), np.int64)
            for context, table in enumerate(model.tables(which)):
                if table is not None:
                    here = which == context
                    first[here], last[here] = table[symbols[here]], table[symbols[here] + 1]
            starts.append(first)
            sizes.append(last - first)
            model.update(symbols, which, part)
        model.above = row
    return np.concatenate(starts), np.concatenate(sizes)


def _begin(
    rules: Rules, state: State, symbols: ArrayLike, expected: ArrayLike | None
) -> tuple[Model, NDArray[np.uint8]]:
    """The model before a message, and the message's rows [R, N]."""
    rows = _rows(rules, symbols)
    if expected is None:
        return Model(rules, state, None), rows
    expected = _rows(rules, expected)
    if expected.shape != rows.shape:
        raise ValueError(f"expected has rows {expected.shape}, but the message {rows.shape}")
    return Model(rules, state, expected), rows


def _rows(rules: Rules, symbols: ArrayLike) -> NDArray[np.uint8]:
    """Symbols [N] or [R, N] as uint8 [R, N]."""
    array = np.asarray(symbols)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"symbols must be integers, got {array.dtype}; quantise them first")
    if array.size and not 0 <= array.min() <= array.max() < rules.alphabet:
        raise ValueError(
            f"symbols must be from 0 to {rules.alphabet - 1}, got {array.min()} to {array.max()}"
        )
    if array.ndim not in (1, 2):
        raise ValueError(f"a message must have shape [N] or [R, N], got {array.shape}")
    return np.atleast_2d(array.astype(np.uint8))


def _digest(state: State, code: bytes, rows: NDArray[np.uint8], model: Model) -> int:
    """CRC-32 of all segments so far: their code, symbols and theta after them."""
    digest = state.digest
    for part in (code, str(rows.shape).encode(), rows.tobytes(), _bytes(model.counts)):
        digest = zlib.crc32(part, digest)
    return digest


def _bytes(counts: NDArray[np.int64]) -> bytes:
    return counts.astype("<i8").tobytes()
