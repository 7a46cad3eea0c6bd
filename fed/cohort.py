"""The clients of one round: mapped in chunks, scanned over steps, spread over a device mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fed.algorithm import FedAlgorithm
from fed.buckets import Buckets, balance, check_buckets
from fed.checks import Schedule, check_round, check_step
from fed.clients import Batch, ClientData, batch_indices, take_row


class _Client(NamedTuple):
    """What one client needs; in a cohort every leaf has a leading [C]."""

    message: Any
    state: Any
    data: ClientData
    client_id: jax.Array
    bucket: Any = ()  # int [], where the cohort is divided into buckets


class _Shared(NamedTuple):
    """What all clients read."""

    round_key: jax.Array
    server_state: Any


_RunOne = Callable[[_Shared, _Client], tuple[Any, Any, Any]]
"""(shared, client) -> (client_state, update, mean metrics)."""


def run_clients(
    algorithm: FedAlgorithm,
    messages: Any,
    client_states: Any,
    data: ClientData,
    key: jax.Array,
    round_index: jax.Array | int,
    *,
    client_ids: jax.Array,
    batch_size: int,
    num_steps: int | None = None,
    epochs: int | None = None,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    buckets: Buckets | None = None,
    bucket_of: jax.Array | None = None,
    server_state: Any = None,
) -> tuple[Any, Any, Any]:
    """Runs every client of a cohort for one round; pure, for the caller to jit.

    Args:
      algorithm: closed over; static under jit.
      messages: leaves [C, ...], what each client receives; with `server_state` int [C], the
        rows for which its message is made.
      client_states: leaves [C, ...], or `()`.
      data: the cohort's samples.
      key: of the experiment; the same in every round.
      round_index: int [], may be traced.
      client_ids: int [C], each client's own number; distinct.
      batch_size: B; the last batch of an epoch may be short.
      num_steps: every client takes this many steps. Give this or `epochs`.
      epochs: every client passes this often over its own samples.
      chunk_size: clients in one `vmap`; chunks follow one another. None: 1 on CPU, where
        small programs use the caches better, and all clients on accelerators.
      mesh: clients are spread over all its devices, which may belong to several processes;
        None uses one device. If their number is a multiple of the devices', data that lie
        over the mesh already (`fed.multihost.from_local`) stay where they are, unless there are
        buckets, which move them to where they are balanced.
      buckets: clients run the client functions of their bucket instead of `algorithm`'s. In
        chunks of 1 a client branches to its bucket's program, and clients are spread over
        the mesh by their cost; otherwise the buckets follow one another, each in chunks.
      bucket_of: int [C], may be traced: the clients' buckets where they are not the rows that
        `buckets` was made for (a sample of them, say). Needs chunks of 1.
      server_state: if given, `algorithm.server_message` makes each client's message inside the
        client's own program. A message is often the whole model; a stack of them would take
        memory for every client.

    Returns:
      New client states [C, ...], updates [C, ...] and metrics [C, ...], the latter as
      float32 means over the client's own steps.

    Raises:
      ValueError: shapes or options that do not fit; see the message.
    """
    schedule = check_round(
        messages, client_states, data, key, client_ids, batch_size, num_steps, epochs
    )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    clients = _Client(messages, client_states, data, jnp.asarray(client_ids))
    shared = _Shared(jax.random.fold_in(key, round_index), server_state)
    run = partial(_run, chunk_size, mesh, shared)
    if buckets is None:
        return run(partial(_run_one, algorithm, schedule), clients)
    check_buckets(buckets, data.size.shape[0], bucket_of)
    by_bucket = [
        partial(_run_one, own._replace(server_message=algorithm.server_message), schedule)
        for own in buckets.algorithms
    ]
    if _chunk(chunk_size, mesh, data.size.shape[0]) == 1:
        return _run_branching(run, by_bucket, buckets, bucket_of, mesh, clients)
    if bucket_of is not None:
        raise ValueError(
            "which clients a bucket has is known only inside the round, so its clients cannot be "
            "vmapped; use chunk_size=1, or choose the clients before the round"
        )
    rows = [buckets.rows(bucket) for bucket in range(len(by_bucket))]
    parts = [
        run(own, take_row(clients, chosen)) for own, chosen in zip(by_bucket, rows, strict=True)
    ]
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    return take_row(together, np.argsort(np.concatenate(rows)))


def _run(
    chunk_size: int | None,
    mesh: Mesh | None,
    shared: _Shared,
    run_one: _RunOne,
    clients: _Client,
) -> tuple[Any, Any, Any]:
    """The clients' results [C, ...], on one device or all over the mesh."""
    if mesh is None:
        chunk = _chunk(chunk_size, mesh, clients.client_id.shape[0])
        return _map_clients(run_one, chunk, shared, clients)
    return _run_sharded(run_one, chunk_size, mesh, shared, clients)


def _run_branching(
    run: Callable[[_RunOne, _Client], tuple[Any, Any, Any]],
    by_bucket: Sequence[_RunOne],
    buckets: Buckets,
    bucket_of: jax.Array | None,
    mesh: Mesh | None,
    clients: _Client,
) -> tuple[Any, Any, Any]:
    """One client after the other, each with its bucket's program."""

    def run_one(shared: _Shared, client: _Client) -> tuple[Any, Any, Any]:
        return jax.lax.switch(client.bucket, by_bucket, shared, client)

    known = np.asarray(buckets.bucket_of, np.int32)
    clients = clients._replace(bucket=jnp.asarray(known if bucket_of is None else bucket_of))
    if mesh is None or bucket_of is not None:
        return run(run_one, clients)
    parts = balance(buckets.cost, mesh.size)
    longest = max(map(len, parts))
    order = np.stack([np.pad(part, (0, longest - len(part)), constant_values=-1) for part in parts])
    order = order.reshape(-1)
    results = run(run_one, _inert(take_row(clients, np.maximum(order, 0)), order < 0))
    places = np.flatnonzero(order >= 0)
    return take_row(results, places[np.argsort(order[places])])


def _chunk(chunk_size: int | None, mesh: Mesh | None, num_clients: int) -> int:
    """Clients in one `vmap`."""
    if chunk_size is not None:
        return chunk_size
    if mesh is None:
        return num_clients if jax.default_backend() != "cpu" else 1
    return -(-num_clients // mesh.size) if mesh.devices.flat[0].platform != "cpu" else 1


def _run_one(
    algorithm: FedAlgorithm, schedule: Schedule, shared: _Shared, client: _Client
) -> tuple[Any, Any, Any]:
    """One client's round: (client_state, update, mean metrics)."""
    data, message = client.data, client.message
    if shared.server_state is not None:
        message = algorithm.server_message(shared.server_state, message)
    init_key, batch_key = jax.random.split(jax.random.fold_in(shared.round_key, client.client_id))
    step_state = algorithm.client_init(message, client.state, init_key)
    step_state = jax.tree.map(jnp.asarray, step_state)
    plan = batch_indices(batch_key, data.size, max_size=data.labels.shape[0], **schedule._asdict())

    def batch_of(indices: jax.Array, weight: jax.Array) -> Batch:
        return Batch(data.inputs[indices], data.labels[indices], weight)

    example = batch_of(plan.indices[0], plan.weight[0])
    after, metrics = jax.eval_shape(algorithm.client_step, step_state, example)
    check_step(step_state, after)
    no_metrics = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), metrics)

    def body(carry: tuple[Any, Any], step: Any) -> tuple[tuple[Any, Any], None]:
        def take(state: Any, sums: Any) -> tuple[Any, Any]:
            state, metrics = algorithm.client_step(state, batch_of(step.indices, step.weight))
            return state, jax.tree.map(lambda s, m: s + m.astype(jnp.float32), sums, metrics)

        # A branch, not a select: where single clients follow one another, a client that
        # has finished costs nothing. Under vmap it becomes a select.
        return jax.lax.cond(step.valid, take, lambda *same: same, *carry), None

    (step_state, sums), _ = jax.lax.scan(body, (step_state, no_metrics), plan)
    num_valid = jnp.maximum(plan.valid.sum(), 1).astype(jnp.float32)
    state, update = algorithm.client_final(message, step_state)
    return state, update, jax.tree.map(lambda s: s / num_valid, sums)


def _map_clients(
    run_one: _RunOne, chunk: int, shared: _Shared, clients: _Client
) -> tuple[Any, Any, Any]:
    if 1 < chunk >= clients.client_id.shape[0]:
        return jax.vmap(partial(run_one, shared))(clients)
    batch_size = None if chunk == 1 else chunk
    return jax.lax.map(partial(run_one, shared), clients, batch_size=batch_size)


def _run_sharded(
    run_one: _RunOne,
    chunk_size: int | None,
    mesh: Mesh,
    shared: _Shared,
    clients: _Client,
) -> tuple[Any, Any, Any]:
    num_clients = clients.client_id.shape[0]
    per_device = -(-num_clients // mesh.size)
    fits = per_device * mesh.size == num_clients
    # Clients that fill the mesh stay where they are; otherwise all move, by one place or more.
    padded = clients if fits else _fill_up(clients, per_device * mesh.size)
    chunk = _chunk(chunk_size, mesh, num_clients)
    spread = PartitionSpec(mesh.axis_names)
    run = jax.shard_map(
        partial(_map_clients, run_one, chunk),
        mesh=mesh,
        in_specs=(PartitionSpec(), spread),
        out_specs=spread,
        check_vma=False,  # clients do not communicate, so there is nothing to check
    )
    results = run(shared, padded)
    return results if fits else take_row(results, slice(num_clients))


def _fill_up(clients: _Client, count: int) -> _Client:
    """`count` clients: the given ones and inert copies."""
    rows, num_clients = np.arange(count), clients.client_id.shape[0]
    return _inert(take_row(clients, rows % num_clients), rows >= num_clients)


def _inert(clients: _Client, chosen: np.ndarray) -> _Client:
    """The clients, the chosen ones without samples: they take no steps."""
    size = jnp.where(chosen, 0, clients.data.size)
    return clients._replace(data=clients.data._replace(size=size))
