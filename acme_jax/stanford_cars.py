"""Stanford Cars (Krause et al., 2013) in the official or the Kaggle layout.

Official: cars_train/ and cars_test/ with pictures, devkit/ with cars_meta.mat and
cars_train_annos.mat, and cars_test_annos_withlabels.mat beside or in the devkit. Kaggle
("stanford-car-dataset-by-classes-folder"): car_data/car_data/{train,test}/<class>/ with
pictures, and names.csv, anno_train.csv and anno_test.csv beside. The bounding boxes are not
used: pictures are classified whole.
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from acme_jax.config import DataConfig
from acme_jax.idx import DataError
from acme_jax.image_folder import Listing, decoded, list_folder
from acme_jax.image_store import Progress
from acme_jax.labelled import Dataset

_HOW_TO_GET = (
    "give as --data.path either a directory with what cars_train.tgz (md5 "
    "065e5b463ae28d29e77c1b4b166cfe61), cars_test.tgz (md5 4ce7ebf6a94d07f1952d94dd34c4d501) and "
    "car_devkit.tgz (md5 c3b158d763b6e2245038c8ad08e45376) unpack to and "
    "cars_test_annos_withlabels.mat (md5 b0a2b23655a3edd16d84508592a98d10), once of "
    "https://ai.stanford.edu/~jkrause/cars/car_dataset.html, or the unpacked Kaggle dataset "
    "jutrera/stanford-car-dataset-by-classes-folder"
)


def read_stanford_cars(config: DataConfig, progress: Progress | None = None) -> Dataset:
    """Reads `config.path`; labels are the official class numbers less 1 in both layouts.

    (In the Kaggle layout without names.csv they are the class directories in sorted order.)

    Returns:
      uint8 images [N, image_size, image_size, 3], memory-mapped; those of cars_test or test/
      are marked as official test images.

    Raises:
      DataError: neither layout, files missing or damaged, annotations that do not match the
        pictures, or as of `image_store.open_store`.
    """
    if config.path is None:
        raise DataError(f"dataset stanford_cars needs a path: {_HOW_TO_GET}")
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is missing or no directory; {_HOW_TO_GET}")
    for place in (root, root / "stanford_cars"):  # torchvision makes the second
        if (place / "cars_train").is_dir() or (place / "devkit").is_dir():
            return decoded("stanford_cars", _list_official(place), config, progress)
    for place in (root / "car_data" / "car_data", root / "car_data", root):
        if (place / "train").is_dir():
            return decoded("stanford_cars", _list_kaggle(place, root), config, progress)
    raise DataError(f"{root} has neither cars_train/ nor car_data/; {_HOW_TO_GET}")


def _list_official(root: Path) -> Listing:
    meta = _find(root, "cars_meta.mat")
    class_names = tuple(str(name).strip() for name in _matlab(meta, "class_names"))
    files: list[str] = []
    labels: list[int] = []
    for part, table in (
        ("cars_train", "cars_train_annos.mat"),
        ("cars_test", "cars_test_annos_withlabels.mat"),
    ):
        path = _find(root, table)
        annotations = _matlab(path, "annotations")
        fields = annotations.dtype.names or ()
        lacking = sorted({"fname", "class"} - set(fields))
        if lacking:
            raise DataError(
                f"{path} has annotations without {lacking[0]} (it has "
                f"{', '.join(fields) or 'nothing'}); {_HOW_TO_GET}"
            )
        numbers = [int(number) for number in annotations["class"]]
        names = [str(name).strip() for name in annotations["fname"]]
        bad = [i for i, number in enumerate(numbers) if not 1 <= number <= len(class_names)]
        if bad:
            raise DataError(
                f"{path}: {len(bad)} classes out of range, first {names[bad[0]]} with "
                f"{numbers[bad[0]]}; {meta.name} names classes 1 to {len(class_names)}"
            )
        _check_same(path, root / part, names)
        files += [f"{part}/{name}" for name in names]
        labels += [number - 1 for number in numbers]
    official_test = np.array([file.startswith("cars_test/") for file in files])
    return Listing(root, files, np.array(labels, np.int32), class_names, official_test)


def _find(root: Path, name: str) -> Path:
    for path in (root / "devkit" / name, root / name):
        if path.is_file():
            return path
    raise DataError(f"{root} lacks {name}, in devkit/ or beside it; {_HOW_TO_GET}")


def _matlab(path: Path, variable: str) -> np.ndarray:
    """A variable [n] of a MATLAB file."""
    # SciPy takes a third of a second to import.
    from scipy.io import loadmat

    try:
        content: dict[str, Any] = loadmat(path, squeeze_me=True)
    # Damaged files raise nearly anything: ValueError, TypeError, zlib.error, MatReadError, ...
    except Exception as error:
        raise DataError(
            f"{path} is not a sound MATLAB file ({error}); get it again: {_HOW_TO_GET}"
        ) from None
    if variable not in content:
        raise DataError(f"{path} has no variable {variable}; it is another file: {_HOW_TO_GET}")
    return np.atleast_1d(content[variable])


def _check_same(table: Path, directory: Path, annotated: list[str]) -> None:
    """Checks that the annotations and the pictures in the directory name the same files."""
    try:
        present = {p.name for p in directory.iterdir() if not p.name.startswith(".")}
    except OSError as error:
        raise DataError(f"{directory} cannot be listed ({error.strerror}); {_HOW_TO_GET}") from None
    missing, extra = sorted(set(annotated) - present), sorted(present - set(annotated))
    if len(set(annotated)) < len(annotated):
        raise DataError(f"{table} names pictures twice; get it again")
    if missing or extra:
        raise DataError(
            f"{table} does not match the pictures in {directory}: {len(missing)} are missing"
            f"{f' (first {missing[0]})' if missing else ''}, {len(extra)} are not annotated"
            f"{f' (first {extra[0]})' if extra else ''}; {_HOW_TO_GET}"
        )


def _list_kaggle(place: Path, root: Path) -> Listing:
    if not (place / "test").is_dir():
        raise DataError(f"{place} has train/ but no test/; {_HOW_TO_GET}")
    listing = list_folder(place)
    names = next((d / "names.csv" for d in (root, place) if (d / "names.csv").is_file()), None)
    if names is None:
        return listing
    # Directory names cannot hold the slash of one class, "Ram C/V Cargo Van Minivan 2012".
    ordered = tuple(",".join(row).strip().replace("/", "-") for row in _rows(names))
    if set(ordered) != set(listing.class_names) or len(ordered) != len(listing.class_names):
        differing = sorted(set(ordered) ^ set(listing.class_names))
        raise DataError(
            f"{names} names {len(ordered)} classes but {place} has {len(listing.class_names)} "
            f"class directories; they differ in {', '.join(differing[:3]) or 'repetitions'}"
        )
    number = np.array([ordered.index(name) for name in listing.class_names], np.int32)
    listing = dataclasses.replace(listing, labels=number[listing.labels], class_names=ordered)
    for part in ("train", "test"):
        table = names.parent / f"anno_{part}.csv"
        if table.is_file():
            _check_annotations(table, part, listing)
    return listing


def _check_annotations(table: Path, part: str, listing: Listing) -> None:
    """Checks rows of file name, four numbers of the box and class number against the folders."""
    annotated: dict[str, int] = {}
    for line, row in enumerate(_rows(table), start=1):
        if len(row) != 6 or not row[5].strip().isdecimal():
            raise DataError(f"{table} line {line}: expected file name, 4 numbers, class number")
        annotated[row[0].strip()] = int(row[5]) - 1
    present = {
        file.rsplit("/", 1)[1]: int(label)
        for file, label in zip(listing.files, listing.labels, strict=True)
        if file.startswith(f"{part}/")
    }
    for file in sorted(set(annotated) | set(present)):
        number, folder = annotated.get(file), present.get(file)
        if number != folder:
            said = "has no row" if number is None else f"has class {number + 1}"
            lies = "is missing" if folder is None else f"lies in that of class {folder + 1}"
            raise DataError(
                f"{table} does not match the directories of {part}/: {file} {said} but {lies}; get "
                "the dataset again"
            )


def _rows(path: Path) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.reader(file) if row]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path} cannot be read ({error}); get it again") from None
