"""What reaches the server in a round: updates in time, late ones of the last round, or nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fed.algorithm import FedAlgorithm
from fed.clients import take_row
from fed.participation import Participation, Roles


class Sent(NamedTuple):
    """Updates on their way to the server."""

    updates: Any  # leaves [K, ...]
    weights: jax.Array  # [K]; 0: nothing arrives from this place
    rows: jax.Array  # [K] int32, of the cohort


class WithLate(NamedTuple):
    """A server's state beside the updates that came too late for its last step."""

    state: Any  # of the algorithm
    late: Sent


def with_late(
    algorithm: FedAlgorithm, server_state: Any, client_states: Any, num_sampled: int
) -> WithLate:
    """A server's state for rounds whose late updates count in the next one; none is late yet.

    Args:
      algorithm: says what an update looks like; nothing is computed.
      server_state: of the algorithm.
      client_states: leaves [C, ...], or `()`.
      num_sampled: K, the clients in a round; C if all are sampled. Takes memory for K updates.
    """

    def update_of_one(server_state: Any, client_states: Any) -> Any:
        message = algorithm.server_message(server_state, jnp.int32(0))
        step_state = algorithm.client_init(message, take_row(client_states, 0), jax.random.key(0))
        return algorithm.client_final(message, step_state)[1]

    updates = jax.tree.map(
        lambda leaf: jnp.zeros((num_sampled, *leaf.shape), leaf.dtype),
        jax.eval_shape(update_of_one, server_state, client_states),
    )
    no_rows = jnp.zeros(num_sampled, jnp.int32)
    return WithLate(server_state, Sent(updates, jnp.zeros(num_sampled, jnp.float32), no_rows))


def receive(
    algorithm: FedAlgorithm, server_state: Any, sent: Sent, roles: Roles
) -> tuple[Any, Any]:
    """The server's step on what has arrived; if that is nothing, its state stays as it is.

    Args:
      algorithm: whose `server_update` is called.
      server_state: of the algorithm, or `WithLate`: then late updates wait for the next round.
      sent: by the clients of this round, also those that nobody gets.
      roles: of the same clients.

    Returns:
      A server state like the one given, and the metrics of `server_update`, 0 without a step.
    """
    in_time = _only(sent, ~roles.dropped & ~roles.late)
    if not isinstance(server_state, WithLate):
        return _step(algorithm, server_state, in_time)
    both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), server_state.late, in_time)
    state, metrics = _step(algorithm, server_state.state, both)
    return WithLate(state, _only(sent, roles.late)), metrics


def check_server_state(
    server_state: Any, participation: Participation | None, num_sampled: int
) -> None:
    """A server's state has a place for late updates exactly if they count.

    Raises:
      ValueError: otherwise, or if it is of another number of clients.
    """
    waits = participation is not None and participation.late == "next_round"
    if waits and not isinstance(server_state, WithLate):
        raise ValueError(
            "with late='next_round' late updates travel with the server's state; start with "
            "fed.simulate.with_late(algorithm, server_state, client_states, num_sampled)"
        )
    if not isinstance(server_state, WithLate):
        return
    if not waits:
        raise ValueError(
            "server_state holds late updates, but participation does not count them; use "
            "Participation(..., late='next_round'), or give server_state.state"
        )
    if server_state.late.rows.shape != (num_sampled,):
        raise ValueError(
            f"server_state holds {server_state.late.rows.shape[0]} late updates, but a round has "
            f"{num_sampled} clients; give with_late that number"
        )


def select_rows(which: jax.Array, tree: Any, other: Any) -> Any:
    """Rows of `tree` where `which` [K], of `other` elsewhere; leaves [K, ...]."""
    return jax.tree.map(
        lambda a, b: jnp.where(which.reshape(-1, *[1] * (jnp.ndim(a) - 1)), a, b), tree, other
    )


def newest(held: Any, updates: Any, arrived: jax.Array, rows: jax.Array) -> Any:
    """What a server holds of every client, with what it was sent since.

    Args:
      held: leaves [C, ...].
      updates: leaves [K, ...].
      arrived: bool [K].
      rows: int [K], of the cohort; of several updates of one row the last that arrived counts.
    """
    order = jnp.where(arrived, jnp.arange(rows.shape[0]), -1)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        last = jnp.full(old.shape[0], -1, order.dtype).at[rows].max(order)
        known = (last >= 0).reshape(-1, *[1] * (old.ndim - 1))
        return jnp.where(known, new[jnp.maximum(last, 0)], old)

    return jax.tree.map(put, held, updates)


def _step(algorithm: FedAlgorithm, server_state: Any, sent: Sent) -> tuple[Any, Any]:
    heard = (sent.weights > 0).any()
    # With weights of 1 a mean of nothing is defined, too; it is not used.
    weights = jnp.where(heard, sent.weights, 1.0)
    state, metrics = algorithm.server_update(server_state, sent.updates, weights, sent.rows)
    return (
        jax.tree.map(lambda new, old: jnp.where(heard, new, old), state, server_state),
        jax.tree.map(lambda leaf: jnp.where(heard, leaf, jnp.zeros_like(leaf)), metrics),
    )


def _only(sent: Sent, wanted: jax.Array) -> Sent:
    """Zeros in the other places: a client without steps may send NaN, and 0 * NaN is NaN."""
    wanted = wanted & (sent.weights > 0)
    return sent._replace(
        updates=select_rows(wanted, sent.updates, jax.tree.map(jnp.zeros_like, sent.updates)),
        weights=jnp.where(wanted, sent.weights, 0.0),
    )
