"""All processes of a job meet, or one line says who is missing; threads play the processes."""

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fed import multihost, roll_call
from fed.roll_call import MultihostError, answer, call_roll

PATIENCE_S = 30.0


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture
def address():
    return "127.0.0.1", free_port()


@contextlib.contextmanager
def threads():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_all_hear_the_news_in_whatever_order_they_start(address):
    with threads() as pool:
        answers = [pool.submit(answer, address, 3, index, PATIENCE_S) for index in (2, 1)]
        call_roll(address[1], 3, "port token", PATIENCE_S)
        assert [done.result(PATIENCE_S) for done in answers] == ["port token"] * 2
    socket.create_server(("", address[1])).close()  # the port is free for JAX


def test_the_missing_are_named(address):
    with threads() as pool:
        came = pool.submit(answer, address, 4, 2, PATIENCE_S)
        with pytest.raises(MultihostError, match=r"2 of 4 .* missing \(process 1, 3\).*started"):
            call_roll(address[1], 4, "", 1.0)
        with pytest.raises(MultihostError, match="ended before all processes were there"):
            came.result(PATIENCE_S)


@pytest.mark.parametrize(
    ("said", "refusal"),
    [((3, 1), "--num-processes is 3 here, but 2 in"), ((2, 2), "another process 2")],
)
def test_who_does_not_fit_is_told_and_the_others_go_on(address, said, refusal):
    with threads() as pool:
        rolled = pool.submit(call_roll, address[1], 2, "news", PATIENCE_S)
        with pytest.raises(MultihostError, match=refusal):
            answer(address, *said, PATIENCE_S)
        assert answer(address, 2, 1, PATIENCE_S) == "news"
        rolled.result(PATIENCE_S)


def test_a_second_process_of_the_same_id_is_refused_but_a_restarted_one_is_not(address):
    with threads() as pool:
        rolled = pool.submit(call_roll, address[1], 3, "news", PATIENCE_S)
        first = connected(address, b"here 1 3\n")
        with pytest.raises(MultihostError, match="another process 1"):
            answer(address, 3, 1, PATIENCE_S)
        first.close()
        again = [pool.submit(answer, address, 3, index, PATIENCE_S) for index in (1, 2)]
        assert [done.result(PATIENCE_S) for done in again] == ["news"] * 2
        rolled.result(PATIENCE_S)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"here one 2\n", b"here 1\n"])
def test_strangers_are_passed_over(address, said):
    with threads() as pool:
        rolled = pool.submit(call_roll, address[1], 2, "news", PATIENCE_S)
        with connected(address, said):
            assert answer(address, 2, 1, PATIENCE_S) == "news"
        rolled.result(PATIENCE_S)


def connected(address, said):
    pause = threading.Event()
    while True:
        try:
            link = socket.create_connection(address, timeout=PATIENCE_S)
        except OSError:
            pause.wait(0.05)
            continue
        link.sendall(said)
        return link


def test_unreachable_coordinator_is_named(address, monkeypatch):
    monkeypatch.setattr(roll_call, "_PAUSE_S", 0.05)
    name = f"127.0.0.1:{address[1]}"
    with pytest.raises(MultihostError) as caught:
        multihost.initialize(name, 2, 1, connect_timeout_s=0.3)
    for part in (name, "0.3 s", "process 0 runs there", "same address", "firewall"):
        assert part in str(caught.value)


def test_port_in_use_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MultihostError, match=f"cannot listen on port {port} "):
            multihost.initialize(f"127.0.0.1:{port}", 2, 0)
