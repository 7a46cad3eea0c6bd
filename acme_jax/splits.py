"""The separate train, select and test splits of a dataset, and those of a device.

Each split has its own type, so that a type checker rejects, for example, the test split where
a choice is made: `TrainSplit` fits weights, `SelectSplit` serves every choice, `TestSplit` is
read once, by the final evaluation.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from acme_jax.config import DataConfig
from acme_jax.idx import DataError
from acme_jax.labelled import Dataset

SPLIT_STREAM = 1
"""Stream of the host generator that shuffles the dataset into its public parts."""
DEVICE_SPLIT_STREAM = 2
"""Stream of the host generator that divides one device's samples."""
_ROWS_AT_ONCE = 256


@dataclasses.dataclass(frozen=True, eq=False)
class _Split:
    inputs: np.ndarray  # images or token ids, as in `Dataset`; always in memory
    labels: np.ndarray  # [N] int32
    indices: np.ndarray  # [N] int64, positions in the array that was divided

    def __len__(self) -> int:
        return len(self.labels)


class TrainSplit(_Split):
    """Samples that fit weights."""


class SelectSplit(_Split):
    """Samples for every choice: importance, search, header, checkpoint, early stopping."""


class TestSplit(_Split):
    """Samples that only the final evaluation reads, once."""

    __test__ = False  # not a pytest class


class RowsOnDisk:
    """Some rows of a memory-mapped file; indexing with an array reads those into memory."""

    def __init__(self, inputs: np.memmap, indices: np.ndarray) -> None:
        self._inputs, self._indices = inputs, indices

    @property
    def shape(self) -> tuple[int, ...]:
        """[n, ...]."""
        return (len(self._indices), *self._inputs.shape[1:])

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Rows by an array of indices or a mask [n]; in memory."""
        return take_rows(self._inputs, self._indices[rows])


@dataclasses.dataclass(frozen=True, eq=False)
class DevicePool:
    """Samples to be divided among the devices (`fed.partition`, then `split_device`).

    Those of a memory-mapped dataset stay on disk until a device takes its own.
    """

    inputs: np.ndarray | RowsOnDisk
    labels: np.ndarray  # [N] int32
    indices: np.ndarray  # [N] int64, positions in the array that was divided

    def __len__(self) -> int:
        return len(self.labels)


class Splits(NamedTuple):
    """The disjoint parts of a dataset."""

    train: TrainSplit
    select: SelectSplit
    test: TestSplit
    device_pool: DevicePool


def make_splits(dataset: Dataset, config: DataConfig, seed: int) -> Splits:
    """Divides a dataset into the public parts and the devices' pool.

    The parts are disjoint and stratified: each has the class proportions of what it is drawn
    from, to within one sample a class. The device pool is everything that remains.

    Where a dataset has an official test part, the public test split is drawn from it alone
    and everything else, the devices' images included, from the rest: an official test image
    never becomes anything but test data. (A device's own test samples are then held-out
    images of the official training part.)

    Of images that lie in a file (`np.memmap`) the rows of the public parts are read into memory
    as the bytes they are, once, in the order of the file; the pool's stay in the file.

    Args:
      dataset: the images or texts.
      config: the number of samples of each public part.
      seed: of the run; the shuffle draws from `default_rng((seed, SPLIT_STREAM, 0))`.

    Raises:
      DataError: fewer samples than asked for, or none left for the devices.
    """
    noun = "images" if dataset.kind == "images" else "texts"
    rng = np.random.default_rng((seed, SPLIT_STREAM, 0))
    marked = dataset.official_test
    everything = np.arange(len(dataset))
    rest = everything if marked is None else everything[~marked]
    wanted = config.public_train + config.public_select
    asked = f"public_train + public_select = {wanted}"
    if marked is None:
        wanted += config.public_test
        asked = f"public_train + public_select + public_test = {wanted}"
    if len(rest) <= wanted:
        raise DataError(
            f"dataset {dataset.name} has {len(rest)} {noun} to divide, but {asked} and the "
            "devices need some too; lower the public_* numbers of DataConfig"
        )
    if marked is not None and marked.sum() < config.public_test:
        raise DataError(
            f"dataset {dataset.name} has {marked.sum()} official test {noun}, but "
            f"public_test is {config.public_test}; lower it"
        )
    labels = dataset.labels
    train, rest = _draw_stratified(rng, rest, labels, config.public_train)
    select, rest = _draw_stratified(rng, rest, labels, config.public_select)
    test_source = rest if marked is None else everything[marked]
    test, unused = _draw_stratified(rng, test_source, labels, config.public_test)
    pool = unused if marked is None else rest

    def take(indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return take_rows(dataset.inputs, indices), labels[indices], indices

    return Splits(
        TrainSplit(*take(train)),
        SelectSplit(*take(select)),
        TestSplit(*take(test)),
        DevicePool(
            RowsOnDisk(dataset.inputs, pool)
            if isinstance(dataset.inputs, np.memmap)
            else dataset.inputs[pool],
            labels[pool],
            pool,
        ),
    )


def take_rows(inputs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Copies rows into memory, those of a memory-mapped file in the order of the file.

    Args:
      inputs: [N, ...].
      indices: [n], whole numbers in [0, N).

    Returns:
      [n, ...] of the same dtype, not memory-mapped.
    """
    if not isinstance(inputs, np.memmap):
        return inputs[indices]
    order = np.argsort(indices)
    rows = np.empty((len(indices), *inputs.shape[1:]), inputs.dtype)
    for start in range(0, len(order), _ROWS_AT_ONCE):
        chunk = order[start : start + _ROWS_AT_ONCE]
        rows[chunk] = inputs[indices[chunk]]
    return rows


def _draw_stratified(
    rng: np.random.Generator, source: np.ndarray, labels: np.ndarray, num: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws num of the indices `source`, proportionally to their labels.

    Quotas by largest remainder (ties: smaller label), so that they add up to num exactly.

    Returns:
      (drawn, shuffled; the others, in increasing order).
    """
    source = rng.permutation(source)
    classes, counts = np.unique(labels[source], return_counts=True)
    quota, remainder = np.divmod(counts * num, len(source))
    quota[np.argsort(-remainder, kind="stable")[: num - quota.sum()]] += 1
    drawn = np.concatenate(
        [source[labels[source] == c][:n] for c, n in zip(classes, quota, strict=True)]
    )
    return rng.permutation(drawn), np.setdiff1d(source, drawn)


def check_num_devices(num_samples: int, num_devices: int) -> None:
    """Checks that every device can get a sample to train on and one to be tested on.

    Raises:
      DataError: fewer than 2 samples a device.
    """
    if num_samples < 2 * num_devices:
        raise DataError(
            f"{num_devices} devices but only {num_samples} samples for them, and each needs at "
            "least 2; lower FleetConfig.num_edges or devices_per_edge, or the public_* numbers "
            "of DataConfig"
        )


def split_device(
    inputs: np.ndarray, labels: np.ndarray, test_fraction: float, seed: int, device: int
) -> tuple[TrainSplit, TestSplit]:
    """Divides one device's samples into its train and its final test part.

    Stratified: of a label with n >= 2 samples, round(n * test_fraction) are test samples, at
    least 1 and at most n - 1, so that such a label occurs on both sides. A label's only sample
    is trained on (if all labels are such, one random sample becomes the test part).

    Args:
      inputs: [N, ...] of the device: images or token ids.
      labels: [N].
      test_fraction: in (0, 1).
      seed: of the run; draws from `default_rng((seed, DEVICE_SPLIT_STREAM, device))`.
      device: number of the device, also named in errors.

    Raises:
      DataError: no samples, a single sample, or a single class.
    """
    mend = "lower the number of devices or choose another FleetConfig.distribution"
    if len(labels) == 0:
        raise DataError(f"device {device} has no samples; {mend}")
    if len(labels) < 2:
        raise DataError(
            f"device {device} has 1 sample, but needs at least 2 (one to train on, one to test "
            f"on); {mend}"
        )
    classes = np.unique(labels)
    if len(classes) == 1:
        raise DataError(
            f"device {device} has samples of one class only (label {classes[0]}), nothing to "
            f"tell apart; {mend}"
        )
    rng = np.random.default_rng((seed, DEVICE_SPLIT_STREAM, device))
    order = rng.permutation(len(labels))
    parts = []
    for c in classes:
        members = order[labels[order] == c]
        num_test = int(np.floor(len(members) * test_fraction + 0.5))
        parts.append(members[: np.clip(num_test, min(1, len(members) - 1), len(members) - 1)])
    test = np.sort(np.concatenate(parts))
    if test.size == 0:
        test = order[:1]
    train = np.setdiff1d(order, test)
    return (
        TrainSplit(inputs[train], labels[train], train),
        TestSplit(inputs[test], labels[test], test),
    )
