"""The volume that a set of minimised objectives dominates, exactly.

Shape letters: P points, M objectives.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def hypervolume(objectives: jax.Array, reference: jax.Array) -> jax.Array:
    """Volume [] between the points and the reference that some point dominates.

    Exact up to rounding for any M. A sweep over the first objective keeps, for every cell of
    the grid that the points' other coordinates span, the lowest second objective so far: P
    steps over P^(M - 2) cells, hence O(P^2) time for M = 3 and O(P^3) with O(P^2) memory
    for M = 4. All points pay, dominated or not: pass the front alone where M > 3 and P is
    large. (The slicing idea is that of Zitzler 1999 and While et al. 2006.)

    Args:
      objectives: [P, M], minimised. Points that are not better than the reference in every
        objective add nothing, nor do rows with NaN or infinity.
      reference: [M]; NaN comes out if it is not finite.
    """
    reference = jnp.broadcast_to(jnp.asarray(reference, objectives.dtype), objectives.shape[1:])
    reference = jnp.where(jnp.all(jnp.isfinite(reference)), reference, jnp.nan)
    inside = jnp.isfinite(objectives) & (objectives < reference[None, :])
    inside = jnp.all(inside, axis=1, keepdims=True)
    points = jnp.where(inside, objectives, reference[None, :])
    if points.shape[0] == 0:
        return jnp.where(jnp.isnan(reference[0]), jnp.nan, jnp.zeros((), points.dtype))
    if points.shape[1] == 1:
        return jnp.max(reference[0] - points[:, 0], initial=0)
    points = points[jnp.argsort(points[:, 0])]
    width = jnp.diff(points[:, 0], append=reference[:1])

    # Slabs of each further objective: where they start and how thick they are.
    starts = jnp.sort(points[:, 2:], axis=0)
    thickness = jnp.diff(starts, axis=0, append=reference[None, 2:])
    num_slabbed = starts.shape[1]
    cells = functools.reduce(jnp.multiply.outer, list(thickness.T), jnp.ones((), objectives.dtype))

    def step(
        carry: tuple[jax.Array, jax.Array], point_width: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        volume, lowest = carry
        point, width = point_width
        covered = functools.reduce(
            jnp.logical_and.outer,
            [point[2 + axis] <= starts[:, axis] for axis in range(num_slabbed)],
            jnp.ones((), bool),
        )
        lowest = jnp.where(covered, jnp.minimum(lowest, point[1]), lowest)
        return (volume + width * jnp.sum((reference[1] - lowest) * cells), lowest), None

    start = (jnp.zeros((), objectives.dtype), jnp.full(cells.shape, reference[1]))
    (volume, _), _ = jax.lax.scan(step, start, (points, width))
    return volume
