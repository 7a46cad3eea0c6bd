"""FedMosaic (arXiv 2506.11024): cores that fit any width, averaged by the relevance of tasks.

Every client trains the cores P, Q of its Co-LoRA modules (`fed.co_lora`) beside frozen shared
ones, and sends them with a sketch of what its task asks of a small frozen model that all clients
hold (`fed.gradient_sketch`). The server answers each client with the mean of the others' cores,
weighted by how alike the sketches are. The client's own cores stay with it; a gate mixes the two.

Deviations from the paper: its ordinary LoRA in the other layers, averaged among clients of one
architecture, is left out (put such arrays among the private ones to train them alone); the sketch
is taken every so many batches counted from each round's first, so that short rounds have one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fed import gradient_sketch
from fed.aggregate import personalized_mean
from fed.algorithm import FedAlgorithm
from fed.algorithms.local_sgd import SgdState, make_step, start
from fed.arrivals import newest
from fed.clients import Batch, replicate


class Adapters(NamedTuple):
    """What a client's loss is a function of; trees with `fed.co_lora.Core` nodes."""

    local: Any  # the client's own cores: trained and sent
    shared: Any  # a tree like `local`: received, frozen
    private: Any  # trained, never sent, such as gates
    fixed: Any  # frozen arrays of the client's model, such as bases and masks


AdaptersLoss = Callable[[Adapters, Batch, jax.Array], tuple[jax.Array, Any]]
"""(adapters, batch, key) -> (loss [], metrics); weighs samples by `batch.weight`."""


class MosaicServer(NamedTuple):
    """What the server holds; rows are clients."""

    received: Any  # leaves [C, ...]: every client's cores as it last sent them
    sketches: jax.Array  # [C, R, D] likewise
    heard: jax.Array  # bool [C], who has sent something yet
    personalized: Any  # leaves [C, ...]: what goes down next


class MosaicClient(NamedTuple):
    """What stays on a client."""

    adapters: Adapters
    sketch: jax.Array  # [R, D] mean task vector, smoothed over rounds, without noise
    rounds: jax.Array  # int32 [], of which it is


class MosaicUpdate(NamedTuple):
    """What a client sends."""

    local: Any
    sketch: jax.Array  # [R, D] with noise


class _Step(NamedTuple):
    sgd: SgdState  # of (local, private)
    adapters: Adapters  # as at the start of the round
    taken: jax.Array  # [R, D] sum of task vectors
    num_taken: jax.Array  # float32 []
    num_steps: jax.Array  # int32 []
    past: jax.Array  # [R, D]
    rounds: jax.Array  # int32 []
    key: jax.Array


def start_clients(
    adapters: Adapters, sketch_shape: tuple[int, int], num_clients: int
) -> MosaicClient:
    """States of C clients: leaves [C, ...].

    Args:
      adapters: leaves [C, ...]; cores of `fed.co_lora.zero_core`, shared like local.
      sketch_shape: (R, D) of a task vector.
      num_clients: C.
    """
    empty = replicate(jnp.zeros(sketch_shape), num_clients)
    return MosaicClient(adapters, empty, jnp.zeros(num_clients, jnp.int32))


def fedmosaic(
    loss_fn: AdaptersLoss,
    optimizer: optax.GradientTransformation,
    task_vector: Callable[[Batch], jax.Array],
    *,
    every: int = 10,
    decay: float = 0.5,
    noise: float = 1e-4,
    temperature: float = 0.5,
) -> FedAlgorithm:
    """FedMosaic as a federated algorithm; client states come from `start_clients`.

    `server_init(cores, sketch_shape, num_clients)` takes one client's cores, as every client
    starts; the first message is these. Bases must be aligned (`fed.co_lora_alignment`): averaging
    cores means something only as far as they do the same in every model. The message is a tree of
    cores, the update cores and a sketch; each round starts a fresh optimiser. Numbers of samples
    do not enter the weights; clients that were not heard count as they were last.

    Args:
      loss_fn: see `AdaptersLoss`.
      optimizer: the clients', of local cores and private arrays.
      task_vector: batch -> [R, D], the gradient of the small model that all clients hold
        (`fed.gradient_sketch.task_vector`).
      every: batches from one task vector to the next.
      decay: what a client's past task vectors count.
      noise: standard deviation of the Gaussian noise on what is sent.
      temperature: of the relevance weights.

    Raises:
      ValueError: an `every` below 1, a decay outside [0, 1), negative noise, or a temperature that
        is not positive.
    """
    if every < 1 or not 0 <= decay < 1 or noise < 0 or temperature <= 0:
        raise ValueError(
            "every must be at least 1, decay in [0, 1), noise at least 0 and temperature above 0; "
            f"got {every}, {decay}, {noise} and {temperature}"
        )

    def server_init(cores: Any, sketch_shape: tuple[int, int], num_clients: int) -> MosaicServer:
        first = replicate(cores, num_clients)
        sketches = jnp.zeros((num_clients, *sketch_shape))
        return MosaicServer(first, sketches, jnp.zeros(num_clients, bool), first)

    def client_init(message: Any, state: MosaicClient, key: jax.Array) -> _Step:
        step_key, noise_key = jax.random.split(key)
        adapters = state.adapters._replace(shared=message)
        return _Step(
            start((adapters.local, adapters.private), optimizer, step_key),
            adapters,
            jnp.zeros_like(state.sketch),
            jnp.float32(0),
            jnp.int32(0),
            state.sketch,
            state.rounds,
            noise_key,
        )

    def client_step(state: _Step, batch: Batch) -> tuple[_Step, Any]:
        def loss(params: tuple[Any, Any], batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
            local, private = params
            return loss_fn(state.adapters._replace(local=local, private=private), batch, key)

        sgd, metrics = make_step(loss, optimizer)(state.sgd, batch)
        due = state.num_steps % every == 0
        # Under vmap both branches are computed; clients in chunks of 1 skip the vector.
        taken = jax.lax.cond(due, lambda: state.taken + task_vector(batch), lambda: state.taken)
        after = state._replace(
            sgd=sgd,
            taken=taken,
            num_taken=state.num_taken + due,
            num_steps=state.num_steps + 1,
        )
        return after, metrics

    def client_final(message: Any, state: _Step) -> tuple[MosaicClient, MosaicUpdate]:
        del message
        local, private = state.sgd.params
        new = state.taken / jnp.maximum(state.num_taken, 1)
        some = state.num_taken > 0
        smooth = gradient_sketch.smooth(state.past, new, state.rounds, decay)
        sketch = jnp.where(some, smooth, state.past)
        sent = sketch + noise * jax.random.normal(state.key, sketch.shape)
        adapters = state.adapters._replace(local=local, private=private)
        client = MosaicClient(adapters, sketch, state.rounds + some)
        return client, MosaicUpdate(local, sent)

    def server_update(
        state: MosaicServer, updates: MosaicUpdate, weights: jax.Array, rows: jax.Array
    ) -> tuple[MosaicServer, dict[str, jax.Array]]:
        arrived = weights > 0
        held = MosaicUpdate(state.received, state.sketches)
        held = newest(held, updates, arrived, rows)
        heard = state.heard.at[rows].max(arrived)
        similarity = gradient_sketch.column_similarity(held.sketch)
        relevance = gradient_sketch.relevance_weights(similarity, heard, temperature=temperature)
        personalized = personalized_mean(relevance, held.local)
        after = MosaicServer(held.local, held.sketch, heard, personalized)
        return after, {"relevance": relevance}

    return FedAlgorithm(
        server_init=server_init,
        server_message=lambda state, row: jax.tree.map(lambda leaf: leaf[row], state.personalized),
        client_init=client_init,
        client_step=client_step,
        client_final=client_final,
        server_update=server_update,
    )
