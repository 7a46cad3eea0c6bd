"""A range coder on integers: symbols with integer probabilities to bytes and back, exactly.

First in, first out: symbols come out in the order in which they went in, so a decoder can adapt
its tables to what it has already read (OSOA, arXiv 2111.01662, one-pass adaptive coding with a
FIFO coder). A symbol is an interval [start, start + size) of the integers below `TOTAL`; it
costs -log2(size / TOTAL) bits. The bytes are the shortest binary fraction in the interval that
is left when every symbol has taken its part of the one before (Martin 1979), in Python's exact
integers: the same on every machine.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import chain, repeat

import numpy as np
from numpy.typing import ArrayLike, NDArray

PRECISION = 16  # bits
TOTAL = 1 << PRECISION
"""What the sizes of a table's intervals sum to."""

_WORD = 16  # bits written at a time
_STATE = 64  # bits of the interval that are kept
_FLOOR = 1 << (_STATE - _WORD)
"""An interval this wide or less is written out until it is wider: at least 2^32 units of 2^16
are left, so that rounding a unit down costs less than 2^-32 of a symbol's probability."""


def encode(starts: ArrayLike, sizes: ArrayLike) -> bytes:
    """Writes symbols, given by their intervals, as bytes.

    Args:
      starts: int [N].
      sizes: int [N], at least 1; starts + sizes at most `TOTAL`.

    Returns:
      The code, less than 9 bits longer than the sum of -log2(sizes / TOTAL); empty for N = 0.
      It does not say how many symbols it holds, nor whether it has been damaged.

    Raises:
      ValueError: intervals that are empty or beyond `TOTAL`, or arrays of different shapes.
    """
    first, length = np.asarray(starts, np.int64), np.asarray(sizes, np.int64)
    if first.ndim != 1 or first.shape != length.shape:
        raise ValueError(
            f"starts {first.shape} and sizes {length.shape} must have the same shape [N]"
        )
    if ((length < 1) | (first < 0) | (first + length > TOTAL)).any():
        raise ValueError(f"intervals must hold at least 1 and lie in [0, {TOTAL})")
    low, width = 0, 1 << _STATE
    words: list[int] = []
    for start, size in zip(first.tolist(), length.tolist(), strict=True):
        unit = width >> PRECISION
        low += unit * start
        width = unit * size
        while width <= _FLOOR:
            # One bit more than a word: what it carries into the words before is added at the end.
            words.append(low >> (_STATE - _WORD))
            low = (low % _FLOOR) << _WORD
            width <<= _WORD
    words += _shortest(low, width)
    return _carry(words).rstrip(b"\0")


class Decoder:
    """Reads the symbols of a code, a batch at a time.

    Every sequence of bytes can be read: those that `encode` did not write give some symbols,
    and beyond the end are zeros. Whether a code is the right one is for a checksum to say.
    """

    def __init__(self, code: bytes) -> None:
        """At the first symbol of the code."""
        padded = np.frombuffer(code + bytes(-len(code) % 2), ">u2").tolist()
        self._words = chain(padded, repeat(0))
        self._offset = 0  # of the code above the interval's low end
        for _ in range(_STATE // _WORD):
            self._offset = self._offset << _WORD | next(self._words)
        self._width = 1 << _STATE

    def decode(
        self, tables: Sequence[NDArray[np.int64] | None], which: ArrayLike
    ) -> NDArray[np.int64]:
        """The next symbols.

        Args:
          tables: each int [A + 1], ascending from 0 to `TOTAL`: symbol s is the interval
            [table[s], table[s + 1]). None for tables that no symbol needs.
          which: int [N], the table of each symbol.

        Returns:
          int64 [N].
        """
        edges = [[] if table is None else table.tolist() for table in tables]
        offset, width = self._offset, self._width
        symbols = []
        for index in np.asarray(which).tolist():
            table = edges[index]
            unit = width >> PRECISION
            value = offset // unit
            if value >= TOTAL:  # only in bytes that `encode` did not write
                value, offset = TOTAL - 1, (unit << PRECISION) - 1
            symbol = bisect_right(table, value) - 1
            symbols.append(symbol)
            start = table[symbol]
            offset -= unit * start
            width = unit * (table[symbol + 1] - start)
            while width <= _FLOOR:
                offset = offset << _WORD | next(self._words)
                width <<= _WORD
        self._offset, self._width = offset, width
        return np.asarray(symbols, np.int64)


def _shortest(low: int, width: int) -> list[int]:
    """The words of the number in [low, low + width) that ends in the most zeros."""
    bits = _STATE
    while (value := -(-low >> bits) << bits) >= low + width:
        bits -= 1
    rest = [value >> shift & 0xFFFF for shift in range(_STATE - 2 * _WORD, -1, -_WORD)]
    return [value >> (_STATE - _WORD), *rest]


def _carry(words: list[int]) -> bytes:
    """Words, the high bit of each added to the one before, as bytes."""
    array = np.asarray(words, np.int64)
    digits, carries = ((part.astype(">u2").tobytes()) for part in (array & 0xFFFF, array >> _WORD))
    total = int.from_bytes(digits, "big") + (int.from_bytes(carries, "big") << _WORD)
    return total.to_bytes(len(digits), "big")
