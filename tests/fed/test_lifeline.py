"""The lifeline alone, without JAX: three ends in one process."""

import queue
import socket
import time

import pytest

from fed import lifeline
from fed.lifeline import Lifeline, Lost

PATIENCE_S = 30


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(lifeline, "INTERVAL_S", 0.1)
    monkeypatch.setattr(lifeline, "_SENT_S", 0.05)


class End:
    """A lifeline and what it reports."""

    def __init__(self, line):
        self.line = line
        self.losses = queue.Queue()
        line.on_lost(self.losses.put)

    def loss(self):
        return self.losses.get(timeout=PATIENCE_S)


@pytest.fixture
def ends():
    hub = Lifeline.listen(timeout_s=20.0)
    made = [End(hub)]
    made += [End(Lifeline.join("127.0.0.1", hub.port, hub.token, i, 20.0)) for i in (1, 2)]
    wait_for(lambda: len(known(hub)) == 2)
    yield made
    for end in made:
        end.line.close()


def known(hub):
    return [peer for peer in list(hub._peers.values()) if peer.process_id is not None]


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_nothing_is_reported_while_all_live(ends):
    time.sleep(0.5)
    assert all(end.losses.empty() for end in ends)


def test_a_broken_connection_is_reported_to_all(ends):
    (link,) = ends[2].line._peers
    link.shutdown(socket.SHUT_RDWR)  # as the system does when a process is killed
    for end in ends[:2]:
        loss = end.loss()
        assert loss.process_id == 2 and "connection closed" in loss.reason


def test_a_reason_is_passed_on_in_one_line(ends):
    ends[1].line.fail("ValueError: two\nlines")
    for end in (ends[0], ends[2]):
        assert end.loss() == Lost(1, "ValueError: two lines")
    assert ends[1].losses.empty()


def test_the_end_of_process_0_is_reported(ends):
    ends[0].line.fail("full disk")
    for end in ends[1:]:
        assert end.loss() == Lost(0, "full disk")


def test_leaving_in_order_is_no_loss(ends):
    ends[2].line.close()
    wait_for(lambda: len(known(ends[0].line)) == 1)
    time.sleep(0.3)
    assert ends[0].losses.empty() and ends[1].losses.empty()
    assert not ends[0].line.wait_alone(0.1)
    ends[1].line.close()
    assert ends[0].line.wait_alone(PATIENCE_S)


def test_silence_is_reported():
    hub = End(Lifeline.listen(timeout_s=0.5))
    try:
        with socket.create_connection(("127.0.0.1", hub.line.port)) as silent:
            silent.send(f"hello {hub.line.token} 1\n".encode())
            assert hub.loss() == Lost(1, "no sign of life for 0.5 s")
    finally:
        hub.line.close()


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"hello wrong 1\n", b"lost 1 x\n"]
)
def test_strangers_are_ignored(ends, said):
    with socket.create_connection(("127.0.0.1", ends[0].line.port)) as stranger:
        stranger.send(said)
    time.sleep(0.3)
    assert all(end.losses.empty() for end in ends)


def test_a_loss_before_anyone_asked_is_kept():
    hub = Lifeline.listen(timeout_s=20.0)
    try:
        with socket.create_connection(("127.0.0.1", hub.port)) as peer:
            peer.send(f"hello {hub.token} 1\n".encode())
            wait_for(lambda: known(hub))
        wait_for(lambda: not hub._peers)
        assert End(hub).loss().process_id == 1
    finally:
        hub.close()
