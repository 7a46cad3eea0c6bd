"""ACME's whole device-edge loop for many edges in one program, on cached features.

Once the header has come down, edges do not depend on each other: all rounds of an edge's devices
run in one go, with similarities [n, n] of that edge alone, so work and memory are linear in the
number of devices. A cohort of edges is mapped in chunks and spread over a mesh; cohorts follow
one another with `fed.stream.run_cohorts`.

All edges share one cell, which is static: under `vmap` a cell that is data would compute every
operation. Shape letters: E edges, n devices of an edge, N samples, T tokens, D features, G gates.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from acme_jax import device, header_layout, label_prior, messages, number_formats
from acme_jax.blocks import Params
from acme_jax.config import ConfigError, RefineConfig
from acme_jax.header_layout import HeaderDims
from acme_jax.layout import AXIS
from fed import similarity
from fed.clients import ClientData, replicate
from fed.simulate import run_rounds
from fed.stream import Cohort
from nas.cells import StaticCell


@dataclasses.dataclass(frozen=True)
class FleetSetup:
    """What all edges share and the program is compiled for.

    Raises:
      ConfigError: the rounds would prune every gate of the header; similarity "kde", because
        these edges have no shared data to ask about; or coding, because bytes are counted by
        messages' shapes here.
      ValueError: a cell that is invalid or does not fit `dims`.
    """

    cell: StaticCell
    dims: HeaderDims
    config: RefineConfig

    def __post_init__(self) -> None:
        header_layout.check_cell(self.cell, self.dims)
        if self.config.similarity == "kde":
            raise ConfigError(
                "a simulated fleet's edges have no reference points, which refine.similarity "
                "'kde' needs; use 'per_dimension', 'flat' or 'sliced'"
            )
        if self.config.coding != "none":
            raise ConfigError(
                f"a simulated fleet counts bytes by messages' shapes, and refine.coding "
                f"{self.config.coding!r} makes them depend on values; leave it at 'none'"
            )
        pruned = self.config.rounds * self.config.prune_per_round
        if pruned >= self.num_gates:
            raise ConfigError(
                f"{self.config.rounds} rounds of prune_per_round {self.config.prune_per_round} "
                f"would prune {pruned} gates, but the header has {self.num_gates}; lower one"
            )

    @property
    def num_gates(self) -> int:
        """G."""
        return header_layout.num_gates(self.dims, self.cell)


class EdgeData(NamedTuple):
    """The cached features of one edge's devices; a cohort adds a leading [E]."""

    train: ClientData  # inputs [n, N, T, D] of any floating dtype, labels [n, N], size [n]
    test: ClientData  # held out: read for the two accuracies only


class DeviceResults(NamedTuple):
    """What came of one edge's devices, [n]; a cohort adds a leading [E]."""

    accuracy_before: Array  # float32, of the header as it came down, on held-out samples
    accuracy_after: Array  # float32, of the trained and pruned header, on the same
    gates_kept: Array  # int32
    uplink_bytes: Array  # int32, of one device over all rounds
    downlink_bytes: Array  # int32


class Shared(NamedTuple):
    """What every cohort reads and none changes: the carry of the stream."""

    params: Params  # of the header that came down, in compact form
    key: Array  # of the experiment


class Traffic(NamedTuple):
    """Bytes on the wire of one device over all rounds."""

    uplink: int
    downlink: int


def traffic(setup: FleetSetup, params: Params) -> Traffic:
    """Encoded sizes of the messages of `refine_edge`; they depend on shapes only. Host function.

    Up: the feature sketch once, an importance set each round. Down: the header once, a
    personalised set each round. The profile (under 100 bytes) and the backbone, which comes
    with the header, are not among them.

    Args:
      setup: of the fleet.
      params: of the header, in compact form.
    """
    config = setup.config
    gates = number_formats.importance(
        np.zeros(setup.num_gates, np.float32), config.importance_format
    )
    quantiles = np.zeros((config.num_quantiles, setup.dims.embed_dim), np.float32)
    sketch = number_formats.sketch(quantiles, config.sketch_format)
    down_once = messages.HeaderMessage(setup.cell, jax.tree.map(np.asarray, params))

    def size(message: messages.Message) -> int:
        return len(messages.encode(message))

    rounds = config.rounds
    return Traffic(
        size(messages.FeatureSketch(sketch)) + rounds * size(messages.ImportanceSet(gates)),
        size(down_once) + rounds * size(messages.PersonalizedImportance(gates)),
    )


def refine_edge(
    setup: FleetSetup, shared: Shared, edge: EdgeData, number: Array, *, chunk_size: int
) -> DeviceResults:
    """All rounds of one edge's devices; pure.

    As `acme_jax.refine` with the method `wasserstein`: sketches go up, weights come
    from their distances, every round trains locally, mixes importances and prunes, and the last
    personalised sets are applied. The sketch is of each sample's mean token, because the cache
    has no class token.

    Args:
      setup: static.
      shared: the header and the experiment's key.
      edge: the devices' features.
      number: int [], of the edge: devices are numbered edge by edge, and draw by their number.
      chunk_size: devices in one `vmap`.
    """
    dims, cell, config = setup.dims, setup.cell, setup.config
    edge = EdgeData(*(part._replace(inputs=part.inputs.astype(jnp.float32)) for part in edge))
    count = edge.train.size.shape[0]
    bits = number_formats.IMPORTANCE_BITS[config.importance_format]
    algorithm = device.refinement(dims, config, cell=cell)
    if bits != number_formats.EXACT_BITS:
        algorithm = number_formats.importance_as_read((bits,) * count)(algorithm)
    start = _initial_device(setup, shared.params)
    states = edge_states = replicate(start, count)
    if config.class_prior is not None:
        prior = label_prior.log_priors(edge.train, dims.num_classes, config.class_prior)
        states = states._replace(params=label_prior.add_to_classifier(states.params, prior))
    evaluate = functools.partial(
        device.evaluate, data=edge.test, dims=dims, cell=cell, chunk_size=chunk_size
    )
    sketch_key, train_key = jax.random.split(shared.key)

    def sketch(inputs: Array, size: Array) -> Array:
        rows = inputs.mean(axis=1)
        quantiles = similarity.quantile_sketch(rows, config.num_quantiles, size=size)
        return number_formats.sketch_as_read(quantiles, config.sketch_format)

    sketches = jax.vmap(sketch)(edge.train.inputs, edge.train.size)
    mixing = device.mixing_weights(sketches, edge.train.size, sketch_key, config)
    before = evaluate(edge_states)
    server, states, _ = run_rounds(
        algorithm,
        algorithm.server_init(mixing.wasserstein),
        states,
        edge.train,
        train_key,
        num_rounds=config.rounds,
        client_ids=number * count + jnp.arange(count, dtype=jnp.int32),
        batch_size=config.batch_size,
        epochs=config.local_epochs,
        chunk_size=chunk_size,
    )
    receive = functools.partial(device.receive, config=config)
    states = jax.vmap(receive)(states, server.personalized)
    sizes = traffic(setup, jax.tree.map(_zeros, shared.params))
    return DeviceResults(
        accuracy_before=before,
        accuracy_after=evaluate(states),
        gates_kept=jnp.sum(states.mask != 0, axis=1, dtype=jnp.int32),
        uplink_bytes=jnp.full(count, sizes.uplink, jnp.int32),
        downlink_bytes=jnp.full(count, sizes.downlink, jnp.int32),
    )


def refine_edges(
    setup: FleetSetup, shared: Shared, edges: EdgeData, numbers: Array, *, chunk_size: int
) -> DeviceResults:
    """`refine_edge` for every edge of a cohort; leaves with a leading [E].

    Args:
      setup: static.
      shared: the header and the experiment's key.
      edges: leaves [E, n, ...].
      numbers: int [E].
      chunk_size: devices in one `vmap`: whole edges of them, as many as fit, or a part of one
        edge's. A number of edges that the chunks do not divide compiles a second program for the
        rest.
    """
    count = edges.train.size.shape[1]
    run = functools.partial(refine_edge, setup, shared, chunk_size=min(chunk_size, count))
    return lax.map(
        lambda args: run(*args), (edges, numbers), batch_size=max(chunk_size // count, 1)
    )


@functools.lru_cache(maxsize=4)
def make_step(
    setup: FleetSetup, mesh: Mesh, *, chunk_size: int
) -> Callable[[Shared, EdgeData, Cohort], tuple[Shared, DeviceResults]]:
    """The step of `fed.stream.run_cohorts` whose clients are edges; equal arguments share it.

    Args:
      setup: static.
      mesh: the cohort's edges are divided over it; their number must be a multiple of its size.
      chunk_size: see `refine_edges`.
    """

    def step(shared: Shared, edges: EdgeData, cohort: Cohort) -> tuple[Shared, DeviceResults]:
        spread = PartitionSpec(AXIS)
        run = jax.shard_map(
            functools.partial(refine_edges, setup, chunk_size=chunk_size),
            mesh=mesh,
            in_specs=(PartitionSpec(), spread, spread),
            out_specs=spread,
            check_vma=False,  # edges do not communicate, so there is nothing to check
        )
        return shared, run(shared, edges, cohort.rows)

    return step


def _initial_device(setup: FleetSetup, params: Params) -> device.DeviceState:
    """Every device's state when the header has just come down."""
    zeros = jax.tree.map(_zeros, params)
    state = device.init_device(
        zeros, setup.cell, setup.dims, setup.config.prune_per_round, setup.config, static=True
    )
    return state._replace(params=params)  # traced, which the host function cannot take


def _zeros(leaf: Array) -> np.ndarray:
    return np.zeros(leaf.shape, leaf.dtype)
