"""Some images of a file, some clients of a job."""

import gzip
import struct

import numpy as np
import pytest

from acme_jax import client_images
from acme_jax.client_images import load_clients, open_pool, read_idx_images
from acme_jax.idx import DataError

COUNT = 25
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 3, 4)).astype(np.uint8)
LABELS = (np.arange(COUNT) % 10).astype(np.uint8)
IDX = struct.pack(">4I", 0x803, COUNT, 3, 4) + PIXELS.tobytes()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(client_images, "_BLOCK", 4)


@pytest.fixture(params=["plain", "gz"])
def directory(request, tmp_path):
    labels = struct.pack(">2I", 0x801, COUNT) + LABELS.tobytes()
    for name, content in (("images-idx3", IDX), ("labels-idx1", labels)):
        path = tmp_path / f"train-{name}-ubyte"
        if request.param == "plain":
            path.write_bytes(content)
        else:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    return tmp_path


@pytest.mark.parametrize("rows", [[], [7], [24, 0, 3, 4, 3, 11], list(range(COUNT))])
def test_rows_of_a_file(directory, rows):
    pool = open_pool("fashion_mnist", str(directory))
    rows = np.array(rows, np.int64)
    np.testing.assert_array_equal(read_idx_images(pool.source, rows), PIXELS[rows])
    np.testing.assert_array_equal(
        pool.images(rows), PIXELS[rows, ..., None].astype(np.float32) / np.float32(255)
    )
    np.testing.assert_array_equal(pool.labels, LABELS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not idx", "not an idx file of images"),
        (IDX[:4] + b"\0\0\0\x09" + IDX[8:-1], "has 9 images; rows 3 to 9"),
        (IDX[: 16 + 12 * 9 + 5], "is truncated: its header promises 25"),
        (gzip.compress(IDX)[:-40], "cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx_images(path, np.array([3, 9]))
    assert str(path) in str(caught.value)


def test_missing_dataset_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"none of {tmp_path}.*dataset-fashion-mnist"):
        open_pool("fashion_mnist", str(tmp_path))


def test_clients_are_padded_as_the_largest_of_all(directory):
    pool = open_pool("fashion_mnist", str(directory))
    parts = [np.array([5, 2]), np.array([9, 8, 7, 1]), np.array([0])]
    data = load_clients(pool, parts, np.array([0, 2]))
    assert data.inputs.shape == (2, 4, 3, 4, 1)
    np.testing.assert_array_equal(data.size, [2, 1])
    np.testing.assert_array_equal(data.labels, [[5, 2, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(data.inputs[0, :2], pool.images(parts[0]))
    np.testing.assert_array_equal(data.inputs[1, 0], pool.images(parts[2])[0])
    assert not data.inputs[0, 2:].any() and not data.inputs[1, 1:].any()
    nobody = load_clients(pool, parts, np.array([], np.int64))
    assert nobody.inputs.shape == (0, 4, 3, 4, 1)
