"""Predictors of an expensive number from few points, each with the spread of its error.

A `Surrogate` is a record of two pure functions, jit- and vmap-able over data sets, masks and
queries. Here: what they share, features of sub-networks, and the polynomial ridge;
`nas.performance_law` has the other one, `nas.validation` judges both, and
`nas.early_rejection` puts them into a search. Shape letters: N points, D features, Q queries,
K monomials.

Points whose features or target are not finite are left out, like masked ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nas.arch import Arch, ArchSpace, keep_mask

Params = Any
"""What a fit returns: a pytree of arrays whose shapes do not depend on the values."""

_PENALTIES = tuple(10.0**power for power in range(2, -7, -1))
# A point that determines its own prediction (leverage 1) has no leave-one-out error.
_LEAST_FREEDOM = 1e-4


class Prediction(NamedTuple):
    """What to expect of each query."""

    mean: jax.Array  # [Q]; NaN where the surrogate can say nothing
    spread: jax.Array  # [Q] standard deviation of target - mean; infinite where unknown


class Surrogate(NamedTuple):
    """A predictor as a record of pure functions; close over it, do not pass it to jit.

    fit: (x [N, D], y [N], mask [N] bool = None) -> params
    predict: (params, x [Q, D]) -> Prediction
    """

    fit: Callable[..., Params]
    predict: Callable[[Params, jax.Array], Prediction]


class PolynomialParams(NamedTuple):
    """A fitted polynomial."""

    center: jax.Array  # [D] mean of the features
    scale: jax.Array  # [D] their standard deviation, 1 where that is 0
    offset: jax.Array  # [K] mean of the monomials
    coefficients: jax.Array  # [K] of the monomials of standardised features
    intercept: jax.Array  # [] mean of the targets
    penalty: jax.Array  # []
    root: jax.Array  # [K, K]; its squared product with a monomial vector is the leverage
    inverse_count: jax.Array  # [] 1 / number of points used
    sigma: jax.Array  # [] standard deviation of the noise; infinite when unknown
    residuals: jax.Array  # [N] leave-one-out errors, target - mean; NaN where undefined


def clean_points(
    x: jax.Array, y: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Points of checked shapes: x [N, D] and y [N] with zeros where unusable, mask [N] bool.

    Raises:
      ValueError: shapes that do not belong together, or no feature.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.ndim != 2 or x.shape[1] == 0 or y.shape != x.shape[:1]:
        raise ValueError(
            f"features {x.shape} and targets {y.shape} do not belong together; expected "
            "[N, D] with D >= 1, and [N]. Use jax.vmap over several data sets"
        )
    dtype = jnp.zeros(()).dtype
    x, y = x.astype(dtype), y.astype(dtype)
    usable = jnp.all(jnp.isfinite(x), axis=1) & jnp.isfinite(y)
    if mask is not None:
        if jnp.shape(mask) != y.shape:
            raise ValueError(f"the mask has shape {jnp.shape(mask)}; expected {y.shape}, one a row")
        usable &= jnp.asarray(mask, bool)
    return jnp.where(usable[:, None], x, 0), jnp.where(usable, y, 0), usable


def check_queries(x: jax.Array, num_features: int) -> jax.Array:
    """Queries [Q, D] as floats.

    Raises:
      ValueError: another shape.
    """
    x = jnp.asarray(x)
    if x.ndim != 2 or x.shape[1] != num_features:
        raise ValueError(f"queries have shape {x.shape}; expected [Q, {num_features}]")
    return x.astype(jnp.zeros(()).dtype)


def gene_features(space: ArchSpace, arch: Arch) -> jax.Array:
    """Every gene of a sub-network as a fraction: [1 + 2 L], depth, heads and neurons.

    Heads and neurons of blocks that are not kept are 0, for that is what they contribute.
    """
    kept = keep_mask(space.num_layers, arch.depth)
    depth = arch.depth[None] / space.num_layers
    heads, neurons = arch.heads / space.num_heads, arch.neurons / space.num_neurons
    return jnp.concatenate([depth, kept * heads, kept * neurons])


def depth_and_width(space: ArchSpace, arch: Arch) -> jax.Array:
    """What the Performance Law wants of a sub-network: [2], both positive.

    Blocks kept, and the mean over kept blocks of half their heads (as a part of H) and half
    their neurons (as a part of F), times H, so that full width is the number of heads.
    """
    kept = keep_mask(space.num_layers, arch.depth)
    share = 0.5 * (arch.heads / space.num_heads + arch.neurons / space.num_neurons)
    depth = jnp.sum(kept)
    return jnp.stack([depth, space.num_heads * jnp.sum(kept * share) / depth])


def polynomial(degree: int = 2, *, penalty: float | Sequence[float] | None = None) -> Surrogate:
    """Ridge regression on all monomials up to `degree` of standardised features.

    Hoerl & Kennard, "Ridge Regression", Technometrics 1970; leave-one-out errors come from
    the hat matrix, without refitting. Degree 2 of (depth, width) is ACME's accuracy model
    (ICDCS 2025), which has no penalty. The closed form goes through the singular values of
    the [N, K] monomials, because the normal equations would square their condition number.

    The spread is sigma sqrt(1 + leverage), sigma^2 being the mean of (residual^2 / (1 -
    leverage)): unbiased for least squares, and raised by what the penalty distorts. With
    fewer points than monomials the penalty decides; where every point determines its own
    prediction the spread is infinite. Without any point the mean is NaN.

    Args:
      degree: 1 to 3.
      penalty: on the squared coefficients, the intercept excepted, positive; of several,
        the one of least leave-one-out error (the largest on ties). None: 1e-6 to 1e2.

    Raises:
      ValueError: another degree, or a penalty that is not positive.
    """
    if degree not in (1, 2, 3):
        raise ValueError(f"degree must be 1, 2 or 3, got {degree!r}")
    given = _PENALTIES if penalty is None else np.atleast_1d(np.asarray(penalty, float)).tolist()
    if not given or not all(value > 0 for value in given):
        raise ValueError(f"penalty must be positive, got {penalty!r}; for least squares use 1e-6")
    penalties = jnp.asarray(sorted(given, reverse=True), jnp.zeros(()).dtype)

    def fit(x: jax.Array, y: jax.Array, mask: jax.Array | None = None) -> PolynomialParams:
        x, y, mask = clean_points(x, y, mask)
        weight = mask.astype(x.dtype)
        inverse_count = 1 / jnp.sum(weight)  # infinite without points: all becomes NaN

        def mean(values: jax.Array) -> jax.Array:
            return jnp.sum(values * weight[:, None], axis=0) * inverse_count

        center = mean(x)
        spread = jnp.sqrt(mean(jnp.square(x - center[None, :])))
        # Rounding leaves a constant column a spread that is tiny, but seldom 0.
        scale = jnp.where(spread > 1e-6 * jnp.abs(center), spread, 1)
        monomials = _monomials((x - center[None, :]) / scale[None, :], degree)
        offset, intercept = mean(monomials), jnp.sum(y * weight) * inverse_count
        centered = jnp.where(mask[:, None], monomials - offset[None, :], 0)
        target = jnp.where(mask, y - intercept, 0)

        left, values, right = jnp.linalg.svd(centered, full_matrices=True)
        num_values = values.size
        left = left[:, :num_values]
        values = jnp.pad(values, (0, right.shape[0] - num_values))
        projected = left.T @ target

        def residual_and_freedom(penalty: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Target - fitted [N] and 1 - leverage [N]."""
            shrunk = 1 - penalty / (jnp.square(values[:num_values]) + penalty)
            fitted = left @ (shrunk * projected)
            leverage = inverse_count + jnp.square(left) @ shrunk
            return target - fitted, 1 - leverage

        def left_out(penalty: jax.Array) -> tuple[jax.Array, jax.Array]:
            residual, freedom = residual_and_freedom(penalty)
            defined = mask & (freedom > _LEAST_FREEDOM)
            safe = jnp.where(defined, freedom, 1)
            score = jnp.sum(jnp.where(mask, jnp.square(residual / safe), 0))
            score = jnp.where(jnp.all(defined | ~mask), score, jnp.inf)
            variance = jnp.sum(jnp.where(defined, jnp.square(residual) / safe, 0))
            count = jnp.sum(defined)
            sigma = jnp.where(count > 0, jnp.sqrt(variance / jnp.maximum(count, 1)), jnp.inf)
            return jnp.where(defined, residual / safe, jnp.nan), jnp.stack([score, sigma])

        residuals, (scores, sigmas) = jax.vmap(left_out, out_axes=(0, 1))(penalties)
        best = jnp.argmin(scores)
        spectrum = jnp.square(values) + penalties[best]
        gain = values[:num_values] / spectrum[:num_values] * projected
        return PolynomialParams(
            center=center,
            scale=scale,
            offset=offset,
            coefficients=right[:num_values].T @ gain,
            intercept=intercept,
            penalty=penalties[best],
            root=right.T / jnp.sqrt(spectrum)[None, :],
            inverse_count=inverse_count,
            sigma=sigmas[best],
            residuals=residuals[best],
        )

    def predict(params: PolynomialParams, x: jax.Array) -> Prediction:
        x = check_queries(x, params.center.size)
        monomials = _monomials((x - params.center[None, :]) / params.scale[None, :], degree)
        centered = monomials - params.offset[None, :]
        leverage = params.inverse_count + jnp.sum(jnp.square(centered @ params.root), axis=1)
        mean = params.intercept + centered @ params.coefficients
        return Prediction(mean, params.sigma * jnp.sqrt(1 + leverage))

    return Surrogate(fit, predict)


def constant() -> Surrogate:
    """The mean and the standard deviation of the targets: a control for the others."""

    def fit(x: jax.Array, y: jax.Array, mask: jax.Array | None = None) -> Prediction:
        _, y, mask = clean_points(x, y, mask)
        count = jnp.sum(mask)
        mean = jnp.sum(y) / count
        squares = jnp.sum(jnp.where(mask, jnp.square(y - mean), 0))
        variance = squares / jnp.maximum(count - 1, 1) * (1 + 1 / count)
        return Prediction(mean, jnp.where(count > 1, jnp.sqrt(variance), jnp.inf))

    def predict(params: Prediction, x: jax.Array) -> Prediction:
        shape = (x.shape[0],)
        return Prediction(*(jnp.broadcast_to(value, shape) for value in params))

    return Surrogate(fit, predict)


def _monomials(x: jax.Array, degree: int) -> jax.Array:
    """All products [N, K] of one to `degree` columns of x [N, D], in order of degree."""
    num_features = x.shape[1]
    products = []
    for order in range(1, degree + 1):
        chosen = list(itertools.combinations_with_replacement(range(num_features), order))
        products.append(jnp.prod(x[:, np.asarray(chosen)], axis=2))
    return jnp.concatenate(products, axis=1)
