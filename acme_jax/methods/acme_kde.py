"""ACME with another similarity: leave-one-out kernel density estimates instead of Wasserstein."""

from __future__ import annotations

import jax
import numpy as np

from acme_jax import densities
from acme_jax.methods import acme
from acme_jax.methods.method import Built, Method, MethodError
from acme_jax.methods.problem import Problem
from fed import similarity

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
    features = problem.public.features
    asked = densities.question(
        jax.random.fold_in(problem.key, 2),
        features,
        num_dims=min(NUM_DIMS, features.shape[1]),
        num_references=NUM_REFERENCES,
    )
    found = densities.answers(asked, problem.data.inputs, problem.data.size)
    distance = densities.distances(found.log_density)
    built = acme.build(problem, similarity.weights(distance, temperature=TEMPERATURE))
    sent = np.asarray(found.log_density), np.asarray(found.quality)
    return built._replace(
        setup_up=lambda row: [part[row] for part in sent],
        setup_down=lambda row: [np.asarray(leaf) for leaf in asked],
    )


METHOD = Method(
    "acme_kde",
    "ACME, KDE similarity",
    "Importance sets mixed by kernel density estimates instead of Wasserstein distances.",
    build,
    needs_public=True,
)
