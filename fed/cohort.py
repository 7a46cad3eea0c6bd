"""The clients of one round: mapped in chunks, scanned over steps, spread over a device mesh."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fed.algorithm import FedAlgorithm
from fed.checks import Schedule, check_round, check_step
from fed.clients import Batch, ClientData, batch_indices, take_row


class _Client(NamedTuple):
    """What one client needs; in a cohort every leaf has a leading [C]."""

    message: Any
    state: Any
    data: ClientData
    client_id: jax.Array


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
) -> tuple[Any, Any, Any]:
    """Runs every client of a cohort for one round; pure, for the caller to jit.

    Args:
      algorithm: closed over; static under jit.
      messages: leaves [C, ...], what each client receives.
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
      mesh: clients are spread over all its devices; None uses one device.

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
    round_key = jax.random.fold_in(key, round_index)
    if mesh is None:
        chunk = chunk_size or _default_chunk(jax.default_backend(), data.size.shape[0])
        return _map_clients(algorithm, schedule, chunk, round_key, clients)
    return _run_sharded(algorithm, schedule, chunk_size, mesh, round_key, clients)


def _run_one(
    algorithm: FedAlgorithm, schedule: Schedule, round_key: jax.Array, client: _Client
) -> tuple[Any, Any, Any]:
    """One client's round: (client_state, update, mean metrics)."""
    data = client.data
    init_key, batch_key = jax.random.split(jax.random.fold_in(round_key, client.client_id))
    step_state = algorithm.client_init(client.message, client.state, init_key)
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
    state, update = algorithm.client_final(client.message, step_state)
    return state, update, jax.tree.map(lambda s: s / num_valid, sums)


def _map_clients(
    algorithm: FedAlgorithm,
    schedule: Schedule,
    chunk: int,
    round_key: jax.Array,
    clients: _Client,
) -> tuple[Any, Any, Any]:
    run_one = partial(_run_one, algorithm, schedule, round_key)
    if chunk >= clients.client_id.shape[0]:
        return jax.vmap(run_one)(clients)
    return jax.lax.map(run_one, clients, batch_size=None if chunk == 1 else chunk)


def _run_sharded(
    algorithm: FedAlgorithm,
    schedule: Schedule,
    chunk_size: int | None,
    mesh: Mesh,
    round_key: jax.Array,
    clients: _Client,
) -> tuple[Any, Any, Any]:
    num_clients = clients.client_id.shape[0]
    per_device = -(-num_clients // mesh.size)
    rows = np.arange(per_device * mesh.size)
    # Fill up with copies that have no samples: they take no steps and are dropped.
    padded = take_row(clients, rows % num_clients)
    size = jnp.where(rows < num_clients, padded.data.size, 0)
    padded = padded._replace(data=padded.data._replace(size=size))
    chunk = chunk_size or _default_chunk(mesh.devices.flat[0].platform, per_device)
    spread = PartitionSpec(mesh.axis_names)
    run = jax.shard_map(
        partial(_map_clients, algorithm, schedule, chunk),
        mesh=mesh,
        in_specs=(PartitionSpec(), spread),
        out_specs=spread,
        check_vma=False,  # clients do not communicate, so there is nothing to check
    )
    return take_row(run(round_key, padded), slice(num_clients))


def _default_chunk(platform: str, num_clients: int) -> int:
    return 1 if platform == "cpu" else num_clients
