"""A federated algorithm as a record of pure functions.

A round: the server writes a message to each client, each client takes steps on its own data
and answers with an update, the server reads all updates. Everything that travels is named:
`message` goes down, `update` goes up, and `client_state` never leaves its device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from fed.clients import Batch


class FedAlgorithm(NamedTuple):
    """Six pure functions; hyper-parameters live in the closure of the factory.

    States, messages, updates and metrics are any pytrees of arrays; metrics may be `{}`.
    The record itself is closed over, never passed through `jit`. The functions of a client
    are written for one client: `fed.simulate` maps them over the cohort.
    """

    server_init: Callable[..., Any]
    """(initial values, e.g. parameters) -> server_state."""

    server_message: Callable[[Any, jax.Array], Any]
    """(server_state, row) -> message for the client in this row of the cohort (int [])."""

    client_init: Callable[[Any, Any, jax.Array], Any]
    """(message, client_state, key) -> step_state; the key is the client's own, consumed."""

    client_step: Callable[[Any, Batch], tuple[Any, Any]]
    """(step_state, batch) -> (step_state, metrics); keeps structure, shapes and dtypes.

    Losses weigh samples by `batch.weight`, which is 0 for fillers."""

    client_final: Callable[[Any, Any], tuple[Any, Any]]
    """(message, step_state) -> (client_state, update)."""

    server_update: Callable[[Any, Any, jax.Array, jax.Array], tuple[Any, Any]]
    """(server_state, updates [K, ...], weights [K], rows [K]) -> (server_state, metrics).

    `rows` (int32) are the cohort's rows that the updates come from. Weight 0 means that the
    update did not arrive and must not count; a row may come twice, a late update first.
    """
