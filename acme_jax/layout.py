"""Which JAX devices a run uses, and the mesh over them.

On CPU several host devices beat one (a single XLA device keeps about 1.6 of two cores
busy), so a run asks for one host device per core. Results do not depend on the layout:
batches are divided into a fixed number of parts whose gradients are added in a fixed order,
and clients and individuals are independent.
"""

from __future__ import annotations

import os
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from acme_jax.config import ConfigError

Tree = TypeVar("Tree")

AXIS = "devices"
"""Name of the mesh axis over which batches, individuals and clients are divided."""


def configure_host_devices(num_devices: int | None) -> None:
    """Asks for `num_devices` host (CPU) devices; None means one for each core.

    Call it before anything touches a JAX device; afterwards it has no effect. An explicit
    `--xla_force_host_platform_device_count` in XLA_FLAGS is left alone.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jax.config.update("jax_num_cpu_devices", num_devices or cores or 1)


def make_mesh(num_devices: int | None = None) -> Mesh:
    """One-dimensional mesh over the first `num_devices` devices (None: all of them).

    Raises:
      ConfigError: more devices asked for than there are.
    """
    devices = jax.devices()
    count = len(devices) if num_devices is None else num_devices
    if count > len(devices):
        raise ConfigError(
            f"compute.num_devices is {count}, but JAX sees {len(devices)} "
            f"{devices[0].platform} device(s); lower it or leave it unset"
        )
    return Mesh(np.array(devices[:count]), (AXIS,))


def divide_mesh(mesh: Mesh, num_parts: int) -> Mesh:
    """The largest sub-mesh whose device count divides `num_parts`."""
    count = max(n for n in range(1, mesh.devices.size + 1) if num_parts % n == 0)
    return Mesh(mesh.devices.reshape(-1)[:count], (AXIS,))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Puts a copy of every leaf on every device of the mesh; does nothing where it lies so.

    Call it on the state that goes into a compiled loop over the mesh. What comes out of such
    a loop lies so; a first state that does not would make the second call compile again.
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
