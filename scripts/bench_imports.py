"""Times `import nas` beyond importing jax, and module by module.

    python scripts/bench_imports.py [--repeats 5]

Every measurement is a fresh interpreter that imports jax first and then every module of `nas`
but the controller (which needs optax), in alphabetical order. Prints the median of all together
and of each module, with what it is the first to load, the slowest first. About 10 s.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import importlib, json, sys, time
import jax, jax.numpy, numpy
seconds = {}
for name in sys.argv[1:]:
    start = time.perf_counter()
    importlib.import_module(name)
    seconds[name] = time.perf_counter() - start
print(json.dumps(seconds))
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """How often to measure."""

    repeats: int = 5


def main() -> None:
    """Measures and prints."""
    arguments = tyro.cli(Arguments)
    names = sorted(path.stem for path in (ROOT / "nas").glob("*.py"))
    modules = ["nas", *(f"nas.{name}" for name in names if name not in ("__init__", "controller"))]
    runs = []
    for _ in range(arguments.repeats):
        command = [sys.executable, "-c", PROGRAM, *modules]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout))
    total = statistics.median(sum(run.values()) for run in runs)
    print(f"import of {len(modules)} modules of nas beyond jax: {1000 * total:.1f} ms (median)")
    medians = {name: statistics.median(run[name] for run in runs) for name in modules}
    for name in sorted(medians, key=lambda name: -medians[name]):
        print(f"  {name:<28}{1000 * medians[name]:7.2f} ms")


if __name__ == "__main__":
    main()
