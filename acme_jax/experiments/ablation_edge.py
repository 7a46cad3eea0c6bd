"""What follows the backbone in an ablation: a header, and its refinement on one edge's devices.

Headers are searched as a run searches them, or not searched: a fixed cell and the linear header,
both trained on the same data with the same optimiser for as many epochs as a search takes in all
(shared weights and final training), so that leaving the search out saves no training.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from acme_jax import device as device_tier
from acme_jax import edge, header, header_layout, number_formats, refine, system
from acme_jax.blocks import Params
from acme_jax.config import RefineConfig
from acme_jax.experiments import cohorts, final
from acme_jax.experiments.study import EdgeData, Study
from acme_jax.fleet import Device
from acme_jax.header_training import Dataset, header_programs
from acme_jax.progress import Stopwatch
from fed import simulate
from fed.algorithms.local import local
from fed.clients import ClientData, replicate, stack_clients
from nas import cells
from nas.cells import OPS, StaticCell

HeaderKind = Literal["searched", "fixed", "linear"]
Weights = Literal["wasserstein", "avg"]


class Header(NamedTuple):
    """A trained header of either form."""

    cell: StaticCell | None
    """None: the linear header."""
    params: Params
    select_accuracy: float
    seconds: float
    """Of searching and training, without compiling."""


class Refined(NamedTuple):
    """What a refinement comes to."""

    test_accuracies: np.ndarray  # [C], each device on its own test samples
    similarity_seconds: float
    refine_seconds: float


def fixed_cell(num_blocks: int) -> StaticCell:
    """sep5x5(x) + maxpool3(x) in every block, x being what the block before it made.

    The header on which the original code refines (SPEC section 5), but that here its blocks do not
    share their weights.
    """
    return tuple(
        (block + 1, OPS.index("sep5x5"), block + 1, OPS.index("maxpool3"))
        for block in range(num_blocks)
    )


def make_header(study: Study, key: Array, data: EdgeData, kind: HeaderKind) -> Header:
    """Searches or trains a header for one backbone.

    Args:
      study: of the run.
      key: consumed.
      data: features of that backbone.
      kind: searched as a run does it, the fixed cell, or linear.
    """
    dims, config = study.context.header_dims, study.config.header
    cell = fixed_cell(dims.blocks) if kind == "fixed" else None
    with Stopwatch() as watch:
        if kind == "searched":
            found = edge.search_header(key, *data, dims, config)
            cell, params, accuracy = found.cell, found.params, found.select_accuracy
        else:
            params, accuracy = _train(study, key, data, cell)
    return Header(cell, params, accuracy, watch.seconds - watch.compile_seconds)


def num_params(study: Study, model: Header) -> int:
    """Parameters of a header."""
    if model.cell is None:
        return sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return header_layout.num_params(study.context.header_dims, model.cell)


def _train(
    study: Study, key: Array, data: EdgeData, cell: StaticCell | None
) -> tuple[Params, float]:
    """A header that is not searched: parameters as devices read them, select accuracy."""
    dims, config = study.context.header_dims, study.config.header
    programs = header_programs(dims, config, linear=cell is None)
    train = Dataset(data.train_tokens, data.train_labels)
    select = Dataset(data.select_tokens, data.select_labels)
    steps = len(train.labels) // min(config.batch_size, len(train.labels))
    epochs = config.search_epochs + config.final_epochs
    choice = None if cell is None else cells.from_static(cell)
    choices = jax.tree.map(lambda gene: np.stack([np.asarray(gene)] * steps), choice)
    init_key, epochs_key = jax.random.split(key)
    state = programs.init(init_key)
    for epoch in range(epochs):
        epoch_key = jax.random.fold_in(epochs_key, epoch)
        state, _ = programs.epoch(epoch_key, state, choices, epochs * steps, train)
    accuracy = float(programs.accuracy(state.params, choice, select))
    params = jax.device_get(state.params)
    return params if cell is None else header.extract(params, cell, dims), accuracy


def refine_header(
    study: Study,
    key: Array,
    backbone: Params,
    model: Header,
    fleet: Sequence[Device],
    weights: Weights,
    config: RefineConfig,
) -> Refined:
    """All rounds on the devices of one edge, then the devices' final evaluation.

    The linear header has no gates: its devices train it alone, in as many rounds.

    Args:
      study: of the run.
      key: equal keys give the devices the same order of samples.
      backbone: sliced.
      model: where every device starts.
      fleet: the devices.
      weights: how they listen to each other.
      config: of the refinement.
    """
    context, dims = study.context, study.context.header_dims
    features = [system.compute_features(context, backbone, d.train.inputs) for d in fleet]
    labels = [device.train.labels for device in fleet]
    tokens, summaries = (
        stack_clients(list(zip(part, labels, strict=True))) for part in zip(*features, strict=True)
    )
    with Stopwatch() as similarity:
        mixed = np.asarray(getattr(_mixing(study, summaries), weights))
    with Stopwatch() as watch:
        if model.cell is None:
            trained = _local(config, context.mesh)(model.params, tokens, key)
            jax.block_until_ready(trained)
            evaluate: final.Evaluate = functools.partial(_evaluate_linear, trained)
        else:
            pruned = refine.gates_per_round(context, model.cell)
            method = cohorts.Method(mixed, pruned)
            states = cohorts.refine(
                key, config, dims, model.cell, model.params, tokens, {"": method}, context.mesh
            )
            evaluate = cohorts.evaluator(states, dims)
    accuracies = final.devices(study, backbone, fleet, evaluate).reshape(-1)
    seconds = [w.seconds - w.compile_seconds for w in (similarity, watch)]
    return Refined(accuracies, *seconds)


def _mixing(study: Study, summaries: ClientData) -> device_tier.Mixing:
    """The edge's weights, from sketches as they travel."""
    context, config = study.context, study.config.refine
    programs = refine.edge_programs(context)
    sketches = np.asarray(programs.sketch(summaries.inputs, summaries.size))
    read = [number_formats.read(number_formats.sketch(s, config.sketch_format)) for s in sketches]
    key = study.key("ablations sketches")
    mixing = programs.mix(jnp.asarray(np.stack(read)), summaries.size, key)
    host: device_tier.Mixing = jax.tree.map(np.asarray, mixing)
    return host


@functools.lru_cache(maxsize=4)
def _local(config: RefineConfig, mesh: Mesh) -> Any:
    """(params, data, key) -> parameters [C, ...] of linear headers that devices train alone."""
    algorithm = local(device_tier.linear_loss, device_tier.optimizer(config))

    @jax.jit
    def run(params: Params, data: ClientData, key: Array) -> Params:
        count = data.size.shape[0]
        _, trained, _ = simulate.run_rounds(
            algorithm,
            algorithm.server_init(),
            replicate(params, count),
            data,
            key,
            client_ids=jnp.arange(count, dtype=jnp.int32),
            num_rounds=config.rounds,
            epochs=config.local_epochs,
            batch_size=config.batch_size,
            mesh=mesh,
        )
        return trained

    return run


_evaluate_linear = jax.jit(device_tier.evaluate_linear)
