"""Which JAX devices a run uses, and the mesh over them.

On CPU several host devices beat one (a single XLA device keeps about 1.6 of two cores
busy), so a run asks for one host device per core. Results do not depend on the layout:
batches are divided into a fixed number of parts whose gradients are added in a fixed order,
and clients and individuals are independent.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from acme_jax.config import ComputeConfig, ConfigError

_FUSION_EMITTERS = "--xla_cpu_use_fusion_emitters"
"""They take a third of the time to compile for CPU; from JAX 0.11 on there is no such flag."""

AXIS = "devices"
"""Name of the mesh axis over which batches, individuals and clients are divided."""


def configure(config: ComputeConfig) -> None:
    """Tells JAX how to compile and how many host (CPU) devices to make: one for each core.

    Call it before anything touches a JAX device; afterwards it has no effect. An explicit
    `--xla_force_host_platform_device_count` in XLA_FLAGS is left alone.

    Raises:
      ConfigError: the directory for compiled programs cannot be made or written.
    """
    if config.compilation_cache is not None:
        _keep_programs(config.compilation_cache)
    flags = os.environ.get("XLA_FLAGS", "")
    if config.fast_compile:
        jax.config.update("jax_disable_most_optimizations", True)
        if jax.__version_info__ < (0, 11) and _FUSION_EMITTERS not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} {_FUSION_EMITTERS}=false".strip()
    if "xla_force_host_platform_device_count" in flags:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jax.config.update("jax_num_cpu_devices", config.num_devices or cores or 1)


def _keep_programs(directory: str) -> None:
    """Keeps every compiled program, also small ones: a run has hundreds of them."""
    path = Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"compute.compilation_cache: cannot make the directory {path} ({error.strerror}); "
            "choose another one, or leave it out"
        ) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(
            f"compute.compilation_cache: {path} cannot be written; choose another directory, or "
            "leave it out"
        )
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)  # no lower limit


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


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Places every leaf on all devices of the mesh; leaves that are there already stay.

    Inputs of a jitted loop are placed before its first call, because arrays that come back
    from a program over the mesh are, and a different placement would compile it again.
    """
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def map_parts(fn: Callable[..., Any], count: int, mesh: Mesh, *args: Any) -> Any:
    """`fn(index, *args)` for every index below `count`, divided over the mesh, stacked.

    Inside a device a loop (`lax.map`); every device ends with all results in the order of
    their index. With a mesh that does not divide `count` some are computed twice.

    Args:
      fn: traceable; index is int32 [].
      count: static.
      mesh: one-dimensional, from `make_mesh`.
      *args: arrays that all devices read.

    Returns:
      The tree that `fn` returns, leaves with a leading [count].
    """
    each = -(-count // mesh.size)

    def local(*args: Any) -> Any:
        first = lax.axis_index(AXIS) * each
        indices = (first + jnp.arange(each, dtype=jnp.int32)) % count
        parts = lax.map(lambda index: fn(index, *args), indices)
        return jax.tree.map(lambda leaf: lax.all_gather(leaf, AXIS, tiled=True)[:count], parts)

    spec = PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*args)
