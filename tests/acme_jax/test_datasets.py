import gzip
import struct

import numpy as np
import pytest

from acme_jax import datasets, presets, splits
from acme_jax.config import ConfigError, DataConfig
from acme_jax.datasets import DataError, Dataset
from acme_jax.idx import read_idx


def idx_bytes(array, code=0x08):
    header = struct.pack(">BBBB", 0, 0, code, array.ndim)
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def make_images(num=12, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, 4, 6), dtype=np.uint8)


def make_dataset(num=300, num_classes=5, **changes):
    rng = np.random.default_rng(0)
    fields = {
        "name": "toy",
        "inputs": rng.random((num, 4, 4, 1), dtype=np.float32),
        "labels": rng.integers(0, num_classes, num).astype(np.int32),
        "num_classes": num_classes,
    }
    return Dataset(**{**fields, **changes})


def write_fashion(directory, num_train=40, num_test=20, **replaced):
    rng = np.random.default_rng(1)
    for part, num in (("train", num_train), ("t10k", num_test)):
        files = {
            f"{part}-images-idx3-ubyte": idx_bytes(make_images(num, seed=num)),
            f"{part}-labels-idx1-ubyte": idx_bytes(rng.integers(0, 10, num, dtype=np.uint8)),
        }
        for name, content in files.items():
            content = replaced.get(name.replace("-", "_"), content)
            (directory / f"{name}.gz").write_bytes(gzip.compress(content))
    return str(directory)


# idx files


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("code", "dtype"), [(0x08, "u1"), (0x09, "i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4")]
)
def test_idx_round_trip(tmp_path, compressed, code, dtype):
    array = (np.arange(24).reshape(2, 3, 4) * 5 - 7 * (dtype != "u1")).astype(dtype)
    content = idx_bytes(array, code)
    path = tmp_path / "file"  # The name does not say whether it is compressed.
    path.write_bytes(gzip.compress(content) if compressed else content)
    read = read_idx(path, num_dims=3)
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.dtype(dtype).newbyteorder("=")


def test_idx_missing(tmp_path):
    with pytest.raises(DataError, match="nothing-here is missing"):
        read_idx(tmp_path / "nothing-here")


@pytest.mark.parametrize("keep", [0, 3, 10, -1])
def test_idx_truncated(tmp_path, keep):
    path = tmp_path / "file"
    path.write_bytes(idx_bytes(make_images())[:keep])
    with pytest.raises(DataError, match="file is truncated"):
        read_idx(path)


def test_idx_truncated_gzip(tmp_path):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(idx_bytes(make_images()))[:-20])
    with pytest.raises(DataError, match=r"is truncated \(its gzip stream ends early"):
        read_idx(path)


def test_idx_corrupt_gzip(tmp_path):
    path = tmp_path / "file.gz"
    content = bytearray(gzip.compress(idx_bytes(make_images())))
    content[60] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(path)


@pytest.mark.parametrize("magic", [b"\x89PNG", b"\0\0\x07\x03", b"\0\0\x08\0"])
def test_idx_wrong_magic(tmp_path, magic):
    path = tmp_path / "file"
    path.write_bytes(magic + idx_bytes(make_images())[4:])
    with pytest.raises(DataError, match=f"not an idx file: its magic number is 0x{magic.hex()}"):
        read_idx(path)


def test_idx_labels_in_place_of_images(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(idx_bytes(np.zeros(5, np.uint8)))
    with pytest.raises(DataError, match="wrong magic number 0x00000801: 1 dimensions, expected 3"):
        read_idx(path, num_dims=3)


def test_idx_trailing_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(idx_bytes(make_images()) + b"more")
    with pytest.raises(DataError, match="4 unexpected bytes after its data"):
        read_idx(path)


# Datasets


def test_packaged_data_equals_what_the_packages_read():
    from sklearn.datasets import load_digits

    expected = load_digits()
    digits = datasets.load(DataConfig(name="digits"))
    np.testing.assert_allclose(digits.inputs[..., 0] * 16, expected.images, atol=1e-5)
    np.testing.assert_array_equal(digits.labels, expected.target)

    mnist = datasets.load(DataConfig(name="mnist5k"))
    assert mnist.inputs.shape == (5000, 28, 28, 1)
    np.testing.assert_array_equal(np.bincount(mnist.labels), np.full(10, 500))
    assert mnist.inputs.max() == 1.0 and mnist.inputs.min() == 0.0
    # An upright digit: the mean image is bright in the middle, dark at the border.
    mean = mnist.inputs.mean(axis=(0, 3))
    assert mean[10:18, 10:18].mean() > 0.3 > 0.01 > mean[:3].mean()


def test_fashion_reads_files_and_marks_the_official_test(tmp_path):
    data = datasets.load(DataConfig(name="fashion_mnist", path=write_fashion(tmp_path)))
    np.testing.assert_array_equal(data.inputs[:40, ..., 0] * 255, make_images(40, seed=40))
    np.testing.assert_array_equal(data.official_test, np.arange(60) >= 40)
    assert data.image_shape == (4, 6, 1)


def test_fashion_is_found_by_itself(tmp_path, monkeypatch):
    found = (str(tmp_path / "absent"), write_fashion(tmp_path))
    monkeypatch.setattr(datasets, "FASHION_DIRECTORIES", found)
    assert len(datasets.load(DataConfig(name="fashion_mnist"))) == 60


def test_fashion_absent_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "FASHION_DIRECTORIES", (str(tmp_path / "absent"),))
    with pytest.raises(DataError, match=r"is missing.*apt-get install dataset-fashion-mnist.*--da"):
        datasets.load(DataConfig(name="fashion_mnist"))


def test_fashion_single_file_missing(tmp_path):
    path = write_fashion(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        DataError, match=r"t10k-labels-idx1-ubyte\.gz is missing\. On Debian: apt-get"
    ):
        datasets.load(DataConfig(name="fashion_mnist", path=path))


def test_fashion_counts_differ(tmp_path):
    labels = idx_bytes(np.zeros(39, np.uint8))
    path = write_fashion(tmp_path, train_labels_idx1_ubyte=labels)
    with pytest.raises(DataError, match="40 train images but 39 train labels"):
        datasets.load(DataConfig(name="fashion_mnist", path=path))


def test_fashion_labels_out_of_range(tmp_path):
    labels = np.zeros(40, np.uint8)
    labels[7] = 10
    path = write_fashion(tmp_path, train_labels_idx1_ubyte=idx_bytes(labels))
    with pytest.raises(
        DataError, match=r"1 labels out of range, first labels\[7\] = 10; expected 0"
    ):
        datasets.load(DataConfig(name="fashion_mnist", path=path))


def test_fashion_image_sizes_differ(tmp_path):
    images = idx_bytes(np.zeros((20, 5, 5), np.uint8))
    path = write_fashion(tmp_path, t10k_images_idx3_ubyte=images)
    with pytest.raises(DataError, match=r"train images are \[4, 6\] but t10k images \[5, 5\]"):
        datasets.load(DataConfig(name="fashion_mnist", path=path))


def test_images_that_are_not_bytes(tmp_path):
    images = idx_bytes(np.zeros((40, 4, 6), ">f4"), code=0x0D)
    path = write_fashion(tmp_path, train_images_idx3_ubyte=images)
    with pytest.raises(DataError, match="train images are float32 and labels uint8; expected by"):
        datasets.load(DataConfig(name="fashion_mnist", path=path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10", r"needs a path: get cifar-10-python.*md5 c58f30108f.*www\.cs\.toronto\.edu"),
        ("cifar100", r"needs a path: get cifar-100-python.*md5 eb9058c3a382ffc7106e4002c42a8d85"),
        ("stanford_cars", r"needs a path: .*cars_train\.tgz \(md5 065e5b463ae.*Kaggle dataset"),
        ("image_folder", "needs a directory as --data.path; expected <path>/<class>/<pictures>"),
        ("arrays", r"needs a path: expected an \.npz file with images"),
        ("text", r"needs a path: expected a \.csv or \.tsv file"),
        ("huggingface", "needs a directory of save_to_disk, or an id on the hub, as --data.path"),
    ],
)
def test_without_a_path_says_what_is_needed(name, message):
    with pytest.raises(DataError, match=message):
        datasets.load(DataConfig(name=name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "cifar10", "image_size": 224}, r"image_size is for stanford_cars, image_fol.*"),
        ({"name": "digits", "cache": "x"}, "DataConfig.cache is for .* the dataset is digits"),
        ({"name": "image_folder", "label_column": "y"}, "label_column is for text, huggingface"),
        ({"name": "image_folder", "image_size": 0}, "image_size must be positive, got 0"),
        ({"name": "image_folder", "path": ""}, "DataConfig.path is empty"),
        ({"on_corrupt": "ignore"}, "on_corrupt is 'ignore'; expected one of refuse, skip"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**changes)


def test_path_for_a_packaged_dataset():
    with pytest.raises(ConfigError, match="digits is part of an installed package"):
        datasets.load(DataConfig(name="digits", path="somewhere"))


def test_packaged_file_missing(monkeypatch, tmp_path):
    spec = type("Spec", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(DataError, match="pip install --force-reinstall scikit-learn"):
        datasets.load(DataConfig(name="digits"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_images(value):
    images = np.zeros((300, 4, 4, 1), np.float32)
    images[17, 2, 1, 0] = value
    with pytest.raises(DataError, match="1 images hold NaN or infinite pixels, first image 17"):
        make_dataset(inputs=images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": np.full((300, 4, 4, 1), 255, np.float32)}, r"lie in \[255, 255\]; scale them"),
        (
            {"inputs": np.zeros((300, 4, 4), np.float32)},
            r"must be images, float32 or uint8 \[N, height",
        ),
        ({"inputs": np.zeros((299, 4, 4, 1), np.float32)}, "299 images but 300 labels"),
        (
            {"labels": np.full(300, -1, np.int32)},
            r"300 labels out of range, first labels\[0\] = -1",
        ),
        ({"labels": np.zeros(300, np.int64)}, "labels must be int32"),
        ({"num_classes": 1}, "needs at least 2 classes"),
        (
            {"inputs": np.zeros((0, 4, 4, 1), np.float32), "labels": np.zeros(0, np.int32)},
            "has no images",
        ),
    ],
)
def test_bad_datasets(changes, message):
    with pytest.raises(DataError, match=message):
        make_dataset(**changes)


def test_patch_size_that_does_not_fit_lists_those_that_do():
    datasets.check_patch((28, 28, 1), 7)
    with pytest.raises(
        ConfigError, match=r"28 x 28 is not .*patch_size 5; sizes.*: 1, 2, 4, 7, 14"
    ):
        datasets.check_patch((28, 28, 1), 5)
    with pytest.raises(ConfigError, match=r"sizes that fit: 1, 2, 4, 8$"):
        datasets.check_patch((16, 24, 3), 16)


@pytest.mark.parametrize("name", ["mnist5k", "digits", "smoke"])
def test_presets_fit_their_data(name):
    config = presets.get(name)
    data = datasets.load(config.data)
    datasets.check_patch(data.image_shape, config.model.patch_size)
    parts = splits.make_splits(data, config.data, config.seed)
    fleet = config.fleet
    splits.check_num_devices(len(parts.device_pool), fleet.num_edges * fleet.devices_per_edge)
