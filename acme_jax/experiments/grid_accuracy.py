"""Accuracy of the grid's sub-networks with the full network's own classifier."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from acme_jax import cloud
from acme_jax.blocks import Params
from acme_jax.encoders import EncoderConfig
from acme_jax.experiments import final
from acme_jax.experiments.experiment import Row
from acme_jax.experiments.study import Study
from acme_jax.layout import replicate
from nas.arch import Arch, ArchSpace


def select_accuracies(study: Study, params: Params) -> np.ndarray:
    """Accuracy [P] of the grid's sub-networks on the select split.

    Args:
      study: whose grid and select split.
      params: of the full network.
    """
    context, public = study.context, study.context.public
    archs = jax.tree.map(lambda *leaves: np.stack(leaves), *[p.arch for p in study.grid])
    program = _program(context.encoder, context.space, context.mesh, context.eval_batch)
    found = program(params, public.select_inputs, public.select_labels, archs)
    return np.asarray(found, np.float64)


def measure(study: Study, params: Params) -> list[Row]:
    """One row for each sub-network of the grid: its place, select and test accuracy.

    Args:
      study: whose grid and public splits.
      params: of a full network that is completely trained.
    """
    params = replicate(params, study.context.mesh)
    select = select_accuracies(study, params)
    test = final.subnetworks(study, params, [point.arch for point in study.grid])
    return [
        {
            "depth": point.depth,
            "width": point.width,
            "select_accuracy": float(chosen),
            "test_accuracy": float(tested),
        }
        for point, chosen, tested in zip(study.grid, select, test, strict=True)
    ]


@functools.lru_cache(maxsize=4)
def _program(
    encoder: EncoderConfig, space: ArchSpace, mesh: Mesh, batch_size: int
) -> Callable[..., Array]:
    def accuracies(params: Params, inputs: Array, labels: Array, archs: Arch) -> Array:
        return cloud.accuracy(params, inputs, labels, encoder, space, archs, mesh, batch_size)

    return jax.jit(accuracies)
