"""Kernel density estimates between an edge and its devices: `refine.similarity = "kde"`.

The edge projects features of its shared (public) data to a few dimensions and sends the projection
and some of the points; a device fits an estimate to its own projected features, leaving each point
out (`fed.kde_fit`, arXiv 2310.03556), and answers with its log densities at those points, 800
bytes for 200. The estimate, whose kernel centres are the device's features, never leaves it. The
edge compares the answers (`fed.kde_edge.pairwise_kde`).

Shape letters: C devices, N samples, F features, D projected dimensions, M reference points.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from acme_jax.config import ConfigError, RefineConfig
from acme_jax.message_records import DensityQuestion
from fed import kde_device, kde_edge
from fed.kde import outlier_score
from fed.kde_device import Projection


class Answers(NamedTuple):
    """What the devices find; rows are devices."""

    log_density: Array  # [C, M] nats, at the edge's reference points
    quality: Array  # [C] `fed.kde.data_quality`; -inf with fewer than two samples
    outlier_score: Array  # [C, N] `fed.kde.outlier_score`; -inf where padded. Stays on the device


def check(config: RefineConfig, num_shared: int, num_features: int) -> None:
    """Whether an edge can ask what the configuration says; before any work.

    Args:
      config: similarity, data_quality, kde_dims, num_references.
      num_shared: samples of the edge's shared data.
      num_features: F.

    Raises:
      ConfigError: fewer features or samples than asked for.
    """
    if config.similarity != "kde" and not config.data_quality:
        return
    if config.kde_dims > num_features:
        raise ConfigError(
            f"refine.kde_dims is {config.kde_dims}, but features have {num_features} dimensions; "
            "lower it"
        )
    if config.num_references > num_shared:
        raise ConfigError(
            f"refine.num_references is {config.num_references}, but an edge shares only "
            f"{num_shared} samples; lower it or raise header.proxy_fraction"
        )


def question(key: Array, shared: Array, *, num_dims: int, num_references: int) -> DensityQuestion:
    """What an edge asks its devices; the key is consumed.

    Args:
      key: of the projection's directions and of the choice of points.
      shared: [S, F] features of data that the edge may show.
      num_dims: D; at most F.
      num_references: M; at most S.
    """
    project_key, draw_key = jax.random.split(key)
    projection = kde_edge.make_projection(project_key, shared, num_dims)
    rows = jax.random.permutation(draw_key, shared.shape[0])[:num_references]
    references = kde_device.project(projection, shared[rows])
    return DensityQuestion(*(np.asarray(leaf) for leaf in (*projection, references)))


@jax.jit
def answers(asked: DensityQuestion, features: Array, sizes: Array) -> Answers:
    """What every device finds in its own data, one device after the other.

    All kernels of a device share one bandwidth, because devices have few samples. O(N^2) memory.

    Args:
      asked: by the edge.
      features: [C, N, F] of the devices' training samples.
      sizes: [C] samples that count.
    """
    projection = Projection(jnp.asarray(asked.matrix), jnp.asarray(asked.offset))
    references = jnp.asarray(asked.references)

    def one(device: tuple[Array, Array]) -> Answers:
        own, size = device
        mask = jnp.arange(own.shape[0]) < size
        report, kde = kde_device.report(projection, references, own, mask, shared=True)
        return Answers(report.log_density, report.quality, outlier_score(kde))

    return lax.map(one, (features, sizes))


def distances(log_density: Array | None) -> Array:
    """Jensen-Shannon divergences [C, C] in nats, at most ln 2, of the answers [C, M].

    Raises:
      ConfigError: None: the edge had no reference points to ask about.
    """
    if log_density is None:
        raise ConfigError(
            "refine.similarity is 'kde', but this edge has no reference points: it needs shared "
            "public data; use 'per_dimension', 'flat' or 'sliced', which compare feature sketches"
        )
    return kde_edge.pairwise_kde(log_density)
