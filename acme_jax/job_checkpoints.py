"""Checkpoints of a federated job on any number of processes and devices.

The main process writes and reads them, alone; the others send and receive through it. A job's
state is small beside its data (the server's model, and what clients keep), and a checkpoint so
written is atomic and verified (`CheckpointStore`), needs no file system that all share, and does
not know how many processes or devices there were. Orbax's own distributed writing would spare the
main process's memory, and need such a file system.

Shape letters: C clients, P the client axis filled up to a multiple of the number of devices.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from acme_jax.checkpoint import CheckpointError, CheckpointStore
from acme_jax.run_dir import differences
from fed import multihost


class State(NamedTuple):
    """What the next round needs."""

    server: Any
    """Equal on all devices."""
    clients: Any
    """Leaves [P, ...] on the devices, divided over them; [C, ...] on the host; or `()`."""


class JobCheckpoints:
    """The checkpoints of one job; the same calls in all processes.

    Args:
      directory: read and written by the main process; None: nothing is saved.
      mesh: from `multihost.client_mesh`.
      job: JSON-ready description of what is computed; a checkpoint fits only an equal one.
      num_clients: C.
      resume: whether checkpoints may be there already.

    Raises:
      CheckpointError: there are some and `resume` is not set.
    """

    def __init__(
        self,
        directory: Path | None,
        mesh: Mesh,
        job: dict[str, Any],
        num_clients: int,
        *,
        resume: bool,
    ) -> None:
        self._active = directory is not None
        self._mesh = mesh
        self._job = json.loads(json.dumps(job))
        self._num_clients = num_clients
        self._store = None
        self.newest: int | None = None
        """Rounds done in the newest checkpoint that this start knows to be whole."""
        if directory is not None and multihost.is_main():
            self._store = CheckpointStore(directory)
            if self._store.steps() and not resume:
                raise CheckpointError(
                    f"{directory} holds the checkpoints of an earlier start; add --resume to "
                    "continue it, or choose another directory"
                )

    def restore(self, initial: State) -> tuple[State, int]:
        """The newest state, or the initial one, placed on the devices; and the rounds done.

        Args:
          initial: host arrays, equal in all processes; clients [C, ...].

        Raises:
          CheckpointError: the checkpoint is of another job.
        """
        done, state = 0, initial
        if self._store is not None and (info := self._store.newest()) is not None:
            if info.meta["job"] != self._job:
                raise CheckpointError(
                    f"the checkpoint of round {info.step} belongs to another job: "
                    f"{differences(info.meta['job'], self._job)}; give the same arguments or "
                    "another directory"
                )
            done, state = info.step, self._store.restore(info.step, initial).tree
        done = int(multihost.from_main(np.int32(done)))
        if done > 0:
            state, self.newest = multihost.from_main(state), done
        mine = multihost.my_rows(self._num_clients, self._mesh)
        own = jax.tree.map(lambda leaf: leaf[mine], state.clients)
        placed = State(
            multihost.replicate(self._mesh, state.server),
            multihost.from_local(self._mesh, own, self._num_clients),
        )
        return placed, done

    def save(self, state: State, done: int) -> None:
        """Writes the devices' state; when it returns, in every process, the checkpoint is whole.

        Raises:
          CheckpointError: in the main process: it could not be written, such as on a full disk.
        """
        if not self._active:
            return
        whole = multihost.to_host(state)
        if self._store is not None:
            clients = jax.tree.map(lambda leaf: leaf[: self._num_clients], whole.clients)
            self._store.save(done, State(whole.server, clients), {"job": self._job})
        multihost.barrier(f"saved {done}")
        self.newest = done

    def advice(self) -> str:
        """How to go on when a process is gone, for `multihost.Job.watch`."""
        if self.newest is None:
            return "there is no checkpoint; start again"
        return f"the newest checkpoint is round {self.newest}; start again with --resume"
