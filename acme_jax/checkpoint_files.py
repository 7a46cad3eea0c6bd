"""The files of one checkpoint: arrays by Orbax, JSON beside them, checksums over all.

Orbax takes half a second to import; it is imported by the first write or read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from acme_jax.run_dir import write_json

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(directory: Path, leaves: list[np.ndarray], content: dict[str, Any]) -> None:
    """Makes the directory with all files of a checkpoint; `content` is its meta.json.

    Raises:
      OSError: there is no room, or the disk fails.
      ValueError: of Orbax, for the same reasons.
    """
    # Asked first, because Orbax's threads print stack dumps when a disk fills up under them.
    if shutil.disk_usage(directory.parent).free < _num_bytes(leaves):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
    directory.mkdir()
    # Orbax stores neither empty arrays nor empty trees; the count makes the tree non-empty.
    stored = {f"{i:05d}": leaf for i, leaf in enumerate(leaves) if leaf.size}
    with _orbax_alone() as checkpointer:
        checkpointer.save(directory / "arrays", {"num_leaves": np.int32(len(leaves)), **stored})
    write_json(directory / "meta.json", content)
    write_json(directory / "manifest.json", digests(directory))


def read_arrays(directory: Path, num_leaves: int) -> list[np.ndarray | None]:
    """The leaves by number; None for those that Orbax does not store because they are empty."""
    with _orbax_alone() as checkpointer:
        stored = checkpointer.restore(directory / "arrays")
    return [stored.get(f"{i:05d}") for i in range(num_leaves)]


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, except the manifest itself."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / "manifest.json"
    }


def disk_failure(error: Exception, directory: Path, leaves: list[np.ndarray]) -> str | None:
    """What a failed `write` met: the cause, the bytes needed and free; None if not the disk.

    Args:
      error: what `write` raised.
      directory: on the disk in question, after what was written is removed.
      leaves: what was to be written.
    """
    text = " ".join(str(error).split())
    # Orbax reports a full disk as a ValueError with the system's words in it.
    full = getattr(error, "errno", None) in _FULL or any(os.strerror(n) in text for n in _FULL)
    if not full and not isinstance(error, OSError):
        return None
    needed, free = _num_bytes(leaves), shutil.disk_usage(directory).free
    cause = "the disk is full" if full else text[:200]
    return f"{cause} (about {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free)"


def _num_bytes(leaves: list[np.ndarray]) -> int:
    return sum(leaf.nbytes for leaf in leaves)


@contextlib.contextmanager
def _orbax_alone() -> Iterator[Any]:
    """Orbax's checkpointer for this process alone; by default it waits for all of a job."""
    import orbax.checkpoint as ocp

    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process_{process}",
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    logging.getLogger("absl").addFilter(_not_from_a_thread)  # the same one is added only once
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        yield checkpointer


def _not_from_a_thread(record: logging.LogRecord) -> bool:
    """Orbax's threads log the stack of an error that is raised in the main thread as well.

    That would bury the one line that says what happened.
    """
    return "_SignalingThread.run() raised an exception" not in record.getMessage()
