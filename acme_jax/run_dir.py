"""The directory of one run: configuration, versions, metrics, log, TensorBoard, checkpoints.

```
config.json     the resolved configuration (its fingerprint identifies the run)
versions.json   Python, packages, commit and hardware of the first start
metrics.jsonl   one JSON object a line; no times in it, so that a resumed run's file is equal
performance.jsonl  seconds, rates and memory of every epoch and round, also of those that a
                killed start did and a later one did again
run.log         dated lines, of every start
tensorboard/    the same numbers as TensorBoard events
profile/        with --profile only: a trace of one phase (`acme_jax.phase_trace`)
checkpoints/    see `acme_jax.checkpoint`
```
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax

from acme_jax.config import Config, from_dict
from acme_jax.json_lines import JsonLines, plain

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_METRICS = "metrics.jsonl"
_PERFORMANCE = "performance.jsonl"
_FINISHED = "results.json"


class RunError(ValueError):
    """A run directory that cannot be used; the message says how to mend it."""


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that the file is either the old or the whole new one, even after a crash."""
    temporary = _temporary(path)
    with temporary.open("w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


class RunDirectory:
    """One run's directory, open for writing. Make it with `create_or_open`.

    Metrics rows are numbered by a running `step`, 1 for the first row of the run. A checkpoint
    stores the `step` of its time; on resume `truncate_to` drops the rows after it.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        self.step = 0
        """Number of metrics rows written so far, also the last row's `step`."""
        self._metrics = JsonLines(path / _METRICS)
        self._performance = JsonLines(path / _PERFORMANCE)
        self._events: Any = None

    @classmethod
    def create_or_open(cls, path: str | Path, config: Config, *, resume: bool) -> RunDirectory:
        """Starts a run in a new or empty directory, or continues the run that is in it.

        With `resume` a directory without a run is started anew, so that one command line serves
        a run that may be killed before or after its first moment. After opening an existing
        run, call `truncate_to` with the `step` of the checkpoint that is continued.

        Raises:
          RunError: the path is no directory, holds other files, another run (the message lists
            the keys that differ), or this run while `resume` is not set.
        """
        run = cls(Path(path), config)
        if run.path.exists() and not run.path.is_dir():
            raise RunError(f"{path} is not a directory; choose another --run-dir")
        if (run.path / "config.json").exists():
            run._check_same_run(resume)
            run.step = len(run._metrics.lines())
        else:
            run._check_empty()
            run.path.mkdir(parents=True, exist_ok=True)
            write_json(run.path / "config.json", config.to_dict())
        now = versions()
        if not (run.path / "versions.json").exists():
            write_json(run.path / "versions.json", now)
        started = json.loads((run.path / "versions.json").read_text())
        if started != now:
            run.log(
                "continued with other software or hardware than started with; results may "
                f"differ in the last bits: {differences(started, now)}"
            )
        return run

    @property
    def finished(self) -> bool:
        """Whether the run has written its results."""
        return (self.path / _FINISHED).exists()

    def append_metrics(self, phase: str, **values: Any) -> None:
        """Appends one row `{"step", "phase", ...values}` to metrics.jsonl and TensorBoard.

        Args:
          phase: name of the phase, also the prefix of the TensorBoard tags.
          **values: numbers, strings, or (nested lists from) arrays. Never times: the rows of a
            resumed run must equal those of an uninterrupted one. NaN and infinity, which JSON
            lacks, become null.
        """
        self._open_events()
        self.step += 1
        row = {"step": self.step, "phase": phase} | {k: plain(v) for k, v in values.items()}
        self._metrics.append(row)
        self._add_metrics(row)

    def append_performance(self, phase: str, *, done: int, **values: float) -> None:
        """Appends one row `{"phase", "done", ...values}` to performance.jsonl and TensorBoard.

        A resumed run keeps all rows, so units that were done twice have two.

        Args:
          phase: name of the phase; the TensorBoard tags are `performance/PHASE/NAME`.
          done: units of the phase done so far, TensorBoard's step.
          **values: times, rates, bytes.
        """
        self._open_events()
        row = {"phase": phase, "done": done} | {k: plain(v) for k, v in values.items()}
        self._performance.append(row)
        self._add_performance(row)

    def truncate_to(self, step: int) -> None:
        """Drops the metrics rows after the first `step` ones, and a torn last line.

        Raises:
          RunError: there are fewer rows than that.
        """
        self.close()
        rows = self._metrics.lines()
        if len(rows) < step:
            raise RunError(
                f"{self.path / _METRICS} has {len(rows)} rows, but the checkpoint was written "
                f"after {step}; the file was altered, so start again in another --run-dir"
            )
        self._metrics.replace(rows[:step])
        self.step = step

    def log(self, text: str) -> None:
        """Appends one dated line to run.log."""
        stamp = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        with (self.path / "run.log").open("a") as file:
            file.write(f"{stamp} {text}\n")

    def close(self) -> None:
        """Closes the open files; the next row opens them again."""
        self._metrics.close()
        self._performance.close()
        if self._events is not None:
            self._events.close()
        self._events = None

    def _check_same_run(self, resume: bool) -> None:
        try:
            stored = from_dict(json.loads((self.path / "config.json").read_text()))
        except ValueError as error:
            raise RunError(
                f"{self.path / 'config.json'} is not the configuration of a run of this version "
                f"({error}); choose another --run-dir"
            ) from None
        if stored.fingerprint() != self.config.fingerprint():
            raise RunError(
                f"{self.path} holds another run; choose another --run-dir, or set these as "
                f"there: {differences(stored.to_dict(), self.config.to_dict())}"
            )
        if not resume:
            state = "finished" if self.finished else "started"
            raise RunError(
                f"{self.path} holds this run already, {state}; add --resume to continue it, or "
                "choose another --run-dir"
            )

    def _check_empty(self) -> None:
        names = {p.name for p in self.path.iterdir()} if self.path.exists() else set()
        # A run killed in its first moment leaves only the temporary file.
        if others := sorted(names - {_temporary(self.path / "config.json").name}):
            raise RunError(
                f"{self.path} holds files but no run ({', '.join(others[:3])}); choose another "
                "--run-dir or empty it"
            )

    def _open_events(self) -> None:
        """Opens TensorBoard events that hold the same rows as both files.

        Events are written again from the rows: what a killed run had not flushed is not lost,
        and what came after the checkpoint does not show.
        """
        if self._events is not None:
            return
        from tensorboardX import SummaryWriter

        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        self._events = SummaryWriter(str(self.path / "tensorboard"), flush_secs=10)
        for line in self._metrics.lines():
            self._add_metrics(json.loads(line))
        for line in self._performance.lines():
            self._add_performance(json.loads(line))

    def _add_metrics(self, row: dict[str, Any]) -> None:
        self._add_events(row["phase"], row, row["step"])

    def _add_performance(self, row: dict[str, Any]) -> None:
        self._add_events(f"performance/{row['phase']}", row, row["done"])

    def _add_events(self, prefix: str, row: dict[str, Any], step: int) -> None:
        for name, value in row.items():
            if name not in ("step", "done") and isinstance(value, int | float):
                self._events.add_scalar(f"{prefix}/{name}", value, step)


def differences(stored: dict[str, Any], asked: dict[str, Any]) -> str:
    """The leaves in which two nested dictionaries differ, as one readable line."""
    here, there = _flatten(stored), _flatten(asked)
    keys = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
    return "; ".join(f"{k} is {here.get(k)!r} there, {there.get(k)!r} now" for k in keys)


def versions() -> dict[str, Any]:
    """Versions of Python and the packages, git commit, and hardware, JSON-ready."""
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
        "hardware": {
            "machine": platform.machine(),
            "cpu": _cpu_name(),
            "cpu_cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "backend": jax.default_backend(),
            "devices": [d.device_kind for d in jax.devices()],
        },
    }


def _commit() -> str | None:
    """The checked-out commit of this package's own repository, "-dirty" if changed."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # Installed: an outer repository would be another one.
        return None
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--exclude=*",
        "--abbrev=40",
        "--dirty",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
