"""Choosing one sub-network for each of many devices, each with limits of its own.

One archive serves a whole fleet in one compiled call. Shape letters: A candidates (places of
an archive), M objectives, C devices. A device that nothing fits is flagged and told what
would fit; it never gets the least bad candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nas import selection

Costs = Mapping[str, jax.Array]
"""What each candidate costs, by name: [A] each; any names, for instance "latency_s"."""

_INT32_MAX = jnp.iinfo(jnp.int32).max


class FleetSelection(NamedTuple):
    """One choice for each of C devices, and what the others would need.

    JAX clamps an index out of range where NumPy refuses it: look at `feasible` first.
    """

    index: jax.Array  # type: ignore[assignment]  # [C] int32; A, which no row has, if infeasible
    feasible: jax.Array  # [C] bool: whether some candidate meets every limit
    closest: jax.Array  # [C] int32; the choice, or else the candidate nearest to fitting
    costs: dict[str, jax.Array]  # [C] each: of `closest`; limits as high as these would do
    violated: dict[str, jax.Array]  # [C] each, bool: limits that `closest` breaks


def select(
    objectives: jax.Array,
    costs: Costs | Callable[[Any], Costs],
    limits: Costs,
    *,
    rule: selection.Rule,
    profiles: Any = None,
    batch_size: int = 1024,
    **rule_options: Any,
) -> FleetSelection:
    """For each device the best candidate that is within all of its limits.

    As `nas.selection.select` with several constraints, for C devices at once; jit it. Ties
    go to the lower index. A cost equal to its limit is feasible; an infinite limit is none; a
    limit that is NaN is met by nothing. Candidates with a NaN or an infinite objective or
    cost are left out. 100,000 devices and 256 candidates take a few hundredths of a second.

    A device that nothing fits is told of the candidate whose largest cost / limit is the
    smallest, over the limits that are positive (no other limit can be approached by a
    ratio). For speed, ratios that differ by less than about A / 2^22 count as equal.

    Args:
      objectives: [A, M], minimised, as in an archive.
      costs: what candidates cost, by name, [A] each, on every device alike; or a function of
        one device's profile that returns them, traceable.
      limits: [C] for every cost, in the same units and by the same names.
      rule: one of `nas.selection.Rule`. "trade_off" weighs all the costs given here.
      profiles: for a function `costs`: a pytree with leading [C], such as a
        `nas.cost.DeviceProfile` of arrays.
      batch_size: devices at a time; bounds memory, and is fastest when it fits the cache.
      **rule_options: error_column, ideal, nadir, num_divisions and sigma of
        `nas.selection.score`.

    Raises:
      ValueError: no candidates, an unknown rule, names or shapes that do not match, or
        `profiles` without a function of them (and the reverse).
    """
    num_rows = _check(objectives, costs, limits, profiles, batch_size)
    limits = {name: jnp.asarray(value) for name, value in limits.items()}

    def costs_on(profile: Any) -> dict[str, jax.Array]:
        own = costs(profile) if callable(costs) else costs
        return {name: jnp.asarray(value) for name, value in own.items()}

    def score(own: dict[str, jax.Array]) -> jax.Array:
        columns = [jnp.asarray(own[name], float) for name in sorted(own)]
        matrix = jnp.stack(columns, axis=1) if columns else jnp.zeros((num_rows, 0))
        return selection.score(objectives, matrix, rule=rule, **rule_options)

    # Where devices agree on the order of preference, choosing is one minimum of integers.
    agreed = None
    if not callable(costs):
        agreed = _preference(score(costs_on(None)))
    elif rule != "trade_off":
        agreed = _preference(score({}))

    def choose(device: tuple[dict[str, jax.Array], Any]) -> FleetSelection:
        limit, profile = device
        own = costs_on(profile)
        wanted = agreed or _Preference(score(own))
        usable = jnp.isfinite(wanted.score)
        for cost in own.values():
            usable &= jnp.isfinite(cost)
        fits = usable
        ratio = jnp.zeros((num_rows,), jnp.float32)
        for name, cost in own.items():
            fits &= cost <= limit[name]
            part = jnp.where(limit[name] > 0, cost / limit[name], 0)
            ratio = jnp.maximum(ratio, part.astype(jnp.float32))
        found, index = _first_wanted(wanted, fits)
        nearest = _first_smallest(ratio, usable)
        closest = jnp.where(found, index, nearest)
        exists = closest < num_rows
        paid = {
            name: jnp.where(exists, cost[jnp.minimum(closest, num_rows - 1)], jnp.nan)
            for name, cost in own.items()
        }
        violated = {name: ~found & ~(paid[name] <= limit[name]) for name in paid}
        return FleetSelection(jnp.where(found, index, num_rows), found, closest, paid, violated)

    return jax.lax.map(choose, (limits, profiles), batch_size=batch_size)


def explain(chosen: FleetSelection, limits: Costs, device: int) -> str:
    """One line about a device: what it got, or what would have to give. Runs on the host.

    Args:
      chosen: the result of `select`.
      limits: as given to it.
      device: its row.
    """
    closest = int(chosen.closest[device])
    paid = {name: float(value[device]) for name, value in chosen.costs.items()}
    if bool(chosen.feasible[device]):
        within = ", ".join(f"{name} {paid[name]:.4g}" for name in paid)
        return f"device {device}: candidate {closest} ({within})"
    if any(np.isnan(value) for value in paid.values()):
        return f"device {device}: nothing fits, because no candidate is valid"
    broken = [
        f"{name} {paid[name]:.4g} instead of {float(limits[name][device]):.4g}"
        for name in paid
        if bool(chosen.violated[name][device])
    ]
    return f"device {device}: nothing fits; candidate {closest} would with {' and '.join(broken)}"


class _Preference(NamedTuple):
    """How much a rule wants each candidate."""

    score: jax.Array  # [A], the lower the better
    order: jax.Array | None = None  # [A] int32, the best first
    rank: jax.Array | None = None  # [A] int32, the place of each in `order`


def _preference(score: jax.Array) -> _Preference:
    order = jnp.argsort(score, stable=True).astype(jnp.int32)
    places = jnp.arange(order.size, dtype=jnp.int32)
    return _Preference(score, order, jnp.zeros_like(order).at[order].set(places))


def _first_wanted(wanted: _Preference, fits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether any candidate fits, and the best of those that do."""
    if wanted.order is None or wanted.rank is None:
        index = jnp.argmin(jnp.where(fits, wanted.score, jnp.inf)).astype(jnp.int32)
        return jnp.any(fits), index
    last = fits.size - 1
    place = jnp.min(jnp.where(fits, wanted.rank, last + 1))
    return place <= last, wanted.order[jnp.minimum(place, last)]


def _first_smallest(ratio: jax.Array, usable: jax.Array) -> jax.Array:
    """Index of about the smallest ratio [A] among the usable; A if there is none.

    The index takes the place of the ratio's last bits, which makes this one minimum of
    integers: XLA vectorises that on CPU, and not an argmin.
    """
    num_rows = ratio.shape[0]
    low_bits = (1 << (num_rows - 1).bit_length()) - 1
    bits = jax.lax.bitcast_convert_type(jnp.abs(ratio), jnp.int32)  # without -0, ordered alike
    packed = (bits & ~low_bits) | jnp.arange(num_rows, dtype=jnp.int32)
    least = jnp.min(jnp.where(usable, packed, _INT32_MAX))
    return jnp.where(least < _INT32_MAX, least & low_bits, num_rows)


def _check(
    objectives: jax.Array,
    costs: Costs | Callable[[Any], Costs],
    limits: Costs,
    profiles: Any,
    batch_size: int,
) -> int:
    """A, after refusing inputs whose names or shapes do not go together."""
    if objectives.ndim != 2 or objectives.shape[0] == 0:
        raise ValueError(
            f"objectives have the shape {objectives.shape}; expected [A, M] with A at least 1 "
            "(an archive of capacity 0 serves nobody)"
        )
    if callable(costs) == (profiles is None):
        raise ValueError(
            "costs as a function go with profiles, and costs as arrays go without; give both a "
            "function and profiles, or arrays alone"
        )
    shapes: Any = costs
    if callable(costs):
        first = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf)[1:], jnp.result_type(leaf)), profiles
        )
        shapes = jax.eval_shape(lambda profile: dict(costs(profile)), first)
    if not shapes or set(shapes) != set(limits):
        raise ValueError(
            f"costs are named {sorted(shapes)} and limits {sorted(limits)}; expected the same "
            "names, at least one (an infinite limit is none)"
        )
    num_rows = objectives.shape[0]
    for name, value in shapes.items():
        if np.shape(value) != (num_rows,):
            raise ValueError(
                f"costs[{name!r}] have the shape {np.shape(value)}; expected ({num_rows},), one "
                "for each row of the objectives"
            )
    leading = {f"limits[{name!r}]": np.shape(value) for name, value in limits.items()}
    expected = next(iter(leading.values()))[:1]
    for path, leaf in jax.tree_util.tree_leaves_with_path(profiles):
        leading[f"profiles{jax.tree_util.keystr(path)}"] = np.shape(leaf)[:1]
    for name, shape in leading.items():
        if len(shape) != 1 or shape != expected:
            raise ValueError(
                f"{name} has the shape {shape}; expected [C], one for each device, for every "
                f"limit and profile ({expected} elsewhere)"
            )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return num_rows
