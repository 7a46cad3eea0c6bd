import os

import numpy as np
import pytest
from PIL import Image

from acme_jax import datasets
from acme_jax.config import DataConfig
from acme_jax.idx import DataError
from acme_jax.image_folder import list_folder


def write_picture(path, colour=0, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 2 * colour, 255 - colour)).save(path)


def write_class(directory, name, num=2, colour=0):
    for i in range(num):
        write_picture(directory / name / f"{i}.png", colour + i)


def read(root, tmp_path, **changes):
    fields = {"image_size": 8, "cache": str(tmp_path / "cache")}
    return datasets.load(DataConfig(name="image_folder", path=str(root), **{**fields, **changes}))


def test_one_directory_a_class(tmp_path):
    root = tmp_path / "root"
    write_class(root, "dog", 3, colour=50)
    write_class(root, "cat", 2, colour=10)
    write_picture(root / "cat" / "deeper" / "x.BMP", 90)
    (root / "dog" / "notes.txt").write_text("not a picture")
    (root / "dog" / ".hidden.png").write_text("not looked at")
    (root / ".git").mkdir()
    data = read(root, tmp_path)
    assert data.class_names == ("cat", "dog")
    np.testing.assert_array_equal(data.labels, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(data.inputs[:, 3, 4, 0], [10, 11, 90, 50, 51, 52])
    np.testing.assert_array_equal(data.inputs[0, 0, 0], [10, 20, 245])
    assert data.inputs.dtype == np.uint8 and isinstance(data.inputs, np.memmap)
    assert data.official_test is None and data.image_shape == (8, 8, 3)


@pytest.mark.parametrize("parts", [("test",), ("val",), ("validation",), ("val", "test")])
def test_official_parts(tmp_path, parts):
    root = tmp_path / "root"
    for part in ("train", *parts):
        for name in ("a", "b"):
            write_class(root / part, name)
    listing = list_folder(root)
    official = "test" if "test" in parts else parts[0]
    for file, label, test in zip(listing.files, listing.labels, listing.official_test, strict=True):
        part, name, _ = file.split("/")
        assert test == (part == official) and listing.class_names[label] == name
    assert len(listing.files) == 4 * (1 + len(parts))


def test_a_class_called_train_is_a_class(tmp_path):
    for name in ("train", "bus"):
        write_class(tmp_path, name)
    assert list_folder(tmp_path).class_names == ("bus", "train")


def test_corrupt_picture_skipped_with_its_label_and_mark(tmp_path):
    root = tmp_path / "root"
    for part in ("train", "test"):
        for name in ("a", "b"):
            write_class(root / part, name, colour=30)
    (root / "train" / "b" / "0.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"train/b/0\.png cannot be decoded \(not a picture"):
        read(root, tmp_path)
    with pytest.warns(UserWarning, match=r"1 of 8 pictures cannot be decoded: train/b/0\.png;"):
        data = read(root, tmp_path, on_corrupt="skip")
    np.testing.assert_array_equal(data.labels, [0, 0, 1, 0, 0, 1, 1])
    np.testing.assert_array_equal(data.official_test, [False] * 3 + [True] * 4)
    np.testing.assert_array_equal(data.inputs[:, 0, 0, 0], [30, 31, 31, 30, 31, 30, 31])


def make_bad(root, kind):
    if kind == "missing":
        return
    root.mkdir()
    if kind == "a file":
        root.rmdir()
        root.write_text("")
    elif kind == "flat":
        write_picture(root / "a.png")
    elif kind == "one class":
        write_class(root, "a")
    elif kind == "no pictures":
        write_class(root, "a")
        (root / "b").mkdir()
        (root / "b" / "x.txt").write_text("")
    elif kind == "new class in test":
        for name in ("a", "b"):
            write_class(root / "train", name)
        write_class(root / "test", "c")
    elif kind == "another part":
        write_class(root / "train", "a")
        write_class(root / "unlabelled", "b")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "root is missing; expected <path>/<class>"),
        ("a file", "root cannot be listed"),
        ("empty", "root has no class directories; expected"),
        ("flat", "root has no class directories; expected"),
        ("one class", r"one class only \(a\), nothing to tell apart"),
        ("no pictures", r"class directory .*root/b has no pictures"),
        ("new class in test", "class c is in the test part but not in train"),
        ("another part", "has train/ and also unlabelled; move those"),
    ],
)
def test_bad_folders(tmp_path, kind, message):
    make_bad(tmp_path / "root", kind)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "root", tmp_path)
    assert not (tmp_path / "cache").exists()


def test_unreadable_class_directory(tmp_path, monkeypatch):
    root = tmp_path / "root"
    for name in ("a", "b"):
        write_class(root, name)
    # By a fake, because the tests may run as root, whom no permission stops.
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"root/b cannot be listed \(Permission denied\)"):
        list_folder(root)
