"""What adaptive coding saves: sizes of a stream of messages beside simpler codes.

The baselines of the specification: the numbers as float16, their 8-bit symbols as they are,
zlib, and a static Huffman code that knows the whole stream beforehand.
"""

from __future__ import annotations

import dataclasses
import heapq
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fed.adaptive_coding import Rules, encode, start


class Sizes(NamedTuple):
    """Bytes of the messages of one stream, [T] each: one entry a message."""

    float16_bytes: NDArray[np.int64]
    raw_bytes: NDArray[np.int64]  # a byte a symbol; for fewer than 256, the bits that they need
    zlib_bytes: NDArray[np.int64]  # every message by itself, level 9
    zlib_stream_bytes: NDArray[np.int64]  # one zlib stream, flushed after every message
    zlib_difference_bytes: NDArray[np.int64]  # zlib of the differences that our coder codes, too
    huffman_bytes: NDArray[np.int64]  # static; the first message carries a byte a symbol for it
    static_bytes: NDArray[np.int64]  # our coder with theta_0 only, never adapted
    adaptive_bytes: NDArray[np.int64]  # our coder, with its checksums


def measure(
    rules: Rules, messages: Sequence[ArrayLike], counts: NDArray[np.int64] | None = None
) -> Sizes:
    """Sizes of all messages of one client.

    Args:
      rules: of our coder.
      messages: uint8 arrays [N] or [R, N], in the order of rounds.
      counts: theta_0 of our coder, int [1 + K, A]; None: all symbols alike.

    Raises:
      ValueError: as `fed.adaptive_coding.encode`.
    """
    symbols = [np.asarray(message, np.uint8) for message in messages]
    packed = [_packed(message, rules.alphabet) for message in symbols]
    static, adaptive = (
        _segments(own, symbols, counts) for own in (dataclasses.replace(rules, increment=0), rules)
    )
    stream = zlib.compressobj(9)
    flushed = [len(stream.compress(part)) + len(stream.flush(zlib.Z_SYNC_FLUSH)) for part in packed]

    def lengths(parts: list[bytes]) -> NDArray[np.int64]:
        return np.asarray([len(part) for part in parts])

    return Sizes(
        float16_bytes=np.asarray([2 * np.size(message) for message in messages]),
        raw_bytes=lengths(packed),
        zlib_bytes=lengths([zlib.compress(part, 9) for part in packed]),
        zlib_stream_bytes=np.asarray(flushed),
        zlib_difference_bytes=lengths(
            [zlib.compress(_packed(part, rules.alphabet), 9) for part in _differences(symbols)]
        ),
        huffman_bytes=_huffman(messages, rules.alphabet),
        static_bytes=lengths(static),
        adaptive_bytes=lengths(adaptive),
    )


def importance_stream(
    seed: int,
    *,
    num_rounds: int = 20,
    num_gates: int = 1024,
    momentum: float = 0.9,
    num_steps: int = 8,
    spread: float = 2.0,
    drift: float = 0.1,
) -> NDArray[np.uint8]:
    """Importance sets of one client over rounds, as they look after 8-bit log quantisation.

    A gate's squared gradient has a log-normal scale of its own, which drifts from round to round;
    a round's importance is the mean over steps of scale * chi^2 (Taylor importance is a square),
    smoothed by `momentum` over rounds. Symbols divide the stream's logarithms evenly.

    Args:
      seed: of NumPy's generator.
      num_rounds: T.
      num_gates: N.
      momentum: of the smoothing; ACME's is 0.9. 0: every round by itself.
      num_steps: optimiser steps in a round.
      spread: standard deviation of the logarithm of the gates' scales.
      drift: standard deviation of its change in a round.

    Returns:
      uint8 [T, N].
    """
    rng = np.random.default_rng(seed)
    scale = spread * rng.normal(size=num_gates)
    rounds: list[NDArray[np.float64]] = []
    for _ in range(num_rounds):
        scale = scale + drift * rng.normal(size=num_gates)
        new = np.exp(scale) * rng.chisquare(1, (num_steps, num_gates)).mean(axis=0)
        rounds.append(momentum * rounds[-1] + (1 - momentum) * new if rounds else new)
    logs = np.log(np.stack(rounds))
    low, high = logs.min(), logs.max()
    return np.rint(255 * (logs - low) / (high - low)).astype(np.uint8)


def _segments(
    rules: Rules, messages: list[NDArray[np.uint8]], counts: NDArray[np.int64] | None
) -> list[bytes]:
    state, segments = start(rules, counts), []
    for message in messages:
        state, segment = encode(rules, state, message)
        segments.append(segment)
    return segments


def _differences(messages: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Rows less the row before, modulo 256, over all messages; rows of another length as are."""
    above, result = np.zeros(0, np.uint8), []
    for message in messages:
        rows = np.atleast_2d(message)
        first = rows[:1] - above if rows.shape[1] == above.size else rows[:1]
        result.append(np.concatenate([first, rows[1:] - rows[:-1]]))
        above = rows[-1]
    return result


def _packed(symbols: NDArray[np.uint8], alphabet: int) -> bytes:
    """Symbols with as many bits as the alphabet needs; their differences, too."""
    bits = (alphabet - 1).bit_length()
    return np.packbits(np.unpackbits(symbols.reshape(-1, 1), axis=1)[:, -bits:]).tobytes()


def _huffman(messages: Sequence[ArrayLike], alphabet: int) -> NDArray[np.int64]:
    """Bytes of each message under the best prefix code of the whole stream."""
    histograms = np.stack([np.bincount(np.ravel(m), minlength=alphabet) for m in messages])
    used = np.flatnonzero(histograms.sum(axis=0))
    heap = [(int(histograms[:, symbol].sum()), int(symbol), [symbol]) for symbol in used]
    heapq.heapify(heap)
    length = np.zeros(alphabet, np.int64)
    length[used] = len(used) == 1  # one symbol only still needs a bit
    while len(heap) > 1:
        (weight, order, first), (other, _, second) = heapq.heappop(heap), heapq.heappop(heap)
        length[first + second] += 1
        heapq.heappush(heap, (weight + other, order, first + second))
    sizes = -(-(histograms @ length) // 8)
    sizes[0] += alphabet
    return sizes
