"""The cloud tier: importance and reordering, evaluation of sub-networks, Pareto search, choice.

Training itself is `acme_jax.training` with the gradients of `acme_jax.distill`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import Mesh

from acme_jax import supernet
from acme_jax.blocks import Params
from acme_jax.config import ConfigError, SearchConfig
from acme_jax.encoders import EncoderConfig
from acme_jax.layout import map_parts
from nas import cost, nsga2, pareto
from nas.arch import Arch, ArchMask, ArchSpace, to_mask
from nas.cost import CostModel, ModelDims
from nas.importance import ImportanceOrder, importance_order, taylor_importance

OBJECTIVES = ("error", "size_bytes", "latency_s", "energy_j")
SIZE_COLUMN = OBJECTIVES.index("size_bytes")
ENERGY_COLUMN = OBJECTIVES.index("energy_j")


class Choice(NamedTuple):
    """The backbone that the cloud chose for one edge."""

    row: int
    """Row of the archive."""
    arch: Arch
    objectives: np.ndarray  # [M]


IMPORTANCE_BATCH = 8
"""Samples of one gradient when importance is measured (the original's)."""


def check_importance_samples(num_select: int, batch_size: int = IMPORTANCE_BATCH) -> None:
    """Refuses a select split that importance cannot be measured on.

    Raises:
      ConfigError: fewer samples than one batch.
    """
    if num_select < batch_size:
        raise ConfigError(
            f"importance needs at least one batch of {batch_size} samples, but the select split "
            f"has {num_select}; raise data.public_select"
        )


def measure_importance(
    params: Params,
    inputs: Array,
    labels: Array,
    config: EncoderConfig,
    batch_size: int = IMPORTANCE_BATCH,
) -> ImportanceOrder:
    """First-order Taylor importance of heads and neurons, and their order (DynaBERT, ACME).

    For each batch a fresh gradient: heads score |dL/dmask|, neurons
    |sum W1 dW1 + b1 db1| + |sum W2 dW2|; the scores are summed over batches. (The original
    code accumulates gradients across batches and reads the evaluation set.)

    Args:
      params: of the reference network.
      inputs: images [N, height, width, channels] or token ids [N, T] of the select split; a
        remainder below one batch is left out.
      labels: [N].
      config: static sizes.
      batch_size: samples per gradient.

    Raises:
      ConfigError: fewer samples than one batch, which would score nothing.
    """
    check_importance_samples(inputs.shape[0], batch_size)
    dims = config.dims
    ones = ArchMask(
        jnp.ones(dims.num_layers),
        jnp.ones((dims.num_layers, dims.num_heads)),
        jnp.ones((dims.num_layers, dims.num_neurons)),
    )

    def loss_fn(params: Params, head_mask: Array, inputs: Array, labels: Array) -> Array:
        logits = supernet.apply(params, inputs, config, ones._replace(head=head_mask)).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def add(
        scores: tuple[Array, Array], batch: tuple[Array, Array]
    ) -> tuple[tuple[Array, Array], None]:
        grads, head_grad = jax.grad(loss_fn, argnums=(0, 1))(params, ones.head, *batch)
        heads = taylor_importance(ones.head, head_grad)
        mlp, grad = params["blocks"]["mlp"], grads["blocks"]["mlp"]
        up = jnp.abs(
            jnp.sum(mlp["up_kernel"] * grad["up_kernel"], axis=1) + mlp["up_bias"] * grad["up_bias"]
        )
        down = taylor_importance(mlp["down_kernel"], grad["down_kernel"], axis=-1)
        return (scores[0] + heads, scores[1] + up + down), None

    count = inputs.shape[0] // batch_size
    batches = (
        inputs[: count * batch_size].reshape(count, batch_size, *inputs.shape[1:]),
        labels[: count * batch_size].reshape(count, batch_size),
    )
    zeros = (jnp.zeros_like(ones.head), jnp.zeros_like(ones.neuron))
    (heads, neurons), _ = lax.scan(add, zeros, batches)
    return importance_order(heads, neurons)


def reorder_by_importance(
    params: Params, inputs: Array, labels: Array, config: EncoderConfig
) -> Params:
    """The network with heads and neurons in the order that `measure_importance` finds."""
    return reorder(params, measure_importance(params, inputs, labels, config))


def reorder(params: Params, order: ImportanceOrder) -> Params:
    """Sorts heads and neurons by importance; the full network's outputs do not change.

    Args:
      params: of the supernet.
      order: permutations of heads [L, H] and neurons [L, F].
    """

    def permute(leaf: Array, permutation: Array, axis: int) -> Array:
        take = lambda row, index: jnp.take(row, index, axis=axis)  # noqa: E731
        return jax.vmap(take)(leaf, permutation)

    attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
    attention = {
        **attention,
        "qkv_kernel": permute(attention["qkv_kernel"], order.heads, 2),
        "qkv_bias": permute(attention["qkv_bias"], order.heads, 1),
        "out_kernel": permute(attention["out_kernel"], order.heads, 0),
    }
    mlp = {
        **mlp,
        "up_kernel": permute(mlp["up_kernel"], order.neurons, 1),
        "up_bias": permute(mlp["up_bias"], order.neurons, 0),
        "down_kernel": permute(mlp["down_kernel"], order.neurons, 0),
    }
    return {**params, "blocks": {"attention": attention, "mlp": mlp}}


def accuracy(
    params: Params,
    inputs: Array,
    labels: Array,
    config: EncoderConfig,
    space: ArchSpace,
    archs: Arch,
    mesh: Mesh,
    batch_size: int | None = None,
) -> Array:
    """Accuracy [P] of a population of sub-networks, divided over the mesh.

    On CPU every individual runs dense (`supernet.apply_arch`) in a loop, and so it does
    wherever the samples do not all fit at once, because their batches fill the machine then; else
    on accelerators the population is vmapped with masks, which wastes FLOPs but fills it.

    Args:
      params: of the supernet.
      inputs: images [N, height, width, channels] or token ids [N, T].
      labels: [N].
      config: static sizes.
      space: the choices.
      archs: genomes with leading [P].
      mesh: the devices among which the dense loop divides the population.
      batch_size: samples in one forward pass; None: all.
    """
    if batch_size is None and not _runs_dense(mesh):

        def masked(arch: Arch) -> Array:
            logits = supernet.apply(params, inputs, config, to_mask(space, arch)).logits
            return jnp.mean(jnp.argmax(logits, axis=-1) == labels)

        return jax.vmap(masked)(archs)

    def dense(index: Array, params: Params, inputs: Array, labels: Array, archs: Arch) -> Array:
        arch = jax.tree.map(lambda leaf: leaf[index], archs)

        def correct(inputs: Array, labels: Array) -> Array:
            logits = supernet.apply_arch(params, inputs, config, space, arch).logits
            return jnp.argmax(logits, axis=-1) == labels

        return jnp.mean(in_batches(correct, batch_size, inputs, labels))

    count = archs.depth.shape[0]
    result: Array = map_parts(dense, count, mesh, params, inputs, labels, archs)
    return result


def in_batches(fn: Callable[..., Array], batch_size: int | None, *rows: Array) -> Array:
    """`fn(*rows)` [N, ...] computed for `batch_size` rows at a time; None: for all at once."""
    count = rows[0].shape[0]
    if batch_size is None or batch_size >= count:
        return fn(*rows)
    # Batches as indices, because a padded copy of all rows would take their memory twice; the last
    # batch begins again at the first row.
    size = count + -count % batch_size
    batches = (jnp.arange(size) % count).reshape(-1, batch_size)
    found: Array = lax.map(lambda batch: fn(*(leaf[batch] for leaf in rows)), batches)
    return found.reshape(-1, *found.shape[2:])[:count]


def _runs_dense(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def costs(dims: ModelDims, archs: Arch, profile: CostModel) -> Array:
    """Size, latency and energy [P, 3] of backbones, in the order of `OBJECTIVES`."""

    def one(arch: Arch) -> Array:
        return jnp.stack(
            [
                cost.size_bytes(dims, arch).astype(jnp.float32),
                cost.latency_s(dims, arch, profile),
                cost.energy_j(dims, arch, profile),
            ]
        )

    return jax.vmap(one)(archs)


def make_evaluate(
    params: Params,
    inputs: Array,
    labels: Array,
    config: EncoderConfig,
    space: ArchSpace,
    mesh: Mesh,
    *,
    dims: ModelDims,
    profile: CostModel,
    size_limit: float,
    batch_size: int | None = None,
) -> Callable[[Arch], tuple[Array, Array]]:
    """The fitness of the search: objectives [P, 4] and how far each is above the size limit.

    Args:
      params: of the supernet.
      inputs: of the select split, images [N, height, width, channels] or token ids [N, T].
      labels: [N].
      config: static sizes.
      space: the choices.
      mesh: see `accuracy`.
      dims: what counts as size, e.g. without the classifier.
      profile: the device whose latency and energy count, assumed or measured.
      size_limit: bytes; a larger sub-network violates the constraint by the excess fraction.
      batch_size: see `accuracy`.
    """

    def evaluate(archs: Arch) -> tuple[Array, Array]:
        error = 1.0 - accuracy(params, inputs, labels, config, space, archs, mesh, batch_size)
        rest = costs(dims, archs, profile)
        violation = jnp.maximum(rest[:, 0] / size_limit - 1.0, 0.0)
        return jnp.concatenate([error[:, None], rest], axis=1), violation

    return evaluate


def check_limits(dims: ModelDims, space: ArchSpace, limits: Sequence[float]) -> None:
    """Refuses limits that no sub-network fits, before any training.

    Raises:
      ConfigError: names the edge and the smallest possible size.
    """

    def smallest() -> Array:
        arch = Arch(
            jnp.int32(min(space.depth_choices)),
            jnp.full(space.num_layers, min(space.head_choices), jnp.int32),
            jnp.full(space.num_layers, min(space.neuron_choices), jnp.int32),
        )
        return cost.size_bytes(dims, arch)

    size = int(jax.jit(smallest)())
    for edge, limit in enumerate(limits):
        if limit < size:
            raise ConfigError(
                f"no sub-network fits the devices of edge {edge}: their smallest budget leaves "
                f"{limit:,.0f} bytes for the backbone, but the smallest sub-network has "
                f"{size:,} bytes; raise fleet.budgets or make the model smaller"
            )


def choose_backbones(
    state: nsga2.SearchState, limits: Sequence[float], config: SearchConfig
) -> list[Choice]:
    """One archive serves all edges: the best row for each edge's limit by `config.rule`.

    Falls back to "lowest_error" where the rule "paper" finds nothing, because it filters by
    size last and may lose every small cell.

    Raises:
      ConfigError: the search found nothing that fits an edge.
    """
    archive = jax.tree.map(np.asarray, state.archive)

    @functools.partial(jax.jit, static_argnums=2)
    def pick(objectives: Array, limits: Array, rule: pareto.Rule) -> pareto.Selection:
        return jax.vmap(
            lambda limit: pareto.select(
                objectives,
                objectives[:, SIZE_COLUMN],
                limit,
                rule=rule,
                energy_column=ENERGY_COLUMN,
                num_divisions=config.num_divisions,
            )
        )(limits)

    within = np.asarray(limits, np.float32)
    chosen, fallback = (
        pick(archive.objectives, within, rule) for rule in (config.rule, "lowest_error")
    )
    choices = []
    for edge in range(len(limits)):
        selection = chosen if bool(chosen.feasible[edge]) else fallback
        if not bool(selection.feasible[edge]):
            raise ConfigError(
                f"the search found no sub-network within {limits[edge]:,.0f} bytes for edge "
                f"{edge}; raise search.num_generations or fleet.budgets"
            )
        index = int(selection.index[edge])
        arch = jax.tree.map(lambda leaf, index=index: leaf[index], archive.genomes)
        choices.append(Choice(index, arch, archive.objectives[index]))
    return choices
