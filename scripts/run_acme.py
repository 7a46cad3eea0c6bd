"""The main job: ACME end to end on real data.

    python scripts/run_acme.py [PRESET] [--run-dir DIR] [--resume] [--profile [PHASE]]
                               [--SECTION.KEY VALUE ...]

`--help` after a preset lists every key with its default.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from acme_jax import layout
from acme_jax.config import Config
from acme_jax.phase_trace import PhaseName, PhaseTrace
from acme_jax.presets import get

FORESEEN = (
    "ConfigError",
    "DataError",
    "PretrainedError",
    "RunError",
    "CheckpointError",
    "NonFiniteLossError",
    "ModelError",
)
"""Errors whose message is all that a user needs; by name, because they are imported late."""

STOPPED = 143
"""Exit status after SIGTERM or Ctrl-C: 128 + 15, as a shell reports a terminated process."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Command line of one run."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    run_dir: Annotated[Path | None, tyro.conf.arg(name="run-dir")] = None
    """Where the run is written; None: runs/PRESET-seedSEED."""
    resume: bool = False
    """Continue a killed run; starts a new one if there is none."""
    profile: PhaseName | None = None
    """Write a trace of one epoch or round of this phase to RUN_DIR/profile, for TensorBoard or
    Perfetto; without a value: of the refinement."""


def profile_value(argv: list[str]) -> list[str]:
    """The arguments, with a phase after a `--profile` that has none."""
    words: list[str] = []
    for index, word in enumerate(argv):
        words.append(word)
        if word == "--profile" and (index + 1 == len(argv) or argv[index + 1].startswith("-")):
            words.append("refinement")
    return words


def main(argv: list[str]) -> int:
    """Parses the command line, runs, and turns every foreseen error into one line."""
    preset = argv.pop(0) if argv and not argv[0].startswith("-") else "mnist5k"
    try:
        default = Arguments(get(preset))
        arguments = tyro.cli(
            Arguments, default=default, args=profile_value(argv), prog=f"run_acme.py {preset}"
        )
        config = arguments.config
        layout.configure(config.compute)
        # Imported late: the layout must be set before JAX starts.
        from acme_jax import system
        from acme_jax.progress import Reporter

        run_dir = arguments.run_dir or Path("runs") / f"{config.preset}-seed{config.seed}"
        trace = arguments.profile and PhaseTrace(run_dir / "profile", arguments.profile)
        system.run(config, run_dir, resume=arguments.resume, reporter=Reporter(trace=trace))
        if trace is not None:
            print(trace.report())
    except Exception as error:
        name = type(error).__name__
        if name == "StoppedError":
            print(error, file=sys.stderr)
            return STOPPED
        if name in FORESEEN or isinstance(error, OSError):
            print(f"error: {error}", file=sys.stderr)
            return 2
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
