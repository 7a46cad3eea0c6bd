"""Checks at the entry of a round: shapes and options, before anything is traced."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fed.clients import ClientData


class Schedule(NamedTuple):
    """Static: S steps, enough for every client; the batch size; the epochs or None."""

    num_steps: int
    batch_size: int
    epochs: int | None


def check_round(
    messages: Any,
    client_states: Any,
    data: ClientData,
    key: jax.Array,
    client_ids: jax.Array,
    batch_size: int,
    num_steps: int | None,
    epochs: int | None,
) -> Schedule:
    """Checks what `run_clients` is given; returns the static schedule."""
    if data.size.ndim != 1 or data.size.shape[0] == 0:
        raise ValueError(f"data.size must have shape [C] with C > 0, got {data.size.shape}")
    num_clients = data.size.shape[0]
    if data.labels.ndim != 2 or data.inputs.shape[:2] != data.labels.shape:
        raise ValueError(
            f"data.inputs {data.inputs.shape} and data.labels {data.labels.shape} must start "
            "with the same [C, N]; fed.clients.stack_clients makes them so"
        )
    ids_shape = jnp.shape(client_ids)
    for name, tree in (
        ("messages", messages),
        ("client_states", client_states),
        ("data", data),
    ):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if jnp.shape(leaf)[:1] != (num_clients,):
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; its "
                    f"leading axis must be the {num_clients} clients of data"
                )
    if ids_shape != (num_clients,):
        raise ValueError(f"client_ids has shape {ids_shape}; expected ({num_clients},)")
    if not isinstance(client_ids, jax.core.Tracer):
        values = np.asarray(client_ids)
        if len(np.unique(values)) != num_clients:
            raise ValueError(
                f"client_ids must be distinct, got {values.tolist()}; equal ids would share "
                "their random numbers"
            )
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"key must come from jax.random.key, got an array of {key.dtype}")
    if (num_steps is None) == (epochs is None):
        raise ValueError(f"give num_steps or epochs, one of them; got {num_steps} and {epochs}")
    for name, value in (("batch_size", batch_size), ("num_steps", num_steps), ("epochs", epochs)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if epochs is not None:
        num_steps = epochs * -(-data.labels.shape[1] // batch_size)
    assert num_steps is not None
    return Schedule(num_steps, batch_size, epochs)


def check_step(before: Any, after: Any) -> None:
    """client_step must return a step state like the one it got."""
    structures = [str(jax.tree.structure(tree)) for tree in (before, after)]
    if structures[0] != structures[1]:
        raise ValueError(
            "client_step must keep the structure of the step state, but turned "
            f"{structures[0]} into {structures[1]}"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    for (path, old), new in pairs:
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ValueError(
                f"client_step must keep shapes and dtypes, but step state"
                f"{jax.tree_util.keystr(path)} changed from {old.dtype}{old.shape} "
                f"to {new.dtype}{new.shape}"
            )
