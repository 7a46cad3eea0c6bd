import numpy as np
import pytest

from acme_jax.idx import DataError
from acme_jax.labelled import Dataset, RawText, tokenise

LABELS = np.array([0, 1, 1, 0], np.int32)
BYTES = np.arange(4 * 2 * 3 * 3, dtype=np.uint8).reshape(4, 2, 3, 3)
IDS = np.array([[1, 5, 2, 0], [1, 7, 2, 0], [1, 5, 7, 2], [1, 2, 0, 0]], np.int32)


def test_images_in_bytes():
    data = Dataset("toy", BYTES, LABELS, 2)
    assert data.kind == "images"
    assert data.input_shape == data.image_shape == (2, 3, 3)
    assert data.sample_bytes == 18 and isinstance(data.sample_bytes, float)


def test_mapped_images_are_neither_copied_nor_scanned(tmp_path, monkeypatch):
    np.save(tmp_path / "images.npy", BYTES)
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    reads = []
    monkeypatch.setattr(np.memmap, "__array_finalize__", lambda self, obj: reads.append(obj))
    data = Dataset("toy", images, LABELS, 2)
    assert data.inputs is images
    assert not reads


def test_token_ids():
    data = Dataset("toy", IDS, LABELS, 2, text_bytes=7.5, class_names=("a", "b"))
    assert data.kind == "text"
    assert data.input_shape == (4,)
    assert data.sample_bytes == 7.5
    with pytest.raises(DataError, match="holds texts, which have no image shape"):
        _ = data.image_shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": IDS.astype(np.int64)}, r"token ids, int32 \[N, T\]; got int64 \[4, 4\]"),
        ({"inputs": IDS - 1}, "token ids must not be negative, got -1"),
        ({"inputs": IDS[:3]}, "3 texts but 4 labels"),
        ({"inputs": IDS[:, :0]}, r"inputs are empty, \[4, 0\]"),
        ({"text_bytes": None}, "text_bytes must be given for texts"),
        ({"inputs": BYTES}, "text_bytes must be given for texts, and for them alone"),
        ({"class_names": ("a",)}, "1 different class names for 2 classes"),
        ({"class_names": ("a", "a")}, "1 different class names for 2 classes"),
        ({"official_test": np.zeros(3, bool)}, r"official_test must be bool \[4\], got bool \[3\]"),
        ({"official_test": np.zeros(4, int)}, "official_test must be bool"),
    ],
)
def test_bad_datasets(changes, message):
    fields = {"inputs": IDS, "labels": LABELS, "num_classes": 2, "text_bytes": 3.0}
    with pytest.raises(DataError, match=message):
        Dataset("toy", **{**fields, **changes})


def make_raw(texts=("one", "zwölf", "drei", "vier")):
    return RawText("toy", texts, LABELS, 2, ("x", "y"), np.array([False, False, True, True]))


def test_tokenise_keeps_everything_but_the_text():
    raw = make_raw()
    data = tokenise(raw, lambda texts: np.array([[len(t), 0] for t in texts], np.int64))
    np.testing.assert_array_equal(data.inputs, [[3, 0], [5, 0], [4, 0], [4, 0]])
    assert data.inputs.dtype == np.int32
    np.testing.assert_array_equal(data.labels, LABELS)
    np.testing.assert_array_equal(data.official_test, raw.official_test)
    assert data.class_names == ("x", "y") and data.name == "toy"
    assert data.sample_bytes == raw.sample_bytes == (3 + 6 + 4 + 4) / 4  # bytes, not letters


@pytest.mark.parametrize(
    "ids", [np.zeros((3, 2), int), np.zeros(4, int), np.zeros((4, 2), np.float32)]
)
def test_tokeniser_that_gives_something_else(ids):
    with pytest.raises(DataError, match=r"the tokeniser gave .* for 4 texts; expected whole"):
        tokenise(make_raw(), lambda texts: ids)


def test_empty_texts():
    with pytest.raises(DataError, match="2 texts are empty, first text 1"):
        make_raw(("one", " \n", "", "four"))


def test_texts_that_do_not_match_the_labels():
    with pytest.raises(DataError, match="3 texts but 4 labels"):
        make_raw(("one", "two", "three"))
