"""The messages that travel between cloud, edges and devices, and their bytes on the wire.

Each message of the bidirectional single loop (ACME, ICDCS 2025) is a typed, immutable record of
`acme_jax.message_records`:

  up      device -> edge   `DeviceProfileMessage`, `FeatureSketch` or `LogDensities`,
                           `DataQuality` (once), `ImportanceSet` (a round)
          edge -> cloud    `ClusterProfile`
  down    cloud -> edge    `BackboneMessage`
          edge -> device   `BackboneMessage`, `HeaderMessage`, `DensityQuestion` (once),
                           `PersonalizedImportance` (a round)

`encode` turns a record into bytes and `decode` turns them back, so the ledger can count what
really travels. Who sent a message, and in which round, belongs to the transport.

Wire format, little-endian, equal messages give equal bytes:

  magic "ACME" | version u8 | kind u8 | header length u32 | header | arrays | CRC-32 u32

The header is compact JSON: the list of the record's fields, as `acme_jax.message_trees` writes
them; the bytes of arrays follow it in the same order (dictionaries by sorted key). Importances
and sketches may travel in few bits (`acme_jax.number_formats`); that is another kind of array, not
another kind of message. This module is no security boundary: the checksum finds accidents, not
attackers.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from acme_jax.message_records import (
    BackboneMessage,
    ClusterProfile,
    DataQuality,
    DensityQuestion,
    DeviceProfileMessage,
    FeatureSketch,
    HeaderMessage,
    ImportanceSet,
    LogDensities,
    PersonalizedImportance,
)
from acme_jax.message_trees import MessageError, Reader, pack
from acme_jax.number_formats import CodedArray, Scheme
from nas.arch import Arch
from nas.cost import DeviceProfile

__all__ = [
    "KINDS",
    "BackboneMessage",
    "ClusterProfile",
    "DataQuality",
    "DensityQuestion",
    "DeviceProfileMessage",
    "FeatureSketch",
    "HeaderMessage",
    "ImportanceSet",
    "LogDensities",
    "Message",
    "MessageError",
    "PersonalizedImportance",
    "centralized_baseline",
    "decode",
    "encode",
    "kind",
]

MAGIC = b"ACME"
VERSION = 1
_PREFIX = struct.Struct("<4sBBI")
_CHECKSUM = struct.Struct("<I")


Message = (
    DeviceProfileMessage
    | ClusterProfile
    | BackboneMessage
    | HeaderMessage
    | FeatureSketch
    | ImportanceSet
    | PersonalizedImportance
    | DensityQuestion
    | LogDensities
    | DataQuality
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
    ("density_question", DensityQuestion),
    ("log_densities", LogDensities),
    ("data_quality", DataQuality),
)
_NUMBER = {record: number for number, (_, record) in enumerate(KINDS)}
_TYPES: dict[str, type] = {
    **dict.fromkeys(("device", "edge", "budget_bytes", "num_samples", "num_devices"), int),
    "profile": DeviceProfile,
    "arch": Arch,
    "cell": tuple,
}


class _Form(NamedTuple):
    """What an array field must be: a float32 sketch would silently cost double."""

    dtype: str
    rank: int
    scheme: Scheme | None = None
    """Of codes, where they may stand instead."""
    optional: bool = False
    """Whether None may stand instead."""


_ARRAYS: dict[tuple[type, str], _Form] = {
    (ClusterProfile, "limits"): _Form("int64", 1),
    (FeatureSketch, "quantiles"): _Form("float16", 2, "linear"),
    (ImportanceSet, "importance"): _Form("float32", 1, "log"),
    (PersonalizedImportance, "importance"): _Form("float32", 1, "log"),
    (DensityQuestion, "matrix"): _Form("float32", 2),
    (DensityQuestion, "offset"): _Form("float32", 1),
    (DensityQuestion, "references"): _Form("float32", 2),
    (LogDensities, "values"): _Form("float32", 1),
    **{(DataQuality, field): _Form("float32", 0, optional=True) for field in DataQuality._fields},
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
        non-finite value in a sketch, an importance set or densities, or a tree with something
        that is neither array, number, list, tuple nor dictionary with string keys.
    """
    number = _kind_number(message)
    chunks: list[bytes] = []
    tree = [pack(value, chunks) for value in message]
    _check_fields(message)
    header = json.dumps(tree, separators=(",", ":"), sort_keys=True).encode()
    return join(number, header, b"".join(chunks))


def join(number: int, header: bytes, arrays: bytes) -> bytes:
    """An encoded message from its kind's number and its parts."""
    body = b"".join((_PREFIX.pack(MAGIC, VERSION, number, len(header)), header, arrays))
    return body + _CHECKSUM.pack(zlib.crc32(body))


def split(encoded: bytes) -> tuple[int, bytes, bytes]:
    """Inverse of `join`, of a message that is known to be whole."""
    *_, number, header_size = _PREFIX.unpack_from(encoded)
    header_end = _PREFIX.size + header_size
    return number, encoded[_PREFIX.size : header_end], encoded[header_end : -_CHECKSUM.size]


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
        reader = Reader(body[header_end:])
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
    finished model as float32. Nothing is compressed; nor does ACME compress anything but what
    `RefineConfig` says. The ACME paper compares with the same baseline, but prints no formula.

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
        form = _ARRAYS.get((type(message), field))
        if form is not None and not (form.optional and value is None):
            _check_array(f"{owner}.{field}", value, form)


def _check_array(name: str, value: Any, form: _Form) -> None:
    if isinstance(value, CodedArray):
        array, wanted = np.asarray(value.codes), ("uint8", form.rank)
        if value.scheme != form.scheme:
            raise MessageError(f"{name} must not be {value.scheme} codes; got {value.scheme!r}")
        if not (math.isfinite(value.low) and math.isfinite(value.high)):
            raise MessageError(f"{name} was coded from NaN, infinite or, for logarithms, negative")
    else:
        array, wanted = np.asarray(value), (form.dtype, form.rank)
        if array.dtype == form.dtype and not np.isfinite(array).all():
            raise MessageError(f"{name} holds NaN or infinite values")
    if (array.dtype, array.ndim) != wanted:
        raise MessageError(
            f"{name} must be {wanted[0]} with {wanted[1]} axes, got {array.dtype} of shape "
            f"{array.shape}; convert it before sending"
        )
