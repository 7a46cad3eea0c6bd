"""Clients in cohorts that stream through the accelerator, so that memory does not grow with them.

host arrays or memory-mapped files -> read ahead in a thread -> device -> host -> sink

One cohort is computed while the next ones are read and the results of the last one are written.
At most `prefetch + 2` cohorts of input and two of results exist at any time, whatever the number
of clients. The last, short cohort is filled up to the same shape, so there is one program.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fed.sources import ArraySink, ArraySource, ClientSink, ClientSource, common_length

__all__ = [
    "ArraySink",
    "ArraySource",
    "ClientSink",
    "ClientSource",
    "Cohort",
    "Done",
    "StreamError",
    "Streamed",
    "run_cohorts",
]


class StreamError(RuntimeError):
    """Reading or writing a cohort failed; the message names the clients, the cause is chained."""


class Cohort(NamedTuple):
    """Which clients a step is given; K is the cohort's size."""

    number: jax.Array  # [] int32, of the cohort
    rows: jax.Array  # [K] int32, the clients' numbers in the source
    valid: jax.Array  # [K] bool; False: a filler that repeats a client and must not count


class Done(NamedTuple):
    """A cohort whose results are on the host and in the sink."""

    number: int
    rows: np.ndarray
    """int64 [k], without fillers."""
    carry: Any
    """After this cohort: a copy on the device."""
    results: Any
    """NumPy, leaves [k, ...], without fillers."""


class Streamed(NamedTuple):
    """How far a run came."""

    carry: Any
    cohorts: int
    """The first cohort that has not been computed: `first` of a run that goes on."""


def run_cohorts(
    step: Callable[[Any, Any, Cohort], tuple[Any, Any]],
    carry: Any,
    source: ClientSource,
    cohort_size: int,
    *,
    sink: ClientSink | None = None,
    prefetch: int = 2,
    first: int = 0,
    sharding: NamedSharding | None = None,
    on_cohort: Callable[[Done], bool | None] | None = None,
) -> Streamed:
    """Runs a step over all clients of a source, cohort by cohort.

    The thread that reads ahead does not see JAX settings made by context managers in the
    caller's thread, such as `jax.default_device`.

    Args:
      step: pure; (carry, rows, cohort) -> (carry, results), where rows is what the source reads
        for the cohort, leaves [K, ...], and results have leaves [K, ...] or are `()`. Compiled
        here, once, with the carry donated. Sums over clients must mask by `cohort.valid`.
      carry: what one cohort hands to the next; arrays of constant shape. Not consumed.
      source: of the clients; int32 must be able to number them.
      cohort_size: K.
      sink: receives the results; None drops them.
      prefetch: cohorts read ahead.
      first: cohort to start with; those before it must be in `carry` already.
      sharding: of the leading axis of rows and results over a mesh, as
        `NamedSharding(mesh, PartitionSpec(axis))`; the carry is replicated. None: one device.
      on_cohort: called in the order of the cohorts, for progress and checkpoints. True asks to
        stop: the cohort that is being computed is finished, and reported too.

    Returns:
      The carry, and how many cohorts are done.

    Raises:
      StreamError: reading or writing failed; nothing of that cohort was reported.
      ValueError: a size or number out of range, rows of another length than asked for, or a
        step that changes the shapes or dtypes of the carry.
    """
    total = len(source)
    num_cohorts = _check(total, cohort_size, prefetch, first, sharding)
    program = _program(step, sharding)
    carry = _own(carry, sharding)

    def load(number: int) -> tuple[int, np.ndarray, Any]:
        rows = np.arange(number * cohort_size, min((number + 1) * cohort_size, total))
        try:
            filled = rows[np.arange(cohort_size) % rows.size]
            tree = source.read(filled)
            length = common_length(tree, "what the source read")
            if length != cohort_size:
                raise ValueError(f"asked for {cohort_size} rows, but the source read {length}")
        except Exception as error:
            raise StreamError(f"reading {_named(number, rows)} failed: {error}") from error
        valid = np.arange(cohort_size) < rows.size
        per_client = (tree, filled.astype(np.int32), valid)
        return number, rows, jax.device_put(per_client, sharding)

    def read_ahead() -> None:
        while waiting and len(loads) < prefetch:
            loads.append(reader.submit(load, waiting.popleft()))

    def finish(flight: _Flight) -> bool:
        jax.block_until_ready(flight.token)  # also without results, so that cohorts cannot pile up
        results = jax.tree.map(
            lambda leaf: leaf[: flight.rows.size], jax.device_get(flight.results)
        )
        try:
            if sink is not None:
                sink.write(flight.rows, results)
        except Exception as error:
            named = _named(flight.number, flight.rows)
            raise StreamError(f"writing the results of {named} failed: {error}") from error
        if on_cohort is None:
            return False
        return bool(on_cohort(Done(flight.number, flight.rows, flight.carry, results)))

    waiting = deque(range(first, num_cohorts))
    loads: deque[Future[Any]] = deque()
    flight, stop = None, False
    reader = ThreadPoolExecutor(1, thread_name_prefix="cohort-reader")
    try:
        read_ahead()
        while loads and not stop:
            number, rows, (tree, clients, valid) = loads.popleft().result()
            read_ahead()
            before, cohort = jax.tree.map(_kind, carry), Cohort(jnp.int32(number), clients, valid)
            carry, results, token = program(carry, tree, cohort)
            _check_carry(before, jax.tree.map(_kind, carry))
            for leaf in jax.tree.leaves(results):
                leaf.copy_to_host_async()
            del tree, clients, valid, cohort  # the device's copies go when the step is done
            previous = flight
            flight = _Flight(
                number, rows, None if on_cohort is None else _copy(carry), results, token
            )
            del results
            for ahead in loads:  # a failed read surfaces now, not when its turn comes
                if ahead.done():
                    ahead.result()
            if previous is not None:
                stop = finish(previous)
        if flight is not None:
            first = flight.number + 1
            finish(flight)
    finally:
        reader.shutdown(wait=True, cancel_futures=True)
    return Streamed(carry, first)


class _Flight(NamedTuple):
    """A cohort that was handed to the device."""

    number: int
    rows: np.ndarray
    carry: Any
    results: Any
    token: jax.Array


@functools.lru_cache(maxsize=8)
def _program(step: Callable[..., Any], sharding: NamedSharding | None) -> Callable[..., Any]:
    """The step, compiled; cached, so that a second run of the same step starts at once."""

    def program(carry: Any, rows: Any, cohort: Cohort) -> tuple[Any, Any, jax.Array]:
        carry, results = step(carry, rows, cohort)
        # Ready when the program is; what it returns unchanged would be ready before.
        return carry, results, cohort.valid.sum()

    if sharding is None:
        return jax.jit(program, donate_argnums=0)
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.jit(program, donate_argnums=0, out_shardings=(everywhere, sharding, everywhere))


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def _own(carry: Any, sharding: NamedSharding | None) -> Any:
    """A copy that may be donated, without weak types, which would compile a second program."""
    arrays = jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(np.asarray(leaf)), carry
    )
    if sharding is not None:
        arrays = jax.device_put(arrays, NamedSharding(sharding.mesh, PartitionSpec()))
    return _copy(arrays)


def _kind(leaf: jax.Array) -> tuple[Any, ...]:
    return leaf.shape, leaf.dtype


def _check_carry(before: Any, after: Any) -> None:
    if before != after:
        raise ValueError(
            f"the step must keep the shapes and dtypes of the carry, but turned {before} into "
            f"{after}"
        )


def _check(
    total: int, cohort_size: int, prefetch: int, first: int, sharding: NamedSharding | None
) -> int:
    """Number of cohorts."""
    if not 0 < total <= np.iinfo(np.int32).max:
        raise ValueError(f"the source has {total} clients; expected 1 to 2^31 - 1")
    for name, value in (("cohort_size", cohort_size), ("prefetch", prefetch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if sharding is not None and cohort_size % sharding.mesh.size:
        raise ValueError(
            f"cohort_size ({cohort_size}) must be a multiple of the {sharding.mesh.size} devices "
            "of the mesh"
        )
    num_cohorts = -(-total // cohort_size)
    if not 0 <= first <= num_cohorts:
        raise ValueError(
            f"first is {first}; {total} clients in cohorts of {cohort_size} are {num_cohorts} "
            "cohorts"
        )
    return num_cohorts


def _named(number: int, rows: np.ndarray) -> str:
    return f"clients {rows[0]} to {rows[-1]} (cohort {number})"
