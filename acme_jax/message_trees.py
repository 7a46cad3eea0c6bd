"""How values stand in a message: nodes of its JSON header, and the bytes that follow it.

Integers stand in the header themselves. An array is a string of dtype and shape ("f4:3,32"); its
raw bytes follow the header, little-endian. An array in few bits (`CodedArray`) is a string of
scheme, bits and shape ("log4:384"); its bytes are the ends of the scale, two float32 numbers, and
the codes, highest bit first, filled up with zeros to a whole byte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from acme_jax.number_formats import CodedArray, Scheme
from fed.quantize import MAX_BITS, MIN_BITS
from nas.arch import Arch
from nas.cost import DeviceProfile

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
_SCHEME = re.compile(f"({'|'.join(get_args(Scheme))})([{MIN_BITS}-{MAX_BITS}])")
_SCALE = np.dtype("<f4")


class MessageError(ValueError):
    """Bytes that are no message, or a record that cannot be sent; says what is wrong."""


def pack(value: Any, chunks: list[bytes]) -> Any:
    """The header's node for `value`; array bytes are appended to `chunks`.

    Raises:
      MessageError: something that is neither array, number, list, tuple nor dictionary with
        string keys.
    """
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, DeviceProfile):
        chunks.append(np.asarray(value, "<f8").tobytes())
        return "profile"
    if isinstance(value, Arch):
        return ["arch", *(pack(np.asarray(leaf), chunks) for leaf in value)]
    if isinstance(value, CodedArray):
        chunks += [
            np.asarray([value.low, value.high], _SCALE).tobytes(),
            pack_bits(value.codes, value.bits),
        ]
        return f"{value.scheme}{value.bits}:{_shape_text(value.codes.shape)}"
    if isinstance(value, list | tuple):
        tag = "list" if isinstance(value, list) else "tuple"
        return [tag, *(pack(item, chunks) for item in value)]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise MessageError(f"dictionary keys must be strings, got {list(value)}")
        return {key: pack(value[key], chunks) for key in sorted(value)}
    array = np.asarray(value)
    code = _CODES.get(array.dtype.newbyteorder("="))
    if code is None:
        raise MessageError(
            f"cannot send {type(value).__name__} ({array.dtype}); expected an array of "
            + ", ".join(str(dtype) for dtype in _CODES)
        )
    chunks.append(np.asarray(array, array.dtype.newbyteorder("<")).tobytes())
    return f"{code}:{_shape_text(array.shape)}"


_BUILD: dict[str, Callable[[Iterable[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "arch": lambda leaves: Arch(*leaves),
}


class Reader:
    """Rebuilds values from header nodes and takes their bytes off the front of `rest`."""

    def __init__(self, payload: memoryview) -> None:
        self.rest = payload

    def unpack(self, node: Any) -> Any:
        """The value that `pack` made this node of.

        Raises:
          MessageError, TypeError, KeyError, IndexError, ValueError: a node that it never makes.
        """
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
        shape = tuple(int(size) for size in sizes.split(",") if size)
        if (coded := _SCHEME.fullmatch(code)) is not None:
            return self._take_codes(coded[1], int(coded[2]), shape)
        return self._take(code, shape)

    def _take(self, code: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = _DTYPES[code].newbyteorder("<")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size > len(self.rest):
            raise MessageError(f"an array {code} of shape {shape} does not fit its {size} bytes")
        array = np.frombuffer(self.rest[:size], dtype).reshape(shape)
        self.rest = self.rest[size:]
        # A copy is aligned, writable and in the machine's byte order.
        return array.astype(_DTYPES[code])

    def _take_codes(self, scheme: Any, bits: int, shape: tuple[int, ...]) -> CodedArray:
        if min(shape, default=0) < 0:
            raise MessageError(f"codes of shape {shape}")
        low, high = self._take("f4", (2,)).tolist()
        count = math.prod(shape)
        packed = self._take("u1", (-(-count * bits // 8),))
        return CodedArray(scheme, bits, unpack_bits(packed, bits, count).reshape(shape), low, high)


def pack_bits(codes: ArrayLike, bits: int) -> bytes:
    """Codes below 2^bits, highest bit first, filled up with zeros to a whole byte."""
    places = np.unpackbits(np.asarray(codes, np.uint8).reshape(-1, 1), axis=1)
    return np.packbits(places[:, 8 - bits :]).tobytes()


def unpack_bits(packed: bytes | np.ndarray, bits: int, count: int) -> np.ndarray:
    """The `count` codes uint8 [N] that `pack_bits` made these bytes of."""
    places = np.unpackbits(np.frombuffer(packed, np.uint8))[: count * bits].reshape(count, bits)
    return np.packbits(np.pad(places, ((0, 0), (8 - bits, 0))), axis=1).reshape(-1)


def _shape_text(shape: tuple[int, ...]) -> str:
    return ",".join(str(size) for size in shape)
