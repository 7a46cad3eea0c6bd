"""The clients of one round as plain Python loops: slow, readable, the oracle of `fed.cohort`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fed.algorithm import FedAlgorithm
from fed.buckets import Buckets, check_buckets
from fed.checks import check_round
from fed.clients import Batch, ClientData, batch_indices, take_row
from fed.errors import ClientError


def run_clients_loop(
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
    buckets: Buckets | None = None,
    bucket_of: jax.Array | None = None,
    server_state: Any = None,
) -> tuple[Any, Any, Any]:
    """`run_clients` as Python loops over clients and steps, on unpadded data; not jittable.

    Raises:
      ClientError: a function of the algorithm failed; names the client and the step.
      ValueError: as `run_clients`.
    """
    schedule = check_round(
        messages, client_states, data, key, client_ids, batch_size, num_steps, epochs
    )
    if buckets is not None:
        check_buckets(buckets, data.size.shape[0], bucket_of)
    options = {"max_size": data.labels.shape[1], **schedule._asdict()}
    plan_batches = jax.jit(partial(batch_indices, **options))
    round_key = jax.random.fold_in(key, round_index)
    results = []
    for row, (size, client_id) in enumerate(zip(data.size, client_ids, strict=True)):
        client = algorithm
        message, state = (take_row(tree, row) for tree in (messages, client_states))
        if buckets is not None:
            own = buckets.bucket_of if bucket_of is None else bucket_of
            client = buckets.algorithms[int(own[row])]
        if server_state is not None:
            message = algorithm.server_message(server_state, message)
        inputs, labels = data.inputs[row, : int(size)], data.labels[row, : int(size)]
        place = "client_init"
        try:
            init_key, batch_key = jax.random.split(jax.random.fold_in(round_key, client_id))
            step_state = client.client_init(message, state, init_key)
            plan = plan_batches(batch_key, size)
            collected = []
            for step in range(int(plan.valid.sum())):
                place = f"step {step}"
                indices = plan.indices[step]
                batch = Batch(inputs[indices], labels[indices], plan.weight[step])
                step_state, metrics = client.client_step(step_state, batch)
                collected.append(metrics)
            place = "client_final"
            state, update = client.client_final(message, step_state)
        except Exception as error:
            raise ClientError(f"client {int(client_id)} failed in {place}: {error}") from error
        metrics = None
        if collected:
            metrics = jax.tree.map(lambda *x: jnp.stack(x).astype(jnp.float32).mean(0), *collected)
        results.append((state, update, metrics))
    # A client without steps has nothing to report; its metrics are 0, as in `run_clients`.
    like = next((metrics for *_, metrics in results if metrics is not None), None)
    if like is None:
        first = plan.indices[0]
        batch = Batch(data.inputs[0, first], data.labels[0, first], plan.weight[0])
        _, like = jax.eval_shape(client.client_step, step_state, batch)
    none = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), like)
    results = [(state, update, none if m is None else m) for state, update, m in results]
    return jax.tree.map(lambda *x: jnp.stack(x), *results)
