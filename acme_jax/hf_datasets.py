"""Datasets of the Hugging Face package `datasets`, an optional extra."""

from __future__ import annotations

import hashlib
import importlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from acme_jax.config import DataConfig
from acme_jax.idx import DataError
from acme_jax.image_store import Progress, Sources, open_store
from acme_jax.labelled import Dataset, RawText

_TEST_PARTS = ("test", "validation", "valid", "val")
"""The first of these that is there is the official test part; the others are trained on."""


def read_huggingface(config: DataConfig, progress: Progress | None = None) -> Dataset | RawText:
    """Reads `config.path`: a directory of `save_to_disk`, or an id on the hub (downloaded).

    Of several splits, train is needed; test, or else validation, becomes the official test
    part, and validation beside test counts as training data. The label column (default:
    label) holds class numbers, or strings, which are then sorted. The input column (default:
    the only one of its kind) holds pictures or strings. Pictures are decoded one by one into
    the image store and never all held in memory.

    Raises:
      DataError: the package is not installed, there is no such dataset, columns are missing or
        of another kind, labels missing, or as of `image_store.open_store` and `RawText`.
    """
    if config.path is None:
        raise DataError(
            "dataset huggingface needs a directory of save_to_disk, or an id on the hub, as "
            "--data.path"
        )
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise DataError(
            "dataset huggingface needs the package datasets: pip install datasets"
        ) from None
    parts = _parts(library, config.path)
    first = next(iter(parts.values()))
    label_column = config.label_column or "label"
    input_column, is_image = _input_column(first.features, config)
    for part, table in parts.items():
        for column in (input_column, label_column):
            if column not in table.features:
                raise DataError(
                    f"dataset {config.path}, split {part}, has no column {column}; it has "
                    f"{', '.join(table.features)}. Give --data.input_column and "
                    "--data.label_column"
                )
    tests = [part for part in _TEST_PARTS if part in parts]
    is_test = np.concatenate(
        [np.full(len(table), part in tests[:1]) for part, table in parts.items()]
    )
    labels, class_names = _labels(parts, label_column, config.path)
    if not is_image:
        texts = [text for table in parts.values() for text in table[input_column]]
        return _texts(config.path, texts, labels, class_names, is_test)
    sources = _sources(library, parts, input_column)
    store = open_store(sources, config, progress)
    return Dataset(
        "huggingface",
        store.images,
        labels[store.kept],
        len(class_names),
        is_test[store.kept] if is_test.any() else None,
        class_names,
    )


def _parts(library: Any, path: str) -> dict[str, Any]:
    """The tables by split, train first."""
    place = Path(path).expanduser()
    try:
        found = library.load_from_disk(str(place)) if place.is_dir() else library.load_dataset(path)
    # The package raises its own and its dependencies' errors, of many kinds.
    except Exception as error:
        how = "as a directory of save_to_disk" if place.is_dir() else "from the hub"
        raise DataError(f"dataset {path} cannot be read {how} ({error})") from None
    if not isinstance(found, Mapping):
        return {"train": found}
    if "train" not in found:
        raise DataError(f"dataset {path} has splits {', '.join(found)}, but none called train")
    known = ("train", *_TEST_PARTS)
    return {part: found[part] for part in known if part in found}


def _input_column(features: Mapping[str, Any], config: DataConfig) -> tuple[str, bool]:
    """The column of inputs and whether it holds pictures."""
    kinds = {}
    for name, feature in features.items():
        if type(feature).__name__ == "Image":
            kinds[name] = True
        elif getattr(feature, "dtype", None) in ("string", "large_string"):
            kinds[name] = False
    if config.input_column in kinds:
        return config.input_column, kinds[config.input_column]
    label = config.label_column or "label"
    choices = [name for name in kinds if name != label]
    pictures = [name for name in choices if kinds[name]]
    choices = pictures or choices
    if config.input_column is None and len(choices) == 1:
        return choices[0], bool(pictures)
    if config.input_column is None and "text" in choices:
        return "text", False
    raise DataError(
        f"dataset {config.path}: which column holds the inputs? Pictures or texts are in "
        f"{', '.join(kinds) or 'none'}; name one with --data.input_column"
    )


def _labels(parts: Mapping[str, Any], column: str, path: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class numbers of all rows, and the names of the classes."""
    values = [label for table in parts.values() for label in table[column]]
    names = getattr(parts["train"].features[column], "names", None)
    if any(isinstance(value, bool) or not isinstance(value, int | str) for value in values):
        raise DataError(
            f"dataset {path}: column {column} must hold whole numbers or strings, without gaps"
        )
    if names is None:
        words = [str(value) for value in values]
        is_number = all(isinstance(value, int) for value in values)
        names = sorted(set(words), key=int if is_number else None)
        if is_number and int(names[0]) < 0:
            raise DataError(f"dataset {path}: column {column} has label {names[0]}, expected >= 0")
        number = {name: i for i, name in enumerate(names)}
        values = [number[word] for word in words]
    outside = [
        value for value in values if not isinstance(value, int) or not 0 <= value < len(names)
    ]
    if outside:
        raise DataError(
            f"dataset {path}: column {column} has {len(outside)} labels out of range, first "
            f"{outside[0]!r}; expected 0 to {len(names) - 1} (-1 often stands for no label: "
            "leave such rows out)"
        )
    if len(names) < 2:
        raise DataError(f"dataset {path} has one class only ({names[0]}), nothing to tell apart")
    return np.array(values, np.int32), tuple(names)


def _texts(
    path: str,
    texts: list[Any],
    labels: np.ndarray,
    class_names: tuple[str, ...],
    is_test: np.ndarray,
) -> RawText:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"dataset {path}: text {i} is {text!r}, expected a string")
    return RawText(
        "huggingface",
        texts,
        labels,
        len(class_names),
        class_names,
        is_test if is_test.any() else None,
    )


def _sources(library: Any, parts: Mapping[str, Any], column: str) -> Sources:
    """The encoded pictures of all parts, one after the other."""
    tables = [table.cast_column(column, library.Image(decode=False)) for table in parts.values()]
    names = [f"{part}[{i}].{column}" for part, table in parts.items() for i in range(len(table))]
    starts = np.cumsum([0, *map(len, tables)])

    def encoded(i: int) -> BinaryIO:
        table = int(np.searchsorted(starts, i, side="right")) - 1
        value = tables[table][int(i - starts[table])][column]
        if value is None:
            raise OSError("there is no picture")
        if value["bytes"] is not None:
            return io.BytesIO(value["bytes"])
        return open(value["path"], "rb")

    # The package names each state of a table by a hash of its files and of what was done since.
    digest = hashlib.sha256()
    for part, table in parts.items():
        digest.update(f"{part} {len(table)} {column} {table._fingerprint}\n".encode())
    return Sources(names, encoded, digest.hexdigest())
