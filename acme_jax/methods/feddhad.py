"""FedDHAD's two parts (arXiv 2507.10430): learned aggregation weights and unit dropout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax.blocks import Params
from acme_jax.methods.method import Built, Method, Payload
from acme_jax.methods.problem import Problem, weighted_loss
from fed.algorithms.fedad import Update, fedad
from fed.algorithms.feddh import feddh
from fed.clients import Batch
from fed.label_skew import label_counts, skew_degree
from fed.unit_dropout import dropout_rates, mean_scores, probe_rows

BASE_RATE = 0.5
"""P of FedAD: the part of units that a probe of mean size drops. The paper takes it from the
Hessian's spectrum (`fed.hessian_spectrum.base_rate`); here it is given."""
TEMPERATURE = 8.0
"""Of unit scores. At 1 some units are dropped almost always, and their factor 1 / (1 - p) on the
rare other occasion makes training diverge. Chosen on the digits."""
MAX_NORM = 1.0
"""Of gradients. Such factors make some of them so large that training on few labels diverges; the
original drops updates whose loss is three times the first. Chosen on the digits."""


def label_histograms(problem: Problem) -> Array:
    """How often each client has each label: [C, Y]."""
    data, classes = problem.data, problem.header.num_classes
    return jax.vmap(lambda labels, size: label_counts(labels, classes, size))(
        data.labels, data.size
    )


def build_feddh(problem: Problem) -> Built:
    """FedDH: clients count by their samples and, as is learned, by the skew of their labels."""
    counts = label_histograms(problem)
    algorithm = feddh(problem.loss(), problem.schedule.optimizer())
    sent = np.asarray(counts, np.int32)

    def logits(server: Any, client: tuple[()], row: Array, features: Array) -> Array:
        del client, row
        return problem.header.logits(server.params, features)

    server = algorithm.server_init(problem.start, skew_degree(counts))
    flops = np.full(problem.num_clients, 3 * problem.header.flops())
    return Built(algorithm, server, (), logits, flops, setup_up=lambda row: [sent[row]])


def unit_scores(params: Params) -> dict[str, Array]:
    """Importance of the hidden units, leaves [U].

    The product of the norms of the weights before and after a unit, scaled to mean 0 and deviation
    1. (The specification leaves the score of dense units open.)
    """

    def score(before: Array, after: Array) -> Array:
        value = jnp.linalg.norm(before, axis=0) * jnp.linalg.norm(after, axis=1)
        return (value - value.mean()) / jnp.maximum(value.std(), 1e-6)

    kernels = [params[name]["kernel"] for name in ("first", "second", "last")]
    return {"first": score(kernels[0], kernels[1]), "second": score(kernels[1], kernels[2])}


def build_fedad(problem: Problem) -> Built:
    """FedAD: each client trains without some unimportant units, those with more data without more.

    Dropout begins at once, because the start is a trained header whose scores are known.
    """
    header, data = problem.header, problem.data
    probes = probe_rows(jax.random.fold_in(problem.key, 1), data.size)
    scores = unit_scores(problem.start)
    # The probes hold the same header at the start, so they find the same scores.
    three = jax.tree.map(lambda leaf: jnp.stack([leaf] * probes.shape[0]), scores)
    scores = mean_scores(three, data.size[probes].astype(jnp.float32))
    rates = dropout_rates(data.size, data.size[probes], BASE_RATE)

    def loss_fn(params: Params, batch: Batch, key: Array, factors: Any) -> tuple[Array, Any]:
        del key
        gates = jnp.concatenate([factors["first"], factors["second"]])
        return weighted_loss(header.logits(params, batch.inputs, gates), batch)

    # No weight decay: dropped units must come back as they were sent.
    optimizer = problem.schedule.optimizer(decays=False, max_norm=MAX_NORM)
    algorithm = fedad(loss_fn, optimizer, temperature=TEMPERATURE)
    start = jax.tree.map(np.asarray, problem.start)

    def up(update: Update, row: int) -> Payload:
        # Dropped units are bit for bit those of the first round's model.
        del row
        pairs = zip(jax.tree.leaves(update.params), jax.tree.leaves(start), strict=True)
        return [np.asarray(leaf)[np.asarray(leaf) != old] for leaf, old in pairs]

    def logits(server: Any, client: tuple[()], row: Array, features: Array) -> Array:
        del client, row
        return header.logits(server.params, features)

    server = algorithm.server_init(problem.start, scores, rates)
    share = 1.0 - np.asarray(rates)
    units = header.num_hidden
    kept = [
        3 * 2 * (s * units * (header.num_features + s * units + header.num_classes)) for s in share
    ]
    return Built(algorithm, server, (), logits, np.asarray(kept), up=up)


FEDDH = Method(
    "feddh", "FedDH", "FedAvg whose weights learn how much label skew counts.", build_feddh, False
)
FEDAD = Method(
    "fedad", "FedAD", "FedAvg in which clients drop unimportant units.", build_fedad, False
)
