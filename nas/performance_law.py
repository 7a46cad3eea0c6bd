"""The Performance Law: how a score grows with depth, width and data, fitted to few points.

"Predicting Scaling of Sequential Recommendation: the Performance Law" (arXiv 2412.00430), in
the form of its published code: a sum over the features of

    weight * (-1 / (2 x^exponent) - exponent * ln x), plus an intercept,

with x the depth N and the width d, and optionally the data D'. The slope in ln x is
-weight * exponent, so a score that grows has negative weights. Two traps:

1. Parameters are hardly identifiable. Where the data do not vary, their exponent and the
   intercept are the same parameter: on the paper's 24 points of depth and width the Jacobian
   has rank 5 of 6, and the smallest singular value that is not 0 is 7,000 times below the
   largest (all parameters 1, D = 1e6). So leave D out (two features; it then is part of the
   intercept), trust predictions rather than parameters, and read `identifiability`.
2. The data quality ApEn measures the length of a short sequence rather than its order: see
   `nas.entropy`.

Deviation: the code gives the data term the weight 1, which makes the score fall with data
whatever the data say; here that weight is fitted unless `weights` fixes it. Shape letters:
N points, F features, Q queries, P = free weights + F + 1 parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nas.surrogate import Prediction, Surrogate, check_queries, clean_points

_SMALLEST, _LARGEST = 0.05, 3.0  # exponents that restarts begin from
_RAW_LIMITS = (-6.9, 10.0)  # of exponents before softplus: 0.001 to 10
_GOLDEN = 0.6180339887498949


class LawParams(NamedTuple):
    """A fitted law."""

    weights: jax.Array  # [F]
    exponents: jax.Array  # [F], positive
    intercept: jax.Array  # []
    root: jax.Array  # [P, P]; its squared product with a Jacobian row is the leverage
    sigma: jax.Array  # [] standard deviation of the noise; infinite when unknown
    rank: jax.Array  # [] int32 of the Jacobian
    singular_ratio: jax.Array  # [] its largest singular value over the smallest not 0


class Identifiability(NamedTuple):
    """How many directions of the parameters the points determine."""

    rank: jax.Array  # [] int32
    singular_ratio: jax.Array  # [] largest singular value over the smallest one not 0


def evaluate(
    weights: jax.Array, exponents: jax.Array, intercept: float | jax.Array, x: jax.Array
) -> jax.Array:
    """The law [N] at x [N, F], positive; NaN in rows that are not."""
    positive = jnp.all((x > 0) & jnp.isfinite(x), axis=1)
    logs = jnp.log(jnp.where(positive[:, None], x, 1))
    value = _curves(exponents, logs)[0] @ weights + (intercept - 0.5 * jnp.sum(weights))
    return jnp.where(positive, value, jnp.nan)


def jacobian(
    weights: jax.Array, exponents: jax.Array, x: jax.Array, *, free: Sequence[bool] | np.ndarray
) -> jax.Array:
    """Derivatives [N, P] of `evaluate` by free weights, all exponents and the intercept.

    Args:
      weights: [F].
      exponents: [F].
      x: [N, F], positive.
      free: which weights are parameters.
    """
    curves, slopes = _curves(exponents, jnp.log(x))
    by_weight, by_exponent = curves - 0.5, weights[None, :] * slopes
    index = np.flatnonzero(np.asarray(free))
    return jnp.concatenate([by_weight[:, index], by_exponent, jnp.ones_like(curves[:, :1])], axis=1)


def identifiability(matrix: jax.Array) -> Identifiability:
    """Numerical rank of a Jacobian [N, P] and the ratio of its singular values.

    Values below max(N, P) roundings of the largest count as 0.
    """
    values = jnp.linalg.svd(matrix, compute_uv=False)
    kept = values > _rank_tolerance(matrix) * values[0]
    smallest = jnp.min(jnp.where(kept, values, jnp.inf))
    return Identifiability(jnp.sum(kept, dtype=jnp.int32), values[0] / smallest)


def performance_law(
    num_features: int = 2,
    *,
    weights: Sequence[float | None] | None = None,
    num_restarts: int = 8,
    num_steps: int = 60,
) -> Surrogate:
    """The Performance Law as a `Surrogate` of positive features.

    Levenberg-Marquardt (Marquardt 1963) in the exponents, which pass through softplus and stay
    from 0.001 to 10; weights and intercept are eliminated, always at their least squares
    (variable projection, Golub & Pereyra 1973, with Kaufman's Jacobian), since all
    parameters together crawl along the valley of trap 1. Restarts are vmapped and the best
    one counts. The spread is that of the linearised law, by the pseudo-inverse of the
    Jacobian: sigma sqrt(1 + leverage), sigma^2 = squared residuals / (points - P).

    Points with a feature that is not positive are left out of the fit, and predicted as NaN.
    With no more points than parameters the spread is infinite; without any, the mean is NaN.

    Args:
      num_features: F; 2 for depth and width (D fixed), 3 with the data D'.
      weights: [F], for each feature its weight, or None to fit it; (None, None, 1.0) is the
        published code. None fits all.
      num_restarts: how many exponents to begin from.
      num_steps: iterations of each.

    Raises:
      ValueError: no feature, restart or step, or not one weight for each feature.
    """
    if num_features < 1 or num_restarts < 1 or num_steps < 1:
        raise ValueError(
            f"num_features ({num_features}), num_restarts ({num_restarts}) and num_steps "
            f"({num_steps}) must be at least 1"
        )
    given: Sequence[float | None] = (None,) * num_features if weights is None else weights
    if len(given) != num_features:
        raise ValueError(f"weights is {weights!r}; expected {num_features} entries, one a feature")
    free = np.asarray([weight is None for weight in given])
    fixed = np.asarray([0.0 if weight is None else weight for weight in given])
    num_free = int(free.sum())
    num_params = num_free + num_features + 1
    starts = _starts(num_restarts, num_features)

    def full_weights(linear: jax.Array) -> jax.Array:
        """All weights [F], given the free ones."""
        return jnp.asarray(fixed, linear.dtype).at[np.flatnonzero(free)].set(linear)

    def fit(x: jax.Array, y: jax.Array, mask: jax.Array | None = None) -> LawParams:
        x, y, mask = clean_points(x, y, mask)
        check_queries(x, num_features)
        mask &= jnp.all(x > 0, axis=1)
        x, y = jnp.where(mask[:, None], x, 1), jnp.where(mask, y, 0)
        count = jnp.sum(mask)

        def reduced(raw: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            """Residual [N], its Jacobian [N, F] by raw exponents, and the free weights."""
            curves, slopes = _curves(jax.nn.softplus(raw), jnp.log(x))
            curves, slopes = (
                _center(curves, mask),
                _center(slopes * jax.nn.sigmoid(raw)[None, :], mask),
            )
            target = _center(y[:, None], mask)[:, 0] - curves @ jnp.asarray(fixed, x.dtype)
            columns = curves[:, np.flatnonzero(free)]
            norms = _norms(columns)
            left, values, right = jnp.linalg.svd(columns / norms[None, :], full_matrices=False)
            kept = values > _rank_tolerance(columns) * jnp.max(values, initial=0)
            left = jnp.where(kept[None, :], left, 0)
            inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
            linear = right.T @ (inverse * (left.T @ target)) / norms
            moved = slopes * full_weights(linear)[None, :]
            return target - left @ (left.T @ target), left @ (left.T @ moved) - moved, linear

        def descend(exponents: jax.Array) -> tuple[jax.Array, jax.Array]:
            raw = jnp.log(jnp.expm1(exponents))
            return _levenberg_marquardt(lambda raw: reduced(raw)[:2], raw, num_steps)

        raws, costs = jax.vmap(descend)(jnp.asarray(starts, x.dtype))
        best = jnp.argmin(jnp.where(jnp.isnan(costs), jnp.inf, costs))
        exponents, full = jax.nn.softplus(raws[best]), full_weights(reduced(raws[best])[2])
        # Without any point the mean, and with it the intercept, is NaN.
        intercept = jnp.sum(jnp.where(mask, y - evaluate(full, exponents, 0.0, x), 0)) / count

        matrix = jnp.where(mask[:, None], jacobian(full, exponents, x, free=free), 0)
        norms = _norms(matrix)
        _, values, right = jnp.linalg.svd(matrix / norms[None, :], full_matrices=True)
        values = jnp.pad(values, (0, num_params - values.size))
        kept = values > _rank_tolerance(matrix) * values[0]
        inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
        freedom = count - num_params
        variance = costs[best] / jnp.maximum(freedom, 1)
        rank, ratio = identifiability(matrix)
        return LawParams(
            weights=full,
            exponents=exponents,
            intercept=intercept,
            root=right.T * inverse[None, :] / norms[:, None],
            sigma=jnp.where(freedom > 0, jnp.sqrt(variance), jnp.inf),
            rank=rank,
            singular_ratio=ratio,
        )

    def predict(params: LawParams, x: jax.Array) -> Prediction:
        x = check_queries(x, num_features)
        mean = evaluate(params.weights, params.exponents, params.intercept, x)
        safe = jnp.where(jnp.isnan(mean)[:, None], 1, x)
        rows = jacobian(params.weights, params.exponents, safe, free=free)
        leverage = jnp.sum(jnp.square(rows @ params.root), axis=1)
        spread = params.sigma * jnp.sqrt(1 + leverage)
        return Prediction(mean, jnp.where(jnp.isnan(mean), jnp.inf, spread))

    return Surrogate(fit, predict)


def _levenberg_marquardt(
    linearise: Callable[[jax.Array], tuple[jax.Array, jax.Array]], raw: jax.Array, num_steps: int
) -> tuple[jax.Array, jax.Array]:
    """The parameters [F] after so many steps, and their sum of squared residuals []."""
    eye = jnp.eye(raw.size, dtype=raw.dtype)

    def step(_: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        raw, cost, damping, residual, matrix = carry
        norms = _norms(matrix)
        # Least squares of the augmented system: its normal equations would not survive float32.
        stacked = jnp.concatenate([matrix / norms[None, :], jnp.sqrt(damping) * eye])
        orthogonal, upper = jnp.linalg.qr(stacked)
        right = orthogonal[: residual.size].T @ -residual
        move = jax.lax.linalg.triangular_solve(upper, right[:, None], left_side=True)[:, 0]
        proposal = jnp.clip(raw + move / norms, *_RAW_LIMITS)
        new_residual, new_matrix = linearise(proposal)
        new_cost = jnp.sum(jnp.square(new_residual))
        better = new_cost < cost  # False for NaN
        damping = jnp.clip(jnp.where(better, damping / 4, damping * 3), 1e-6, 1e6)
        new = (proposal, new_cost, damping, new_residual, new_matrix)
        old = (raw, cost, damping, residual, matrix)
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old)

    residual, matrix = linearise(raw)
    cost, damping = jnp.sum(jnp.square(residual)), jnp.asarray(1e-2, raw.dtype)
    raw, cost, *_ = jax.lax.fori_loop(0, num_steps, step, (raw, cost, damping, residual, matrix))
    return raw, cost


def _curves(exponents: jax.Array, logs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(1 - x^-e) / 2 - e ln x and its derivative by e, both [N, F]; logs are ln x.

    The 1/2 belongs to the intercept; with it, small exponents lose nothing to rounding.
    """
    scaled = exponents[None, :] * logs
    return -0.5 * jnp.expm1(-scaled) - scaled, logs * (0.5 * jnp.exp(-scaled) - 1)


def _center(columns: jax.Array, mask: jax.Array) -> jax.Array:
    """Columns [N, K] less their means over the mask, zeros outside it."""
    weight = mask.astype(columns.dtype)[:, None]
    mean = jnp.sum(columns * weight, axis=0) / jnp.maximum(jnp.sum(weight), 1)
    return (columns - mean[None, :]) * weight


def _norms(columns: jax.Array) -> jax.Array:
    """Euclidean norms of columns, 1 where they are 0."""
    norms = jnp.sqrt(jnp.sum(jnp.square(columns), axis=0))
    return jnp.where(norms > 0, norms, 1)


def _rank_tolerance(matrix: jax.Array) -> float:
    return max(matrix.shape) * float(jnp.finfo(matrix.dtype).eps)


def _starts(num_restarts: int, num_features: int) -> np.ndarray:
    """Exponents [R, F] spread evenly over the logarithm, by a Kronecker sequence."""
    number = np.arange(num_restarts)[:, None] + 0.5
    step = _GOLDEN ** np.arange(num_features)[None, :]
    share = (number * np.where(step == 1, 1 / num_restarts, step)) % 1.0
    return _SMALLEST * (_LARGEST / _SMALLEST) ** share
