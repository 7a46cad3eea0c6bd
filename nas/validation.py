"""Is a surrogate to be believed: left-out predictions, their order and their intervals.

Pure functions; jit them with the surrogate closed over. Shape letters: N points, D features,
Q queries, I interval levels, S bootstrap samples.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nas.rank_correlation import kendall_tau, spearman_rho
from nas.surrogate import Prediction, Surrogate

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Nominal levels of the central intervals that `assess` looks at."""


class Quality(NamedTuple):
    """How predictions compare with the truth; NaN where there is nothing to compare."""

    rmse: jax.Array  # [] in the target's unit
    mean_absolute_error: jax.Array  # []
    worst_error: jax.Array  # [] largest absolute error
    kendall_tau: jax.Array  # []
    spearman_rho: jax.Array  # []
    coverage: jax.Array  # [I] part of the targets within each interval
    calibration_error: jax.Array  # [] mean of |coverage - level|


def leave_one_out(
    surrogate: Surrogate, x: jax.Array, y: jax.Array, mask: jax.Array | None = None
) -> Prediction:
    """The prediction of each point [N] by a fit to all the others: N fits, vmapped.

    Args:
      surrogate: refitted whole, its choice of penalty included.
      x: [N, D].
      y: [N].
      mask: [N], points to use; masked ones are predicted too, by a fit to all points used.
    """
    return k_fold(surrogate, x, y, jnp.arange(len(y), dtype=jnp.int32), len(y), mask)


def k_fold(
    surrogate: Surrogate,
    x: jax.Array,
    y: jax.Array,
    fold: jax.Array,
    num_folds: int,
    mask: jax.Array | None = None,
) -> Prediction:
    """The prediction of each point [N] by a fit to the other folds: `num_folds` fits, vmapped.

    Args:
      surrogate: refitted whole.
      x: [N, D].
      y: [N].
      fold: int32 [N], below `num_folds`; which points are left out together.
      num_folds: how many.
      mask: [N], points to use.

    Raises:
      ValueError: fewer than two folds, or not one fold for each point.
    """
    x, y, fold = jnp.asarray(x), jnp.asarray(y), jnp.asarray(fold)
    if num_folds < 2 or fold.shape != y.shape:
        raise ValueError(
            f"{num_folds} folds of shape {fold.shape}; expected at least 2, one for each of "
            f"the targets {y.shape}"
        )
    used = jnp.ones(y.shape, bool) if mask is None else jnp.asarray(mask, bool)

    def left_out(number: jax.Array) -> Prediction:
        return surrogate.predict(surrogate.fit(x, y, used & (fold != number)), x)

    every = jax.vmap(left_out)(jnp.arange(num_folds, dtype=jnp.int32))
    rows = jnp.arange(len(y), dtype=jnp.int32)
    return jax.tree.map(lambda values: values[fold, rows], every)


def bootstrap_means(
    key: jax.Array,
    surrogate: Surrogate,
    x: jax.Array,
    y: jax.Array,
    queries: jax.Array,
    *,
    num_samples: int = 100,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Predicted means [S, Q] of fits to points drawn with replacement (Efron 1979).

    Their quantiles are intervals of the mean that assume no linearity; the noise of a new
    target comes on top.

    Args:
      key: consumed.
      surrogate: refitted to each sample.
      x: [N, D].
      y: [N].
      queries: [Q, D].
      num_samples: S.
      mask: [N], points to draw from.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    used = jnp.ones(y.shape, bool) if mask is None else jnp.asarray(mask, bool)
    share = used / jnp.maximum(jnp.sum(used), 1)

    def sample(key: jax.Array) -> jax.Array:
        index = jax.random.choice(key, len(y), (len(y),), p=share)
        return surrogate.predict(surrogate.fit(x[index], y[index], used[index]), queries).mean

    return jax.vmap(sample)(jax.random.split(key, num_samples))


def coverage(
    prediction: Prediction,
    y: jax.Array,
    levels: tuple[float, ...] = LEVELS,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Part [I] of the targets y [N] within the central Gaussian interval of each level.

    Rows without a finite mean or target are left out; an infinite spread covers.

    Raises:
      ValueError: a level outside (0, 1).
    """
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"levels must be between 0 and 1, got {levels}")
    used = _usable(prediction, y, mask)
    # A central interval of the Gaussian reaches sqrt(2) erfinv(level) deviations.
    reach = np.sqrt(2) * jax.lax.erf_inv(jnp.asarray(levels, prediction.mean.dtype))
    error = jnp.where(used, jnp.abs(y - prediction.mean), 0)
    inside = error[None, :] <= reach[:, None] * prediction.spread[None, :]
    return jnp.sum(inside & used[None, :], axis=1) / jnp.sum(used)


def assess(
    prediction: Prediction,
    y: jax.Array,
    levels: tuple[float, ...] = LEVELS,
    mask: jax.Array | None = None,
) -> Quality:
    """The quality of predictions of targets y [N]; for honest ones see `leave_one_out`."""
    y = jnp.asarray(y, prediction.mean.dtype)
    used = _usable(prediction, y, mask)
    count = jnp.sum(used)
    error = jnp.where(used, y - prediction.mean, 0)
    covered = coverage(prediction, y, levels, mask)
    return Quality(
        rmse=jnp.sqrt(jnp.sum(jnp.square(error)) / count),
        mean_absolute_error=jnp.sum(jnp.abs(error)) / count,
        worst_error=jnp.where(count > 0, jnp.max(jnp.abs(error)), jnp.nan),
        kendall_tau=kendall_tau(prediction.mean, y, used),
        spearman_rho=spearman_rho(prediction.mean, y, used),
        coverage=covered,
        calibration_error=jnp.mean(jnp.abs(covered - jnp.asarray(levels, covered.dtype))),
    )


def _usable(prediction: Prediction, y: jax.Array, mask: jax.Array | None) -> jax.Array:
    used = jnp.isfinite(prediction.mean) & jnp.isfinite(y)
    return used if mask is None else used & jnp.asarray(mask, bool)
