"""What an experiment is: a name, its units of work, and what a unit finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from acme_jax.config import Config
from acme_jax.experiments.study import Study

Row = dict[str, Any]
"""One finding: flat, JSON-ready; keys with units in their names (`test_accuracy` in [0, 1])."""


class Experiment(NamedTuple):
    """One of the paper's experiments."""

    name: str
    title: str
    """One line, for the command's help."""
    units: Callable[[Config], list[str]]
    """Names of the units of work of one seed, in order; file names. A unit is what is kept when
    a run is killed: seconds to a few minutes."""
    run: Callable[[Study, str], list[Row]]
    """Does one unit; deterministic in the study and the unit's name."""
