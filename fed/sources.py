"""Where the clients of a stream come from and where their results go: NumPy on the host."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import numpy as np

from fed.mapped import fresh


class ClientSource(Protocol):
    """Where clients come from."""

    def __len__(self) -> int:
        """C, the number of clients."""

    def read(self, rows: np.ndarray) -> Any:
        """A pytree of new NumPy arrays [len(rows), ...]; called from a thread of its own."""


class ClientSink(Protocol):
    """Where results go."""

    def write(self, rows: np.ndarray, results: Any) -> None:
        """Stores results, NumPy leaves [len(rows), ...], of these clients."""


class ArraySource:
    """Clients in NumPy arrays or memory maps, leaves [C, ...].

    Raises:
      ValueError: no leaves, or leaves of different lengths.
    """

    def __init__(self, tree: Any) -> None:
        self._tree = tree
        self._length = common_length(tree, "the source")

    def __len__(self) -> int:
        return self._length

    def read(self, rows: np.ndarray) -> Any:
        """Copies of these rows."""
        return jax.tree.map(lambda leaf: np.asarray(fresh(leaf)[rows]), self._tree)


class ArraySink:
    """Results in NumPy arrays or memory maps, leaves [C, ...], of the results' structure.

    Raises:
      ValueError: no leaves, or leaves of different lengths.
    """

    def __init__(self, tree: Any) -> None:
        self._tree = tree
        common_length(tree, "the sink")

    def write(self, rows: np.ndarray, results: Any) -> None:
        """Stores the rows; those of memory maps are on disk when it returns."""

        def store(leaf: np.ndarray, values: np.ndarray) -> None:
            if leaf.shape[1:] != values.shape[1:]:
                raise ValueError(
                    f"results have shape [k, {_listed(values)}], the sink [C, {_listed(leaf)}]"
                )
            target = fresh(leaf)
            target[rows] = values
            if isinstance(target, np.memmap):
                target.flush()

        jax.tree.map(store, self._tree, results)


def common_length(tree: Any, name: str) -> int:
    """The leading axis that all leaves share.

    Raises:
      ValueError: no leaves, or leaves of different lengths.
    """
    shapes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(tree)}
    if len(shapes) != 1 or () in shapes:
        lengths = sorted(shape[0] if shape else 0 for shape in shapes)
        raise ValueError(
            f"the leaves of {name} must have one common leading axis, got lengths {lengths}"
        )
    return int(shapes.pop()[0])


def _listed(leaf: np.ndarray) -> str:
    return ", ".join(str(size) for size in leaf.shape[1:])
