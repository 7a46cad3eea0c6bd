"""Texts and labels from .csv, .tsv or .jsonl files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from acme_jax.config import DataConfig
from acme_jax.idx import DataError
from acme_jax.labelled import RawText

Label = int | str
_SUFFIXES = (".csv", ".tsv", ".jsonl")
_TEST_PARTS = ("test", "val", "valid", "validation", "dev")
"""The first of these that is there is the official test part; the others are trained on."""
_LAYOUT = (
    "expected a .csv or .tsv file with a header, a .jsonl file of objects, or a directory with "
    "train and test files of those kinds"
)


class Row(NamedTuple):
    """One sample."""

    where: str  # file and line, for messages
    text: str
    label: Label


def read_text(config: DataConfig) -> RawText:
    """Reads `config.path`: one file, or a directory with train.* and test.* (or val.*).

    Columns are `config.input_column` (default: text) and `config.label_column` (default:
    label); others are not looked at. Labels that are all whole numbers are sorted as such,
    others as words, and numbered from 0. Files are UTF-8. With test.* and val.* both, val.*
    counts as training data.

    Raises:
      DataError: files or columns missing, not UTF-8, a damaged line, an empty text, a label
        that is missing or negative, or one class only.
    """
    if config.path is None:
        raise DataError(f"dataset text needs a path: {_LAYOUT}")
    text_column, label_column = config.input_column or "text", config.label_column or "label"
    rows: list[Row] = []
    is_test: list[bool] = []
    for path, official in _files(Path(config.path).expanduser()):
        found = list(_read_file(path, text_column, label_column))
        if not found:
            raise DataError(f"{path} has no rows; {_LAYOUT}")
        rows += found
        is_test += [official] * len(found)
    return _numbered(rows, np.array(is_test))


def _numbered(rows: list[Row], is_test: np.ndarray) -> RawText:
    """Numbers the labels; is_test is [N] bool."""
    for row in rows:
        if not row.text.strip():
            raise DataError(f"{row.where}: the text is empty; remove the row or fill it")
        if row.label == "":
            raise DataError(f"{row.where}: the label is empty; remove the row or fill it")
    labels: list[Label] = [row.label for row in rows]
    try:
        labels = [int(label) for label in labels]
    except ValueError:
        labels = [str(label) for label in labels]
    negative = [i for i, label in enumerate(labels) if isinstance(label, int) and label < 0]
    if negative:
        raise DataError(
            f"{rows[negative[0]].where}: label {labels[negative[0]]} is negative, which often "
            "stands for no label; remove such rows"
        )
    classes = sorted(set(labels), key=lambda label: (str(type(label)), label))
    only_test = set(classes) - {c for c, test in zip(labels, is_test, strict=True) if not test}
    if only_test:
        raise DataError(f"dataset text: label {min(map(str, only_test))} has only test rows")
    if len(classes) < 2:
        raise DataError(
            f"dataset text has one class only (label {classes[0]}), nothing to tell apart"
        )
    number = {label: i for i, label in enumerate(classes)}
    return RawText(
        "text",
        [row.text for row in rows],
        np.array([number[label] for label in labels], np.int32),
        len(classes),
        tuple(str(label) for label in classes),
        is_test if is_test.any() else None,
    )


def _files(place: Path) -> list[tuple[Path, bool]]:
    """The files to read and whether each is an official test part."""
    if place.is_file():
        if place.suffix.lower() not in _SUFFIXES:
            raise DataError(f"{place} is none of {', '.join(_SUFFIXES)}; {_LAYOUT}")
        return [(place, False)]
    if not place.is_dir():
        raise DataError(f"{place} is missing; {_LAYOUT}")
    found: dict[str, Path] = {}
    for part in ("train", *_TEST_PARTS):
        paths = [place / f"{part}{s}" for s in _SUFFIXES if (place / f"{part}{s}").is_file()]
        if len(paths) > 1:
            raise DataError(f"{place} has {' and '.join(p.name for p in paths)}; keep one of them")
        if paths:
            found[part] = paths[0]
    if "train" not in found:
        raise DataError(f"{place} has no train file; {_LAYOUT}")
    tests = [part for part in found if part != "train"]
    return [(path, bool(tests) and part == tests[0]) for part, path in found.items()]


def _read_file(path: Path, text_column: str, label_column: str) -> Iterator[Row]:
    read: Callable[[Any, Path], Iterator[tuple[int, dict[str, Any]]]] = (
        _json_lines if path.suffix.lower() == ".jsonl" else _table
    )
    try:
        # utf-8-sig: spreadsheets write a mark before the header.
        with path.open(newline="", encoding="utf-8-sig") as file:
            for line, values in read(file, path):
                for column in (text_column, label_column):
                    if column not in values:
                        raise DataError(
                            f"{path} line {line} has no column {column}; it has "
                            f"{', '.join(map(str, values)) or 'none'}. Rename it, or give "
                            f"--data.{'input' if column == text_column else 'label'}_column"
                        )
                yield _row(f"{path} line {line}", values[text_column], values[label_column])
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x}: {error.reason}); "
            "convert it, for example with iconv -f latin1 -t utf-8"
        ) from None
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error})") from None


def _row(where: str, text: Any, label: Any) -> Row:
    if not isinstance(text, str):
        raise DataError(f"{where}: the text is {text!r}, expected a string")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise DataError(f"{where}: the text holds half a character (a lone surrogate); repair it")
    if isinstance(label, bool) or not isinstance(label, Label):
        raise DataError(f"{where}: the label is {label!r}, expected a whole number or a string")
    return Row(where, text, label.strip() if isinstance(label, str) else label)


def _table(file: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    dialect: dict[str, Any] = {"delimiter": "\t"} if path.suffix.lower() == ".tsv" else {}
    reader = csv.reader(file, strict=True, **dialect)
    header: list[str] | None = None
    for values in reader:
        if header is None:
            header = [name.strip() for name in values]
            if len(set(header)) < len(header):
                raise DataError(f"{path}: the header names a column twice: {', '.join(header)}")
        elif values:
            if len(values) != len(header):
                raise DataError(
                    f"{path} line {reader.line_num} has {len(values)} fields, the header has "
                    f"{len(header)}; quote texts that hold the separator"
                )
            yield reader.line_num, dict(zip(header, values, strict=True))


def _json_lines(file: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, content in enumerate(file, start=1):
        if not content.strip():
            continue
        try:
            values = json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {line} is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise DataError(f"{path} line {line} is {values!r:.40}, expected an object")
        yield line, values
