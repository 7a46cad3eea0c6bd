"""CE-LoRA (arXiv 2503.23869): tri-matrix adapters of the header, of which the cores travel."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import numpy as np
import optax
from jax import Array

from acme_jax.blocks import Params
from acme_jax.methods.method import Built, Method, MethodError
from acme_jax.methods.problem import Problem
from fed import gmm, kde_device, kde_edge, transport, tri_matrix
from fed.algorithms.celora import CeLoraServer, Train, celora, data_similarity
from fed.clients import replicate

RANK = 8
SCALE = 2.0
RATE = 3e-3
"""Of Adam, as the paper trains; with SGD the factors, which start small, hardly move."""
SKETCH_DIMS = 16
"""Features are projected for the sketches, which would otherwise weigh more than the header."""


def build(problem: Problem, train: Train = "all") -> Built:
    """Clients train adapters of all three layers of the frozen start.

    Args:
      problem: of the comparison.
      train: `"cores"` is the mode with a frozen orthonormal basis.

    Raises:
      MethodError: no public samples to make the sketches' projection from.
    """
    header, count = problem.header, problem.num_clients
    if problem.public is None:
        raise MethodError(
            "celora needs public samples at the edge for the projection of its sketches, and this "
            "problem has none; fedavg, heterofl and acme do without"
        )
    sizes = (header.num_features, header.num_hidden, header.num_hidden, header.num_classes)
    keys = jax.random.split(jax.random.fold_in(problem.key, 3), 3)
    rank = min(RANK, *sizes)
    kind: tri_matrix.Start = "trained_basis" if train == "all" else "frozen_basis"
    adapters = {
        name: tri_matrix.init(key, rows, columns, rank=rank, start=kind)
        for name, key, (rows, columns) in zip(
            ("first", "second", "last"), keys, itertools.pairwise(sizes), strict=True
        )
    }
    base = problem.loss()

    def adapted(params: Any) -> Params:
        return {
            name: {
                "kernel": layer["kernel"] + tri_matrix.delta(params[name], SCALE).T,
                "bias": layer["bias"],
            }
            for name, layer in problem.start.items()
        }

    algorithm = celora(
        lambda params, batch, key: base(adapted(params), batch, key), optax.adam(RATE), train=train
    )
    sketches = _sketches(problem)
    distance = transport.client_distances(sketches)
    server = algorithm.server_init(adapters, data_similarity(distance))
    sent = [np.asarray(leaf) for leaf in jax.tree.leaves(sketches)]

    def logits(server: CeLoraServer, client: Any, row: Array, features: Array) -> Array:
        del server, row  # with its own cores: the mean of the last round is not trained on
        return header.logits(adapted(client), features)

    # The frozen layers forward and back to the inputs; the adapters are small beside them.
    pairs = list(itertools.pairwise(sizes))
    flops = 2 * header.flops() + 3 * 2 * sum(rank * (a + b + rank) for a, b in pairs)
    return Built(
        algorithm,
        server,
        replicate(adapters, count),
        logits,
        np.full(count, flops),
        setup_up=lambda row: [leaf[row] for leaf in sent],
    )


def _sketches(problem: Problem) -> gmm.ClassMixtures:
    """Each client's mixtures of Gaussians, one for each class."""
    assert problem.public is not None
    key, fit_key = jax.random.split(jax.random.fold_in(problem.key, 4))
    features = problem.public.features
    dims = min(SKETCH_DIMS, features.shape[1])
    projection = kde_edge.make_projection(key, features, dims)

    @jax.jit
    @jax.vmap
    def fit(features: Array, labels: Array, size: Array) -> gmm.ClassMixtures:
        return gmm.fit_classes(
            fit_key,
            kde_device.project(projection, features),
            labels,
            size,
            num_classes=problem.header.num_classes,
        )

    data = problem.data
    return fit(data.inputs, data.labels, data.size)


METHOD = Method(
    "celora",
    "CE-LoRA",
    "Low-rank adapters B C A; only the small C travels and is averaged by similarity.",
    build,
    False,
    needs_public=True,
)
FROZEN = Method(
    "celora_frozen",
    "CE-LoRA, frozen basis",
    "As CE-LoRA with an orthonormal basis that all share and nobody trains.",
    functools.partial(build, train="cores"),
    False,
    needs_public=True,
)
