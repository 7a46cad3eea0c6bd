"""Pickles of plain data, read without running the programs that pickles are."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from acme_jax.idx import DataError

# NumPy's own names for these differ by version, and asking a pickle's old name of a new NumPy
# gives a deprecation warning.
_RECONSTRUCT: Callable[..., Any] = np.empty(0).__reduce__()[0]  # type: ignore[assignment]


def _byte_dtype(spec: bytes | str, align: int = 0, copy: int = 1) -> np.dtype:
    """The dtype of bytes; called by pickles of Python 2, whose flags are integers."""
    if spec not in (b"u1", "u1"):
        raise pickle.UnpicklingError(f"array of dtype {spec!r}, expected bytes (u1)")
    return np.dtype("u1", bool(align), bool(copy))


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _byte_dtype,
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Everything a pickle can call comes from here."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks to run {module}.{name}")
        return _ALLOWED[module, name]


def load_plain(raw: bytes, where: str) -> Any:
    """Reads a pickle of dictionaries, lists, numbers, byte strings and uint8 arrays.

    Anything else is refused, because to load it may run any code that its author chose.

    Args:
      raw: the pickle, of Python 2 or 3. Text of Python 2 comes out as bytes.
      where: names it in errors.

    Raises:
      DataError: truncated, damaged or not plain.
    """
    try:
        return _PlainUnpickler(io.BytesIO(raw), encoding="bytes").load()
    # Damaged pickles raise nearly anything: EOFError, KeyError, IndexError, ValueError, ...
    except Exception as error:
        raise DataError(
            f"{where} is not a sound pickle of plain data ({error or type(error).__name__}); "
            "get it again from the official place"
        ) from None
