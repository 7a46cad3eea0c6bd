"""A resumable run: phases that checkpoint, report progress, and stop cleanly.

A run is a sequence of named phases, each a loop of units of work (epochs, generations,
rounds). Every `every` units and at the end of each phase the loop's state is checkpointed in
the phase's own store. On resume, complete phases are read back, the first incomplete one
continues from its newest whole checkpoint, and everything after it is discarded, so that
the metrics and models of a killed run end up equal to those of an uninterrupted one.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax

from acme_jax.checkpoint import CheckpointStore
from acme_jax.performance import RoundMeter
from acme_jax.progress import Phase, Reporter, StopFlag
from acme_jax.run_dir import RunDirectory
from acme_jax.training import NonFiniteLossError

State = TypeVar("State")
Rows = list[dict[str, Any]]


class StoppedError(RuntimeError):
    """The run was asked to stop (SIGTERM or Ctrl-C); its state is saved."""


class Session:
    """The moving parts of one run: directory, progress and the stop flag."""

    def __init__(self, run: RunDirectory, reporter: Reporter, stop: StopFlag) -> None:
        self.run = run
        self.reporter = reporter
        self.stop = stop
        self._root = run.path / "checkpoints"
        self._seen: list[str] = []
        self._behind = self._root.exists()  # still reading what an earlier start has done
        self.complete_phases: set[str] = set()
        """Phases that ran from their first to their last unit in this start."""
        self._complete_step = 0  # metrics rows up to the last complete phase
        self._current: Phase | None = None
        self._ticks = 0

    def loop(
        self,
        name: str,
        *,
        total: int,
        every: int,
        initial: Callable[[], State],
        advance: Callable[[State, int], tuple[State, Rows]],
        stride: int = 1,
        template: Callable[[dict[str, Any]], Any] | None = None,
        extra: Callable[[], dict[str, Any]] | None = None,
        restored: Callable[[dict[str, Any]], None] | None = None,
        meter: Callable[[], RoundMeter] | None = None,
    ) -> State:
        """Runs `state, rows = advance(state, index)` for index 0, stride, ... below `total`.

        Args:
          name: of the phase, unique in the run; names its checkpoints and metrics.
          total: units of work.
          every: units between checkpoints.
          initial: the state before the first unit.
          advance: does up to `stride` units of work and returns metrics rows; it must be
            deterministic in its arguments.
          stride: units done by one call of `advance`.
          template: structure of the state, from the checkpoint's extra values; None: that of
            `initial()`.
          extra: JSON-ready values to store beside the arrays.
          restored: receives those values when the state is read back.
          meter: makes what measures each call of `advance`; only called if there is work to do,
            before the phase's time starts. None: one that knows of seconds and memory only.

        Raises:
          StoppedError: after saving, when a stop was asked for.
          NonFiniteLossError: a row's loss is not finite; names phase and unit. The newest
            checkpoint is from before it.
        """
        self._seen.append(name)
        store = CheckpointStore(self._root / name, log=self.say)
        state, done = self._restore(store, name, total, initial, template, restored)
        if done == total:
            self.reporter.say(f"{name}: read from the checkpoint")
            return state
        if done == 0:
            self.complete_phases.add(name)
        self.check_stop(name, done, total)  # A stop that came since the last unit of a loop.
        measuring = RoundMeter() if meter is None else meter()
        with self.phase(name, total, done, stride) as phase:
            saved = done
            while done < total:
                with measuring.measure() as performance:
                    state, rows = advance(state, done)
                    jax.block_until_ready(state)
                count = min(stride, total - done)
                self._check_finite(name, done, rows)
                for row in rows:
                    self.run.append_metrics(name, **row)
                done += count
                self.run.append_performance(name, done=done, **performance)
                phase.advance(count - self._ticks, _summary(rows))
                self._ticks = 0
                if done == total or done - saved >= every or self.stop.requested:
                    values = {} if extra is None else extra()
                    meta = {"metrics_step": self.run.step, "done": done, "extra": values}
                    store.save(done, state, meta)
                    saved = done
                self.check_stop(name, done, total)
        return state

    def check_stop(self, name: str, done: int, total: int) -> None:
        """Raises `StoppedError` if a stop was asked for."""
        if self.stop.requested:
            raise StoppedError(
                f"stopped in phase {name} after {done} of {total}; everything so far is saved, "
                "continue with --resume"
            )

    @contextmanager
    def phase(self, name: str, total: int = 1, done: int = 0, stride: int = 1) -> Iterator[Phase]:
        """A phase that is shown and timed but not checkpointed (cheap and deterministic)."""
        self.run.log(f"{name}: starts at {done} of {total}")
        with self.reporter.phase(name, total, done=done, stride=stride) as phase:
            self._current = phase
            yield phase
        self._current = None
        self.run.log(f"{name}: done")

    def tick(self, text: str = "") -> None:
        """Shows one unit of a long `advance` as done before it returns."""
        if self._current is not None:
            self._current.advance(1, text)
            self._ticks += 1

    def finish(self) -> None:
        """After the last phase: drops metrics that an earlier start wrote beyond it."""
        self._catch_up(None)

    def abandon(self) -> None:
        """Before any work: removes what a new run has written, so that its directory is free.

        For bad input; otherwise the mended command line would find "another run" there.
        """
        self.run.close()
        path = self.run.path
        if self._root.exists() or (path / "metrics.jsonl").exists():
            return
        for name in ("config.json", "versions.json", "run.log"):
            (path / name).unlink(missing_ok=True)
        if not any(path.iterdir()):
            path.rmdir()

    def decoding(self, done: int, total: int) -> None:
        """Shows how many pictures of the data set are decoded."""
        if done % 1000 == 0 or done == total:
            self.say(f"decoded {done:,} of {total:,} pictures")

    def say(self, text: str) -> None:
        """Shows one line and writes it to the log."""
        self.reporter.say(text)
        self.run.log(text)

    def _restore(
        self,
        store: CheckpointStore,
        name: str,
        total: int,
        initial: Callable[[], State],
        template: Callable[[dict[str, Any]], Any] | None,
        restored: Callable[[dict[str, Any]], None] | None,
    ) -> tuple[State, int]:
        newest = store.newest() if self._behind else None
        if newest is None:
            self._catch_up(None)
            return initial(), 0
        meta = newest.meta
        structure = initial() if template is None else template(meta["extra"])
        state = store.restore(newest.step, structure).tree
        if restored is not None:
            restored(meta["extra"])
        if meta["done"] < total:
            self._catch_up(meta["metrics_step"])
            self.say(f"{name}: continues at {meta['done']} of {total}")
        else:
            self._complete_step = meta["metrics_step"]
        return state, meta["done"]

    def _catch_up(self, metrics_step: int | None) -> None:
        """From here on the run computes: drops what an earlier start wrote beyond this point."""
        if not self._behind:
            return
        self._behind = False
        self.run.truncate_to(self._complete_step if metrics_step is None else metrics_step)
        for path in self._root.iterdir():
            if path.name not in self._seen:
                shutil.rmtree(path)

    def _check_finite(self, name: str, done: int, rows: Rows) -> None:
        for offset, row in enumerate(rows):
            loss = row.get("loss", 0.0)
            if not math.isfinite(loss):
                raise NonFiniteLossError(
                    f"the loss became {loss} in phase {name}, epoch or round {done + offset + 1}"
                    f"{_first_bad_step(row)}; the newest checkpoint is from before it. Lower the "
                    f"phase's learning_rate or clip_norm and start a new run"
                )


def _first_bad_step(row: dict[str, Any]) -> str:
    step = row.get("bad_step")
    return "" if step is None else f", step {step}"


def _summary(rows: Rows) -> str:
    if not rows:
        return ""
    shown = [f"{k} {v:.3g}" for k, v in rows[-1].items() if isinstance(v, float)]
    return ", ".join(shown[:2])
