"""What the cloud and the edges of the whole system hand out: backbones within limits, headers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from acme_jax import cloud, concrete, edge
from acme_jax.blocks import Params
from acme_jax.experiments.device_costs import HeaderModel
from acme_jax.experiments.study import GridPoint, Study
from acme_jax.fleet import Device, edge_devices
from acme_jax.layout import replicate
from nas.arch import Arch
from nas.cost import ModelDims


class SystemEdge(NamedTuple):
    """One edge of ACME, ready for its devices."""

    number: int
    point: GridPoint
    model: HeaderModel
    select_accuracy: float
    """Of the header."""


def best_within(study: Study, limit_bytes: float, dims: ModelDims) -> GridPoint:
    """The sub-network of the grid with the best select accuracy among those of at most that size.

    Args:
      study: its supernet is measured once and kept.
      limit_bytes: of the sub-network.
      dims: what counts as size: with the classifier or without.

    Raises:
      ValueError: not even the smallest fits.
    """
    sizes = [float(concrete.size_bytes(dims, point.arch)) for point in study.grid]
    fitting = [i for i, size in enumerate(sizes) if size <= limit_bytes]
    if not fitting:
        raise ValueError(
            f"no sub-network of the grid fits {limit_bytes:,.0f} bytes; the smallest has "
            f"{min(sizes):,.0f}. Raise fleet.budgets"
        )
    accuracies = select_accuracies(study)
    return study.grid[max(fitting, key=lambda i: (accuracies[i], -sizes[i]))]


def select_accuracies(study: Study) -> np.ndarray:
    """Accuracy of the grid's sub-networks [P] on the select split, with the cloud's classifier."""

    def make() -> tuple[Any, dict[str, Any]]:
        context, public = study.context, study.context.public
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[p.arch for p in study.grid])

        @jax.jit
        def measure(params: Params, inputs: Array, labels: Array, archs: Arch) -> Array:
            return cloud.accuracy(
                params, inputs, labels, context.encoder, context.space, archs, context.mesh,
                context.eval_batch,
            )  # fmt: skip

        params = replicate(study.stages.elastic, context.mesh)
        found = measure(params, public.select_inputs, public.select_labels, stacked)
        return {"accuracy": np.asarray(found)}, {}

    return np.asarray(study.cached("whole_system_grid", make)[0]["accuracy"])


def edge_limit(fleet: list[Device], number: int) -> int:
    """Bytes that every device of the edge can hold."""
    return min(device.budget_bytes for device in edge_devices(fleet, number))


def make_edges(study: Study, fleet: list[Device]) -> list[SystemEdge]:
    """For every edge the best backbone that leaves room for any header, and a searched header.

    The backbone is chosen among the grid's 16 by select accuracy, not by the per-layer Pareto
    search: cheaper, and the paper's own space. Headers are searched once in a study, for limits
    do not depend on how the devices' data are distributed.
    """
    context = study.context
    edges = []
    for number in range(context.config.fleet.num_edges):
        limit = edge_limit(fleet, number) - context.header_reserve_bytes
        point = best_within(study, limit, context.backbone_dims)
        backbone = study.backbone(point.arch)

        def make(number: int = number, backbone: Params = backbone) -> tuple[Any, dict[str, Any]]:
            data, config = study.edge_data(backbone), context.config.header
            key = study.key("whole_system header", number)
            found = edge.search_header(key, *data, context.header_dims, config)
            facts = {"cell": found.cell, "select_accuracy": found.select_accuracy}
            return jax.tree.map(np.asarray, found.params), facts

        params, facts = study.cached(f"whole_system_header_{number}", make)
        cell = tuple(tuple(block) for block in facts["cell"])
        model = HeaderModel(point.arch, backbone, cell, params)
        edges.append(SystemEdge(number, point, model, float(facts["select_accuracy"])))
    return edges
