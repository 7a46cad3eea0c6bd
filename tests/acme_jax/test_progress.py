import io
import os
import signal
import time

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from acme_jax import progress
from acme_jax.progress import PhaseTimer, Reporter, stop_on_signals


def make_reporter(mode, terminal=False):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    return Reporter(mode, console=console)


def output(reporter):
    return reporter.console.file.getvalue()


def test_plain_prints_start_and_end(monkeypatch):
    with make_reporter("auto") as reporter:
        assert reporter.mode == "plain"
        with reporter.phase("width [a]", 3) as phase:
            for _ in range(3):
                phase.advance(text="loss 0.5")
    lines = output(reporter).splitlines()
    assert lines[0] == "width [a] ..."
    assert lines[1].startswith("width [a]: done in 0.0 s (compile ")
    assert len(lines) == 2


def test_plain_prints_time_left_between(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with make_reporter("plain") as reporter, reporter.phase("depth", 12, done=2) as phase:
        for _ in range(6):
            now[0] += 2.0
            phase.advance(text="loss 0.5")
    lines = output(reporter).splitlines()
    # 2 s a unit; lines at 6 s and 12 s only. The 2 units of an earlier start took no time.
    assert lines[1] == "  depth: 5/12, 14 s left, loss 0.5"
    assert lines[2] == "  depth: 8/12, 8 s left, loss 0.5"
    assert len(lines) == 4


def test_live_shows_a_bar():
    with make_reporter("auto", terminal=True) as reporter:
        assert reporter.mode == "live"
        with reporter.phase("reference", 4) as phase:
            phase.advance(4, text="accuracy 0.93")
        reporter.say("note [b]")
    text = output(reporter)
    assert "reference" in text and "4/4" in text and "accuracy 0.93" in text and "note [b]" in text


def test_quiet_prints_nothing_but_times():
    with make_reporter("quiet") as reporter:
        with reporter.phase("a", 1) as phase:
            phase.advance()
        reporter.say("x")
    assert output(reporter) == ""
    assert [r.phase for r in reporter.timer.records] == ["a"]


def test_timer_separates_compilation():
    @jax.jit
    def inner(x):
        return jnp.tanh(x) * 2

    @jax.jit
    def outer(x):
        return inner(inner(x) + 1).sum()

    timer = PhaseTimer()
    with timer.measure("cold"):
        outer(jnp.ones((4, 4))).block_until_ready()
    with timer.measure("warm"):
        outer(jnp.ones((4, 4))).block_until_ready()
        time.sleep(0.05)
    cold, warm = timer.records
    assert 0.0 < cold.compile_seconds < cold.seconds
    assert warm.compile_seconds < 0.05 <= warm.seconds


def test_timer_takes_nested_compile_events_once(monkeypatch):
    """Inner trace, outer trace around it, then a compilation: the union of the intervals."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    timer = PhaseTimer()
    with timer.measure("a"):
        for end, event, duration in [
            (2.0, "jaxpr_trace_duration", 1.0),
            (4.0, "jaxpr_trace_duration", 0.5),
            (5.0, "jaxpr_trace_duration", 5.0),
            (9.0, "backend_compile_duration", 3.0),
        ]:
            now[0] = end
            jax.monitoring.record_event_duration_secs(f"/jax/core/compile/{event}", duration)
        jax.monitoring.record_event_duration_secs("/jax/something/else", 9.0)
        now[0] = 10.0
    assert timer.records == [progress.PhaseTime("a", 10.0, 8.0)]
    jax.monitoring.record_event_duration_secs("/jax/core/compile/backend_compile_duration", 1.0)
    assert timer.records[0].compile_seconds == 8.0


def test_timer_records_failed_phases():
    timer = PhaseTimer()
    with pytest.raises(ZeroDivisionError), timer.measure("a"):
        raise ZeroDivisionError
    assert [r.phase for r in timer.records] == ["a"]


def test_peak_memory_is_in_bytes():
    # Python with JAX takes 100 to 200 MB; a wrong unit would be off by a factor of 1024.
    assert 2**26 < progress.peak_memory_bytes() < 2**36


def test_sigterm_sets_the_flag_and_the_handler_is_restored():
    previous = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is previous


def test_second_interrupt_is_immediate():
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.0)
