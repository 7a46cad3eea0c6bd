"""Optimal transport: between histograms, mixtures of Gaussians, and clients' labelled data.

Entropic transport in the log domain (Sinkhorn; Cuturi 2013), rounded to exact marginals
(Altschuler et al. 2017), so a cost is never below the exact one and little above it.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fed.clients import take_row
from fed.gmm import ClassMixtures, Mixture


def sinkhorn(
    cost: jax.Array,
    source: jax.Array,
    target: jax.Array,
    *,
    regularization: float = 0.01,
    num_iterations: int = 200,
) -> jax.Array:
    """A plan that moves one histogram to another at little cost.

    Minimises <P, cost> - epsilon * entropy(P) by alternating the two marginals; epsilon falls
    from the largest cost to its last value over the first half of the iterations, which then
    start close to the solution (epsilon scaling). Costs of empty places do not matter.

    Args:
      cost: [I, J], finite.
      source: [I], not negative, with a positive sum; normalised to sum 1. 0 masks a place.
      target: [J], the same.
      regularization: the last epsilon, as a fraction of the largest cost between places that
        are not empty. Above the exact optimum by at most epsilon * log(min(I, J)) when converged.
      num_iterations: of both marginals.

    Returns:
      P [I, J], whose rows sum to `source` and columns to `target` up to rounding.

    Raises:
      ValueError: arrays whose shapes do not fit.
    """
    if cost.ndim != 2 or (*source.shape, *target.shape) != cost.shape:
        raise ValueError(
            f"source {source.shape} and target {target.shape} must have the rows and columns of "
            f"cost {cost.shape}"
        )
    source, target = source / source.sum(), target / target.sum()
    full = (source > 0)[:, None] & (target > 0)[None]
    cost = jnp.where(full, cost, 0)
    largest = cost.max()
    cost = cost / jnp.where(largest > 0, largest, 1)
    log_source, log_target = jnp.log(source), jnp.log(target)

    def iterate(step: jax.Array, potential: jax.Array) -> jax.Array:
        epsilon = regularization ** jnp.minimum(1.0, 2 * step / num_iterations)
        rows = _dual(cost, log_source, potential, epsilon)
        return _dual(cost.T, log_target, rows, epsilon)

    columns = jnp.where(target > 0, 0.0, -jnp.inf)
    columns = jax.lax.fori_loop(0, num_iterations, iterate, columns)
    rows = _dual(cost, log_source, columns, regularization)
    return _round(jnp.exp((rows[:, None] + columns[None] - cost) / regularization), source, target)


def component_costs(first: Mixture, second: Mixture) -> jax.Array:
    """Squared 2-Wasserstein distances between components with diagonal covariances.

    |mu1 - mu2|^2 + sum_d (sqrt v1_d - sqrt v2_d)^2 (CE-LoRA, arXiv 2503.23869).

    Args:
      first: of K components.
      second: of J components.

    Returns:
      [K, J], squared units of the features.
    """

    def one(mean: jax.Array, deviation: jax.Array) -> jax.Array:
        means = (second.means - mean[None]) ** 2
        return (means + (jnp.sqrt(second.variances) - deviation[None]) ** 2).sum(axis=1)

    return jax.vmap(one)(first.means, jnp.sqrt(first.variances))


def mixture_wasserstein(
    first: Mixture, second: Mixture, *, regularization: float = 0.01, num_iterations: int = 200
) -> jax.Array:
    """The mixture-Wasserstein distance MW2 (Delon & Desolneux 2020).

    The square root of the least cost of moving one mixture's components to the other's, each as
    a whole: an upper bound of the 2-Wasserstein distance, exact for single Gaussians.

    Args:
      first: of K components.
      second: of J components.
      regularization: see `sinkhorn`.
      num_iterations: see `sinkhorn`.

    Returns:
      [], in the units of the features.
    """
    cost = component_costs(first, second)
    plan = sinkhorn(
        cost,
        first.weights,
        second.weights,
        regularization=regularization,
        num_iterations=num_iterations,
    )
    return jnp.sqrt((cost * plan).sum())


def client_distances(
    sketches: ClassMixtures,
    *,
    regularization: float = 0.01,
    num_iterations: int = 200,
    chunk_size: int = 16,
) -> jax.Array:
    """Distances between clients' labelled data (CE-LoRA's server, reconstructed).

    Two labels are as far as their mixtures (`mixture_wasserstein`); two clients as far as moving
    one's labels to the other's costs, with label frequencies as masses. Labels are matched by
    what their samples look like, not by name.

    Args:
      sketches: leaves [C, L, ...] of `fed.gmm.fit_classes`; each client has a sample or more.
      regularization: see `sinkhorn`.
      num_iterations: see `sinkhorn`.
      chunk_size: pairs of clients at a time.

    Returns:
      [C, C], symmetric, in the units of the features. The diagonal is what regularisation
      leaves of 0.
    """
    distance, plan = (
        partial(function, regularization=regularization, num_iterations=num_iterations)
        for function in (mixture_wasserstein, sinkhorn)
    )

    def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        first, second = (take_row(sketches, row) for row in pair)
        to_all = jax.vmap(distance, in_axes=(None, 0))
        cost = jax.vmap(to_all, in_axes=(0, None))(first.mixtures, second.mixtures)
        return (cost * plan(cost, first.counts, second.counts)).sum()

    num_clients = sketches.counts.shape[0]
    rows, columns = np.triu_indices(num_clients)
    # Whole chunks; the pairs that fill up the last one are computed twice.
    chunks = np.resize(np.arange(rows.size), (-(-rows.size // chunk_size), chunk_size))
    distances = jax.lax.map(
        jax.vmap(one), (jnp.asarray(rows[chunks]), jnp.asarray(columns[chunks]))
    )
    pairs = distances.reshape(-1)[: rows.size]
    upper = jnp.zeros((num_clients, num_clients), pairs.dtype).at[rows, columns].set(pairs)
    return upper.at[columns, rows].set(pairs)


def _dual(
    cost: jax.Array, log_mass: jax.Array, other: jax.Array, epsilon: float | jax.Array
) -> jax.Array:
    """The potential [I] at which rows have their mass, given that of the columns [J]."""
    return epsilon * (log_mass - jax.nn.logsumexp((other[None] - cost) / epsilon, axis=1))


def _round(plan: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """The plan with exact marginals: nothing too much, what is missing added as a product."""

    def share(wanted: jax.Array, given: jax.Array) -> jax.Array:
        return jnp.minimum(wanted / jnp.where(given > 0, given, 1), 1)

    plan = plan * share(source, plan.sum(axis=1))[:, None]
    plan = plan * share(target, plan.sum(axis=0))[None]
    rows = jnp.maximum(source - plan.sum(axis=1), 0)
    columns = jnp.maximum(target - plan.sum(axis=0), 0)
    missing = rows.sum()
    return plan + rows[:, None] * columns[None] / jnp.where(missing > 0, missing, 1)
