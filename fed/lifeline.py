"""Telling every process of a job, within seconds, that another one is gone.

A process that waits in a collective operation for one that was killed or is frozen waits long or
for ever. So each process keeps a TCP connection to process 0, in a thread of its own that runs
while the main thread waits: both ends send a sign of life every second, a connection that breaks
or falls silent means that its process is gone, and process 0 passes the news on.

Lines of text travel: `hello TOKEN ID`, `alive`, `left` (finished, in order) and `lost ID REASON`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

INTERVAL_S = 1.0
"""Between two signs of life."""

_SENT_S = 0.5
"""Time that the last words get to leave before the process may end."""


class Lost(NamedTuple):
    """A process that is gone."""

    process_id: int
    reason: str


@dataclasses.dataclass
class _Peer:
    process_id: int | None  # None until it has said hello
    heard: float
    received: bytes = b""


class Lifeline:
    """One process's end; `listen` in process 0, `join` in the others.

    Args:
      process_id: of this process.
      token: what a `hello` must say, so that strangers are ignored.
      timeout_s: silence after which a process counts as gone.
      listener: process 0 only.
      link: to process 0; in the others only.
    """

    def __init__(
        self,
        process_id: int,
        token: str,
        timeout_s: float,
        *,
        listener: socket.socket | None = None,
        link: socket.socket | None = None,
    ) -> None:
        self.process_id = process_id
        self.token = token
        self._timeout_s = timeout_s
        self._listener = listener
        self._peers: dict[socket.socket, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._on_lost: Callable[[Lost], None] | None = None
        self._lost: Lost | None = None
        self._lock = threading.RLock()
        self._closed = threading.Event()
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)
        if link is not None:
            self._add(link, _Peer(0, time.monotonic()))
            self._send(link, f"hello {token} {process_id}")
        self._thread = threading.Thread(target=self._run, name="lifeline", daemon=True)
        self._thread.start()

    @classmethod
    def listen(cls, timeout_s: float, port: int = 0) -> Lifeline:
        """Process 0's end, on all interfaces; port 0 takes any free one, see `port`.

        Raises:
          OSError: the port is taken.
        """
        return cls(0, secrets.token_hex(8), timeout_s, listener=open_listener(port))

    @classmethod
    def join(cls, host: str, port: int, token: str, process_id: int, timeout_s: float) -> Lifeline:
        """Another process's end.

        Raises:
          OSError: process 0 cannot be reached there.
        """
        link = socket.create_connection((host, port), timeout=timeout_s)
        return cls(process_id, token, timeout_s, link=link)

    @property
    def port(self) -> int:
        """Where process 0 listens."""
        assert self._listener is not None, "only process 0 listens"
        return int(self._listener.getsockname()[1])

    def on_lost(self, callback: Callable[[Lost], None] | None) -> None:
        """Calls `callback` once, in the lifeline's thread, when a process is gone or already was.

        None: nobody is called from now on.
        """
        with self._lock:
            self._on_lost = callback

    def fail(self, reason: str) -> None:
        """Tells the others that this process ends because of an error; it hears no more of them."""
        self.on_lost(None)
        self._broadcast(f"lost {self.process_id} {_one_line(reason)}")
        time.sleep(_SENT_S)

    def wait_alone(self, timeout_s: float) -> bool:
        """Process 0: waits until all others have left or are gone; whether they have in time."""
        deadline = time.monotonic() + timeout_s
        while self._known():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def close(self) -> None:
        """Tells the others that this process has finished; nobody is watched any more."""
        self._broadcast("left")
        self._closed.set()
        self._thread.join(2 * INTERVAL_S)
        for peer in list(self._peers):
            self._drop(peer)
        if self._listener is not None:
            self._listener.close()
        self._selector.close()

    def _run(self) -> None:
        looked = sent = time.monotonic()
        while not self._closed.is_set():
            ready = self._selector.select(INTERVAL_S / 2)
            now = time.monotonic()
            if now - looked > 4 * INTERVAL_S:
                # This process itself was frozen: what it has not heard is nobody's fault.
                for peer in self._peers.values():
                    peer.heard = now
            looked = now
            for key, _ in ready:
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._receive(key.fileobj)
            if now - sent >= INTERVAL_S:
                sent = now
                self._broadcast("alive")
            for sock, peer in list(self._peers.items()):
                if now - peer.heard > self._timeout_s:
                    self._gone(sock, f"no sign of life for {self._timeout_s:g} s")
            with self._lock:
                lost, callback = self._lost, self._on_lost
            if lost is not None and callback is not None:
                self._on_lost = None
                callback(lost)

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            self._add(sock, _Peer(None, time.monotonic()))

    def _add(self, sock: socket.socket, peer: _Peer) -> None:
        sock.setblocking(False)
        with self._lock:
            self._peers[sock] = peer
        self._selector.register(sock, selectors.EVENT_READ)

    def _receive(self, sock: socket.socket) -> None:
        peer = self._peers[sock]
        try:
            data = sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._gone(sock, "its connection closed: it was killed or crashed")
            return
        peer.heard = time.monotonic()
        *lines, peer.received = (peer.received + data).split(b"\n")
        for line in lines:
            self._obey(sock, peer, line.decode(errors="replace"))

    def _obey(self, sock: socket.socket, peer: _Peer, line: str) -> None:
        word, _, rest = line.partition(" ")
        if peer.process_id is None:
            token, _, number = rest.partition(" ")
            if word == "hello" and token == self.token and number.isdigit():
                peer.process_id = int(number)
            else:
                self._drop(sock)
        elif word == "left":
            self._drop(sock)
        elif word == "lost":
            number, _, reason = rest.partition(" ")
            self._report(Lost(int(number), reason))

    def _gone(self, sock: socket.socket, reason: str) -> None:
        peer = self._peers.get(sock)
        self._drop(sock)
        if peer is not None and peer.process_id is not None:
            self._report(Lost(peer.process_id, reason))

    def _report(self, lost: Lost) -> None:
        """Remembers the first loss; process 0 passes it on."""
        if self._lost is not None:
            return
        if self._listener is not None:
            self._broadcast(f"lost {lost.process_id} {lost.reason}")
            time.sleep(_SENT_S)
        with self._lock:
            self._lost = lost

    def _broadcast(self, line: str) -> None:
        for sock in self._known():
            self._send(sock, line)

    def _known(self) -> list[socket.socket]:
        with self._lock:
            return [sock for sock, peer in self._peers.items() if peer.process_id is not None]

    def _send(self, sock: socket.socket, line: str) -> None:
        # Lines are short: one that does not fit into the buffer goes to a peer that has long been
        # silent. A broken connection shows when it is read.
        with contextlib.suppress(OSError):
            sock.send(line.encode() + b"\n")

    def _drop(self, sock: socket.socket) -> None:
        with self._lock:
            if self._peers.pop(sock, None) is None:
                return
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)
        sock.close()


def open_listener(port: int) -> socket.socket:
    """A listening socket on all interfaces, for IPv4 and, where there is, IPv6.

    Raises:
      OSError: the port is taken.
    """
    backlog = 1024  # that many processes may come at once
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
        )
    return socket.create_server(("", port), backlog=backlog)


def _one_line(text: str, limit: int = 300) -> str:
    return " ".join(text.split())[:limit]
