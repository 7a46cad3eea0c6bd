"""The messages that travel between cloud, edges and devices, and their bytes on the wire.

Each message of the bidirectional single loop (ACME, ICDCS 2025) is a typed, immutable record:

  up      device -> edge   `DeviceProfileMessage`, `FeatureSketch` (once), `ImportanceSet` (a round)
          edge -> cloud    `ClusterProfile`
  down    cloud -> edge    `BackboneMessage`
          edge -> device   `BackboneMessage`, `HeaderMessage`, `PersonalizedImportance` (a round)

`encode` turns a record into bytes and `decode` turns them back, so the ledger can count what
really travels. Who sent a message, and in which round, belongs to the transport.

Wire format, little-endian, equal messages give equal bytes:

  magic "ACME" | version u8 | kind u8 | header length u32 | header | arrays | CRC-32 u32

The header is compact JSON: the list of the record's fields. Integers stand there themselves;
an array is a string of dtype and shape ("f4:3,32") and its raw bytes follow the header in the
same order (dictionaries by sorted key). This module is no security boundary: the checksum
finds accidents, not attackers.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from nas.arch import Arch
from nas.cost import DeviceProfile

Params = Any
"""A parameter pytree: nested dictionaries (string keys), lists and tuples of arrays."""

MAGIC = b"ACME"
VERSION = 1
_PREFIX = struct.Struct("<4sBBI")
_CHECKSUM = struct.Struct("<I")
_DTYPES = {
    code: np.dtype(dtype)
    for code, dtype in {
        "b1": np.bool_,
        **{f"{letter}{size}": f"{letter}{size}" for letter in "iu" for size in (1, 2, 4, 8)},
        **{f"f{size}": f"f{size}" for size in (2, 4, 8)},
        "bf2": jnp.bfloat16,
    }.items()
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class MessageError(ValueError):
    """Bytes that are no message, or a record that cannot be sent; says what is wrong."""


class DeviceProfileMessage(NamedTuple):
    """Device to edge, once: what the device can hold and how fast it is."""

    device: int
    budget_bytes: int
    """Largest model the device accepts."""
    num_samples: int
    profile: DeviceProfile
    """Latency and power constants (floats)."""


class ClusterProfile(NamedTuple):
    """Edge to cloud, once: the summary of the edge's devices."""

    edge: int
    num_devices: int
    limits: ArrayLike
    """int64 [N]: each device's budget in bytes."""
    profile: DeviceProfile
    """Latency and power constants that the search uses for this edge (floats)."""


class BackboneMessage(NamedTuple):
    """Cloud to edge, then edge to device, once: the chosen sub-network, really sliced."""

    arch: Arch
    params: Params


class HeaderMessage(NamedTuple):
    """Edge to device, once: the searched header."""

    cell: tuple[tuple[int, int, int, int], ...]
    """One (x, op_x, y, op_y) a block."""
    params: Params


class FeatureSketch(NamedTuple):
    """Device to edge, once: the distribution of its features, not the features."""

    quantiles: ArrayLike
    """float16 [Q, D]: Q quantiles of each of the D features."""


class ImportanceSet(NamedTuple):
    """Device to edge, each round: the importance of every gate of its header."""

    importance: ArrayLike
    """float32 [G]."""


class PersonalizedImportance(NamedTuple):
    """Edge to device, each round: the importances mixed for this device."""

    importance: ArrayLike
    """float32 [G]."""


Message = (
    DeviceProfileMessage
    | ClusterProfile
    | BackboneMessage
    | HeaderMessage
    | FeatureSketch
    | ImportanceSet
    | PersonalizedImportance
)

# The place in this table is the kind on the wire: append, never reorder.
KINDS: tuple[tuple[str, Callable[..., Message]], ...] = (
    ("device_profile", DeviceProfileMessage),
    ("cluster_profile", ClusterProfile),
    ("backbone", BackboneMessage),
    ("header", HeaderMessage),
    ("feature_sketch", FeatureSketch),
    ("importance_set", ImportanceSet),
    ("personalized_importance", PersonalizedImportance),
)
_NUMBER = {record: number for number, (_, record) in enumerate(KINDS)}
_TYPES: dict[str, type] = {
    **dict.fromkeys(("device", "edge", "budget_bytes", "num_samples", "num_devices"), int),
    "profile": DeviceProfile,
    "arch": Arch,
    "cell": tuple,
}
# Required dtype and rank of the plain array fields: a float32 sketch would silently cost double.
_ARRAYS = {
    (ClusterProfile, "limits"): ("int64", 1),
    (FeatureSketch, "quantiles"): ("float16", 2),
    (ImportanceSet, "importance"): ("float32", 1),
    (PersonalizedImportance, "importance"): ("float32", 1),
}


def kind(message: Message) -> str:
    """The message's name in the traffic ledger, such as "importance_set"."""
    return KINDS[_kind_number(message)][0]


def encode(message: Message) -> bytes:
    """The message as bytes; equal messages give equal bytes.

    Arrays may be NumPy's or JAX's. The cost beside the arrays is 14 bytes and the header: an
    importance set of 256 gates takes 1,048 bytes.

    Raises:
      MessageError: not a message record, a field of the wrong type, dtype or rank, a
        non-finite value in a sketch or an importance set, or a tree with something that is
        neither array, number, list, tuple nor dictionary with string keys.
    """
    number = _kind_number(message)
    chunks: list[bytes] = []
    tree = [_pack(value, chunks) for value in message]
    _check_fields(message)
    header = json.dumps(tree, separators=(",", ":"), sort_keys=True).encode()
    body = b"".join((_PREFIX.pack(MAGIC, VERSION, number, len(header)), header, *chunks))
    return body + _CHECKSUM.pack(zlib.crc32(body))


def decode(data: bytes) -> Message:
    """The record that `encode` was given, with NumPy arrays.

    Raises:
      MessageError: bytes that are truncated, damaged, of another format or version, or of an
        unknown kind.
    """
    smallest = _PREFIX.size + _CHECKSUM.size
    if len(data) < smallest:
        raise MessageError(
            f"truncated message: {len(data)} bytes, but the smallest has {smallest}; send it again"
        )
    magic, version, number, header_size = _PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise MessageError(f"not a message: it starts with {magic!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise MessageError(
            f"message format {version} is not supported; this program reads format {VERSION}"
        )
    if number >= len(KINDS):
        names = ", ".join(name for name, _ in KINDS)
        raise MessageError(f"unknown message kind {number}; known kinds, from 0: {names}")
    header_end = _PREFIX.size + header_size
    if header_end + _CHECKSUM.size > len(data):
        raise MessageError(
            f"truncated message: {len(data)} bytes, but its header alone ends at byte {header_end}"
        )
    body = memoryview(data)[: -_CHECKSUM.size]
    if zlib.crc32(body) != _CHECKSUM.unpack_from(data, len(body))[0]:
        raise MessageError(
            f"damaged or truncated message: the checksum of its {len(data)} bytes is wrong; "
            "send it again"
        )
    name, record = KINDS[number]
    try:
        tree = json.loads(bytes(body[_PREFIX.size : header_end]))
        reader = _Reader(body[header_end:])
        message = record(*(reader.unpack(node) for node in tree))
    except (TypeError, KeyError, IndexError, ValueError, RecursionError) as error:
        raise MessageError(f"malformed {name} message: {error}") from error
    if len(reader.rest):
        raise MessageError(f"malformed {name} message: {len(reader.rest)} bytes are left over")
    _check_fields(message)
    return message


def centralized_baseline(
    num_train_per_device: Sequence[int],
    sample_bytes: float,
    model_bytes_per_device: Sequence[int],
) -> tuple[int, int]:
    """Traffic of training everything in the cloud instead, (uplink, downlink) in bytes.

    Up go all raw training samples, and one byte for each label. Down comes every device's
    finished model as float32. Nothing is compressed, in ACME neither. The ACME paper compares
    with the same baseline, but prints no formula.

    Args:
      num_train_per_device: training samples of each device.
      sample_bytes: of one raw sample: one byte (uint8) a pixel and channel of an image, the
        UTF-8 bytes of a text.
      model_bytes_per_device: size of each device's finished float32 model.
    """
    return round(sum(num_train_per_device) * (sample_bytes + 1)), sum(model_bytes_per_device)


def _kind_number(message: Message) -> int:
    if type(message) not in _NUMBER:
        raise MessageError(
            f"{type(message).__name__} is no message; expected one of "
            + ", ".join(record.__name__ for record in _NUMBER)
        )
    return _NUMBER[type(message)]


def _check_fields(message: Message) -> None:
    owner = type(message).__name__
    for field, value in zip(message._fields, message, strict=True):
        expected = _TYPES.get(field, type(value))
        if type(value) is not expected:
            raise MessageError(
                f"{owner}.{field} must be {expected.__name__}, got {type(value).__name__}"
            )
        if (type(message), field) in _ARRAYS:
            dtype, rank = _ARRAYS[type(message), field]
            array = np.asarray(value)
            if array.dtype != dtype or array.ndim != rank:
                raise MessageError(
                    f"{owner}.{field} must be {dtype} with {rank} axes, got {array.dtype} of "
                    f"shape {array.shape}; convert it before sending"
                )
            if not np.isfinite(array).all():
                raise MessageError(f"{owner}.{field} holds NaN or infinite values")


def _pack(value: Any, chunks: list[bytes]) -> Any:
    """The header's node for `value`; array bytes are appended to `chunks`."""
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, DeviceProfile):
        chunks.append(np.asarray(value, "<f8").tobytes())
        return "profile"
    if isinstance(value, Arch):
        return ["arch", *(_pack(np.asarray(leaf), chunks) for leaf in value)]
    if isinstance(value, list | tuple):
        tag = "list" if isinstance(value, list) else "tuple"
        return [tag, *(_pack(item, chunks) for item in value)]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise MessageError(f"dictionary keys must be strings, got {list(value)}")
        return {key: _pack(value[key], chunks) for key in sorted(value)}
    array = np.asarray(value)
    code = _CODES.get(array.dtype.newbyteorder("="))
    if code is None:
        raise MessageError(
            f"cannot send {type(value).__name__} ({array.dtype}); expected an array of "
            + ", ".join(str(dtype) for dtype in _CODES)
        )
    chunks.append(np.asarray(array, array.dtype.newbyteorder("<")).tobytes())
    return f"{code}:{','.join(str(size) for size in array.shape)}"


_BUILD: dict[str, Callable[[Iterable[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "arch": lambda leaves: Arch(*leaves),
}


class _Reader:
    """Rebuilds values from header nodes and takes their bytes off the front of `rest`."""

    def __init__(self, payload: memoryview) -> None:
        self.rest = payload

    def unpack(self, node: Any) -> Any:
        if isinstance(node, bool | int) or node is None:
            return node
        if isinstance(node, dict):
            return {key: self.unpack(child) for key, child in node.items()}
        if isinstance(node, list):
            return _BUILD[node[0]](self.unpack(child) for child in node[1:])
        if not isinstance(node, str):
            raise MessageError(f"unexpected {node!r} in the header")
        if node == "profile":
            return DeviceProfile(*self._take("f8", (len(DeviceProfile._fields),)).tolist())
        code, _, sizes = node.partition(":")
        return self._take(code, tuple(int(size) for size in sizes.split(",") if size))

    def _take(self, code: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = _DTYPES[code].newbyteorder("<")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size > len(self.rest):
            raise MessageError(f"an array {code} of shape {shape} does not fit its {size} bytes")
        array = np.frombuffer(self.rest[:size], dtype).reshape(shape)
        self.rest = self.rest[size:]
        # A copy is aligned, writable and in the machine's byte order.
        return array.astype(_DTYPES[code])
