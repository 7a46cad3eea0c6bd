"""The supernet with one stage of the cloud's training changed or left out.

A changed supernet starts from the study's own reference model and trains with the same random
streams, so that it differs from the study's supernet by the change alone. It lies in a directory
of its own below the study's, with its own checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax

from acme_jax import cloud
from acme_jax.blocks import Params
from acme_jax.config import Config, TrainConfig
from acme_jax.experiments.study import Study
from acme_jax.json_lines import JsonLines
from acme_jax.progress import Stopwatch
from acme_jax.run_dir import RunDirectory
from acme_jax.session import Session
from acme_jax.supernet_training import Stages, train_stages


def without_hidden_loss(config: Config) -> Config:
    """The configuration in which students learn from the teacher's logits only."""

    def change(train: TrainConfig) -> TrainConfig:
        return dataclasses.replace(train, hidden_loss=0.0)

    distill = config.distill
    return dataclasses.replace(
        config,
        distill=dataclasses.replace(
            distill, width=change(distill.width), depth=change(distill.depth)
        ),
    )


def retrain(study: Study, name: str, config: Config, *, reorder: bool = True) -> Stages:
    """Width and depth distillation of the study's reference model, done another way.

    Args:
      study: whose reference model, data and seed.
      name: of the change; its directory's name.
      config: the study's, with another `distill`.
      reorder: False leaves heads and neurons as they were trained.

    Raises:
      NonFiniteLossError, StoppedError: as `Session.loop`.
    """
    session, trained = study.context.session, study.stages.trained
    run = RunDirectory.create_or_open(directory(study, name), config, resume=True)
    try:
        context = dataclasses.replace(
            study.context,
            config=config,
            session=Session(run, session.reporter, session.stop),
        )
        return train_stages(context, trained=trained, reorder=reorder)
    finally:
        run.close()


def directory(study: Study, name: str) -> Path:
    """Where a changed supernet lies."""
    return study.directory / "ablations" / name


def phase_seconds(directory: Path, phase: str) -> float:
    """Seconds that the epochs of a training phase took, without compiling.

    Args:
      directory: of a study or a run.
      phase: its name.
    """
    lines = JsonLines(directory / "performance.jsonl").lines()
    rows = [row for row in map(json.loads, lines) if row["phase"] == phase]
    # Of an epoch that was done twice, because a run was killed, the last one counts.
    seconds = {row["done"]: row["seconds"] - row["compile_seconds"] for row in rows}
    return sum(seconds.values(), 0.0)


def distillation_seconds(directory: Path) -> float:
    """Seconds of both distillation phases, without compiling."""
    phases = ("width distillation", "depth distillation")
    return sum(phase_seconds(directory, phase) for phase in phases)


def reordering_seconds(study: Study) -> float:
    """Seconds of measuring importance and sorting, without compiling."""
    public, trained = study.context.public, study.stages.trained
    by_importance = jax.jit(cloud.reorder_by_importance, static_argnums=3)
    with Stopwatch() as watch:
        sorted_params: Params = by_importance(
            trained, public.select_inputs, public.select_labels, study.context.encoder
        )
        jax.block_until_ready(sorted_params)
    return watch.seconds - watch.compile_seconds
