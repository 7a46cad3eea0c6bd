"""One job on many processes and devices: the client axis divided over all of them.

The same program runs as one process or as many. In every process, before JAX starts:

    job = multihost.initialize("10.0.0.1:8476", num_processes=2, process_id=0)
    mesh = multihost.client_mesh()
    rows = multihost.my_rows(num_clients, mesh)             # load only these clients
    data = multihost.from_local(mesh, load(rows), num_clients)
    with job.watch(lambda: "start again with --resume"):    # stop if another process is gone
        ...                                                 # run_round(..., mesh=mesh)
    job.leave()

All processes must make the same calls in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from fed.global_arrays import (
    client_mesh,
    from_all,
    from_local,
    from_main,
    my_rows,
    padded_count,
    replicate,
    to_host,
)
from fed.lifeline import Lifeline, Lost
from fed.roll_call import MultihostError, answer, call_roll

__all__ = [
    "LOST",
    "Job",
    "MultihostError",
    "barrier",
    "client_mesh",
    "from_all",
    "from_local",
    "from_main",
    "initialize",
    "is_main",
    "my_rows",
    "padded_count",
    "replicate",
    "to_host",
]

LOST = 75
"""Exit status of a process that stops because another is gone: EX_TEMPFAIL, "try again"."""

_LEAVE_S = 30.0
"""How long process 0 waits at the end for the others to disconnect."""

_BACKUP_S = 300
"""Silence after which JAX aborts a process by itself, should the lifeline fail to; longer than
any pause of a machine."""

_NEWS_S = 3.0
"""How long after an error the lifeline may take to say that another process is gone."""


@dataclasses.dataclass(frozen=True)
class Job:
    """This process's place among all; made by `initialize`."""

    num_processes: int = 1
    process_id: int = 0
    lifeline: Lifeline | None = None

    @contextlib.contextmanager
    def watch(self, advice: Callable[[], str]) -> Iterator[None]:
        """While the body runs, this process stops when another is gone, also inside a collective.

        It prints one line to stderr, `process 1 of 2 is gone (REASON); ADVICE`, and exits at once
        with status `LOST`, without the body's cleanup: files must be written atomically. If the
        body itself raises, the others stop likewise and the error goes on; end with `leave`.

        Args:
          advice: how to go on, called when it is needed, in another thread.
        """
        if self.lifeline is None:
            yield
            return
        self.lifeline.on_lost(lambda lost: self._stop(lost, advice))
        try:
            yield
        except BaseException as error:
            # Perhaps because the other end of a collective operation is gone, for which there are
            # several types of error. Then the lifeline ends this process now.
            time.sleep(_NEWS_S)
            self.lifeline.fail(f"{type(error).__name__}: {error}")
            raise
        self.lifeline.on_lost(None)

    def leave(self, status: int = 0) -> int:
        """Ends the job: with status 0 after all others have come here too, otherwise at once.

        JAX waits at exit for processes that may be gone; hence a failed process ends here.

        Returns:
          The status, for `sys.exit`.
        """
        if self.lifeline is None:
            return status
        if status != 0:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        barrier("leave")
        if self.process_id == 0:  # It serves the others until they have taken their leave.
            self.lifeline.wait_alone(_LEAVE_S)
        jax.distributed.shutdown()
        self.lifeline.close()
        return status

    def _stop(self, lost: Lost, advice: Callable[[], str]) -> None:
        where = f"process {lost.process_id} of {self.num_processes} is gone ({lost.reason})"
        try:
            sys.stdout.flush()
            print(f"{where}; {advice()}", file=sys.stderr, flush=True)
        finally:  # whatever `advice` does: this thread is all that still runs
            os._exit(LOST)


def initialize(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    heartbeat_timeout_s: float = 20.0,
    connect_timeout_s: float = 120.0,
    watch_port: int = 0,
) -> Job:
    """Joins the processes into one job; call it before anything touches a JAX device.

    On TPU VM slices, under Slurm and under Open MPI all three may be None: JAX finds them.

    Args:
      coordinator: `host:port` of process 0, the same for all, reachable by all.
      num_processes: of the job.
      process_id: 0, 1, ..., each once.
      heartbeat_timeout_s: silence after which a process counts as gone.
      connect_timeout_s: how long to wait for the other processes.
      watch_port: on which process 0 listens for signs of life; 0: any free one.

    Raises:
      MultihostError: called too late or twice, an impossible id or address, the coordinator
        cannot be reached, or some processes did not come.
    """
    _check(coordinator, num_processes, process_id)
    lifeline = None
    if coordinator is not None and num_processes is not None and process_id is not None:
        place = (num_processes, process_id)
        lifeline = _gather(coordinator, *place, heartbeat_timeout_s, connect_timeout_s, watch_port)
    # Gloo is what joins CPU devices of several processes. Recoverable: JAX leaves it to the
    # lifeline to end the others when a process is gone, instead of aborting with a stack dump.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_recoverability", True)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=round(connect_timeout_s),
            heartbeat_timeout_seconds=max(_BACKUP_S, round(3 * heartbeat_timeout_s)),
        )
    except (RuntimeError, ValueError) as error:
        raise _explained(error, coordinator, num_processes, connect_timeout_s) from error
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return Job()
    return Job(count, index, lifeline or _found_lifeline(heartbeat_timeout_s, watch_port))


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here."""
    multihost_utils.sync_global_devices(name)


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    if jax.distributed.is_initialized():
        raise MultihostError("the processes are joined already; call initialize once")
    if num_processes is not None and num_processes < 1:
        raise MultihostError(f"num_processes must be at least 1, got {num_processes}")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        ids = "not negative" if num_processes is None else f"0 to {num_processes - 1}"
        raise MultihostError(f"process_id is {process_id}; expected {ids}, each id used once")
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise MultihostError(
                f"coordinator is {coordinator!r}; expected host:port of process 0, such as "
                "10.0.0.1:8476"
            )


def _explained(
    error: Exception, coordinator: str | None, num_processes: int | None, timeout_s: float
) -> MultihostError:
    text = " ".join(str(error).split())
    if "must be called before" in text:
        return MultihostError(
            "initialize came too late: something has already started JAX's devices "
            "(jax.devices, jnp.zeros, device_put, ...); call it first"
        )
    if "should be defined" in text or "must be defined" in text:
        return MultihostError(
            "no cluster was recognised (TPU VM slice, Slurm, Open MPI); give the coordinator's "
            "host:port, the number of processes, and this process's id"
        )
    return MultihostError(
        f"the {num_processes or ''} processes at {coordinator or 'the found coordinator'} did not "
        f"come together within {timeout_s:g} s; check that each was started, with the same address "
        f"and number and an id of its own ({text[:200]})"
    )


def _gather(
    coordinator: str,
    num_processes: int,
    process_id: int,
    timeout_s: float,
    connect_timeout_s: float,
    watch_port: int,
) -> Lifeline | None:
    """Meets the other processes at the coordinator's address and joins the lifeline."""
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    if process_id > 0:
        address = (host, int(port))
        where, token = answer(address, num_processes, process_id, connect_timeout_s).split()
        return _join(host, int(where), token, process_id, timeout_s)
    lifeline = None if num_processes == 1 else _listen(timeout_s, watch_port)
    news = "" if lifeline is None else f"{lifeline.port} {lifeline.token}"
    call_roll(int(port), num_processes, news, connect_timeout_s)
    return lifeline


def _found_lifeline(timeout_s: float, watch_port: int) -> Lifeline:
    """The lifeline of processes that JAX found by itself: where it is, they learn through JAX."""
    lifeline, packed = None, np.zeros(4 + 2 + 8, np.int32)
    index = jax.process_index()
    if index == 0:
        lifeline = _listen(timeout_s, watch_port)
        own = socket.inet_aton(_own_address())
        packed[:] = [*own, *divmod(lifeline.port, 256), *bytes.fromhex(lifeline.token)]
    told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(packed)).astype(np.uint8))
    if lifeline is not None:
        return lifeline
    port = int.from_bytes(told[4:6], "big")
    return _join(socket.inet_ntoa(told[:4]), port, told[6:].hex(), index, timeout_s)


def _listen(timeout_s: float, port: int) -> Lifeline:
    try:
        return Lifeline.listen(timeout_s, port)
    except OSError as error:
        raise MultihostError(
            f"process 0 cannot listen on port {port} for signs of life ({error.strerror}); give "
            "another watch_port"
        ) from None


def _join(host: str, port: int, token: str, process_id: int, timeout_s: float) -> Lifeline:
    try:
        return Lifeline.join(host, port, token, process_id, timeout_s)
    except OSError as error:
        raise MultihostError(
            f"process {process_id} cannot reach {host}:{port}, where process 0 listens for signs "
            f"of life ({error.strerror or error}); open that port, or choose one with watch_port"
        ) from None


def _own_address() -> str:
    """This machine's IPv4 address towards the outside; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
