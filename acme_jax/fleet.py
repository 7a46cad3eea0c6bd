"""The simulated devices: their edge, limits, speed and own data."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from acme_jax.config import Config, ConfigError
from acme_jax.splits import (
    DevicePool,
    TestSplit,
    TrainSplit,
    check_num_devices,
    split_device,
)
from fed import partition
from fed.paper_groups import paper_label_groups
from nas.cost import DeviceProfile

FLEET_STREAM = 3
"""Host random stream of the devices' data and speeds (see DESIGN's randomness rule)."""

REFERENCE_PROFILE = DeviceProfile(
    flops_per_s=2e9,
    bytes_per_s=1e9,
    overhead_s=20e-6,
    idle_power_w=0.5,
    energy_per_flop_j=2e-10,
    energy_per_byte_j=1e-9,
)
"""A small single-board computer, the speed that the Pareto search models. Assumed, not
measured; devices differ from it by up to a factor of two."""


class Device(NamedTuple):
    """One device. Its data never leave it."""

    id: int
    edge: int
    budget_bytes: int
    """Largest model (backbone and header) that it accepts."""
    profile: DeviceProfile
    train: TrainSplit
    test: TestSplit

    @property
    def labels(self) -> list[int]:
        """The classes that the device knows."""
        return [int(label) for label in np.unique(self.train.labels)]


def make_fleet(pool: DevicePool, config: Config, num_classes: int, full_bytes: int) -> list[Device]:
    """Divides the device pool and draws limits and speeds; deterministic in the seed.

    Devices are numbered edge by edge. An edge's first device has exactly the edge's budget,
    the others up to `budget_spread` more, so the edge's backbone must fit the first.

    Args:
      pool: the images that belong to devices.
      config: `fleet` and `seed` are read.
      num_classes: of the data set.
      full_bytes: size of the full model, of which budgets are fractions.

    Raises:
      DataError: more devices than samples, or a device with no samples or only one class.
      ConfigError: a distribution that this data set cannot give.
    """
    fleet = config.fleet
    num_devices = fleet.num_edges * fleet.devices_per_edge
    check_num_devices(len(pool), num_devices)
    seed = (config.seed, FLEET_STREAM, 0)
    try:
        if fleet.distribution == "dirichlet":
            parts = partition.dirichlet(
                pool.labels,
                num_devices,
                fleet.dirichlet_alpha,
                samples_per_client=fleet.samples_per_device,
                min_samples=10,
                seed=seed,
            )
        else:
            parts = partition.label_groups(
                pool.labels,
                _label_groups(fleet.distribution, num_devices, num_classes),
                samples_per_client=fleet.samples_per_device,
                seed=seed,
            )
    except partition.PartitionError as error:
        raise ConfigError(f"fleet.distribution {fleet.distribution!r}: {error}") from error
    rng = np.random.default_rng((config.seed, FLEET_STREAM, 1))
    devices = []
    for device, indices in enumerate(parts):
        edge, place = divmod(device, fleet.devices_per_edge)
        spread = 0.0 if place == 0 else rng.uniform(0.0, fleet.budget_spread)
        budget = fleet.budgets[edge % len(fleet.budgets)] * full_bytes * (1.0 + spread)
        speed = 2.0 ** rng.uniform(-1.0, 1.0)
        profile = REFERENCE_PROFILE._replace(
            flops_per_s=REFERENCE_PROFILE.flops_per_s * speed,
            bytes_per_s=REFERENCE_PROFILE.bytes_per_s * speed,
            overhead_s=REFERENCE_PROFILE.overhead_s / speed,
        )
        train, test = split_device(
            pool.inputs[indices], pool.labels[indices], fleet.test_fraction, config.seed, device
        )
        devices.append(Device(device, edge, int(budget), profile, train, test))
    return devices


def _label_groups(distribution: str, num_devices: int, num_classes: int) -> list[tuple[int, ...]]:
    """The paper's label lists; with fewer than its 10 classes "iid" is every label everywhere.

    Raises:
      ConfigError: another distribution of fewer than 10 classes.
    """
    if num_classes >= 10:
        return paper_label_groups(distribution, num_devices, num_classes)
    if distribution != "iid":
        raise ConfigError(
            f"fleet.distribution {distribution!r} divides at least 10 classes, but the data have "
            f"{num_classes}; choose --fleet.distribution dirichlet or iid"
        )
    return [tuple(range(num_classes))] * num_devices


def edge_devices(devices: list[Device], edge: int) -> list[Device]:
    """The devices of one edge, in the order of their ids."""
    return [device for device in devices if device.edge == edge]
