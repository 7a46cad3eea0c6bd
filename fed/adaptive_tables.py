"""Integer tables of symbols' probabilities that adapt to what has been coded.

One-pass adaptation (OSOA, arXiv 2111.01662) in the specification's minimal mode: theta are counts,
and every step is integer arithmetic, hence equal at both ends and on every machine. See
`fed.adaptive_coding` for what is sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fed.range_coder import TOTAL


@dataclasses.dataclass(frozen=True)
class Rules:
    """What both ends agree on; shipped once with theta_0.

    Raises:
      ValueError: a number out of its range.
    """

    alphabet: int = 256
    """A: symbols are 0 ... A - 1; from 2 to 256."""

    prediction: Literal["previous", "none"] = "previous"
    """Code the difference to the row before, or symbols as they are."""

    num_contexts: int = 1
    """K: after the first row, symbols have one of K tables by the symbol above, divided into
    equal ranges. 2 for masks (a pruned gate stays pruned); differences need only 1."""

    batch_size: int = 64
    """Symbols between two updates of the tables; smaller learns sooner and codes slower."""

    increment: int = 16
    """What a symbol adds to its count; with theta_0's counts of 1, a symbol never seen weighs
    a sixteenth. 0: no adaptation."""

    limit: int = 1 << 15
    """A table with a larger sum is halved: the past counts less and less."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("alphabet", 2, 256),
            ("num_contexts", 1, self.alphabet),
            ("batch_size", 1, None),
            ("increment", 0, 1 << 20),
            ("limit", 2 * self.alphabet, 1 << 30),
        ):
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                span = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"{name} must be {span}, got {value}")
        if self.prediction not in ("previous", "none"):
            raise ValueError(f"prediction must be 'previous' or 'none', got {self.prediction!r}")


class State(NamedTuple):
    """Theta and what it was learnt from, at one end."""

    counts: NDArray[np.int64]  # [1 + K, A] table 0: without a row above; 1 + k: context k
    above: NDArray[np.uint8]  # [N] the last row, empty at the start
    digest: int  # the last segment's checksum


class Model:
    """Theta during one message, and its update; the same code runs at both ends."""

    def __init__(self, rules: Rules, state: State, expected: NDArray[np.uint8] | None) -> None:
        """At the start of a message, whose rows [R, N] may be expected to be something."""
        self.rules, self.above, self.expected = rules, state.above, expected
        self.counts = state.counts.copy()
        self._tables: list[NDArray[np.int64] | None] = [None] * len(self.counts)

    def state(self, digest: int) -> State:
        """As it is now."""
        return State(self.counts, self.above.copy(), digest)

    def contexts(self, index: int, length: int) -> NDArray[np.int64]:
        """The table of each place of the next row [N]; 0 without a row above of its length."""
        if self.expected is not None:
            self.above = self.expected[index]
        if self.above.size != length:
            self.above = np.zeros(length, np.uint8)
            return np.zeros(length, np.int64)
        return 1 + self.above.astype(np.int64) * self.rules.num_contexts // self.rules.alphabet

    def tables(self, contexts: NDArray[np.int64]) -> list[NDArray[np.int64] | None]:
        """Intervals' edges [A + 1] by counts, for the tables that are needed.

        Edge s is s + floor((TOTAL - A) * sum of counts below s / sum of all counts): sums to
        TOTAL without a remainder to hand out, and every symbol has at least 1.
        """
        alphabet = self.rules.alphabet
        for context in np.flatnonzero(np.bincount(contexts)):
            if self._tables[context] is None:
                below = np.concatenate([[0], np.cumsum(self.counts[context])])
                scaled = below * (TOTAL - alphabet) // below[-1]
                self._tables[context] = np.arange(alphabet + 1) + scaled
        return self._tables

    def batches(self, length: int) -> Iterator[slice]:
        """The places of a row's batches."""
        for first in range(0, length, self.rules.batch_size):
            yield slice(first, min(first + self.rules.batch_size, length))

    def differences(self, row: NDArray[np.uint8]) -> NDArray[np.int64]:
        """What is coded in place of the row's symbols [N]."""
        if self.rules.prediction == "none":
            return row.astype(np.int64)
        return (row.astype(np.int64) - self.above) % self.rules.alphabet

    def update(
        self, coded: NDArray[np.int64], contexts: NDArray[np.int64], part: slice
    ) -> NDArray[np.int64]:
        """theta_t = f(theta_{t-1}, batch t); returns the batch's symbols."""
        if self.rules.increment:
            np.add.at(self.counts, (contexts, coded), self.rules.increment)
            while (large := self.counts.sum(axis=1) > self.rules.limit).any():
                self.counts[large] = (self.counts[large] + 1) >> 1
            for context in np.flatnonzero(np.bincount(contexts)):
                self._tables[context] = None
        if self.rules.prediction == "none":
            return coded
        return (coded + self.above[part]) % self.rules.alphabet
