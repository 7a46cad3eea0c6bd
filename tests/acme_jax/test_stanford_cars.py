"""Both layouts with a few pictures; the .mat files have the fields of the official devkit."""

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from acme_jax import datasets
from acme_jax.config import DataConfig
from acme_jax.idx import DataError

NAMES = ("AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "Acura RL Sedan 2012")
TRAIN = {"00001.jpg": 3, "00002.jpg": 1, "00003.jpg": 2, "00004.jpg": 3}  # class from 1
TEST = {"00001.jpg": 2, "00002.jpg": 3}


def write_jpeg(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (colour, colour, colour)).save(path, quality=95)


def colour_of(part, name):
    return 10 * int(name[:5]) + (100 if part == "test" else 0)


def write_annotations(path, rows, **columns):
    kinds = [(f"bbox_{c}", "O") for c in ("x1", "y1", "x2", "y2")]
    table = np.zeros((1, len(rows)), [*kinds, ("class", "O"), ("fname", "O")])
    for i, (name, number) in enumerate(rows.items()):
        row = (np.uint8([[3]]), np.uint8([[4]]), np.uint8([[30]]), np.uint8([[20]]))
        table[0, i] = (*row, np.array([[number]], np.int16), name)
    savemat(path, {"annotations": table, **columns})


def write_official(root, train=TRAIN, test=TEST, beside=True):
    devkit = root / "devkit"
    devkit.mkdir(parents=True)
    savemat(devkit / "cars_meta.mat", {"class_names": np.array(NAMES, dtype=object)[None]})
    write_annotations(devkit / "cars_train_annos.mat", train)
    place = root if beside else devkit
    write_annotations(place / "cars_test_annos_withlabels.mat", test)
    for part, rows in (("train", TRAIN), ("test", TEST)):
        for name in rows:
            write_jpeg(root / f"cars_{part}" / name, colour_of(part, name))


def write_kaggle(root, tables=True):
    for part, rows in (("train", TRAIN), ("test", TEST)):
        for name in rows:
            # In this dataset file names are unique in a part only, as here.
            folder = NAMES[rows[name] - 1].replace("/", "-")
            write_jpeg(root / "car_data" / "car_data" / part / folder / name, colour_of(part, name))
        if tables:
            lines = [f"{name},39,116,569,375,{number}\n" for name, number in rows.items()]
            (root / f"anno_{part}.csv").write_text("".join(lines))
    if tables:
        (root / "names.csv").write_text("".join(f"{name}\n" for name in NAMES))


def read(root, tmp_path):
    config = DataConfig(
        name="stanford_cars", path=str(root), image_size=16, cache=str(tmp_path / "cache")
    )
    return datasets.load(config)


def samples(data):
    """(colour, class name, official test) of each row."""
    return {
        (int(image[8, 8, 0]), data.class_names[label].replace("/", "-"), bool(test))
        for image, label, test in zip(data.inputs, data.labels, data.official_test, strict=True)
    }


EXPECTED = {
    (colour_of(part, name), NAMES[number - 1].replace("/", "-"), part == "test")
    for part, rows in (("train", TRAIN), ("test", TEST))
    for name, number in rows.items()
}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("below", ["", "stanford_cars"])
def test_official_layout(tmp_path, beside, below):
    root = tmp_path / "root"
    write_official(root / below, beside=beside)
    data = read(root, tmp_path)
    assert data.class_names == NAMES and data.num_classes == 3
    np.testing.assert_array_equal(data.labels, [2, 0, 1, 2, 1, 2])
    assert samples(data) == EXPECTED
    assert data.inputs.shape == (6, 16, 16, 3)


@pytest.mark.parametrize("below", ["", "car_data", "car_data/car_data"])
@pytest.mark.parametrize("tables", [True, False])
def test_kaggle_layout(tmp_path, tables, below):
    root = tmp_path / "root"
    write_kaggle(root, tables)
    data = read(root / below, tmp_path)
    assert samples(data) == EXPECTED
    if tables and not below:  # class numbers as in the official layout
        assert data.class_names == tuple(name.replace("/", "-") for name in NAMES)
    else:
        assert data.class_names == tuple(sorted(name.replace("/", "-") for name in NAMES))


def damage_official(root, kind):
    devkit = root / "devkit"
    if kind == "no test labels":
        (root / "cars_test_annos_withlabels.mat").unlink()
    elif kind == "no devkit":
        for path in devkit.iterdir():
            path.unlink()
    elif kind == "truncated":
        path = devkit / "cars_train_annos.mat"
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "not matlab":
        (devkit / "cars_meta.mat").write_text("<html>404</html>")
    elif kind == "other variable":
        savemat(devkit / "cars_meta.mat", {"names": [1, 2]})
    elif kind == "unlabelled":  # the devkit's cars_test_annos.mat, renamed
        table = np.zeros((1, 2), [("bbox_x1", "O"), ("fname", "O")])
        table["fname"][0] = list(TEST)
        savemat(root / "cars_test_annos_withlabels.mat", {"annotations": table})
    elif kind == "class out of range":
        write_annotations(devkit / "cars_train_annos.mat", {**TRAIN, "00003.jpg": 4})
    elif kind == "class 0":
        write_annotations(devkit / "cars_train_annos.mat", {**TRAIN, "00003.jpg": 0})
    elif kind == "picture missing":
        (root / "cars_train" / "00002.jpg").unlink()
    elif kind == "picture not annotated":
        write_jpeg(root / "cars_test" / "00009.jpg", 9)
    elif kind == "no pictures":
        for path in (root / "cars_test").iterdir():
            path.unlink()
        (root / "cars_test").rmdir()
    elif kind == "corrupt":
        path = root / "cars_test" / "00002.jpg"
        path.write_bytes(path.read_bytes()[:400])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no test labels", r"lacks cars_test_annos_withlabels\.mat, in devkit/ or beside it; give"),
        ("no devkit", r"lacks cars_meta\.mat"),
        ("truncated", r"cars_train_annos\.mat is not a sound MATLAB file"),
        ("not matlab", r"cars_meta\.mat is not a sound MATLAB file"),
        ("other variable", "has no variable class_names"),
        ("unlabelled", "has annotations without class"),
        ("class out of range", r"1 classes out of range, first 00003.jpg with 4; .*classes 1 to 3"),
        ("class 0", r"1 classes out of range, first 00003.jpg with 0"),
        ("picture missing", r"1 are missing \(first 00002.jpg\), 0 are not annotated"),
        ("picture not annotated", r"0 are missing, 1 are not annotated \(first 00009.jpg\)"),
        ("no pictures", "cars_test cannot be listed"),
        ("corrupt", r"cars_test/00002\.jpg cannot be decoded"),
    ],
)
def test_damaged_official_layout(tmp_path, kind, message):
    root = tmp_path / "root"
    write_official(root)
    damage_official(root, kind)
    with pytest.raises(DataError, match=message):
        read(root, tmp_path)


def damage_kaggle(root, kind):
    data = root / "car_data" / "car_data"
    if kind == "no test":
        (data / "test").rename(root / "elsewhere")
    elif kind == "name too many":
        (root / "names.csv").write_text("".join(f"{name}\n" for name in (*NAMES, "Fiat 500")))
    elif kind == "wrong class":
        (root / "anno_train.csv").write_text(
            (root / "anno_train.csv").read_text().replace("375,1\n", "375,2\n")
        )
    elif kind == "row missing":
        lines = (root / "anno_test.csv").read_text().splitlines()
        (root / "anno_test.csv").write_text(lines[0])
    elif kind == "picture missing":
        (data / "train" / NAMES[2] / "00001.jpg").unlink()
    elif kind == "no numbers":
        (root / "anno_test.csv").write_text("name,x1,y1,x2,y2,class\n")
    elif kind == "not text":
        (root / "names.csv").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no test", "has train/ but no test/"),
        ("name too many", "names 4 classes but .* has 3 class directories; they differ in Fiat"),
        ("wrong class", "00002.jpg has class 2 but lies in that of class 1"),
        ("row missing", r"anno_test.csv .* 00002.jpg has no row but lies in that of class 3"),
        ("picture missing", "00001.jpg has class 3 but is missing"),
        ("no numbers", "anno_test.csv line 1: expected file name, 4 numbers, class number"),
        ("not text", "names.csv cannot be read"),
    ],
)
def test_damaged_kaggle_layout(tmp_path, kind, message):
    root = tmp_path / "root"
    write_kaggle(root)
    damage_kaggle(root, kind)
    with pytest.raises(DataError, match=message):
        read(root, tmp_path)


def test_neither_layout(tmp_path):
    with pytest.raises(DataError, match="has neither cars_train/ nor car_data/; give as"):
        read(tmp_path, tmp_path)
    with pytest.raises(DataError, match="absent is missing or no directory"):
        read(tmp_path / "absent", tmp_path)
