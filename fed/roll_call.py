"""Finding out that all processes of a job are there, before JAX would abort because one is not.

Process 0 listens on the coordinator's port until every other process has said who it is, tells
them all what they need, and frees the port for JAX. One line of text travels each way.
"""

from __future__ import annotations

import contextlib
import socket
import time

from fed.lifeline import open_listener

_LINE_S = 5.0
"""How long one line may take."""

_PAUSE_S = 0.2


class MultihostError(RuntimeError):
    """The processes cannot form a job; the message says what to check."""


def call_roll(port: int, num_processes: int, news: str, timeout_s: float) -> None:
    """Process 0: waits for processes 1, 2, ... and gives each of them the news, one line.

    Raises:
      MultihostError: the port is taken, or some did not come in time; the message says which.
    """
    deadline = time.monotonic() + timeout_s
    here: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(port))
        while len(here) < num_processes - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                link, _ = listener.accept()
            except TimeoutError:
                missing = sorted(set(range(1, num_processes)) - here.keys())
                names = ", ".join(map(str, missing[:10])) + (", ..." if missing[10:] else "")
                raise MultihostError(
                    f"after {timeout_s:g} s {len(missing)} of {num_processes} processes are "
                    f"missing (process {names}); check that each was started, with this address, "
                    "this number of processes, and an id of its own"
                ) from None
            stack.enter_context(link)
            _admit(link, here, num_processes)
        for link in here.values():
            with contextlib.suppress(OSError):  # Who is gone by now is missed a moment later.
                link.sendall(f"welcome {news}\n".encode())


def answer(address: tuple[str, int], num_processes: int, process_id: int, timeout_s: float) -> str:
    """Another process: reports to process 0; returns its news when all are there.

    Raises:
      MultihostError: process 0 did not answer, ended, or refused; the message says why.
    """
    host, port = address
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection((host, port), timeout=min(timeout_s, _LINE_S)) as link:
                link.settimeout(max(deadline - time.monotonic(), _LINE_S))
                link.sendall(f"here {process_id} {num_processes}\n".encode())
                word, _, text = _line(link).partition(" ")
        except OSError as error:
            if time.monotonic() > deadline:
                raise MultihostError(
                    f"the coordinator {host}:{port} did not answer for {timeout_s:g} s "
                    f"({error.strerror or error}); check that process 0 runs there, that all "
                    "processes were given the same address, and that no firewall closes the port"
                ) from None
            time.sleep(_PAUSE_S)
            continue
        if word == "welcome":
            return text
        raise MultihostError(
            text
            or f"process 0 at {host}:{port} ended before all processes were there; see its "
            "own message"
        )


def _listen(port: int) -> socket.socket:
    try:
        return open_listener(port)
    except OSError as error:
        raise MultihostError(
            f"process 0 cannot listen on port {port} ({error.strerror}); another program, or an "
            "earlier run that has not ended, uses it: end that or give another port"
        ) from None


def _admit(link: socket.socket, here: dict[int, socket.socket], num_processes: int) -> None:
    """Notes who is at the other end; strangers are passed over."""
    link.settimeout(_LINE_S)
    try:
        word, *numbers = _line(link).split(" ")
        if word != "here":
            return
        process_id, count = map(int, numbers)
    except (OSError, ValueError):
        return
    refusal = None
    if count != num_processes:
        refusal = f"--num-processes is {count} here, but {num_processes} in process 0"
    elif not 0 < process_id < num_processes or _alive(here.get(process_id)):
        refusal = f"there is another process {process_id}; give each an id of its own"
    if refusal is None:
        here[process_id] = link
    else:
        with contextlib.suppress(OSError):
            link.sendall(f"refused {refusal}\n".encode())


def _alive(link: socket.socket | None) -> bool:
    """Whether the other end still waits: it says nothing more, but is not closed either."""
    if link is None:
        return False
    link.setblocking(False)
    try:
        return link.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        link.settimeout(_LINE_S)


def _line(link: socket.socket) -> str:
    """What was received up to the first line feed, or to the end."""
    received = b""
    while b"\n" not in received and len(received) < 1000 and (part := link.recv(1000)):
        received += part
    return received.split(b"\n")[0].decode(errors="replace")
