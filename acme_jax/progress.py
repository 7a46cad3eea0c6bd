"""Progress with time left, seconds by phase, peak memory, and stopping on request."""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Literal, NamedTuple

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from acme_jax.phase_trace import PhaseTrace

Mode = Literal["auto", "live", "plain", "quiet"]

_PLAIN_INTERVAL_S = 5.0
_COMPILE_EVENTS = frozenset(
    {
        "/jax/core/compile/jaxpr_trace_duration",
        "/jax/core/compile/jaxpr_to_mlir_module_duration",
        "/jax/core/compile/backend_compile_duration",
    }
)


class PhaseTime(NamedTuple):
    """Wall-clock time of one phase; compile_seconds (trace, lower, compile) are part of it."""

    phase: str
    seconds: float
    compile_seconds: float


class Stopwatch:
    """Seconds and compile seconds of a `with` body; known when it has ended, also by an error.

    JAX reports each trace, lowering and compilation when it ends, inner ones (a jitted function
    called while another is traced) before the outer one that contains them. The time is
    therefore the length of the union of the reported intervals, not their sum.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.compile_seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._intervals: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        jax.monitoring.unregister_event_duration_listener(self._listen)
        self.compile_seconds = sum((end - begin for begin, end in self._intervals), 0.0)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event in _COMPILE_EVENTS:
            end = time.perf_counter()
            start = end - duration_secs
            while self._intervals and self._intervals[-1][1] > start:
                start = min(start, self._intervals.pop()[0])
            self._intervals.append((start, end))


class PhaseTimer:
    """Records seconds and compile seconds of phases, which must not nest."""

    def __init__(self) -> None:
        self.records: list[PhaseTime] = []

    @contextlib.contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Times the body; also when it raises."""
        watch = Stopwatch()
        try:
            with watch:
                yield
        finally:
            self.records.append(PhaseTime(phase, watch.seconds, watch.compile_seconds))


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class StopFlag:
    """Set by a signal; long loops poll `requested` between steps and then save and return."""

    def __init__(self) -> None:
        self.requested = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """SIGTERM and the first Ctrl-C set the flag; a second Ctrl-C interrupts at once.

    Must be entered in the main thread. The previous handlers come back at the end.
    """
    stop = StopFlag()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    previous = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Phase:
    """One phase in progress; `advance` it. Made by `Reporter.phase`."""

    def __init__(
        self, reporter: Reporter, name: str, total: int, done: int, task: TaskID | None
    ) -> None:
        self._reporter = reporter
        self._name = name
        self._total = total
        self._task = task
        self._done = self._done_before = done
        self._start = self._printed = time.perf_counter()

    def advance(self, num: int = 1, text: str = "") -> None:
        """Counts `num` more units of work as done.

        Args:
          num: units.
          text: a short metric, such as "loss 0.31".
        """
        self._done += num
        if self._reporter.trace is not None:
            self._reporter.trace.unit()
        if self._task is not None:
            self._reporter.bars.update(self._task, advance=num, text=text)
        now = time.perf_counter()
        if self._reporter.mode == "plain" and now - self._printed >= _PLAIN_INTERVAL_S:
            self._printed = now
            pace = (now - self._start) / max(1, self._done - self._done_before)
            left = pace * (self._total - self._done)
            share = f"{self._done}/{self._total}, {left:.0f} s left"
            self._reporter.say(f"  {self._name}: {share}{', ' if text else ''}{text}")


class Reporter:
    """Shows phases as they run, and times them.

    Mode "live" draws one bar a phase (rich): count, elapsed time, time left, a short metric.
    "plain" prints a line at the start and end of each phase and at most one each 5 s between.
    "quiet" prints nothing. "auto" is live on a terminal and plain elsewhere.

    Use as a context manager; phases follow one another and do not nest. With a `trace` the
    phase that it names is traced.
    """

    def __init__(
        self,
        mode: Mode = "auto",
        *,
        console: Console | None = None,
        trace: PhaseTrace | None = None,
    ) -> None:
        self.trace = trace
        self.console = console or Console(soft_wrap=True)
        self.mode = mode
        if mode == "auto":
            self.mode = "live" if self.console.is_terminal else "plain"
        self.timer = PhaseTimer()
        self.bars = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            refresh_per_second=4,
        )

    def __enter__(self) -> Reporter:
        if self.mode == "live":
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.mode == "live":
            self.bars.stop()

    @contextlib.contextmanager
    def phase(self, name: str, total: int, *, done: int = 0, stride: int = 1) -> Iterator[Phase]:
        """Shows and times one phase.

        Args:
          name: shown, and the key of the timer's record.
          total: units of work in the phase.
          done: of these, units an earlier start of the run has done already.
          stride: units done at once, before `advance` is called.
        """
        task = None
        if self.mode == "live":
            task = self.bars.add_task(name, total=total, completed=done, text="")
        if self.mode == "plain":
            self.say(f"{name} ...")
        traced: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.trace is not None:
            traced = self.trace.during(name, -(-(total - done) // stride))
        with self.timer.measure(name), traced:
            yield Phase(self, name, total, done, task)
        if self.mode == "plain":
            record = self.timer.records[-1]
            compiled = f" (compile {record.compile_seconds:.1f} s)"
            self.say(f"{name}: done in {record.seconds:.1f} s{compiled}")

    def say(self, text: str) -> None:
        """Prints one line above the bars; nothing in quiet mode."""
        if self.mode != "quiet":
            self.console.print(text, markup=False, highlight=False)
