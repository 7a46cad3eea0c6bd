"""The parent's side of `bench_clients.py`: processes, their turns, and whether they agree."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from client_work import Flat

TIMEOUT_S = 900.0
TOLERANCE = 1e-5
"""Of losses and of averaged parameters, absolute."""


class WorkerError(RuntimeError):
    """A contender that died, hung or answered nonsense."""


class Worker:
    """A contender's process, from its start until the warm-up round is done.

    Raises:
      WorkerError: see there; the message ends with the last lines of its error output.
    """

    def __init__(self, form: str, command: Sequence[str], log: Path) -> None:
        self.form = form
        self._log = log
        start = time.perf_counter()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # On a GPU the first of several workers would take three quarters of its memory.
                env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            )
        try:
            self.ready = self._answer("loss", "info")
        except WorkerError:
            self.close()
            raise
        self.start_s = time.perf_counter() - start

    def round(self, index: int) -> dict[str, Any]:
        """One round: seconds, loss, rss_bytes."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(f"round {index}\n")
            self._process.stdin.flush()
        return self._answer("seconds", "loss", "rss_bytes")

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._process.communicate("quit\n", timeout=10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _answer(self, *keys: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        # A worker writes one line for each of ours, so nothing waits in Python's own buffer.
        if not select.select([self._process.stdout], [], [], TIMEOUT_S)[0]:
            raise WorkerError(f"{self.form} has not answered for {TIMEOUT_S:.0f} s")
        line = self._process.stdout.readline()
        try:
            answer = json.loads(line)
            return {key: answer[key] for key in keys}
        except (ValueError, KeyError, TypeError):
            tail = "\n".join(self._log.read_text().splitlines()[-8:])
            said = f"answered {line.strip()!r}" if line else "ended"
            raise WorkerError(
                f"{self.form} {said}; expected a JSON line with {', '.join(keys)}\n{tail}"
            ) from None


def run_passes(workers: Sequence[Worker], passes: int, rounds: int) -> dict[str, list[dict]]:
    """One round of each worker in turn, again and again: its answers by form."""
    answers: dict[str, list[dict]] = {worker.form: [] for worker in workers}
    for number in range(passes):
        first = number % len(workers)
        for worker in (*workers[first:], *workers[:first]):
            answers[worker.form].append(worker.round(1 + number % rounds))
    return answers


def check_losses(reference: str, losses: Mapping[str, Sequence[float]]) -> None:
    """Checks that all contenders report the same losses, round by round.

    Raises:
      WorkerError: one does not.
    """
    for form, values in losses.items():
        differences = np.abs(np.subtract(values, losses[reference]))
        if not differences.max() <= TOLERANCE:  # NaN fails
            worst = int(np.argmax(differences))
            raise WorkerError(
                f"{form} does other work than {reference}: its losses differ by up to "
                f"{differences.max():.2e} ({values[worst]:.7f} and "
                f"{losses[reference][worst]:.7f}), allowed are {TOLERANCE:.0e}"
            )


def check_params(reference: str, params: Mapping[str, Flat]) -> dict[str, float]:
    """Checks that all contenders aggregate to the same parameters.

    Returns:
      The largest absolute difference from the reference, by form.

    Raises:
      WorkerError: other names or shapes, or a difference above the tolerance.
    """
    expected = params[reference]
    shapes = {name: leaf.shape for name, leaf in expected.items()}
    differences = {}
    for form, found in params.items():
        if {name: leaf.shape for name, leaf in found.items()} != shapes:
            raise WorkerError(
                f"{form} saved {sorted(found)}, {reference} {sorted(shapes)}, or leaves of other "
                "shapes; expected the paths and shapes of params.npz"
            )
        by_name = {name: float(np.abs(found[name] - expected[name]).max()) for name in shapes}
        worst = max(by_name, key=lambda name: np.nan_to_num(by_name[name], nan=np.inf))
        differences[form] = by_name[worst]
        if not differences[form] <= TOLERANCE:
            raise WorkerError(
                f"{form} does other work than {reference}: after the warm-up round {worst} differs "
                f"by up to {differences[form]:.2e}, allowed are {TOLERANCE:.0e}"
            )
    return differences
