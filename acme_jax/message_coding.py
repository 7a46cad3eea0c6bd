"""Lossless adaptive coding of what devices send up: `refine.coding = "adaptive"`.

Both ends of a link keep tables of symbols' probabilities and adapt them to every message (OSOA,
arXiv 2111.01662, with integer tables: `fed.adaptive_coding`), so no model is ever sent. Works on
messages that `acme_jax.messages` has encoded and gives back the same bytes; every kind of message
has tables of its own. Coded are the numbers that have few values:

* codes in few bits: importances as differences to what the message before said, in the new scale;
  quantiles of a sketch as differences to the quantile below. The scale's ends travel as they are.
* of float numbers the highest byte alone, sign and exponent, as a difference in the same way;
  the others look like noise and travel as they are. This saves little: quantise first
  (`refine.importance_format`, `refine.sketch_format`).

On the wire, big-endian; less than 8 bytes above the ideal length and what travels as it is:

  0x80 + kind u8 | header length u16 | header | bytes as they are | segment

The header, that of the encoded message, is left out (length 0) when it is the last one's of this
kind. The segment ends in a checksum over all messages of the kind so far; a message that is damaged
or out of order raises `fed.errors.SegmentError`.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from acme_jax import messages
from acme_jax.message_trees import pack_bits, unpack_bits
from fed import adaptive_coding
from fed.adaptive_tables import Rules, State
from fed.errors import SegmentError

CODED = ("feature_sketch", "importance_set", "log_densities")
"""Kinds with enough numbers for tables to learn from; the others travel as they are."""

_PREFIX = struct.Struct(">BH")
_CODED = 0x80
_NODE = re.compile(r"(log|linear|f)([2-8]):(\d+(?:,\d+)?)")
_SCALE = np.dtype("<f4")
_MAX_SYMBOLS = 1 << 24
"""What a damaged header may ask for at most."""
_NEWEST = 0.7
"""Weight of the newest importance in what is expected of the next one; as `_Form.rules`."""


class Memory(NamedTuple):
    """What both ends of a link know of the messages of one kind."""

    state: State
    header: bytes
    """Of the last message."""
    logs: NDArray[np.float64]
    """[G] logarithms of importances as expected, -inf for zero; empty if there are none."""


class _Form(NamedTuple):
    """How an encoded message's numbers are divided."""

    scheme: str
    """"log", "linear" or "f" for floats."""
    size: int
    """Bits of a code, or bytes of a float."""
    shape: tuple[int, ...]

    @property
    def num_symbols(self) -> int:
        return math.prod(self.shape)

    @property
    def num_raw(self) -> int:
        """Bytes that travel as they are."""
        return 2 * _SCALE.itemsize if self.scheme != "f" else self.num_symbols * (self.size - 1)

    @property
    def rules(self) -> Rules:
        """Of the tables; the numbers are the best of a few on the importances of the digits."""
        return Rules(
            alphabet=256 if self.scheme == "f" else 1 << self.size,
            num_contexts=4 if self.scheme == "log" else 1,
            batch_size=32,
            increment=32,
        )


def encode(memory: Memory | None, plain: bytes) -> tuple[Memory, bytes]:
    """Codes one message; pure.

    Args:
      memory: after the kind's messages before on this link; None: there was none.
      plain: of `messages.encode`, of a kind in `CODED`.

    Returns:
      The memory for the next message, and the coded message.
    """
    number, header, payload = messages.split(plain)
    form = _form(header)
    memory = _current(memory, form)
    symbols, raw = _divide(form, payload)
    known = header == memory.header
    expected = _expected(form, memory, raw)
    state, segment = adaptive_coding.encode(
        form.rules, _mixed(memory.state, bytes([number]) + header + raw), symbols, expected=expected
    )
    head = _PREFIX.pack(_CODED + number, 0 if known else len(header))
    after = Memory(state, header, _logs(form, memory, symbols, raw))
    return after, head + (b"" if known else header) + raw + segment


def decode(memory: Memory | None, coded: bytes) -> tuple[Memory, bytes]:
    """Reads one message; pure. Inverse of `encode`, with the memory before it.

    Raises:
      SegmentError: damaged, or not the next message of its kind on this link.
    """
    if len(coded) < _PREFIX.size or coded[0] < _CODED:
        raise SegmentError(f"no coded message: {len(coded)} bytes; ask for it again")
    number, length = _PREFIX.unpack_from(coded)
    number -= _CODED
    rest = coded[_PREFIX.size :]
    header, rest = rest[:length], rest[length:]
    if not length:
        header = b"" if memory is None else memory.header
    try:
        form = _form(header)
    except (ValueError, RecursionError) as error:
        raise SegmentError(
            f"a coded message of {len(coded)} bytes has no header that can be read, or leaves out "
            "one that never came; ask for it again, or start both ends anew"
        ) from error
    memory = _current(memory, form)
    raw, segment = rest[: form.num_raw], rest[form.num_raw :]
    if len(raw) < form.num_raw:
        raise SegmentError(f"truncated coded message: {len(coded)} bytes; ask for it again")
    expected = _expected(form, memory, raw)
    state, symbols = adaptive_coding.decode(
        form.rules,
        _mixed(memory.state, bytes([number]) + header + raw),
        segment,
        form.shape,
        expected=expected,
    )
    after = Memory(state, header, _logs(form, memory, symbols, raw))
    return after, messages.join(number, header, _join(form, symbols, raw))


def to_record(memory: Memory) -> dict[str, Any]:
    """JSON-ready, for a checkpoint."""
    state = memory.state
    return {
        "counts": state.counts.tolist(),
        "above": state.above.tolist(),
        "digest": state.digest,
        "header": memory.header.decode(),
        "logs": [None if np.isneginf(value) else float(value) for value in memory.logs],
    }


def from_record(record: dict[str, Any]) -> Memory:
    """Inverse of `to_record`, exactly."""
    state = State(
        np.asarray(record["counts"], np.int64),
        np.asarray(record["above"], np.uint8),
        record["digest"],
    )
    logs = [-math.inf if value is None else value for value in record["logs"]]
    return Memory(state, record["header"].encode(), np.asarray(logs, np.float64))


def _form(header: bytes) -> _Form:
    """Of a header with one array.

    Raises:
      ValueError: another header, or an array beyond all reason.
    """
    nodes = json.loads(header)
    match = _NODE.fullmatch(nodes[0]) if isinstance(nodes, list) and len(nodes) == 1 else None
    if match is None:
        raise ValueError(f"cannot code a message with fields {nodes}")
    form = _Form(match[1], int(match[2]), tuple(int(size) for size in match[3].split(",")))
    if form.num_symbols > _MAX_SYMBOLS:
        raise ValueError(f"cannot code {form.num_symbols} numbers; at most {_MAX_SYMBOLS}")
    return form


def _current(memory: Memory | None, form: _Form) -> Memory:
    """The memory for the next message: anew when its numbers have another alphabet."""
    if memory is None or memory.state.counts.shape[1] != form.rules.alphabet:
        return Memory(adaptive_coding.start(form.rules), b"", np.zeros(0))
    return memory


def _mixed(state: State, other: bytes) -> State:
    """The state whose next checksum also holds for bytes beside the segment."""
    return state._replace(digest=zlib.crc32(other, state.digest))


def _divide(form: _Form, payload: bytes) -> tuple[NDArray[np.uint8], bytes]:
    """An encoded message's symbols, in the array's shape, and the bytes beside them."""
    if form.scheme == "f":
        columns = np.frombuffer(payload, np.uint8).reshape(form.num_symbols, form.size)
        return columns[:, -1].reshape(form.shape), columns[:, :-1].tobytes()
    codes = unpack_bits(payload[form.num_raw :], form.size, form.num_symbols)
    return codes.reshape(form.shape), payload[: form.num_raw]


def _join(form: _Form, symbols: NDArray[np.uint8], raw: bytes) -> bytes:
    """Inverse of `_divide`."""
    if form.scheme == "f":
        low = np.frombuffer(raw, np.uint8).reshape(form.num_symbols, form.size - 1)
        return np.concatenate([low, symbols.reshape(-1, 1)], axis=1).tobytes()
    return raw + pack_bits(symbols, form.size)


def _expected(form: _Form, memory: Memory, raw: bytes) -> NDArray[np.int64] | None:
    """Codes of the importances that are expected, in the new scale.

    Only additions, products and quotients of float64, which are the same on every machine.
    """
    if form.scheme != "log" or memory.logs.shape != form.shape:
        return None
    low, high = np.frombuffer(raw, _SCALE).astype(np.float64)
    span, intervals = high - low, (1 << form.size) - 2
    finite = np.where(np.isneginf(memory.logs), 0.0, memory.logs)
    if 0.0 < span < math.inf:
        steps = np.clip(np.rint((finite - low) / span * intervals), 0, intervals)
    else:
        steps = np.zeros(form.shape)
    return np.where(np.isneginf(memory.logs), 0, 1 + steps.astype(np.int64))


def _logs(
    form: _Form, memory: Memory, symbols: NDArray[np.uint8], raw: bytes
) -> NDArray[np.float64]:
    """What is expected of the next importances: a moving mean; zero stays zero."""
    if form.scheme != "log":
        return np.zeros(0)
    low, high = np.frombuffer(raw, _SCALE).astype(np.float64)
    share = (symbols.astype(np.float64) - 1.0) / ((1 << form.size) - 2)
    new = low + share * (high - low)
    if memory.logs.shape == form.shape:
        old = np.where(np.isneginf(memory.logs), new, memory.logs)
        new = old + _NEWEST * (new - old)
    return np.where(symbols == 0, -math.inf, new)
