"""The spectrum of a loss's Hessian by Lanczos, and the part of it that is not small.

FedAD (arXiv 2507.10430) takes its base rate of dropout from it. Stochastic Lanczos quadrature
(Ghorbani et al., ICML 2019): k steps from a random vector give k nodes and weights, a sample of
the spectral density. Shape letters: P parameters, K Lanczos steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

_MAX_HALVINGS = 30


class Spectrum(NamedTuple):
    """A density of eigenvalues as weighted points."""

    eigenvalues: jax.Array  # [K] ascending
    weights: jax.Array  # [K] sum to 1; 0: no eigenvalue


def lanczos(
    product: Callable[[jax.Array], jax.Array], start: jax.Array, num_steps: int
) -> Spectrum:
    """Nodes and weights of a symmetric matrix's spectrum, as the vector `start` sees it.

    Vectors are made orthogonal to all earlier ones, twice. Where fewer than K directions exist,
    the nodes beyond have weight 0.

    Args:
      product: v [P] -> A v [P].
      start: [P], not zero.
      num_steps: K.

    Raises:
      ValueError: no steps.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    small = jnp.finfo(start.dtype).eps * 100

    def step(carry: tuple, index: jax.Array) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
        basis, vector, largest = carry
        basis = basis.at[index].set(vector)
        image = product(vector)
        diagonal = _dot(vector, image)
        for _ in range(2):
            image = image - _dot(_dot(basis, image), basis)
        norm = jnp.linalg.norm(image)
        largest = jnp.maximum(largest, jnp.maximum(jnp.abs(diagonal), norm))
        norm = jnp.where(norm > small * largest, norm, 0)  # otherwise rounding: nothing is left
        vector = jnp.where(norm > 0, image / jnp.where(norm > 0, norm, 1), 0)
        return (basis, vector, largest), (diagonal, norm)

    basis = jnp.zeros((num_steps, start.shape[0]), start.dtype)
    begin = (basis, start / jnp.linalg.norm(start), jnp.zeros((), start.dtype))
    _, (diagonal, off) = jax.lax.scan(step, begin, jnp.arange(num_steps))
    matrix = jnp.diag(diagonal) + jnp.diag(off[:-1], 1) + jnp.diag(off[:-1], -1)
    eigenvalues, vectors = jnp.linalg.eigh(matrix)
    return Spectrum(eigenvalues, vectors[0] ** 2)


def hessian_spectrum(
    key: jax.Array, loss: Callable[[Any], jax.Array], params: Any, *, num_steps: int = 50
) -> Spectrum:
    """The spectrum of a loss's Hessian from one random vector of signs.

    Costs K Hessian-vector products and K P numbers of memory.

    Args:
      key: consumed.
      loss: parameters -> [].
      params: where; any tree of floats with P numbers.
      num_steps: K.
    """
    flat, unravel = ravel_pytree(params)
    slope = jax.grad(lambda flat: loss(unravel(flat)))
    start = jax.random.rademacher(key, flat.shape, flat.dtype)
    return lanczos(lambda vector: jax.jvp(slope, (flat,), (vector,))[1], start, num_steps)


def mass_above(spectrum: Spectrum, threshold: jax.Array | float) -> jax.Array:
    """rho(t) []: the part of the spectrum above a threshold, each node blurred to a Gaussian.

    Its variance is 1e-5 max(1, range), as in the published code, which sums 10,000 bins instead
    of taking the Gaussians' tails.
    """
    counted = spectrum.weights > jnp.finfo(spectrum.weights.dtype).eps
    high = jnp.max(jnp.where(counted, spectrum.eigenvalues, -jnp.inf))
    low = jnp.min(jnp.where(counted, spectrum.eigenvalues, jnp.inf))
    deviation = jnp.sqrt(1e-5 * jnp.maximum(1.0, high - low))
    tails = jax.scipy.stats.norm.sf((threshold - spectrum.eigenvalues) / deviation)
    return jnp.sum(spectrum.weights * tails)


def base_rate(
    spectrum: Spectrum, *, step: float = 0.1, window: int = 4, tolerance: float = 0.005
) -> jax.Array:
    """FedAD's base rate P []: rho(t) at the first t where it has become flat.

    t rises from 0 in steps until `window` successive rho lie within `tolerance`; the last is the
    rate. If rho falls below half of rho(0) before, the step is halved and t starts again.

    Args:
      spectrum: of the loss's Hessian.
      step: first step of t, in the unit of the eigenvalues.
      window: how many values are compared.
      tolerance: largest less smallest of them.

    Returns:
      [] in [0, 1]; NaN if the spectrum is not finite.
    """
    first = mass_above(spectrum, 0.0)

    def again(state: tuple) -> jax.Array:
        return ~state[0] & jnp.isfinite(first)

    def advance(state: tuple) -> tuple:
        _, step, count, values, halvings = state
        value = mass_above(spectrum, step * count)
        values = jnp.append(values[1:], value)
        flat = (count + 1 >= window) & (jnp.max(values) - jnp.min(values) < tolerance)
        fell = ~flat & (value < 0.5 * first) & (halvings < _MAX_HALVINGS)
        return (
            flat,
            jnp.where(fell, 0.5 * step, step),
            jnp.where(fell, 0, count + 1),
            values,
            halvings + fell,
        )

    begin = (jnp.bool_(False), jnp.asarray(step, first.dtype), jnp.int32(0))
    values = jnp.full(window, jnp.nan, first.dtype)
    *_, values, _ = jax.lax.while_loop(again, advance, (*begin, values, jnp.int32(0)))
    return values[-1]


def _dot(left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.matmul(left, right, precision="highest")
