"""Arrays whose client axis is divided over all devices of all processes.

Each process loads and places only its own clients; see `fed.multihost` for how a job starts.
Shape letters: C clients, P the client axis filled up to a multiple of the number of devices.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def client_mesh(axis: str = "clients") -> Mesh:
    """One-dimensional mesh over all devices of all processes."""
    return Mesh(np.array(jax.devices()), (axis,))


def padded_count(num_clients: int, mesh: Mesh) -> int:
    """P: the number of clients, filled up to a multiple of the number of devices."""
    return -(-num_clients // mesh.size) * mesh.size


def my_rows(num_clients: int, mesh: Mesh) -> np.ndarray:
    """int64: the clients that this process must load, ascending; together, each exactly once."""
    padded = padded_count(num_clients, mesh)
    rows = np.arange(padded)
    held = [
        rows[index] for index in _sharding(mesh).addressable_devices_indices_map((padded,)).values()
    ]
    mine = np.unique(np.concatenate(held))
    return mine[mine < num_clients]


def from_local(mesh: Mesh, local_tree: Any, num_clients: int) -> Any:
    """Global arrays [P, ...] over the mesh, each process giving its own clients; nothing moves.

    Fillers are zeros: as `ClientData`, clients without samples, which weigh nothing.

    Args:
      mesh: from `client_mesh`.
      local_tree: NumPy leaves [len(my_rows(num_clients, mesh)), ...], in that order.
      num_clients: C, of all processes together.

    Raises:
      ValueError: a leaf of another length.
    """
    rows, padded = my_rows(num_clients, mesh), padded_count(num_clients, mesh)

    def place(leaf: Any) -> jax.Array:
        local = np.asarray(leaf)
        if local.shape[:1] != rows.shape:
            raise ValueError(
                f"a leaf has shape {local.shape}; its leading axis must be the {rows.size} clients "
                f"of this process, see my_rows"
            )

        def shard(index: Any) -> np.ndarray:  # a tuple of slices
            wanted = np.arange(padded)[index[0]]
            values = np.zeros((wanted.size, *local.shape[1:]), local.dtype)
            real = wanted < num_clients
            values[real] = local[np.searchsorted(rows, wanted[real])]
            return values

        return jax.make_array_from_callback((padded, *local.shape[1:]), _sharding(mesh), shard)

    return jax.tree.map(place, local_tree)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts host values, equal in all processes, on every device; nothing moves."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any) -> jax.Array:
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, everywhere, lambda index: value[index])

    return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
    """NumPy copies of whole arrays, in every process, moved leaf by leaf; fillers stay."""

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def from_main(tree: Any) -> Any:
    """The main process's arrays in every process, as NumPy, to the bit.

    Args:
      tree: leaves that NumPy can hold; elsewhere than in the main process only their shapes and
        dtypes count.
    """
    leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, tree))
    if jax.process_count() == 1 or not leaves:
        return jax.tree.unflatten(structure, leaves)
    # All as one vector: one program, one transfer. As bytes: JAX sends by adding zeros, which
    # would turn -0.0 into 0.0.
    sent = multihost_utils.broadcast_one_to_all(np.concatenate([_bytes(leaf) for leaf in leaves]))
    parts = np.split(np.asarray(sent), np.cumsum([leaf.nbytes for leaf in leaves])[:-1])
    received = [
        part.view(leaf.dtype).reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, received)


def from_all(value: Any) -> np.ndarray:
    """[processes, ...]: every process's value, of one shape and dtype, to the bit."""
    array = np.asarray(value)
    gathered = np.asarray(multihost_utils.process_allgather(_bytes(array)))
    return gathered.view(array.dtype).reshape(-1, *array.shape)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))
