"""Trees of arrays in a directory of `.npy` files, memory-mapped: larger than memory, quick to open.

A tree is a nested dictionary with string keys. Its directory holds one `.npy` file for each leaf
(the keys joined by dots) and `tree.json`: shapes, dtypes and the caller's own `meta`.

A map keeps every page that it has touched in the process's resident memory. `fresh` maps a
leaf's file again, so that a reader or writer which walks through all of it gives the pages back.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

_INDEX = "tree.json"
_FORMAT = 1


class MappedTreeError(ValueError):
    """A directory that holds no usable tree; the message says what is wrong and how to mend it."""


class ArraySpec(NamedTuple):
    """Shape and dtype of one leaf."""

    shape: tuple[int, ...]
    dtype: Any


class MappedTree(NamedTuple):
    """A tree that is open."""

    tree: dict[str, Any]
    meta: dict[str, Any]


def create(
    directory: str | Path, template: Mapping[str, Any], meta: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Makes the files, filled with zeros, and maps them for writing.

    Args:
      directory: new or empty; its parents are made.
      template: nested dictionary whose leaves have `shape` and `dtype` (`ArraySpec`, arrays).
      meta: anything JSON can hold; `open_tree` returns it.

    Returns:
      The template's dictionary with `np.memmap` leaves.

    Raises:
      MappedTreeError: the directory has files in it, a name that cannot be a file's, or a leaf
        without elements, which cannot be mapped.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise MappedTreeError(f"{directory} exists and is not empty; choose another directory")
    leaves = _flatten(template)
    for name, leaf in leaves.items():
        if 0 in leaf.shape:
            raise MappedTreeError(f"leaf {name} has shape {tuple(leaf.shape)}: it has no elements")
    directory.mkdir(parents=True, exist_ok=True)
    maps = {
        name: np.lib.format.open_memmap(
            directory / f"{name}.npy", mode="w+", dtype=np.dtype(leaf.dtype), shape=leaf.shape
        )
        for name, leaf in leaves.items()
    }
    index = {
        "format": _FORMAT,
        "leaves": {name: _described(leaf) for name, leaf in leaves.items()},
        "meta": dict(meta or {}),
    }
    (directory / _INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return _unflatten(maps)


@contextlib.contextmanager
def building(
    directory: str | Path, template: Mapping[str, Any], meta: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """`create` for a body that fills the tree: it appears whole under its name, or not at all.

    Raises:
      MappedTreeError: as `create`, or the directory exists.
    """
    directory = Path(directory)
    if directory.exists():
        raise MappedTreeError(f"{directory} exists already; open it, or delete it first")
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
    try:
        tree = create(temporary, template, meta)
        yield tree
        for leaf in _flatten(tree).values():
            leaf.flush()
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def open_tree(
    directory: str | Path,
    expected: Mapping[str, Any] | None = None,
    *,
    mode: Literal["r", "r+"] = "r",
) -> MappedTree:
    """Maps a tree that `create` or `building` made.

    Args:
      directory: of the tree.
      expected: as the `template` of `create`: what the tree must hold. None: anything.
      mode: "r" to read, "r+" to write as well.

    Raises:
      MappedTreeError: a missing, truncated or damaged file, or other leaves than expected.
    """
    directory = Path(directory)
    found, meta = _read_index(directory)
    if expected is not None:
        _check_leaves(directory, found, _flatten(expected))
    maps = {name: _open_leaf(directory / f"{name}.npy", spec, mode) for name, spec in found.items()}
    return MappedTree(_unflatten(maps), meta)


def fresh(leaf: np.ndarray) -> np.ndarray:
    """A memory-mapped leaf mapped anew; any other array, a view of a map too, as it is.

    Drop the result after use: its pages leave the resident memory with it.
    """
    if not isinstance(leaf, np.memmap) or not isinstance(leaf.base, mmap.mmap):
        return leaf
    if leaf.filename is None:
        return leaf
    mode: Literal["r", "r+"] = "r" if leaf.mode == "r" else "r+"
    return np.memmap(leaf.filename, leaf.dtype, mode, leaf.offset, leaf.shape)


def _read_index(directory: Path) -> tuple[dict[str, ArraySpec], dict[str, Any]]:
    path = directory / _INDEX
    try:
        index = json.loads(path.read_text())
        version, meta = index["format"], index["meta"]
        leaves = {
            name: ArraySpec(tuple(shape), np.dtype(dtype))
            for name, (shape, dtype) in index["leaves"].items()
        }
    except FileNotFoundError:
        raise MappedTreeError(
            f"{directory} holds no arrays: {_INDEX} is missing; check the path, or delete the "
            "directory and make it again"
        ) from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MappedTreeError(
            f"{path} is damaged ({error}); delete {directory} and make it again"
        ) from None
    if version != _FORMAT:
        raise MappedTreeError(
            f"{path} has format {version}, this program reads {_FORMAT}; delete {directory} and "
            "make it again"
        )
    return leaves, meta


def _open_leaf(path: Path, spec: ArraySpec, mode: Literal["r", "r+"]) -> np.memmap:
    remedy = f"delete {path.parent} and make it again"
    try:
        leaf = np.lib.format.open_memmap(path, mode=mode)
    except FileNotFoundError:
        raise MappedTreeError(f"{path} is missing; {remedy}") from None
    except (ValueError, EOFError, OSError) as error:
        raise MappedTreeError(f"{path} is truncated or damaged ({error}); {remedy}") from None
    if leaf.shape != spec.shape or leaf.dtype != spec.dtype:
        raise MappedTreeError(
            f"{path} holds {leaf.dtype} {list(leaf.shape)}, but {_INDEX} beside it says "
            f"{spec.dtype} {list(spec.shape)}; {remedy}"
        )
    return leaf


def _check_leaves(
    directory: Path, found: Mapping[str, ArraySpec], expected: Mapping[str, Any]
) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if name not in found or name not in expected:
            what = "is missing" if name not in found else "is not expected"
            raise MappedTreeError(
                f"leaf {name} {what} in {directory}, which holds {', '.join(found)}; choose "
                "another directory, or delete it and make it again"
            )
        here, there = found[name], expected[name]
        if here.shape != tuple(there.shape) or here.dtype != np.dtype(there.dtype):
            raise MappedTreeError(
                f"leaf {name} in {directory} is {here.dtype} {list(here.shape)}, expected "
                f"{np.dtype(there.dtype)} {list(there.shape)}; choose another directory, or "
                "delete it and make it again"
            )


def _described(leaf: Any) -> list[Any]:
    return [[int(size) for size in leaf.shape], np.dtype(leaf.dtype).str]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not key.replace("_", "").isalnum():
            raise MappedTreeError(
                f"key {key!r} cannot name a file; use letters, digits and underscores"
            )
        name = f"{prefix}{key}"
        flat |= _flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    if not flat:
        raise MappedTreeError(f"{prefix.rstrip('.') or 'the tree'} has no leaves")
    return flat


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
