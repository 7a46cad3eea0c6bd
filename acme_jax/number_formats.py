"""In what form importances and feature sketches travel between a device and its edge.

`RefineConfig.importance_format` and `sketch_format` name a form; here are its bits
(`fed.quantize`), what is sent, and what the receiver reads, which is what it computes with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax.config import ImportanceFormat, SketchFormat
from fed import quantize
from fed.algorithm import FedAlgorithm
from fed.quantize import EXACT_BITS, Codes

Scheme = Literal["log", "linear"]

IMPORTANCE_BITS: dict[ImportanceFormat, int] = {
    "float32": EXACT_BITS,
    "log8": 8,
    "log4": 4,
    "log2": 2,
}
SKETCH_BITS: dict[SketchFormat, int | None] = {"float16": None, "linear8": 8, "linear4": 4}
"""None: no codes, float16 as it is."""


class CodedArray(NamedTuple):
    """An array in few bits, on the host: `fed.quantize.Codes` with what they mean."""

    scheme: Scheme
    bits: int
    codes: np.ndarray  # uint8, of the array's shape
    low: float
    high: float


def importance(values: np.ndarray, form: ImportanceFormat) -> np.ndarray | CodedArray:
    """An importance set float32 [G] as it is sent."""
    bits = IMPORTANCE_BITS[form]
    if bits == EXACT_BITS:
        return values
    return _on_host("log", bits, _log_encode(values, bits))


def sketch(quantiles: np.ndarray, form: SketchFormat) -> np.ndarray | CodedArray:
    """A feature sketch float32 [Q, D] as it is sent."""
    bits = SKETCH_BITS[form]
    if bits is None:
        return quantiles.astype(np.float16)
    return _on_host("linear", bits, _linear_encode(quantiles, bits))


def read(received: Any) -> np.ndarray:
    """The float32 numbers that `importance` or `sketch` sent."""
    if not isinstance(received, CodedArray):
        return np.asarray(received, np.float32)
    coded = Codes(
        jnp.asarray(received.codes), jnp.float32(received.low), jnp.float32(received.high)
    )
    decode = _log_decode if received.scheme == "log" else _linear_decode
    return np.array(decode(coded, received.bits))


def sketch_as_read(quantiles: Array, form: SketchFormat) -> Array:
    """What the edge reads of a feature sketch float32 [Q, D]; traceable."""
    bits = SKETCH_BITS[form]
    if bits is None:
        return quantiles.astype(jnp.float16).astype(jnp.float32)
    return quantize.linear_decode(quantize.linear_encode(quantiles, bits), bits)


@functools.lru_cache(maxsize=16)
def importance_as_read(bits: tuple[int, ...]) -> Callable[[FedAlgorithm], FedAlgorithm]:
    """Makes a refinement's sets travel in few bits, up and down; equal arguments share it.

    What the algorithm of `acme_jax.device.refinement` then computes with is what it would read
    from messages in that form.

    Args:
      bits: of each device of the cohort, one of `IMPORTANCE_BITS`.
    """

    def wrap(algorithm: FedAlgorithm) -> FedAlgorithm:
        def server_update(
            state: Any, updates: Array, sizes: Array, rows: Array
        ) -> tuple[Any, dict[str, Array]]:
            each = jnp.asarray(bits, jnp.int32)
            received = jax.vmap(quantize.log_round_trip)(updates, each[rows])
            after, metrics = algorithm.server_update(state, received, sizes, rows)
            answers = jax.vmap(quantize.log_round_trip)(after.personalized, each)
            new = (after.rounds > state.rounds)[:, None]  # the others have been sent before
            answers = jnp.where(new, answers, after.personalized)
            return after._replace(personalized=answers), metrics

        return algorithm._replace(server_update=server_update)

    return wrap


def _on_host(scheme: Scheme, bits: int, coded: Codes) -> CodedArray:
    codes, low, high = jax.device_get(coded)
    return CodedArray(scheme, bits, np.asarray(codes), float(low), float(high))


_log_encode, _log_decode, _linear_encode, _linear_decode = (
    jax.jit(function, static_argnums=1)
    for function in (
        quantize.log_encode,
        quantize.log_decode,
        quantize.linear_encode,
        quantize.linear_decode,
    )
)
