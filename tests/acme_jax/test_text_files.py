import json

import numpy as np
import pytest

from acme_jax import datasets
from acme_jax.config import DataConfig
from acme_jax.idx import DataError

ROWS = [("a fine day", "pos"), ('so "bad", really\nbad', "neg"), ("naïve 日本", "pos")]


def quoted(value):
    return '"' + value.replace('"', '""') + '"'


def write(directory, suffix, rows=ROWS, stem="data"):
    path = directory / f"{stem}{suffix}"
    if suffix == ".jsonl":
        lines = [json.dumps({"label": label, "text": text, "id": 3}) for text, label in rows]
    else:
        by = "\t" if suffix == ".tsv" else ","
        lines = [by.join(("id", "label", "text"))]
        lines += [by.join(("3", str(label), quoted(text))) for text, label in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path, **changes):
    return datasets.load(DataConfig(name="text", path=str(path), **changes))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_files(tmp_path, suffix):
    raw = read(write(tmp_path, suffix))
    assert list(raw.texts) == [text for text, _ in ROWS]
    assert raw.class_names == ("neg", "pos") and raw.num_classes == 2
    np.testing.assert_array_equal(raw.labels, [1, 0, 1])
    assert raw.labels.dtype == np.int32 and raw.official_test is None
    assert raw.sample_bytes == np.mean([len(text.encode()) for text, _ in ROWS])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_whole_numbers_are_sorted_as_such(tmp_path, suffix):
    rows = [(f"text {label}", label) for label in (10, 9, 2, 10)]
    raw = read(write(tmp_path, suffix, rows))
    assert raw.class_names == ("2", "9", "10")
    np.testing.assert_array_equal(raw.labels, [2, 1, 0, 2])


def test_other_columns_and_byte_order_mark(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("review,sentiment\nfine,1\nbad,0\n", encoding="utf-8-sig")
    raw = read(path, input_column="review", label_column="sentiment")
    assert list(raw.texts) == ["fine", "bad"]
    with pytest.raises(DataError, match=r"line 2 has no column text; it has review, sentiment\. R"):
        read(path, label_column="sentiment")
    with pytest.raises(DataError, match=r"no column label; .*give --data\.label_column"):
        read(path, input_column="review")


@pytest.mark.parametrize("parts", [("test",), ("validation",), ("dev", "test")])
def test_directory_with_parts(tmp_path, parts):
    write(tmp_path, ".csv", ROWS, "train")
    for part in parts:
        write(tmp_path, ".jsonl", [(f"of {part}", "pos"), ("x", "neg")], part)
    raw = read(tmp_path)
    official = "test" if "test" in parts else parts[0]
    for text, test in zip(raw.texts, raw.official_test, strict=True):
        assert not test or text in (f"of {official}", "x")
    assert raw.official_test.sum() == 2 and len(raw) == 3 + 2 * len(parts)
    assert not raw.official_test[:3].any()


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        (".csv", "", "has no rows"),
        (".csv", "text,label\n", "has no rows"),
        (".csv", "text,label\nfine,1\n\nbad\n", "line 4 has 1 fields, the header has 2"),
        (".csv", "text,label\nyes, fine,1\n", "line 2 has 3 fields.*quote texts that hold"),
        (".csv", 'text,label\n"fine,1\n', "cannot be read"),
        (".csv", "text,text\na,b\n", "names a column twice: text, text"),
        (".csv", "text,label\nfine,1\n ,0\n", "line 3: the text is empty"),
        (".csv", "text,label\nfine,1\nbad,\n", "line 3: the label is empty"),
        (".csv", "text,label\nfine,1\nbad,-1\n", "line 3: label -1 is negative"),
        (".csv", "text,label\nfine,1\nbad,1\n", r"one class only \(label 1\)"),
        (".jsonl", '{"text": "a", "label": 1}\n{"text": "b"', "line 2 is not JSON"),
        (".jsonl", '["a", 1]\n', "line 1 is .*, expected an object"),
        (".jsonl", '{"text": "a"}\n', "line 1 has no column label; it has text"),
        (".jsonl", '{"text": 3, "label": 1}\n', "line 1: the text is 3, expected a string"),
        (".jsonl", '{"text": null, "label": 1}\n', "the text is None, expected a string"),
        (".jsonl", '{"text": "a", "label": 0.5}\n', "the label is 0.5, expected a whole"),
        (".jsonl", '{"text": "a", "label": true}\n', "the label is True, expected a whole"),
        (".jsonl", '{"text": "\\ud83d", "label": 1}\n', "half a character"),
        (".txt", "text,label\na,1\n", r"is none of \.csv, \.tsv, \.jsonl"),
    ],
)
def test_bad_files(tmp_path, suffix, content, message):
    path = tmp_path / f"data{suffix}"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_not_utf8(tmp_path):
    path = tmp_path / "data.csv"
    path.write_bytes("text,label\nnaïve,1\nfine,0\n".encode("latin1"))
    with pytest.raises(DataError, match=r"data\.csv is not UTF-8 \(byte 0xef.*iconv"):
        read(path)


def test_bad_directories(tmp_path):
    with pytest.raises(DataError, match=r"absent is missing; expected a \.csv"):
        read(tmp_path / "absent")
    write(tmp_path, ".csv", stem="test")
    with pytest.raises(DataError, match="has no train file"):
        read(tmp_path)
    write(tmp_path, ".csv", stem="train")
    write(tmp_path, ".tsv", stem="train")
    with pytest.raises(DataError, match=r"has train\.csv and train\.tsv; keep one"):
        read(tmp_path)
    (tmp_path / "train.tsv").unlink()
    write(tmp_path, ".csv", [("x", "new")], stem="test")
    with pytest.raises(DataError, match="label new has only test rows"):
        read(tmp_path)
