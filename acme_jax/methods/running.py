"""Runs one method on one problem: rounds, bytes, and accuracy of every client."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from acme_jax.layout import replicate
from acme_jax.methods.method import Built, Method, Payload
from acme_jax.methods.problem import Problem
from acme_jax.progress import Stopwatch
from fed.clients import ClientData
from fed.simulate import run_clients, run_rounds


class Outcome(NamedTuple):
    """A method after its last round."""

    server: Any
    clients: Any
    built: Built
    seconds: float
    """Of the rounds, compiling left out."""
    up_bytes: np.ndarray  # [C] of all rounds and the setup
    down_bytes: np.ndarray  # [C]
    flops: np.ndarray  # [C] of a client's training in all rounds


def run(method: Method, problem: Problem) -> Outcome:
    """All rounds of the problem's schedule.

    Raises:
      MethodError: the method cannot serve these clients; before any training.
    """
    built = method.build(problem)
    schedule = problem.schedule
    ids = jnp.arange(problem.num_clients, dtype=jnp.int32)
    options: dict[str, Any] = {
        "client_ids": ids,
        "epochs": schedule.epochs,
        "batch_size": schedule.batch_size,
        "mesh": problem.mesh,
    }

    @jax.jit
    def rounds(server: Any, clients: Any, data: ClientData, key: Array) -> Any:
        server, clients, metrics = run_rounds(
            built.algorithm, server, clients, data, key, num_rounds=schedule.rounds, **options
        )
        return server, clients, () if built.down_bytes is None else metrics.server

    arguments = replicate((built.server, built.clients, problem.data, problem.key), problem.mesh)
    with Stopwatch() as watch:
        server, clients, metrics = jax.block_until_ready(rounds(*arguments))
    up, down = _bytes(built, problem, jax.tree.map(np.asarray, metrics))
    steps = np.ceil(np.asarray(problem.data.size) / schedule.batch_size) * schedule.epochs
    samples = steps * schedule.batch_size * schedule.rounds
    seconds = watch.seconds - watch.compile_seconds
    return Outcome(server, clients, built, seconds, up, down, built.flops * samples)


def _bytes(built: Built, problem: Problem, metrics: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the first round really sends, encoded, times the rounds; and the setup.

    Where a method says what went down in all rounds, that counts.
    """
    algorithm, schedule = built.algorithm, problem.schedule
    ids = jnp.arange(problem.num_clients, dtype=jnp.int32)

    @jax.jit
    def messages(server: Any, clients: Any, data: ClientData, key: Array) -> Any:
        down = jax.vmap(algorithm.server_message, in_axes=(None, 0))(server, ids)
        _, up, _ = run_clients(
            algorithm,
            down,
            clients,
            data,
            key,
            jnp.int32(0),
            client_ids=ids,
            num_steps=1,
            batch_size=schedule.batch_size,
            mesh=problem.mesh,
        )
        return down, up

    arguments = replicate((built.server, built.clients, problem.data, problem.key), problem.mesh)
    down, up = jax.tree.map(np.asarray, messages(*arguments))
    sizes = np.zeros((2, problem.num_clients), np.int64)
    for row in range(problem.num_clients):
        own_down, own_up = (jax.tree.map(lambda leaf, r=row: leaf[r], tree) for tree in (down, up))
        each = [_encoded(built.up(own_up, row)), _encoded(built.down(own_down, row))]
        once = [_encoded(built.setup_up(row)), _encoded(built.setup_down(row))]
        sizes[:, row] = [
            schedule.rounds * len(payload) + len(first)
            for payload, first in zip(each, once, strict=True)
        ]
    if built.down_bytes is not None:
        setup = [len(_encoded(built.setup_down(row))) for row in range(problem.num_clients)]
        sizes[1] = built.down_bytes(metrics) + np.asarray(setup)
    return sizes[0], sizes[1]


def _encoded(payload: Payload) -> bytes:
    return b"".join(np.ascontiguousarray(array).tobytes() for array in payload)


def evaluator(outcome: Outcome) -> Callable[[ClientData], Array]:
    """Accuracies [C] of the clients on samples given as features, for the final evaluation."""

    @jax.jit
    def evaluate(server: Any, clients: Any, data: ClientData) -> Array:
        def one(args: tuple[Array, Any, Array, Array, Array]) -> Array:
            row, client, features, labels, size = args
            found = jnp.argmax(outcome.built.logits(server, client, row, features), axis=-1)
            valid = jnp.arange(labels.shape[0]) < size
            return jnp.sum((found == labels) & valid) / size

        rows = jnp.arange(data.size.shape[0], dtype=jnp.int32)
        return lax.map(one, (rows, clients, data.inputs, data.labels, data.size))

    return functools.partial(evaluate, outcome.server, outcome.clients)
