"""The resumable phases of a run, each one loop of `Session.loop`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax import cloud, concrete, edge, header, training
from acme_jax.blocks import Params
from acme_jax.config import TrainConfig
from acme_jax.context import Context, Stream, proxy_indices
from acme_jax.layout import replicate
from acme_jax.session import Rows
from acme_jax.training import GradFn, TrainState
from nas import nsga2
from nas.arch import Arch, full
from nas.cells import StaticCell
from nas.nsga2 import SearchState


class EdgeHeader(NamedTuple):
    """What an edge found by searching, and the linear baseline."""

    cell: StaticCell
    params: Params
    linear: Params
    select_accuracy: float
    linear_select_accuracy: float
    candidate_accuracies: list[float]


def train(
    context: Context,
    name: str,
    config: TrainConfig,
    epoch: Callable[..., tuple[TrainState, dict[str, Array]]],
    stream: Stream,
    params: Params,
    lesson: Any = None,
) -> Params:
    """One training phase of the cloud on its public train split, an epoch per unit.

    Args:
      context: of the run.
      name: of the phase.
      config: its schedule.
      epoch: the jitted epoch of `compiled_epoch`.
      stream: of its randomness.
      params: where it starts.
      lesson: what the epoch's gradient takes.
    """
    inputs, labels = context.public.train_inputs, context.public.train_labels
    mesh = context.mesh
    params, lesson = replicate((params, lesson), mesh)
    optimizer = training.make_optimizer(config)
    schedule = training.make_schedule(config, inputs.shape[0])
    key = context.stream(stream)

    def initial() -> TrainState:
        return training.init_state(params, optimizer)

    def advance(state: TrainState, index: int) -> tuple[TrainState, Rows]:
        state, metrics = epoch(key, replicate(state, mesh), lesson, schedule, inputs, labels)
        values = {k: np.asarray(v, np.float64) for k, v in metrics.items()}
        row: dict[str, Any] = {k: float(v.mean()) for k, v in values.items()}
        bad = np.flatnonzero(~np.isfinite(values["loss"]))
        if bad.size:
            row["bad_step"] = int(bad[0]) + 1
        elif not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
            # The last update broke what the next epoch would show: do not keep it.
            row |= {"loss": math.nan, "bad_step": values["loss"].size}
        return state, [{"epoch": index + 1, **row}]

    state = context.session.loop(
        name,
        total=config.epochs,
        every=context.config.compute.checkpoint_every,
        initial=initial,
        advance=advance,
    )
    return state.params


def compiled_epoch(
    context: Context, grad_fn: GradFn, config: TrainConfig
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The epoch of `training.make_epoch`, jitted, its state donated."""
    epoch = training.make_epoch(grad_fn, config, context.mesh, context.plan.micro_batches(config))
    return jax.jit(epoch, donate_argnums=(1,))


class SearchProgress(NamedTuple):
    """The search's state and the history of its hypervolume, a part of the reference box."""

    state: SearchState
    hypervolume: Array  # [G]; NaN where not yet reached


def search(context: Context, params: Params, size_limit: float) -> SearchProgress:
    """The Pareto search: generations run in compiled segments, evaluation inside."""
    config = context.config.search
    start = jax.tree.map(np.asarray, concrete.grid(context.space))
    # Up to half of the first population, evenly from the smallest to the largest.
    room = min(config.population_size // 2, start.depth.shape[0])
    chosen = np.linspace(0, start.depth.shape[0] - 1, room).round().astype(int)
    searcher = nsga2.nsga2(
        context.space,
        population_size=config.population_size,
        initial=jax.tree.map(lambda leaf: leaf[chosen], start),
    )
    key = context.stream(Stream.SEARCH)
    stride = math.gcd(config.num_generations, context.config.compute.checkpoint_every)

    def evaluator(
        params: Params, inputs: Array, labels: Array
    ) -> Callable[[Arch], tuple[Array, Array]]:
        return cloud.make_evaluate(
            params,
            inputs,
            labels,
            context.encoder,
            context.space,
            context.mesh,
            dims=context.backbone_dims,
            profile=context.cost_model,
            size_limit=size_limit,
            batch_size=context.plan.eval_batch,
        )

    @jax.jit
    def segment(
        state: SearchState, params: Params, inputs: Array, labels: Array
    ) -> tuple[SearchState, Array]:
        evaluate = evaluator(params, inputs, labels)
        return nsga2.run(key, state, searcher, evaluate, num_generations=stride)

    arrays = (
        replicate(params, context.mesh),
        context.public.select_inputs,
        context.public.select_labels,
    )

    @jax.jit
    def initial() -> SearchProgress:
        largest = jax.tree.map(lambda leaf: leaf[None], full(context.space))
        worst = cloud.costs(context.backbone_dims, largest, context.cost_model)[0]
        reference = jnp.concatenate([jnp.ones(1), worst]) * 1.01
        state = nsga2.init_state(key, searcher, evaluator(*arrays), reference=reference)
        return SearchProgress(state, jnp.full(config.num_generations, jnp.nan))

    def advance(progress: SearchProgress, index: int) -> tuple[SearchProgress, Rows]:
        state, volumes = segment(replicate(progress.state, context.mesh), *arrays)
        history = np.array(progress.hypervolume)
        # As a part of the box below the reference point, because the product of units says nothing.
        history[index : index + stride] = np.asarray(volumes) / np.prod(np.asarray(state.reference))
        rows = [
            {"generation": index + offset + 1, "hypervolume": float(volume)}
            for offset, volume in enumerate(history[index : index + stride])
        ]
        return SearchProgress(state, jnp.asarray(history)), rows

    return context.session.loop(
        "pareto search",
        total=config.num_generations,
        every=context.config.compute.checkpoint_every,
        stride=stride,
        initial=initial,
        advance=advance,
    )


def search_header(
    context: Context, edge_id: int, train_features: np.ndarray, select_features: np.ndarray
) -> EdgeHeader:
    """One edge's header search and its linear baseline, as one checkpointed unit."""
    config, dims = context.config.header, context.header_dims
    labels = jnp.asarray(context.splits.train.labels[proxy_indices(context)])
    data = (
        jnp.asarray(train_features),
        labels,
        jnp.asarray(select_features),
        jnp.asarray(context.splits.select.labels),
    )
    facts: dict[str, Any] = {}

    def progress(numbers: Any) -> None:
        shown = {k: v for k, v in numbers.items() if isinstance(v, float)}
        context.session.tick(", ".join(f"{k} {v:.3g}" for k, v in list(shown.items())[:2]))

    def advance(_: Any, index: int) -> tuple[dict[str, Params], Rows]:
        del index
        found = edge.search_header(
            context.stream(Stream.HEADER, edge_id), *data, dims, config, progress=progress
        )
        linear = edge.train_linear_header(
            context.stream(Stream.LINEAR, edge_id), *data, dims, config, progress=progress
        )
        facts.update(
            cell=[list(block) for block in found.cell],
            select_accuracy=found.select_accuracy,
            linear_select_accuracy=linear.select_accuracy,
            candidate_accuracies=[float(a) for a in found.candidate_accuracies],
        )
        history = found.history
        rows: Rows = [
            {"epoch": i + 1, "loss": float(loss), "reward": float(reward), "entropy": float(h)}
            for i, (loss, reward, h) in enumerate(
                zip(history.search_loss, history.reward, history.entropy, strict=True)
            )
        ]
        rows += [
            {"final_epoch": i + 1, "loss": float(loss), "linear_loss": float(linear_loss)}
            for i, (loss, linear_loss) in enumerate(
                zip(history.final_loss, linear.loss, strict=True)
            )
        ]
        return {"header": found.params, "linear": linear.params}, rows

    def template(extra: dict[str, Any]) -> dict[str, Params]:
        cell = _static_cell(extra["cell"])
        shapes = jax.eval_shape(
            lambda key: {
                "header": header.init(key, cell, dims),
                "linear": header.init_linear(key, dims.embed_dim, dims.num_classes),
            },
            context.key,
        )
        return dict(shapes)

    total = config.search_epochs + 2 * config.final_epochs
    tree: dict[str, Params] = context.session.loop(
        f"header search, edge {edge_id}",
        total=total,
        every=total,
        stride=total,
        initial=dict,
        advance=advance,
        template=template,
        extra=lambda: facts,
        restored=facts.update,
    )
    return EdgeHeader(
        cell=_static_cell(facts["cell"]),
        params=tree["header"],
        linear=tree["linear"],
        select_accuracy=facts["select_accuracy"],
        linear_select_accuracy=facts["linear_select_accuracy"],
        candidate_accuracies=facts["candidate_accuracies"],
    )


def _static_cell(blocks: Any) -> StaticCell:
    return tuple((int(x), int(op_x), int(y), int(op_y)) for x, op_x, y, op_y in blocks)
