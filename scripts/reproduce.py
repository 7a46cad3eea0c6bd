"""The paper's experiments, on several seeds.

    python scripts/reproduce.py EXPERIMENT [EXPERIMENT ...] [--dataset fashion_mnist]
                                [--seeds 0 1 2] [--root DIR] [--out DIR] [--again]

EXPERIMENT is one of backbone_grid, headers, header_cells, selection, personalization, traffic,
ablations, whole_system, methods, or all. The same command continues a run that was stopped. Each
experiment writes DIR/EXPERIMENT-DATASET.json, from which `scripts/make_results.py` makes
tables and pictures.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro
from run_acme import FORESEEN, STOPPED

from acme_jax import layout
from acme_jax.experiments.settings import settings


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to run."""

    experiments: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Names, or all."""
    dataset: str = "fashion_mnist"
    """fashion_mnist, cifar100, stanford_cars, mnist5k, digits, or tiny (a minute, for a try)."""
    path: str | None = None
    """Where the data lie, as --data.path of run_acme.py."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every seed draws its own splits, devices and weights."""
    root: Path = Path("runs/reproduce")
    """What is made on the way, below a directory of the data set's name; kept for a later start."""
    out: Path | None = None
    """Where the JSON goes; None: beside what is made on the way."""
    again: bool = False
    """Compute these experiments' units again, also those that are complete."""


def main(argv: list[str]) -> int:
    """Runs; every foreseen error is one line."""
    arguments = tyro.cli(Arguments, args=argv, prog="reproduce.py")
    try:
        config = settings(arguments.dataset)
        root = arguments.root / arguments.dataset
        compute = dataclasses.replace(config.compute, compilation_cache=str(root / "compiled"))
        config = dataclasses.replace(
            config, compute=compute, data=dataclasses.replace(config.data, path=arguments.path)
        )
        layout.configure(config.compute)
        # Imported late: the layout must be set before JAX starts.
        from acme_jax.experiments import registry, running
        from acme_jax.progress import Reporter, stop_on_signals
        from acme_jax.run_dir import write_json

        wanted = arguments.experiments
        names = registry.EXPERIMENTS if wanted == ("all",) else wanted
        experiments = [registry.experiment(name) for name in names]
        if arguments.again:
            running.forget(experiments, arguments.seeds, root)
        with Reporter() as reporter, stop_on_signals() as stop:
            for seed in arguments.seeds:
                seeded = dataclasses.replace(config, seed=seed)
                running.run_seed(experiments, seeded, root, reporter, stop)
        out = arguments.out or root
        out.mkdir(parents=True, exist_ok=True)
        seeds = " ".join(str(seed) for seed in arguments.seeds)
        for experiment in experiments:
            command = (
                f"python scripts/reproduce.py {experiment.name} "
                f"--dataset {arguments.dataset} --seeds {seeds}"
            )
            found = running.document(experiment, config, arguments.seeds, root, command)
            path = out / f"{experiment.name}-{arguments.dataset}.json"
            write_json(path, found)
            print(f"{path}: {len(found['rows'])} rows, {found['seconds']:.0f} s")
    except Exception as error:
        name = type(error).__name__
        if name == "StoppedError":
            print(error, file=sys.stderr)
            return STOPPED
        if name in FORESEEN or isinstance(error, OSError):
            # The messages name the options of run_acme.py.
            print(f"error: {error}".replace("--data.path", "--path"), file=sys.stderr)
            return 2
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
