"""The data of up to millions of simulated devices: lists of rows of a pool, memory-mapped.

Every device has its own distribution of labels, drawn from a Dirichlet distribution, and draws
its samples from the pool by it, with replacement: a million devices share some 55,000 images, so
samples repeat between devices, and rarely within one. Training and held-out samples come from
disjoint parts of the pool. Device k is the same in a store of any size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from acme_jax.config import ConfigError
from acme_jax.feature_pool import FeaturePool
from acme_jax.fleet_refinement import EdgeData
from acme_jax.run_dir import differences
from fed import mapped
from fed.clients import ClientData

STORE_STREAM = 5
"""Host random stream of the devices' distributions and samples (see DESIGN's randomness rule)."""

_BLOCK = 4096  # devices drawn together


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """What determines the devices' data.

    Raises:
      ConfigError: an impossible number.
    """

    devices: int
    samples: int = 16
    """Of one device; the last quarter, at least one, is held out."""
    alpha: float = 0.3
    """Of the Dirichlet distribution: small, and a device knows few labels."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("devices", 1), ("samples", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.alpha > 0:
            raise ConfigError(f"alpha must be positive, got {self.alpha}")

    @property
    def num_test(self) -> int:
        """Held-out samples of a device."""
        return max(self.samples // 4, 1)


def open_or_make(
    directory: Path, config: StoreConfig, pool: FeaturePool, log: Callable[[str], None] = print
) -> dict[str, np.ndarray]:
    """The devices' rows of the pool: `train` int32 [C, N] and `test` int32 [C, M], mapped.

    Raises:
      MappedTreeError: the store is damaged, or was made otherwise.
    """
    path = directory / f"devices_{config.devices}"
    num_train = config.samples - config.num_test
    template = {
        "train": mapped.ArraySpec((config.devices, num_train), "i4"),
        "test": mapped.ArraySpec((config.devices, config.num_test), "i4"),
    }
    asked = dataclasses.asdict(config)
    if not path.exists():
        log(f"drawing the samples of {config.devices:,} devices in {path} ...")
        with mapped.building(path, template, asked) as tree:
            _draw(tree, config, pool)
    found = mapped.open_tree(path)
    if found.meta != asked:
        raise mapped.MappedTreeError(
            f"{path} was made otherwise: {differences(found.meta, asked)}; choose another "
            "--data-dir, or delete it"
        )
    return mapped.open_tree(path, template).tree


class EdgeSource:
    """The features of whole edges, for `fed.stream.run_cohorts`.

    Args:
      pool: of the features.
      devices: `train` [C, N] and `test` [C, M], rows of the pool.
      devices_per_edge: n.

    Raises:
      ConfigError: n does not divide the number of devices.
    """

    def __init__(
        self, pool: FeaturePool, devices: dict[str, np.ndarray], devices_per_edge: int
    ) -> None:
        count = len(devices["train"])
        if devices_per_edge < 1 or count % devices_per_edge:
            raise ConfigError(
                f"{count} devices cannot be divided among edges of {devices_per_edge}; change "
                "--devices or --devices-per-edge"
            )
        self._pool, self._devices, self._each = pool, devices, devices_per_edge
        self._length = count // devices_per_edge

    def __len__(self) -> int:
        return self._length

    def read(self, rows: np.ndarray) -> EdgeData:
        """Features and labels of these edges' devices, leaves [E, n, ...]."""
        numbers = rows[:, None] * self._each + np.arange(self._each)[None]

        def gather(name: str) -> Any:
            samples = np.asarray(mapped.fresh(self._devices[name])[numbers])  # [E, n, N]
            size = np.full(numbers.shape, samples.shape[-1], np.int32)
            labels = self._pool.labels[samples].astype(np.int32)
            return ClientData(self._pool.features[samples], labels, size)  # type: ignore[arg-type]

        return EdgeData(gather("train"), gather("test"))


def _draw(tree: dict[str, Any], config: StoreConfig, pool: FeaturePool) -> None:
    """Fills the store block by block; whole blocks are drawn, so that a store's size is no seed."""
    num_labels = int(pool.labels.max()) + 1
    parts = {"train": slice(0, pool.num_train), "test": slice(pool.num_train, len(pool.labels))}
    for block in range(-(-config.devices // _BLOCK)):
        rng = np.random.default_rng((config.seed, STORE_STREAM, block))
        shares = rng.dirichlet(np.full(num_labels, config.alpha), _BLOCK).cumsum(axis=1)
        first = block * _BLOCK
        for name, leaf in tree.items():
            rows = np.arange(len(pool.labels))[parts[name]]
            order = rows[np.argsort(pool.labels[rows], kind="stable")]
            counts = np.bincount(pool.labels[rows], minlength=num_labels)
            starts = np.cumsum(counts) - counts
            level, place = rng.random((2, _BLOCK, leaf.shape[1]))
            label = (shares[:, None, :-1] < level[:, :, None]).sum(axis=2)
            drawn = order[starts[label] + (place * counts[label]).astype(int)]
            leaf[first : first + _BLOCK] = drawn[: len(leaf) - first]
