"""The experiments by name. Adding one takes its module and one line here."""

from __future__ import annotations

import importlib

from acme_jax.config import ConfigError
from acme_jax.experiments.experiment import Experiment

EXPERIMENTS = (
    "backbone_grid",
    "headers",
    "header_cells",
    "selection",
    "personalization",
    "traffic",
    "ablations",
    "whole_system",
    "methods",
)
"""Modules of this package; each has an `EXPERIMENT`. In the order of docs/RESULTS.md."""


def experiment(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
      ConfigError: there is none; the message lists the names.
    """
    if name not in EXPERIMENTS:
        raise ConfigError(
            f"unknown experiment {name!r}; expected one of {', '.join(EXPERIMENTS)}, or all"
        )
    found: Experiment = importlib.import_module(f"acme_jax.experiments.{name}").EXPERIMENT
    return found
