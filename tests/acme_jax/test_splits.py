import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acme_jax import splits
from acme_jax.config import DataConfig
from acme_jax.datasets import DataError, Dataset

CONFIG = DataConfig(public_train=103, public_select=40, public_test=50)


def make_dataset(num=300, num_classes=5, official_test=None, seed=0):
    rng = np.random.default_rng(seed)
    # Unequal classes, so that proportional quotas are not whole numbers.
    labels = rng.choice(num_classes, num, p=np.arange(1, num_classes + 1) / 15).astype(np.int32)
    images = rng.random((num, 2, 2, 1), dtype=np.float32)
    return Dataset("toy", images, labels, num_classes, official_test)


def test_parts_are_disjoint_complete_and_of_the_asked_size():
    data = make_dataset()
    parts = splits.make_splits(data, CONFIG, seed=3)
    assert [len(p) for p in parts] == [103, 40, 50, 107]
    together = np.concatenate([p.indices for p in parts])
    np.testing.assert_array_equal(np.sort(together), np.arange(300))
    for part in parts:
        np.testing.assert_array_equal(part.inputs, data.inputs[part.indices])
        np.testing.assert_array_equal(part.labels, data.labels[part.indices])


def test_parts_are_stratified():
    data = make_dataset()
    parts = splits.make_splits(data, CONFIG, seed=3)
    left = np.bincount(data.labels, minlength=5)
    for part in parts[:3]:
        counts = np.bincount(part.labels, minlength=5)
        assert np.all(np.abs(counts - left * len(part) / left.sum()) < 1)
        left = left - counts


def test_parts_have_their_own_types():
    kinds = [type(p) for p in splits.make_splits(make_dataset(), CONFIG, seed=0)]
    assert kinds == [
        splits.TrainSplit,
        splits.SelectSplit,
        splits.TestSplit,
        splits.DevicePool,
    ]
    assert not any(issubclass(a, b) for a in kinds for b in kinds if a is not b)


def test_seed_decides():
    data = make_dataset()
    one, same, other = (splits.make_splits(data, CONFIG, seed=s) for s in (1, 1, 2))
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a.indices, b.indices)
    assert not np.array_equal(one.train.indices, other.train.indices)


def test_official_test_images_become_test_data_only():
    official = np.zeros(300, bool)
    official[::4] = True  # 75
    parts = splits.make_splits(make_dataset(official_test=official), CONFIG, seed=0)
    assert [len(p) for p in parts] == [103, 40, 50, 225 - 143]
    assert official[parts.test.indices].all()
    for part in (parts.train, parts.select, parts.device_pool):
        assert not official[part.indices].any()


def test_mapped_images_are_divided_as_those_in_memory(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (300, 2, 2, 3), dtype=np.uint8)
    labels = make_dataset().labels
    np.save(tmp_path / "images.npy", images)
    mapped = Dataset("toy", np.load(tmp_path / "images.npy", mmap_mode="r"), labels, 5)
    expected = splits.make_splits(Dataset("toy", images, labels, 5), CONFIG, seed=3)
    for part, other in zip(splits.make_splits(mapped, CONFIG, seed=3), expected, strict=True):
        np.testing.assert_array_equal(part.indices, other.indices)
        if isinstance(part, splits.DevicePool):
            assert isinstance(
                part.inputs, splits.RowsOnDisk
            )  # nothing is read before a device does
            assert part.inputs.shape == other.inputs.shape and len(part.inputs) == len(part)
            some = np.array([5, 0, 17, 3])
            assert type(part.inputs[some]) is np.ndarray
            np.testing.assert_array_equal(part.inputs[some], other.inputs[some])
            np.testing.assert_array_equal(part.inputs[np.arange(len(part))], other.inputs)
            continue
        assert type(part.inputs) is np.ndarray and part.inputs.dtype == np.uint8
        np.testing.assert_array_equal(part.inputs, other.inputs)


def test_mapped_rows_are_read_in_the_order_of_the_file(monkeypatch, tmp_path):
    class Recording(np.memmap):
        def __getitem__(self, rows):
            read.append(np.array(rows))
            return super().__getitem__(rows)

    read = []
    np.save(tmp_path / "rows.npy", np.arange(1000, dtype=np.int32))
    rows = np.load(tmp_path / "rows.npy", mmap_mode="r").view(Recording)
    monkeypatch.setattr(splits, "_ROWS_AT_ONCE", 100)
    wanted = np.random.default_rng(0).permutation(1000)[:450]
    np.testing.assert_array_equal(splits.take_rows(rows, wanted), wanted)
    assert [len(r) for r in read] == [100, 100, 100, 100, 50]
    assert np.all(np.diff(np.concatenate(read)) > 0)


def test_texts_are_divided():
    ids = np.arange(600, dtype=np.int32).reshape(300, 2)
    data = Dataset("toy", ids, make_dataset().labels, 5, text_bytes=9.0)
    parts = splits.make_splits(data, CONFIG, seed=3)
    for part in parts:
        np.testing.assert_array_equal(part.inputs[:, 0], 2 * part.indices)
    with pytest.raises(DataError, match="has 300 texts to divide"):
        splits.make_splits(data, DataConfig(), seed=3)


def test_pool_too_small_gives_the_numbers():
    with pytest.raises(DataError, match=r"has 190 images.*public_test = 193 and the devices need"):
        splits.make_splits(make_dataset(190), CONFIG, seed=0)


def test_nothing_left_for_the_devices():
    with pytest.raises(DataError, match="has 193 images to divide"):
        splits.make_splits(make_dataset(193), CONFIG, seed=0)


def test_official_test_too_small():
    official = np.arange(300) < 20
    with pytest.raises(DataError, match="has 20 official test images, but public_test is 50"):
        splits.make_splits(make_dataset(official_test=official), CONFIG, seed=0)


def test_more_devices_than_samples():
    splits.check_num_devices(20, 10)
    with pytest.raises(DataError, match=r"10 devices but only 19 samples.*lower FleetConfig"):
        splits.check_num_devices(19, 10)


# One device


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=2, max_size=6).filter(
        lambda counts: sum(n > 0 for n in counts) > 1
    ),
    fraction=st.floats(0.05, 0.95),
    device=st.integers(0, 99),
)
def test_device_split_properties(counts, fraction, device):
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
    images = np.arange(labels.size, dtype=np.float32).reshape(-1, 1, 1, 1)
    train, test = splits.split_device(images, labels, fraction, 0, device)
    assert len(train) > 0 and len(test) > 0
    both = np.concatenate([train.indices, test.indices])
    np.testing.assert_array_equal(np.sort(both), np.arange(labels.size))
    np.testing.assert_array_equal(train.inputs[:, 0, 0, 0], train.indices)
    np.testing.assert_array_equal(test.labels, labels[test.indices])
    for label, count in enumerate(counts):
        num_test = int((test.labels == label).sum())
        if count >= 2:
            assert 1 <= num_test <= count - 1
            assert abs(num_test - count * fraction) <= 1
    if max(counts) > 1:  # Otherwise every label is single, and one of them must be the test.
        assert set(test.labels) <= set(train.labels)


def test_devices_differ_and_repeat():
    labels = np.arange(40, dtype=np.int32) % 4
    images = np.zeros((40, 1, 1, 1), np.float32)
    first, again, other = (
        splits.split_device(images, labels, 0.4, 0, device)[1].indices for device in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "device 7 has no samples; lower the number of devices or choose another"),
        ([3], "device 7 has 1 sample, but needs at least 2"),
        ([3, 3, 3], r"device 7 has samples of one class only \(label 3\).*; lower the number of"),
    ],
)
def test_bad_devices(labels, message):
    images = np.zeros((len(labels), 2, 2, 1), np.float32)
    with pytest.raises(DataError, match=message):
        splits.split_device(images, np.array(labels, np.int32), 0.4, 0, 7)
