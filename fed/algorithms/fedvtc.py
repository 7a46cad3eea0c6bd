"""FedVTC: clients share statistics of classes and make samples of what they lack.

Niu, Dong and Qin, "Bridging Generalization Gap of Heterogeneous Federated Clients Using
Generative Models" (arXiv 2508.01669). A client's model is a head over an extractor of features;
models may differ, only the width D of the features is common. Up go means, counts and variances
of the features of each class, down come those of all clients. Each client trains a small generator
on its own samples, decodes Gaussian latents of the classes with it and trains on the result
beside its own samples.

Where the inputs are a frozen backbone's features already (`feature_model`), latents and samples
live in one space, and the generator is dense (`fed.latent_generator.dense_generator`) or left out:
then the latents are the samples.

Deviations from the paper: model and generator take a step each on every batch instead of
alternating by phases, so the optimisers of both are in memory; statistics are collected over the
round's batches while an extractor still changes (exact for a frozen one); synthetic samples are
used beside local ones from a given round on, instead of in a closing phase.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fed import class_statistics
from fed.aggregate import weighted_mean
from fed.algorithm import FedAlgorithm
from fed.algorithms.fedvtc_step import (
    Model,
    VtcConfig,
    feature_model,
    generator_step,
    model_step,
    prior_of,
    synthetic_batch,
)
from fed.class_statistics import ClassStatistics
from fed.clients import Batch, replicate
from fed.latent_generator import Generator, Variational

__all__ = [
    "Model",
    "VtcClient",
    "VtcConfig",
    "VtcServer",
    "VtcUpdate",
    "feature_model",
    "fedvtc",
    "start_clients",
    "start_generator",
]


class VtcServer(NamedTuple):
    """State of the server, and its message to every client."""

    statistics: ClassStatistics  # of all clients
    generator: Any  # Variational if it is shared, else ()
    round: jax.Array  # int32 [], rounds in which something has arrived


class VtcClient(NamedTuple):
    """What stays on a client."""

    params: Any  # of its model
    generator: Any  # Variational if it is the client's own, else ()
    size: jax.Array  # [Y], of its own classes as far as it has seen them


class VtcUpdate(NamedTuple):
    """What a client sends."""

    statistics: ClassStatistics  # counts are of samples seen; only their proportions matter
    generator: Any


class _Step(NamedTuple):
    params: Any
    optimizer_state: Any
    generator: Any
    generator_optimizer_state: Any
    statistics: ClassStatistics  # of this round so far
    shared: VtcServer
    deviation: jax.Array  # of the shared statistics
    size: jax.Array
    key: jax.Array


def start_generator(key: jax.Array, generator: Generator, config: VtcConfig) -> Variational:
    """Fresh parameters of a generator; the key is consumed."""
    return Variational(generator.init(key), jnp.zeros(config.num_features))


def start_clients(
    key: jax.Array, params: Any, num_clients: int, config: VtcConfig, generator: Generator | None
) -> VtcClient:
    """States of C clients: leaves [C, ...].

    Args:
      key: consumed; every client's generator gets its own start.
      params: leaves [C, ...] of the clients' models. Clients of different structure need one
        tree for all, for instance a dictionary of the structures of which each uses its own.
      num_clients: C.
      config: as given to `fedvtc`.
      generator: as given to `fedvtc`.
    """
    own: Any = ()
    if generator is not None and not config.share_generator:
        make = jax.vmap(lambda key: start_generator(key, generator, config))
        own = make(jax.random.split(key, num_clients))
    return VtcClient(params, own, replicate(jnp.zeros(config.num_classes), num_clients))


def fedvtc(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: VtcConfig,
    *,
    generator: Generator | None = None,
    generator_optimizer: optax.GradientTransformation | None = None,
) -> FedAlgorithm:
    """FedVTC; client states come from `start_clients`, the server's from `server_init`.

    `server_init()` makes the server's state, `server_init(start_generator(...))` with a shared
    generator. Optimisers start afresh each round. With buckets, models differ between them.

    Args:
      model: the clients'; logits have `config.num_classes` columns.
      optimizer: of the model.
      config: static.
      generator: latents to inputs; None: the latents are the inputs, for a `feature_model`.
      generator_optimizer: given if and only if there is a generator.

    Raises:
      ValueError: a generator without its optimiser or the reverse, or a shared generator that is
        missing.
    """
    if (generator is None) != (generator_optimizer is None):
        raise ValueError("give generator and generator_optimizer together, or neither")
    if config.share_generator and generator is None:
        raise ValueError("share_generator=True, but there is no generator")

    def server_init(shared: Any = ()) -> VtcServer:
        if isinstance(shared, Variational) != config.share_generator:
            raise ValueError(
                "server_init takes start_generator(...) if share_generator is True, else nothing"
            )
        statistics = class_statistics.empty(
            config.num_classes, config.num_features, config.variance
        )
        return VtcServer(statistics, shared, jnp.int32(0))

    def client_init(message: VtcServer, state: VtcClient, key: jax.Array) -> _Step:
        own = message.generator if config.share_generator else state.generator
        return _Step(
            state.params,
            optimizer.init(state.params),
            own,
            () if generator_optimizer is None else generator_optimizer.init(own),
            class_statistics.empty(config.num_classes, config.num_features, config.variance),
            message,
            class_statistics.deviations(message.statistics, config.variance_floor),
            state.size,
            key,
        )

    def client_step(state: _Step, batch: Batch) -> tuple[_Step, dict[str, jax.Array]]:
        key, synthetic_key, generator_key = jax.random.split(state.key, 3)
        prior = prior_of(state.shared.statistics, config)

        def decode(latents: jax.Array) -> jax.Array:
            if generator is None:
                return latents
            return generator.apply(state.generator.generator, latents)

        params, optimizer_state, features, metrics = model_step(
            state.params,
            state.optimizer_state,
            batch,
            synthetic_batch(
                synthetic_key, prior, state.deviation, wanted(state, batch), config, decode
            ),
            prior,
            config.prototype_weight * jnp.minimum(state.shared.round / config.warmup_rounds, 1),
            model=model,
            optimizer=optimizer,
            config=config,
        )
        new = class_statistics.from_samples(
            features,
            batch.labels,
            batch.weight,
            num_classes=config.num_classes,
            kind=config.variance,
        )
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), state.statistics, new)
        after = state._replace(
            params=params,
            optimizer_state=optimizer_state,
            statistics=class_statistics.merge(both),
            key=key,
        )
        if generator is None or generator_optimizer is None:
            return after, metrics
        own, own_optimizer_state, terms = generator_step(
            generator_key,
            state.generator,
            state.generator_optimizer_state,
            batch,
            prior,
            lambda inputs: model.extract(params, inputs),
            generator=generator,
            optimizer=generator_optimizer,
            config=config,
        )
        after = after._replace(generator=own, generator_optimizer_state=own_optimizer_state)
        return after, {**metrics, **terms._asdict()}

    def wanted(state: _Step, batch: Batch) -> jax.Array:
        """Bool [Y]: the classes of which this client makes samples now."""
        now = state.shared.round >= config.first_synthetic_round
        if config.synthetic_classes == "all":
            return jnp.broadcast_to(now, (config.num_classes,))
        here = batch.weight @ jax.nn.one_hot(batch.labels, config.num_classes)
        return now & (state.size + state.statistics.size + here == 0)

    def client_final(message: VtcServer, state: _Step) -> tuple[VtcClient, VtcUpdate]:
        del message
        own, sent = ((), state.generator) if config.share_generator else (state.generator, ())
        size = jnp.maximum(state.size, state.statistics.size)
        return VtcClient(state.params, own, size), VtcUpdate(state.statistics, sent)

    def server_update(
        state: VtcServer, updates: VtcUpdate, weights: jax.Array, rows: jax.Array
    ) -> tuple[VtcServer, dict[str, jax.Array]]:
        del rows
        # A client's classes count by its own proportions and its weight, its number of samples:
        # passing twice over its samples does not make it twice as important.
        seen = updates.statistics.size.sum(1)
        factor = jnp.where((weights > 0) & (seen > 0), weights / jnp.maximum(seen, 1e-6), 0)
        merged = class_statistics.merge(updates.statistics, factor)
        shared = state.generator
        if config.share_generator:
            shared = weighted_mean(weights, updates.generator)
        statistics = class_statistics.prefer(merged, state.statistics)
        known = (statistics.size > 0).sum().astype(jnp.float32)
        return VtcServer(statistics, shared, state.round + 1), {"known_classes": known}

    return FedAlgorithm(
        server_init=server_init,
        server_message=lambda state, row: state,
        client_init=client_init,
        client_step=client_step,
        client_final=client_final,
        server_update=server_update,
    )
