"""Runs experiments unit by unit, keeps every unit's rows, and writes one document at the end.

A unit of a seed that is complete lies in `ROOT/seedN/results/EXPERIMENT/UNIT.json`, and a later
start reads it instead of computing it again.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acme_jax.config import Config
from acme_jax.experiments.experiment import Experiment, Row
from acme_jax.experiments.study import Study, open_study
from acme_jax.json_lines import plain
from acme_jax.progress import Reporter, StopFlag
from acme_jax.run_dir import versions, write_json
from acme_jax.session import StoppedError


def run_seed(
    experiments: Sequence[Experiment],
    config: Config,
    root: Path,
    reporter: Reporter,
    stop: StopFlag,
) -> None:
    """Does what is left to do of one seed.

    Args:
      experiments: in this order.
      config: of the data set, with the seed.
      root: directory of the data set.
      reporter: shows progress.
      stop: honoured between units and epochs.

    Raises:
      StoppedError: a stop was asked for; everything complete is kept.
      ConfigError, DataError, RunError: bad input, before long work starts.
    """
    todo = [
        (experiment, unit)
        for experiment in experiments
        for unit in experiment.units(config)
        if not _unit_path(root, config.seed, experiment.name, unit).exists()
    ]
    if not todo:
        reporter.say(f"seed {config.seed}: everything is read from {root}")
        return
    with open_study(config, _seed_directory(root, config.seed), reporter, stop) as study:
        for number, (experiment, unit) in enumerate(todo):
            _run_unit(study, experiment, unit, root, f"{number + 1} of {len(todo)}")
            if stop.requested and number + 1 < len(todo):
                raise StoppedError(
                    f"stopped after {experiment.name} {unit}, seed {config.seed}; the same "
                    "command goes on from here"
                )


def _run_unit(study: Study, experiment: Experiment, unit: str, root: Path, place: str) -> None:
    seed = study.config.seed
    study.context.session.say(f"seed {seed}: {experiment.name} {unit} ({place}) ...")
    start = time.perf_counter()
    rows = experiment.run(study, unit)
    seconds = time.perf_counter() - start
    path = _unit_path(root, seed, experiment.name, unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{key: plain(value) for key, value in row.items()} for row in rows]
    write_json(path, {"rows": rows, "seconds": seconds, "versions": versions()})
    study.context.session.say(f"seed {seed}: {experiment.name} {unit} done in {seconds:.0f} s")


def document(
    experiment: Experiment, config: Config, seeds: Sequence[int], root: Path, command: str
) -> dict[str, Any]:
    """Everything that one experiment found, as it is committed.

    Args:
      experiment: whose units are complete for every seed.
      config: of the data set.
      seeds: of the rows.
      root: directory of the data set.
      command: that made it.
    """
    rows: list[Row] = []
    seconds, commits = 0.0, set()
    made: dict[str, Any] = {}
    for seed in seeds:
        for unit in experiment.units(dataclasses.replace(config, seed=seed)):
            made = json.loads(_unit_path(root, seed, experiment.name, unit).read_text())
            rows += [{"seed": seed, "unit": unit, **row} for row in made["rows"]]
            seconds += made["seconds"]
            commits.add(made["versions"]["commit"])
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "command": command,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commits": sorted(str(commit) for commit in commits),
        "versions": {"python": made["versions"]["python"], **made["versions"]["packages"]},
        "hardware": made["versions"]["hardware"],
        "seconds": seconds,
        "seeds": list(seeds),
        "config": _config(config),
        "rows": rows,
    }


def _config(config: Config) -> dict[str, Any]:
    """All that rows depend on: without the seed, and without where things lie on this machine."""
    data = dataclasses.replace(config.data, path=None)
    compute = dataclasses.replace(config.compute, compilation_cache=None)
    found = dataclasses.replace(config, data=data, compute=compute).to_dict()
    return {name: part for name, part in found.items() if name != "seed"}


def forget(experiments: Sequence[Experiment], seeds: Sequence[int], root: Path) -> None:
    """Removes the units of these experiments and seeds, so that they are computed again."""
    for seed in seeds:
        for experiment in experiments:
            directory = _unit_path(root, seed, experiment.name, "any").parent
            for path in directory.glob("*.json"):
                path.unlink()


def _seed_directory(root: Path, seed: int) -> Path:
    return root / f"seed{seed}"


def _unit_path(root: Path, seed: int, experiment: str, unit: str) -> Path:
    return _seed_directory(root, seed) / "results" / experiment / f"{unit}.json"
