"""A profiler trace of one phase of a run, for TensorBoard (plugin `xprof`) or ui.perfetto.dev."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax

PhaseName = Literal[
    "reference model",
    "importance",
    "width distillation",
    "depth distillation",
    "pareto search",
    "features",
    "header search",
    "refinement",
    "final evaluation",
]
"""Phases of a run that can be traced; of those that every edge has, the first edge's is."""


class PhaseTrace:
    """Traces one unit (epoch, generations, round) of one phase.

    One, because a second of small programs on CPU makes 10 MB; the second, because the first
    compiles, unless there is no other.

    Args:
      directory: made when the trace begins; holds `plugins/profile/DATE/*.xplane.pb` and, for
        Perfetto, `*.trace.json.gz`.
      phase: which one.
    """

    def __init__(self, directory: Path, phase: PhaseName) -> None:
        self.directory = directory
        self._phase = phase
        self._waiting = self._running = self._done = False

    @contextlib.contextmanager
    def during(self, name: str, units: int) -> Iterator[None]:
        """Around every phase of the run; traces the wanted one, once.

        Args:
          name: of the phase.
          units: that it is going to do.
        """
        wanted = name == self._phase or name.startswith(f"{self._phase}, edge ")
        self._waiting = wanted and not self._done
        if units == 1:
            self._start_if_waiting()
        try:
            yield
        finally:
            self._waiting = False
            self._stop()

    def unit(self) -> None:
        """After each unit of any phase."""
        self._stop()
        self._start_if_waiting()

    def report(self) -> str:
        """One line: where the trace is and what opens it, or why there is none."""
        if not self._done:
            return f"no profile: phase {self._phase} was complete already, so nothing ran"
        return (
            f"profile of phase {self._phase}: {self.directory}, for TensorBoard (plugin xprof); "
            "its *.trace.json.gz also for ui.perfetto.dev"
        )

    def _start_if_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would drown the rest
            jax.profiler.start_trace(str(self.directory), profiler_options=options)
            self._running = self._done = True

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
