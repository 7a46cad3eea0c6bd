"""Running the clients of a round, and rounds, on whatever hardware there is.

A client draws from `fold_in(fold_in(key, round), client_id)`, takes its own number of steps
and never sees another client, so its result does not depend on padding, chunk size, devices
or who else takes part. `run_clients_loop` is the same round as plain Python loops: slow,
readable, and able to say which client failed.

With `participation` a round has K sampled clients out of C, some of which drop out or answer
late (`fed.participation`). All of it is drawn inside the round, so one compiled program serves
every round. A round in which nothing arrives leaves the server as it was. Late updates that
count in the next round travel with the server's state:

    participation = Participation(num_sampled=8, dropout=0.1, deadline_s=30.0, late="next_round")
    server = simulate.with_late(algorithm, params, (), num_sampled=8)
    server, _, metrics = simulate.run_rounds(
        algorithm, server, (), data, key, participation=participation, seconds=seconds, ...
    )
    params = server.state
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fed.algorithm import FedAlgorithm
from fed.arrivals import Sent, WithLate, check_server_state, receive, select_rows, with_late
from fed.buckets import Buckets, check_buckets
from fed.checks import check_round
from fed.clients import ClientData, take_row
from fed.cohort import run_clients
from fed.loop import run_clients_loop
from fed.participation import Participation, Roles, check_reachable, draw, everyone

__all__ = [
    "Counts",
    "RoundMetrics",
    "WithLate",
    "run_clients",
    "run_clients_loop",
    "run_round",
    "run_rounds",
    "with_late",
]

Backend = Literal["map", "loop"]


class Counts(NamedTuple):
    """How many clients did what in a round; int32 []."""

    sampled: jax.Array
    arrived: jax.Array  # in time and with a weight: what the server hears of this round
    dropped: jax.Array
    late: jax.Array


class RoundMetrics(NamedTuple):
    """Diagnostics of a round; `run_rounds` adds a leading axis of rounds."""

    client: Any  # leaves [K, ...]: mean over each client's own steps, 0 without steps
    server: Any  # whatever the algorithm's server_update reports, 0 where nothing arrived
    roles: Roles  # [K] the rows of these clients, and who of them dropped out or was late
    counts: Counts


def run_round(
    algorithm: FedAlgorithm,
    server_state: Any,
    client_states: Any,
    data: ClientData,
    key: jax.Array,
    round_index: jax.Array | int,
    *,
    client_ids: jax.Array,
    batch_size: int,
    num_steps: int | None = None,
    epochs: int | None = None,
    weights: jax.Array | None = None,
    participation: Participation | None = None,
    seconds: jax.Array | None = None,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    buckets: Buckets | None = None,
    backend: Backend = "map",
) -> tuple[Any, Any, RoundMetrics]:
    """One round: messages down, the clients' work, updates up, the server's step.

    Args:
      algorithm: closed over; static under jit.
      server_state: of the algorithm; `with_late` makes it where late updates count.
      client_states: leaves [C, ...], or `()`.
      data: the cohort's samples.
      key: of the experiment; the same in every round.
      round_index: int [], may be traced.
      client_ids: as for `run_clients`, as are the options that follow.
      batch_size: B.
      num_steps: see `run_clients`.
      epochs: see `run_clients`.
      weights: [C] for the server's update; None: the clients' numbers of samples.
      participation: who takes part; static. None: everyone, and the server's step is taken
        without looking at what arrived.
      seconds: [C] each client's time for this round; given if and only if there is a deadline.
      chunk_size: see `run_clients`.
      mesh: see `run_clients`. Where K < C, the sampled clients' data move between its devices.
      buckets: of the cohort's rows [C]: clients run the client functions of their bucket, the
        server those of `algorithm`. Where K < C, on accelerators too in chunks of 1.
      backend: `"map"` or `"loop"` (`run_clients_loop`; not jittable, ignores the two above).

    Returns:
      The new server state, like the one given, the new client states [C, ...], and the metrics.
      States of clients that were not sampled or dropped out are the old ones.

    Raises:
      ValueError: as `run_clients` and `fed.participation.draw`, an unknown backend, or a
        server state that does not fit the participation.
    """
    run: Callable[..., tuple[Any, Any, Any]]
    if backend == "map":
        run = partial(run_clients, chunk_size=chunk_size, mesh=mesh)
    elif backend == "loop":
        run = run_clients_loop
    else:
        raise ValueError(f"unknown backend {backend!r}; expected 'map' or 'loop'")
    if weights is not None and jnp.shape(weights) != data.size.shape:
        raise ValueError(f"weights has shape {jnp.shape(weights)}; expected {data.size.shape}")
    cohort = _Cohort(client_states, data, client_ids, weights)
    if participation is None:
        if seconds is not None:
            raise ValueError("seconds have no effect without participation; leave them out")
        roles = everyone(data.size.shape[0])
    else:
        check_round(data.size, client_states, data, key, client_ids, batch_size, num_steps, epochs)
        roles = draw(key, round_index, client_ids, seconds, participation)
        cohort = _take_part(cohort, roles)
    check_server_state(server_state, participation, roles.rows.shape[0])
    sender = server_state.state if isinstance(server_state, WithLate) else server_state
    if buckets is not None:
        run = partial(run, buckets=buckets, bucket_of=_bucket_of(buckets, roles, data.size))
    states, updates, client_metrics = run(
        algorithm,
        roles.rows,
        cohort.states,
        cohort.data,
        key,
        round_index,
        client_ids=cohort.client_ids,
        batch_size=batch_size,
        num_steps=num_steps,
        epochs=epochs,
        server_state=sender,
    )
    if mesh is not None and backend == "map":
        # The server sees all updates whole, so its sums do not depend on the mesh.
        updates = jax.lax.with_sharding_constraint(updates, NamedSharding(mesh, PartitionSpec()))
    size = cohort.data.size.astype(jnp.float32)
    sent = Sent(updates, size if cohort.weights is None else cohort.weights, roles.rows)
    if participation is None:
        server_state, server_metrics = algorithm.server_update(server_state, *sent)
    else:
        states = _put_back(client_states, cohort.states, states, roles)
        server_state, server_metrics = receive(algorithm, server_state, sent, roles)
    metrics = RoundMetrics(client_metrics, server_metrics, roles, _count(roles, sent.weights))
    return server_state, states, metrics


class _Cohort(NamedTuple):
    """The clients that run in a round; leaves [C, ...], or [K, ...] of the sampled."""

    states: Any
    data: ClientData
    client_ids: jax.Array
    weights: jax.Array | None  # of the server's update; None: the numbers of samples


def _take_part(cohort: _Cohort, roles: Roles) -> _Cohort:
    """The sampled rows; those who drop out have no samples, so they take no steps."""
    cohort = jax.tree.map(jnp.asarray, cohort)
    if roles.rows.shape[0] < cohort.data.size.shape[0]:
        cohort = take_row(cohort, roles.rows)
    size = jnp.where(roles.dropped, 0, cohort.data.size)
    weights = cohort.weights
    if weights is not None:
        weights = jnp.where(size > 0, weights, 0).astype(jnp.float32)
    return cohort._replace(data=cohort.data._replace(size=size), weights=weights)


def _put_back(states: Any, taken: Any, new: Any, roles: Roles) -> Any:
    """The cohort's states [C, ...] with the new ones [K, ...] of those who did not drop out."""
    expected, found = (jax.tree.map(lambda x: (jnp.shape(x), x.dtype), t) for t in (taken, new))
    if expected != found:
        raise ValueError(
            "client_final must return a client state like the one that client_init was given; "
            f"with [K] first, that is {expected}, but it returned {found}"
        )
    new = select_rows(roles.dropped, taken, new)

    def put(old: jax.Array, rows: jax.Array) -> jax.Array:
        if rows.shape == old.shape:  # everyone is sampled
            return rows
        return (
            jnp.asarray(old).at[roles.rows].set(rows, unique_indices=True, indices_are_sorted=True)
        )

    return jax.tree.map(put, states, new)


def _count(roles: Roles, weights: jax.Array) -> Counts:
    arrived = ~roles.dropped & ~roles.late & (weights > 0)
    sampled = jnp.int32(roles.rows.shape[0])
    return Counts(sampled, *(jnp.sum(x, dtype=jnp.int32) for x in (arrived, *roles[1:])))


def _bucket_of(buckets: Buckets, roles: Roles, size: jax.Array) -> jax.Array | None:
    """The buckets [K] of the sampled clients; None if everyone takes part."""
    check_buckets(buckets, size.shape[0], None)
    sampled = roles.rows.shape[0] < size.shape[0]
    return jnp.asarray(buckets.bucket_of, jnp.int32)[roles.rows] if sampled else None


def run_rounds(
    algorithm: FedAlgorithm,
    server_state: Any,
    client_states: Any,
    data: ClientData,
    key: jax.Array,
    *,
    num_rounds: int,
    first_round: jax.Array | int = 0,
    participation: Participation | None = None,
    seconds: jax.Array | None = None,
    **options: Any,
) -> tuple[Any, Any, RoundMetrics]:
    """Rounds `first_round`, ... of the whole cohort as one scan.

    Continuing with `first_round` set to the rounds done equals one longer run.

    Args:
      algorithm: closed over; static under jit.
      server_state: as for `run_round`.
      client_states: leaves [C, ...], or `()`.
      data: the cohort's samples.
      key: of the experiment.
      num_rounds: R.
      first_round: int [], may be traced.
      participation: see `run_round`.
      seconds: see `run_round`; [C], the same in every round but for the jitter.
      **options: those of `run_round`, except the loop backend.

    Returns:
      The last server state, the last client states, and metrics with a leading [R].

    Raises:
      ValueError: as `run_round`, or a deadline that no client can ever meet.
    """
    check_reachable(participation, seconds)

    def body(carry: tuple[Any, Any], round_index: jax.Array) -> tuple[tuple[Any, Any], Any]:
        server_state, client_states = carry
        server_state, client_states, metrics = run_round(
            algorithm,
            server_state,
            client_states,
            data,
            key,
            round_index,
            participation=participation,
            seconds=seconds,
            **options,
        )
        return (server_state, client_states), metrics

    rounds = first_round + jnp.arange(num_rounds, dtype=jnp.int32)
    carry, metrics = jax.lax.scan(body, (server_state, client_states), rounds)
    return *carry, metrics
