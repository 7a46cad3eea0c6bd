"""Running the clients of a round, and rounds, on whatever hardware there is.

A client draws from `fold_in(fold_in(key, round), client_id)`, takes its own number of steps
and never sees another client, so its result does not depend on padding, chunk size, devices
or who else takes part. `run_clients_loop` is the same round as plain Python loops: slow,
readable, and able to say which client failed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fed.algorithm import FedAlgorithm
from fed.clients import ClientData
from fed.cohort import run_clients
from fed.loop import run_clients_loop

__all__ = ["RoundMetrics", "run_clients", "run_clients_loop", "run_round", "run_rounds"]

Backend = Literal["map", "loop"]


class RoundMetrics(NamedTuple):
    """Diagnostics of a round; `run_rounds` adds a leading axis of rounds."""

    client: Any  # leaves [C, ...]: mean over each client's own steps
    server: Any  # whatever the algorithm's server_update reports


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
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    backend: Backend = "map",
) -> tuple[Any, Any, RoundMetrics]:
    """One round: messages down, the clients' work, updates up, the server's step.

    Args:
      algorithm: closed over; static under jit.
      server_state: of the algorithm.
      client_states: leaves [C, ...], or `()`.
      data: the cohort's samples.
      key: of the experiment; the same in every round.
      round_index: int [], may be traced.
      client_ids: as for `run_clients`, as are the options that follow.
      batch_size: B.
      num_steps: see `run_clients`.
      epochs: see `run_clients`.
      weights: [C] for the server's update; None: the clients' numbers of samples.
      chunk_size: see `run_clients`.
      mesh: see `run_clients`.
      backend: `"map"` or `"loop"` (`run_clients_loop`; not jittable, ignores the two above).

    Returns:
      The new server state, new client states [C, ...], and the metrics.

    Raises:
      ValueError: as `run_clients`, or an unknown backend.
    """
    rows = jnp.arange(data.size.shape[0], dtype=jnp.int32)
    run: Callable[..., tuple[Any, Any, Any]]
    if backend == "map":
        run = partial(run_clients, chunk_size=chunk_size, mesh=mesh)
    elif backend == "loop":
        run = run_clients_loop
    else:
        raise ValueError(f"unknown backend {backend!r}; expected 'map' or 'loop'")
    client_states, updates, metrics = run(
        _message_from_row(algorithm, server_state),
        rows,
        client_states,
        data,
        key,
        round_index,
        client_ids=client_ids,
        batch_size=batch_size,
        num_steps=num_steps,
        epochs=epochs,
    )
    if mesh is not None and backend == "map":
        # The server sees all updates whole, so its sums do not depend on the mesh.
        updates = jax.lax.with_sharding_constraint(updates, NamedSharding(mesh, PartitionSpec()))
    client_weights = data.size.astype(jnp.float32) if weights is None else weights
    server_state, server_metrics = algorithm.server_update(
        server_state, updates, client_weights, rows
    )
    return server_state, client_states, RoundMetrics(metrics, server_metrics)


def _message_from_row(algorithm: FedAlgorithm, server_state: Any) -> FedAlgorithm:
    """The algorithm with a row in place of a message, so that messages are never stacked.

    A message is often the whole model; a stack of them would take memory for every client.
    """

    def client_init(row: jax.Array, client_state: Any, key: jax.Array) -> Any:
        return algorithm.client_init(algorithm.server_message(server_state, row), client_state, key)

    def client_final(row: jax.Array, step_state: Any) -> tuple[Any, Any]:
        return algorithm.client_final(algorithm.server_message(server_state, row), step_state)

    return algorithm._replace(client_init=client_init, client_final=client_final)


def run_rounds(
    algorithm: FedAlgorithm,
    server_state: Any,
    client_states: Any,
    data: ClientData,
    key: jax.Array,
    *,
    num_rounds: int,
    first_round: jax.Array | int = 0,
    **options: Any,
) -> tuple[Any, Any, RoundMetrics]:
    """Rounds `first_round`, ... of the whole cohort as one scan.

    Continuing with `first_round` set to the rounds done equals one longer run.

    Args:
      algorithm: closed over; static under jit.
      server_state: of the algorithm.
      client_states: leaves [C, ...], or `()`.
      data: the cohort's samples.
      key: of the experiment.
      num_rounds: R.
      first_round: int [], may be traced.
      **options: those of `run_round`, except the loop backend.

    Returns:
      The last server state, the last client states, and metrics with a leading [R].
    """

    def body(carry: tuple[Any, Any], round_index: jax.Array) -> tuple[tuple[Any, Any], Any]:
        server_state, client_states, metrics = run_round(
            algorithm, *carry, data, key, round_index, **options
        )
        return (server_state, client_states), metrics

    rounds = first_round + jnp.arange(num_rounds, dtype=jnp.int32)
    carry, metrics = jax.lax.scan(body, (server_state, client_states), rounds)
    return *carry, metrics
