"""ACME with another similarity: leave-one-out kernel density estimates instead of Wasserstein."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from acme_jax.methods import acme
from acme_jax.methods.method import Built, Method, MethodError
from acme_jax.methods.problem import Problem
from fed import kde_device, kde_edge, similarity

NUM_DIMS = 8
NUM_REFERENCES = 200
TEMPERATURE = 0.05


def build(problem: Problem) -> Built:
    """Devices send their log densities at the edge's reference points, the edge compares those.

    Raises:
      MethodError: the edge holds no public samples to take reference points from.
    """
    if problem.public is None:
        raise MethodError(
            "acme_kde needs public samples at the edge for its reference points, and this problem "
            "has none; acme, feddh and heterofl do without"
        )
    project_key, draw_key = jax.random.split(jax.random.fold_in(problem.key, 2))
    features = problem.public.features
    num_dims = min(NUM_DIMS, features.shape[1])
    projection = kde_edge.make_projection(project_key, features, num_dims)
    rows = jax.random.permutation(draw_key, features.shape[0])[:NUM_REFERENCES]
    references = kde_device.project(projection, features[rows])
    data = problem.data
    masks = jnp.arange(data.labels.shape[1])[None] < data.size[:, None]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0))
    def report(features: jax.Array, mask: jax.Array) -> kde_device.Report:
        # One bandwidth for all kernels, because devices have few samples.
        return kde_device.report(projection, references, features, mask, shared=True)[0]

    reports = report(data.inputs, masks)
    distance = kde_edge.pairwise_kde(reports.log_density)
    built = acme.build(problem, similarity.weights(distance, temperature=TEMPERATURE))
    sent = jax.tree.map(np.asarray, reports)
    asked = [np.asarray(leaf) for leaf in (*projection, references)]
    return built._replace(
        setup_up=lambda row: [sent.log_density[row], sent.quality[row]],
        setup_down=lambda row: asked,
    )


METHOD = Method(
    "acme_kde",
    "ACME, KDE similarity",
    "Importance sets mixed by kernel density estimates instead of Wasserstein distances.",
    build,
    needs_public=True,
)
