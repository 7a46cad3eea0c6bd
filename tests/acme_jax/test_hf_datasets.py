"""With a stand-in for the package `datasets`, and with the package itself where installed."""

import importlib
import importlib.util
import io
import types

import numpy as np
import pytest

from acme_jax import hf_datasets
from acme_jax import image_store as image_store_module
from acme_jax.config import DataConfig
from acme_jax.hf_datasets import read_huggingface
from acme_jax.idx import DataError
from tests.acme_jax.test_image_store import encoded, make_picture


class Image:
    def __init__(self, decode=True):
        self.decode = decode


class Value:
    def __init__(self, dtype):
        self.dtype = dtype


class ClassLabel:
    dtype = "int64"

    def __init__(self, names):
        self.names = names


class Table:
    """As much of datasets.Dataset as is used."""

    def __init__(self, columns, features, fingerprint="f"):
        self.columns, self.features, self._fingerprint = columns, features, fingerprint

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        for name, feature in self.features.items():
            # The real package would decode here, and hide which picture is damaged.
            assert not (isinstance(feature, Image) and feature.decode), name
        return {name: values[key] for name, values in self.columns.items()}

    def cast_column(self, name, feature):
        return Table(self.columns, {**self.features, name: feature}, self._fingerprint)


def make_images(num=4, seed=0, labels=None, **features):
    values = [
        {"bytes": encoded(make_picture(seed=seed + i)), "path": f"{i}.png"} for i in range(num)
    ]
    return Table(
        {"img": values, "label": [i % 2 for i in range(num)] if labels is None else labels},
        {"img": Image(), "label": ClassLabel(["cat", "dog"]), **features},
        f"print {seed}",
    )


def make_texts(texts=("one", "two", "three", "four"), labels=(0, 1, 1, 0), **features):
    return Table(
        {"text": list(texts), "label": list(labels), "title": list(texts)},
        {"text": Value("string"), "label": ClassLabel(["no", "yes"]), **features},
    )


@pytest.fixture
def library(monkeypatch):
    """The stand-in; set its `found` to what it shall load."""
    fake = types.SimpleNamespace(Image=Image, asked=[])
    fake.load_from_disk = lambda path: fake.asked.append(("disk", path)) or fake.found
    fake.load_dataset = lambda path: fake.asked.append(("hub", path)) or fake.found
    real = importlib.import_module
    monkeypatch.setattr(
        hf_datasets.importlib,
        "import_module",
        lambda name, *rest: fake if name == "datasets" else real(name, *rest),
    )
    return fake


def make_config(tmp_path, **changes):
    fields = {"path": "someone/something", "image_size": 16, "cache": str(tmp_path / "cache")}
    return DataConfig(name="huggingface", **{**fields, **changes})


def test_images(library, tmp_path):
    library.found = {
        "train": make_images(4),
        "validation": make_images(2, seed=20),
        "test": make_images(3, seed=40),
    }
    data = read_huggingface(make_config(tmp_path))
    assert library.asked == [("hub", "someone/something")]
    assert isinstance(data.inputs, np.memmap) and data.inputs.shape == (9, 16, 16, 3)
    assert data.class_names == ("cat", "dog")
    # The official test part may stand anywhere, but is marked.
    assert data.official_test.sum() == 3
    expected = image_store_module.decode
    for row, seed in zip(data.inputs[data.official_test], (40, 41, 42), strict=True):
        np.testing.assert_array_equal(
            row, expected(io.BytesIO(encoded(make_picture(seed=seed))), 16)
        )
    np.testing.assert_array_equal(data.labels[data.official_test], [0, 1, 0])


def test_images_in_files_and_from_disk(library, tmp_path):
    table = make_images(3)
    for i, value in enumerate(table.columns["img"]):
        path = tmp_path / f"{i}.png"
        path.write_bytes(value["bytes"])
        table.columns["img"][i] = {"bytes": None, "path": str(path)}
    library.found = table
    data = read_huggingface(make_config(tmp_path, path=str(tmp_path)))
    assert library.asked == [("disk", str(tmp_path))]
    assert len(data) == 3 and data.official_test is None


@pytest.mark.parametrize("value", [{"bytes": b"damaged", "path": None}, None])
def test_corrupt_image(library, tmp_path, value):
    library.found = make_images()
    library.found.columns["img"][2] = value
    with pytest.raises(DataError, match=r"train\[2\]\.img cannot be decoded"):
        read_huggingface(make_config(tmp_path))
    with pytest.warns(UserWarning, match=r"1 of 4 pictures cannot be decoded: train\[2\]\.img"):
        data = read_huggingface(make_config(tmp_path, on_corrupt="skip"))
    np.testing.assert_array_equal(data.labels, [0, 1, 1])


def test_second_run_uses_the_store_unless_the_table_changed(library, tmp_path, monkeypatch):
    library.found = make_images()
    read_huggingface(make_config(tmp_path))
    library.found = make_images(seed=1)
    read_huggingface(make_config(tmp_path))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(image_store_module, "decode", None)
    read_huggingface(make_config(tmp_path))


def test_texts(library, tmp_path):
    library.found = {"train": make_texts(), "test": make_texts(("five", "six"), (1, 0))}
    raw = read_huggingface(make_config(tmp_path))
    assert list(raw.texts) == ["one", "two", "three", "four", "five", "six"]
    np.testing.assert_array_equal(raw.labels, [0, 1, 1, 0, 1, 0])
    np.testing.assert_array_equal(raw.official_test, [False] * 4 + [True] * 2)
    assert raw.class_names == ("no", "yes")


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["x", "b", "x", "a"], ("a", "b", "x"), [2, 1, 2, 0]),
        ([10, 9, 10, 2], ("2", "9", "10"), [2, 1, 2, 0]),
    ],
)
def test_labels_without_names(library, tmp_path, labels, names, numbers):
    library.found = make_texts(labels=labels, label=Value("int64"))
    raw = read_huggingface(make_config(tmp_path))
    assert raw.class_names == names
    np.testing.assert_array_equal(raw.labels, numbers)


def test_named_columns(library, tmp_path):
    library.found = make_texts(title=Value("string"), mark=ClassLabel(["a", "b"]))
    library.found.columns["mark"] = [1, 1, 0, 1]
    raw = read_huggingface(make_config(tmp_path, input_column="title", label_column="mark"))
    np.testing.assert_array_equal(raw.labels, [1, 1, 0, 1])


@pytest.mark.parametrize(
    ("found", "changes", "message"),
    [
        ({"test": make_texts()}, {}, "has splits test, but none called train"),
        (make_texts(), {"label_column": "mark"}, "split train, has no column mark; it has text"),
        (make_texts(), {"input_column": "mark"}, "which column holds the inputs.*in text"),
        (make_texts(text=Value("int64")), {}, "Pictures or texts are in none"),
        (
            {"train": make_texts(), "test": make_texts(labels=(0, 1, -1, 0))},
            {},
            r"1 labels out of range, first -1; expected 0 to 1 \(-1 often stands for no label",
        ),
        (make_images(labels=[0, 1, 2, 0]), {}, "1 labels out of range, first 2"),
        (make_texts(labels=(0, 1, None, 0)), {}, "must hold whole numbers or strings, without"),
        (make_texts(labels=(3, 3, 3, 3), label=Value("int64")), {}, r"one class only \(3\)"),
        (make_texts(labels=(3, -1, 3, 3), label=Value("int64")), {}, "has label -1"),
        (make_texts(("a", None, "b", "c")), {}, "text 1 is None, expected a string"),
        (make_texts(("a", "", "b", "c")), {}, "1 texts are empty, first text 1"),
    ],
)
def test_bad_datasets(library, tmp_path, found, changes, message):
    library.found = found
    with pytest.raises(DataError, match=message):
        read_huggingface(make_config(tmp_path, **changes))
    assert not (tmp_path / "cache").exists()


def test_not_there(library, tmp_path):
    def fail(path):
        raise FileNotFoundError("Couldn't find it")

    library.load_dataset = library.load_from_disk = fail
    with pytest.raises(DataError, match=r"something cannot be read from the hub \(Couldn't find"):
        read_huggingface(make_config(tmp_path))
    with pytest.raises(DataError, match="as a directory of save_to_disk"):
        read_huggingface(make_config(tmp_path, path=str(tmp_path)))


def test_package_not_installed(tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(hf_datasets.importlib, "import_module", absent)
    with pytest.raises(DataError, match=r"needs the package datasets: pip install datasets"):
        read_huggingface(make_config(tmp_path))


# The package itself


@pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the extra huggingface is not installed"
)
@pytest.mark.filterwarnings("default")
def test_the_real_package(tmp_path):
    real = importlib.import_module("datasets")
    features = real.Features({"img": real.Image(), "label": real.ClassLabel(names=["a", "b"])})

    def table(seeds):
        values = [{"bytes": encoded(make_picture(seed=s)), "path": None} for s in seeds]
        labels = [s % 2 for s in seeds]
        return real.Dataset.from_dict({"img": values, "label": labels}, features=features)

    found = real.DatasetDict({"train": table([0, 1, 2]), "test": table([3, 4])})
    found.save_to_disk(str(tmp_path / "saved"))
    config = make_config(tmp_path, path=str(tmp_path / "saved"))
    data = read_huggingface(config)
    assert data.class_names == ("a", "b")
    np.testing.assert_array_equal(data.labels, [0, 1, 0, 1, 0])
    np.testing.assert_array_equal(data.official_test, [False] * 3 + [True] * 2)
    assert np.abs(data.inputs[3].astype(int) - read_huggingface(config).inputs[3]).max() == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1

    texts = real.Dataset.from_dict({"text": ["one", "two"], "label": [1, 0]})
    texts.save_to_disk(str(tmp_path / "texts"))
    raw = read_huggingface(make_config(tmp_path, path=str(tmp_path / "texts")))
    assert list(raw.texts) == ["one", "two"] and raw.class_names == ("0", "1")
