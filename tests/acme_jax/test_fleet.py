"""The fleet: edges, budgets, speeds, and disjoint data of the right labels."""

import dataclasses

import numpy as np
import pytest

from acme_jax import fleet
from acme_jax.config import Config, ConfigError, FleetConfig
from acme_jax.datasets import DataError
from acme_jax.splits import DevicePool
from fed.paper_groups import paper_label_groups

FULL_BYTES = 1_000_000


def make_pool(num=900, num_classes=10, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num).astype(np.int32)
    images = np.arange(num, dtype=np.float32).reshape(num, 1, 1, 1)  # every image is its number
    return DevicePool(images, labels, np.arange(num) + 5000)


POOL = make_pool()
CONFIG = Config(
    fleet=FleetConfig(
        num_edges=3,
        devices_per_edge=4,
        budgets=(0.3, 0.8),
        budget_spread=0.2,
        samples_per_device=40,
        test_fraction=0.4,
    )
)


def make(pool=POOL, num_classes=10, seed=0, **changes):
    config = dataclasses.replace(
        CONFIG, seed=seed, fleet=dataclasses.replace(CONFIG.fleet, **changes)
    )
    return fleet.make_fleet(pool, config, num_classes, FULL_BYTES)


def numbers(split):
    return split.inputs.ravel().astype(int)


def test_devices_are_numbered_edge_by_edge():
    devices = make()
    assert [d.id for d in devices] == list(range(12))
    assert [d.edge for d in devices] == [0] * 4 + [1] * 4 + [2] * 4
    assert [d.id for d in fleet.edge_devices(devices, 1)] == [4, 5, 6, 7]


def test_budgets_start_at_the_edges_and_spread_upwards():
    devices = make()
    for edge, fraction in enumerate((0.3, 0.8, 0.3)):  # shorter tuples repeat
        budgets = [d.budget_bytes for d in devices if d.edge == edge]
        base = fraction * FULL_BYTES
        assert budgets[0] == int(base) == min(budgets)
        assert max(budgets) <= 1.2 * base
        assert len(set(budgets)) == 4
        assert all(isinstance(b, int) for b in budgets)
    assert len({d.budget_bytes for d in make(budget_spread=0.0) if d.edge == 1}) == 1


def test_speeds_differ_by_at_most_a_factor_of_two_from_the_reference():
    devices, reference = make(), fleet.REFERENCE_PROFILE
    speeds = [d.profile.flops_per_s / reference.flops_per_s for d in devices]
    assert 0.5 <= min(speeds) < 0.9 and 1.1 < max(speeds) <= 2.0
    for device, speed in zip(devices, speeds, strict=True):
        np.testing.assert_allclose(device.profile.bytes_per_s / reference.bytes_per_s, speed)
        np.testing.assert_allclose(reference.overhead_s / device.profile.overhead_s, speed)
        assert device.profile.idle_power_w == reference.idle_power_w


@pytest.mark.parametrize("distribution", ["iid", "c2", "c3", "c4", "dirichlet"])
def test_data_are_disjoint_and_belong_to_the_pool(distribution):
    devices = make(distribution=distribution, dirichlet_alpha=1.0)
    parts = [numbers(split) for d in devices for split in (d.train, d.test)]
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    for device in devices:
        assert 2 <= len(device.train) + len(device.test) <= 40
        assert len(device.train) > 0 and len(device.test) > 0
        for split in (device.train, device.test):
            np.testing.assert_array_equal(split.labels, POOL.labels[numbers(split)])
        assert device.labels == sorted(set(device.train.labels.tolist()))


@pytest.mark.parametrize("distribution", ["iid", "c2", "c3", "c4"])
def test_labels_are_the_papers(distribution):
    groups = paper_label_groups(distribution, 12, 10)
    for device, group in zip(make(distribution=distribution), groups, strict=True):
        assert device.labels == sorted(group)
        assert set(device.test.labels) <= set(group)


def test_about_the_test_fraction_is_held_out():
    devices = make(distribution="iid", samples_per_device=40)
    for device in devices:
        share = len(device.test) / (len(device.train) + len(device.test))
        assert abs(share - 0.4) < 0.1


def test_small_alpha_is_more_skewed_than_large():
    def distance(alpha):
        """Mean total variation between a device's labels and the pool's."""
        whole = np.bincount(POOL.labels, minlength=10) / len(POOL)
        distances = []
        for d in make(distribution="dirichlet", dirichlet_alpha=alpha, samples_per_device=900):
            labels = np.concatenate([d.train.labels, d.test.labels])
            mine = np.bincount(labels, minlength=10) / len(labels)
            distances.append(0.5 * np.abs(mine - whole).sum())
        return np.mean(distances)

    assert distance(0.5) > 0.35
    assert distance(100.0) < 0.15


def fingerprint(devices):
    return [
        (d.budget_bytes, d.profile, numbers(d.train).tolist(), numbers(d.test).tolist())
        for d in devices
    ]


@pytest.mark.parametrize("distribution", ["c3", "dirichlet"])
def test_deterministic_in_the_seed(distribution):
    first = fingerprint(make(distribution=distribution, dirichlet_alpha=1.0))
    assert first == fingerprint(make(distribution=distribution, dirichlet_alpha=1.0))
    other = fingerprint(make(distribution=distribution, dirichlet_alpha=1.0, seed=1))
    for field in range(4):  # budgets (but for each edge's first), speeds, data
        same = sum(a[field] == b[field] for a, b in zip(first, other, strict=True))
        assert same <= 3


def test_host_random_state_is_left_alone():
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    make()
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_too_many_devices_for_the_samples_are_refused():
    with pytest.raises(DataError, match="12 devices but only 20 samples"):
        make(pool=make_pool(20))


def test_too_few_classes_for_the_papers_lists_are_refused():
    with pytest.raises(ConfigError, match=r"'c3' divides at least 10 classes.*dirichlet or iid"):
        make(pool=make_pool(num_classes=4), num_classes=4)


def test_too_few_samples_for_dirichlet_are_refused():
    with pytest.raises(ConfigError, match=r"fleet\.distribution 'dirichlet'"):
        make(pool=make_pool(100), distribution="dirichlet")


def test_a_device_of_one_class_is_refused_by_its_number():
    """Labels so skewed that some device knows one class only."""
    with pytest.raises(DataError, match=r"device \d+ has samples of one class only"):
        make(distribution="dirichlet", dirichlet_alpha=0.01)


def test_iid_of_few_classes_gives_every_device_every_label():
    devices = make(pool=make_pool(num_classes=4), num_classes=4, distribution="iid")
    assert all(device.labels == [0, 1, 2, 3] for device in devices)
