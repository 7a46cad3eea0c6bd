import gzip

import numpy as np
import pytest

from acme_jax import datasets
from acme_jax.config import DataConfig
from acme_jax.idx import DataError
from tests.acme_jax.test_datasets import write_fashion

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (12, 4, 5, 3), dtype=np.uint8)
LABELS = np.arange(12) % 3


def read(path):
    return datasets.load(DataConfig(name="arrays", path=str(path)))


@pytest.mark.parametrize(
    "names",
    [("images", "labels"), ("x", "y"), ("inputs", "y"), ("x_train", "y_train"), ("images", "y")],
)
def test_npz(tmp_path, names):
    np.savez(tmp_path / "data.npz", **dict(zip(names, (IMAGES, LABELS), strict=True)))
    data = read(tmp_path / "data.npz")
    np.testing.assert_array_equal(data.inputs, IMAGES)
    np.testing.assert_array_equal(data.labels, LABELS)
    assert data.inputs.dtype == np.uint8 and data.num_classes == 3 and data.official_test is None


@pytest.mark.parametrize("form", ["{part}_{kind}", "{kind}_{part}"])
def test_npz_with_parts(tmp_path, form):
    arrays = {}
    for part, rows in (("test", slice(0, 3)), ("val", slice(3, 5)), ("train", slice(5, 12))):
        arrays[form.format(part=part, kind="images")] = IMAGES[rows]
        arrays[form.format(part=part, kind="labels")] = LABELS[rows, None]
    np.savez_compressed(tmp_path / "data.npz", **arrays)
    data = read(tmp_path / "data.npz")
    order = [*range(5, 12), 3, 4, 0, 1, 2]
    np.testing.assert_array_equal(data.inputs, IMAGES[order])
    np.testing.assert_array_equal(data.labels, LABELS[order])
    np.testing.assert_array_equal(data.official_test, [False] * 9 + [True] * 3)


def test_grey_and_float(tmp_path):
    images = RNG.random((12, 4, 5), dtype=np.float32)
    np.savez(tmp_path / "data.npz", images=images, labels=LABELS.astype(np.uint8))
    data = read(tmp_path / "data.npz")
    np.testing.assert_array_equal(data.inputs[..., 0], images)
    assert data.inputs.dtype == np.float32 and data.labels.dtype == np.int32


@pytest.mark.parametrize("grey", [False, True])
def test_directory_is_mapped(tmp_path, grey):
    images = IMAGES[..., 0] if grey else IMAGES
    official = np.arange(12) >= 10
    for name, array in (("images", images), ("labels", LABELS), ("official_test", official)):
        np.save(tmp_path / f"{name}.npy", array)
    data = read(tmp_path)
    assert isinstance(data.inputs, np.memmap) and data.inputs.shape == (12, 4, 5, 1 if grey else 3)
    np.testing.assert_array_equal(data.inputs[..., 0], IMAGES[..., 0])
    np.testing.assert_array_equal(data.official_test, official)


def test_idx_files(tmp_path):
    expected = datasets.load(DataConfig(name="fashion_mnist", path=write_fashion(tmp_path)))
    data = read(tmp_path)
    assert data.inputs.dtype == np.uint8
    np.testing.assert_array_equal(data.inputs.astype(np.float32) / 255, expected.inputs)
    np.testing.assert_array_equal(data.labels, expected.labels)
    np.testing.assert_array_equal(data.official_test, expected.official_test)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "has images without labels of the same part"),
        ({"images": None}, "has labels without images"),
        ({"images": None, "labels": None, "pixels": IMAGES}, r"has arrays pixels; expected an"),
        ({"x": IMAGES}, "has images and x, keep one of them"),
        ({"labels": LABELS[:-1]}, "images has 12 images but labels 11 labels"),
        ({"labels": LABELS.astype(float)}, "labels is float64 .*; expected whole numbers"),
        ({"labels": np.eye(12, dtype=int)}, r"labels is int64 \[12, 12\]; expected whole numbers"),
        ({"labels": LABELS + 1}, r"labels lie in \[1, 3\]; they must be class numbers from 0"),
        ({"labels": LABELS - 1}, r"labels lie in \[-1, 1\]"),
        ({"labels": LABELS * 1000}, r"labels lie in \[0, 2000\].*large gaps"),
        ({"labels": LABELS * 0}, "one class only"),
        ({"images": IMAGES.astype(float)}, "images is float64; convert it to uint8"),
        ({"images": IMAGES.astype(np.float32)}, r"pixels lie in \[0, 255\]; scale them"),
        ({"images": IMAGES[0]}, r"images has 4 images but labels 12"),
        ({"images": IMAGES.reshape(12, -1)}, r"images has shape \[12, 60\]; expected"),
        ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"so 5 channels; .*transpose\(0, 2, 3, 1\)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "has no images"),
        ({"test_images": IMAGES}, "has test_images without labels"),
        (
            {"test_images": IMAGES[:, :2], "test_labels": LABELS},
            r"test images are uint8 \[12, 2, 5, 3\] but train images",
        ),
        ({"labels": np.array(["a"] * 12, dtype=object)}, "cannot be read"),  # a pickle
    ],
)
def test_bad_npz(tmp_path, changes, message):
    arrays = {"images": IMAGES, "labels": LABELS, **changes}
    np.savez(tmp_path / "data.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(DataError, match=message):
        read(tmp_path / "data.npz")


@pytest.mark.parametrize("damage", ["truncated", "damaged", "not npz", "npy", "empty", "gzip"])
def test_damaged_npz(tmp_path, damage):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, images=IMAGES, labels=LABELS)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "damaged":
        content[200] ^= 0xFF
    elif damage == "not npz":
        content = b"<html>404</html>"
    elif damage == "empty":
        content = b""
    elif damage == "gzip":
        content = gzip.compress(content)
    path.write_bytes(content)
    if damage == "npy":
        with path.open("wb") as file:
            np.save(file, IMAGES)
    message = "is a single array" if damage == "npy" else "cannot be read"
    with pytest.raises(DataError, match=message):
        read(path)


def test_bad_directories(tmp_path):
    with pytest.raises(DataError, match=r"absent is missing; expected an .npz"):
        read(tmp_path / "absent")
    with pytest.raises(DataError, match=r"images\.npy is missing; expected"):
        read(tmp_path)
    np.save(tmp_path / "images.npy", IMAGES)
    with pytest.raises(DataError, match=r"labels\.npy is missing"):
        read(tmp_path)
    np.save(tmp_path / "labels.npy", LABELS[:-2])
    with pytest.raises(DataError, match=r"images.npy has 12 images but labels.npy 10 labels"):
        read(tmp_path)
    np.save(tmp_path / "labels.npy", LABELS)
    np.save(tmp_path / "official_test.npy", np.zeros(11, bool))
    with pytest.raises(DataError, match=r"official_test must be bool \[12\], got bool \[11\]"):
        read(tmp_path)
    content = (tmp_path / "images.npy").read_bytes()
    (tmp_path / "images.npy").write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"images\.npy cannot be read"):
        read(tmp_path)
