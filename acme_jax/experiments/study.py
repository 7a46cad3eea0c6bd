"""What the experiments of one seed share: data, devices, the cloud's supernet, the edge's data.

A study lies in one directory. What takes long is made once and read back by whichever experiment
needs it next: the supernet in the checkpoints of a `Session`, everything else by `Study.cached`.
Nothing here reads a test split; `acme_jax.experiments.final` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax import concrete, encoders, slicing
from acme_jax.blocks import Params
from acme_jax.checkpoint import CheckpointStore
from acme_jax.config import Config, FleetConfig
from acme_jax.context import Context, make_context, proxy_indices
from acme_jax.fleet import Device, make_fleet
from acme_jax.progress import Reporter, StopFlag
from acme_jax.run_dir import RunDirectory
from acme_jax.session import Session
from acme_jax.supernet_training import Stages, train_stages
from acme_jax.system import compute_features
from nas.arch import Arch


class GridPoint(NamedTuple):
    """One uniform sub-network of the paper's grid of depths and widths."""

    depth: float  # part of the blocks
    width: float  # part of the heads and neurons
    arch: Arch


class EdgeData(NamedTuple):
    """What an edge searches and trains headers on: features of one frozen backbone."""

    train_tokens: Array  # [N, T, D] of the edge's shared data
    train_labels: Array  # [N]
    select_tokens: Array  # [M, T, D]
    select_labels: Array  # [M]


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """One seed of one configuration. Open it with `open_study`."""

    context: Context
    directory: Path

    @property
    def config(self) -> Config:
        """Of the study; its seed is the study's."""
        return self.context.config

    @functools.cached_property
    def stages(self) -> Stages:
        """The full network after each stage of the cloud's training."""
        return train_stages(self.context)

    @functools.cached_property
    def grid(self) -> list[GridPoint]:
        """The uniform sub-networks, smallest first."""
        archs = jax.tree.map(np.asarray, concrete.grid(self.context.space))
        encoder = self.context.encoder
        return [
            GridPoint(
                float(archs.depth[i]) / encoder.num_layers,
                float(archs.heads[i, 0]) / encoder.num_heads,
                jax.tree.map(lambda leaf, i=i: leaf[i], archs),
            )
            for i in range(len(archs.depth))
        ]

    def point(self, depth: float, width: float) -> GridPoint:
        """The grid's sub-network nearest to a depth and a width, both in (0, 1]."""
        return min(self.grid, key=lambda p: abs(p.depth - depth) + abs(p.width - width))

    def backbone(self, arch: Arch, params: Params | None = None) -> Params:
        """A sub-network as devices get it: sliced, without classifier.

        Args:
          arch: concrete.
          params: of the full network; None: the supernet's.
        """
        whole = self.stages.elastic if params is None else params
        sliced = slicing.slice_params(jax.device_get(whole), arch)
        return {
            name: jax.tree.map(jnp.asarray, leaf)
            for name, leaf in sliced.items()
            if name not in encoders.HEADS
        }

    def edge_data(self, backbone: Params) -> EdgeData:
        """Features of the edge's shared data and of the select split."""
        splits, rows = self.context.splits, proxy_indices(self.context)
        train, _ = compute_features(self.context, backbone, splits.train.inputs[rows])
        select, _ = compute_features(self.context, backbone, splits.select.inputs)
        return EdgeData(
            jnp.asarray(train),
            jnp.asarray(splits.train.labels[rows]),
            jnp.asarray(select),
            jnp.asarray(splits.select.labels),
        )

    def fleet(self, **changes: Any) -> list[Device]:
        """Devices by the study's `FleetConfig` with some fields changed.

        Raises:
          ConfigError, DataError: as `acme_jax.fleet.make_fleet`.
        """
        fleet: FleetConfig = dataclasses.replace(self.config.fleet, **changes)
        config = dataclasses.replace(self.config, fleet=fleet)
        context = self.context
        return make_fleet(
            context.splits.device_pool, config, context.encoder.num_classes, context.full_bytes
        )

    def key(self, name: str, index: int = 0) -> Array:
        """A random key of an experiment, by any name; the same in every start."""
        named = jax.random.fold_in(self.context.key, zlib.crc32(name.encode()))
        return jax.random.fold_in(named, index)

    def cached(
        self, name: str, make: Callable[[], tuple[Any, dict[str, Any]]]
    ) -> tuple[Any, dict[str, Any]]:
        """`make()`, or what it returned the first time.

        Args:
          name: unique in the study; also a directory's name.
          make: returns nested dictionaries (and lists) of arrays, and facts for JSON.
        """
        store = CheckpointStore(self.directory / "cache" / name, log=self.context.session.say)
        if (newest := store.newest()) is not None:
            facts = newest.meta["facts"]
            structure = _structure(newest.meta["structure"])
            return store.restore(newest.step, structure).tree, facts
        tree, facts = make()
        described = jax.tree.map(lambda leaf: [list(leaf.shape), str(leaf.dtype)], tree)
        store.save(0, tree, {"facts": facts, "structure": described})
        return tree, facts


def _structure(described: Any) -> Any:
    """Zeros in the shapes that `Study.cached` wrote down."""
    if isinstance(described, dict):
        return {name: _structure(part) for name, part in described.items()}
    if len(described) == 2 and isinstance(described[1], str):
        return np.zeros(described[0], described[1])
    return [_structure(part) for part in described]


@contextlib.contextmanager
def open_study(
    config: Config, directory: Path, reporter: Reporter, stop: StopFlag
) -> Iterator[Study]:
    """A study, new or continued; one process at a time.

    Args:
      config: with the seed.
      directory: of the study.
      reporter: shows progress.
      stop: a stop that is asked for is honoured between epochs.

    Raises:
      ConfigError, DataError, RunError: bad input, or the directory holds another configuration.
    """
    run = RunDirectory.create_or_open(directory, config, resume=True)
    try:
        session = Session(run, reporter, stop)
        with session.phase("data and devices"):
            context = make_context(config, session)
        yield Study(context, directory)
    finally:
        run.close()
