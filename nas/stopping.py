"""When to stop a search: once its archive has ceased to grow. And how to measure that.

The archive is measured by the hypervolume it dominates, exactly or by Monte Carlo, and a
search stops when that has not grown by more than a relative tolerance for `patience`
generations. (Hypervolume as a stagnation criterion: Wagner, Trautmann and Naujoks, "OCD:
Online Convergence Detection for Evolutionary Multi-objective Algorithms", EMO 2009; theirs
tests the variance of several indicators, this rule is the plain one.) Shape letters: A
places of the archive, M objectives, N samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nas.hypervolume import hypervolume

Measure = Callable[[jax.Array, jax.Array], jax.Array]
"""(objectives [A, M], NaN in empty places; reference [M]) -> volume []."""


@dataclasses.dataclass(frozen=True)
class StoppingRule:
    """Stop when the volume has not grown by more than `tolerance` for `patience` generations.

    Growth is counted from the last time that it exceeded the tolerance, so that many small
    steps add up. As long as the volume is 0 or NaN (no feasible point beats the reference)
    nothing has been found, and the search goes on.

    Attributes:
      tolerance: of the volume, relative; 0: any growth counts.
      patience: generations without growth before the stop.

    Raises:
      ValueError: a negative or infinite tolerance, or a patience below 1.
    """

    tolerance: float = 1e-3
    patience: int = 10

    def __post_init__(self) -> None:
        if not (0.0 <= self.tolerance < math.inf):
            raise ValueError(
                f"StoppingRule.tolerance must be a finite number of at least 0, such as 1e-3, "
                f"got {self.tolerance}"
            )
        if self.patience < 1:
            raise ValueError(f"StoppingRule.patience must be at least 1, got {self.patience}")


NEVER = StoppingRule(patience=2**31 - 1)
"""The rule of a search that always runs to its end."""


class StopState(NamedTuple):
    """What a `StoppingRule` remembers."""

    best: jax.Array  # [] the volume when it last grew
    stale: jax.Array  # [] int32, generations since then
    stopped: jax.Array  # [] bool


def init() -> StopState:
    """The state before the first generation."""
    return StopState(jnp.zeros(()), jnp.zeros((), jnp.int32), jnp.zeros((), bool))


def update(rule: StoppingRule, state: StopState, volume: jax.Array) -> StopState:
    """The state after a generation whose archive measures `volume` []; see `stopped`."""
    grown = volume > state.best * (1.0 + rule.tolerance)
    best = jnp.where(grown, volume, state.best)
    stale = jnp.where(grown | (best <= 0), 0, state.stale + 1)
    return StopState(best, stale, stale >= rule.patience)


def exact(columns: Sequence[int] | None = None) -> Measure:
    """The exact hypervolume of the objectives `columns`; None: of all.

    Its time grows as A^2 for three objectives and A^3 for four: track fewer objectives or
    use `monte_carlo` where the archive is large.

    Raises:
      ValueError: columns that are empty, repeated, negative or not among the objectives
        (the last when first used).
    """
    chosen = _columns(columns)

    def measure(objectives: jax.Array, reference: jax.Array) -> jax.Array:
        objectives, reference = _track(objectives, reference, chosen)
        return hypervolume(objectives, reference)

    return measure


def monte_carlo(
    key: jax.Array,
    ideal: jax.Array,
    *,
    num_samples: int = 16_384,
    columns: Sequence[int] | None = None,
) -> Measure:
    """An estimate of the hypervolume: the part of fixed random points that are dominated.

    The points are uniform in the box from `ideal` to the reference and drawn once, from
    `key`; hence the estimate is deterministic, never falls when the archive improves, and
    compares two searches on the same points. O(N A M) time. Its standard error is
    `monte_carlo_error`: at most half the box / sqrt(N), 0.4 % of the box at the default.

    Args:
      key: consumed.
      ideal: [M], the lower end of the box; points beyond it count only inside the box.
      num_samples: N.
      columns: objectives to track; None: all.

    Raises:
      ValueError: as of `exact`; an `ideal` that is not [M]; or fewer than one sample.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    low = jnp.asarray(ideal, jnp.zeros(()).dtype)
    if low.ndim != 1:
        raise ValueError(f"ideal must hold one value for each objective, got shape {low.shape}")
    chosen = _columns(columns)
    low = _track(low[None, :], low, chosen)[1]
    unit = jax.random.uniform(key, (num_samples, low.size))

    def measure(objectives: jax.Array, reference: jax.Array) -> jax.Array:
        objectives, reference = _track(objectives, reference, chosen)
        if reference.shape != low.shape:
            raise ValueError(
                f"ideal holds {low.size} values but there are {reference.size} objectives to "
                "track; give `ideal` one value for each objective"
            )
        span = jnp.maximum(reference - low, 0)
        samples = low[None, :] + span[None, :] * unit
        beaten = jnp.ones((num_samples, objectives.shape[0]), bool)
        for values, limits in zip(objectives.T, samples.T, strict=True):
            beaten &= values[None, :] <= limits[:, None]
        return jnp.prod(span) * jnp.mean(jnp.any(beaten, axis=1), dtype=span.dtype)

    return measure


def monte_carlo_error(
    volume: jax.Array | float, box: jax.Array | float, num_samples: int
) -> jax.Array:
    """Standard error [] of an estimate by `monte_carlo`: that of a binomial share.

    Args:
      volume: the estimate.
      box: the volume between the `ideal` and the reference.
      num_samples: N.
    """
    share = jnp.clip(volume / jnp.asarray(box), 0, 1)
    return box * jnp.sqrt(share * (1 - share) / num_samples)


def _columns(columns: Sequence[int] | None) -> np.ndarray | None:
    if columns is None:
        return None
    chosen = np.asarray(columns, np.int32)
    if chosen.ndim != 1 or chosen.size == 0 or len(set(chosen.tolist())) < chosen.size:
        raise ValueError(
            f"columns must name one objective or more, each once, got {tuple(columns)}"
        )
    if chosen.min() < 0:
        raise ValueError(f"columns must not be negative, got {tuple(columns)}")
    return chosen


def _track(
    objectives: jax.Array, reference: jax.Array, chosen: np.ndarray | None
) -> tuple[jax.Array, jax.Array]:
    """The chosen columns of both."""
    if chosen is None:
        return objectives, reference
    if chosen.max() >= reference.size:
        raise ValueError(
            f"columns {tuple(chosen.tolist())} name an objective that does not exist; there "
            f"are {reference.size}, from 0 to {reference.size - 1}"
        )
    return objectives[:, chosen], reference[chosen]
