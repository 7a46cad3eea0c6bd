"""Reassembly: which layers of different models make new models (pFedHR).

Wang et al., "Towards Personalized Federated Learning via Heterogeneous Model Reassembly" (NeurIPS
2023, arXiv 2308.08643). Models fall apart into units, one a layer, which are compared by what they
read and give on public samples, grouped, and put together again under four rules:

1. R1: units follow one another in the order of their layers.
2. R2: kinds of operations follow one another in a fixed order (convolutions, then dense layers).
3. R3: every kind of operation is there.
4. R4: every group is there.

The functions know units by number only, so models may differ in depth, width and kind; which
units there are is static, everything else may be traced. The layer that gives logits should be a
kind of its own: the rules then put it at the end of every candidate.

Deviations: the groups' centres are units (k-medoids), because distances are all that is known of
them. The paper says that candidates grow greedily, but not by what; here by the nearest unit. Of
the candidates a random few are kept, as the authors' code does with its own random ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fed.cka import pairwise_cka

LEAST_ALIGNMENT = 1e-6
"""Below it, distances grow no further."""
ITERATIONS = 10
"""Of the grouping; more change nothing on some hundred units."""


class Units(NamedTuple):
    """The layers of all models, one after the other; static."""

    owner: np.ndarray  # int [U], the model
    layer: np.ndarray  # int [U], the place in its model, from 0
    operation: np.ndarray  # int [U], the kind; smaller kinds come first


class Rules(NamedTuple):
    """Which of the rules a candidate keeps; bool []."""

    layer_order: jax.Array  # R1
    operation_order: jax.Array  # R2
    all_operations: jax.Array  # R3
    all_groups: jax.Array  # R4


class Candidates(NamedTuple):
    """Rows of units that may become models."""

    members: jax.Array  # int32 [P, K + 1], in the order of their layers
    found: jax.Array  # bool [P]; False: no such candidate, or the same as an earlier one


def units_of(operations: Sequence[Sequence[int]]) -> Units:
    """The units of models.

    Args:
      operations: of each model the kinds of its layers, in their order.
    """
    counts = [len(model) for model in operations]
    return Units(
        np.repeat(np.arange(len(counts)), counts),
        np.concatenate([np.arange(count) for count in counts]),
        np.concatenate([np.asarray(model, int) for model in operations]),
    )


def pad_columns(activations: Sequence[jax.Array]) -> jax.Array:
    """Activations [N, ...] of several units as one array [U, N, P], zeros beyond each width.

    Zeros change no alignment.
    """
    flat = [jnp.reshape(each, (each.shape[0], -1)) for each in activations]
    width = max(each.shape[1] for each in flat)
    return jnp.stack([jnp.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in flat])


def unit_distances(inputs: jax.Array, outputs: jax.Array) -> jax.Array:
    """How differently units work: 1 / (CKA of inputs + CKA of outputs), linear CKA.

    Args:
      inputs: [U, N, P], what each unit reads on the same N public samples.
      outputs: [U, N, Q].

    Returns:
      [U, U], symmetric; 0.5 between units that do the same.
    """
    alignment = pairwise_cka(inputs[:, None]) + pairwise_cka(outputs[:, None])
    return 1.0 / jnp.maximum(alignment, LEAST_ALIGNMENT)


def group(distance: jax.Array, num_groups: int) -> jax.Array:
    """Groups of near units, by k-medoids.

    Centres start where they lower the sum of distances most, one after the other (Kaufman and
    Rousseeuw's BUILD), then centres and members are found in turn. Deterministic.

    Args:
      distance: [U, U], symmetric.
      num_groups: K, static.

    Returns:
      int32 [U] in [0, K). Groups without members are possible where units equal one another.

    Raises:
      ValueError: K is not from 1 to U.
    """
    num_units = distance.shape[0]
    if not 1 <= num_groups <= num_units:
        raise ValueError(f"num_groups must be from 1 to {num_units} units, got {num_groups}")
    nearest, chosen = jnp.full(num_units, jnp.inf), []
    for _ in range(num_groups):
        best = jnp.argmin(jnp.minimum(nearest[:, None], distance).sum(axis=0))
        nearest = jnp.minimum(nearest, distance[:, best])
        chosen.append(best)

    def improve(_: int, centres: jax.Array) -> jax.Array:
        members = _nearest(distance, centres)[None] == jnp.arange(num_groups)[:, None]
        cost = members.astype(distance.dtype) @ distance
        better = jnp.argmin(jnp.where(members, cost, jnp.inf), axis=1)
        return jnp.where(members.any(axis=1), better, centres)

    return _nearest(distance, jax.lax.fori_loop(0, ITERATIONS, improve, jnp.stack(chosen)))


def rules(units: Units, members: jax.Array, groups: jax.Array, num_groups: int) -> Rules:
    """What a candidate keeps of the rules.

    Args:
      units: of all models.
      members: int [M], the candidate's units in their order.
      groups: int [U], from `group`.
      num_groups: K.
    """
    layer, operation = (jnp.asarray(each)[members] for each in (units.layer, units.operation))
    kinds = np.unique(units.operation)
    return Rules(
        (jnp.diff(layer) > 0).all(),
        (jnp.diff(operation) >= 0).all(),
        (operation[None] == kinds[:, None]).any(axis=1).all(),
        (groups[members][None] == jnp.arange(num_groups)[:, None]).any(axis=1).all(),
    )


def candidates(units: Units, groups: jax.Array, distance: jax.Array, num_groups: int) -> Candidates:
    """Candidates that keep all rules, grown from every pair of units of one group.

    To a pair comes one unit from each of the other groups, always the one that is nearest to
    those chosen so far (by the sum of distances) and fits them by R1 and R2. So candidates have
    K + 1 units, and there are none where K exceeds the number of layers less one.

    Args:
      units: of all models.
      groups: int [U], from `group`; may be traced.
      distance: [U, U].
      num_groups: K, static.

    Raises:
      ValueError: no unit can follow another.
    """
    before = (units.layer[:, None] < units.layer) & (units.operation[:, None] <= units.operation)
    pairs = np.argwhere(before)
    if not len(pairs):
        raise ValueError("no unit can follow another; models need at least two layers")
    fits, layer = jnp.asarray(before | before.T), jnp.asarray(units.layer)
    last = int(units.layer.max()) + 1

    def grow(pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        chosen = jnp.zeros(len(units.layer), bool).at[pair].set(True)
        ok = groups[pair[0]] == groups[pair[1]]
        for _ in range(num_groups - 1):
            taken = jnp.zeros(num_groups, bool).at[groups].max(chosen)
            allowed = (fits | ~chosen[:, None]).all(axis=0) & ~taken[groups]
            cost = (distance * chosen[:, None]).sum(axis=0)
            best = jnp.argmin(jnp.where(allowed, cost, jnp.inf))
            ok &= allowed[best]
            chosen = chosen.at[best].set(True)
        members = jnp.argsort(jnp.where(chosen, layer, last))[: num_groups + 1]
        kept = jnp.stack(rules(units, members, groups, num_groups))
        return members.astype(jnp.int32), ok & kept.all()

    members, found = jax.vmap(grow)(jnp.asarray(pairs))
    same = (members[:, None] == members[None]).all(axis=-1) & found[None]
    return Candidates(members, found & ~jnp.tril(same, -1).any(axis=1))


def draw(key: jax.Array, candidates: Candidates, count: int) -> Candidates:
    """`count` of the candidates at random, those that were found first; the key is consumed.

    Where there are fewer, the rest are not found.
    """
    lacking = max(count - candidates.found.shape[0], 0)
    found = jnp.pad(candidates.found, (0, lacking))
    members = jnp.pad(candidates.members, ((0, lacking), (0, 0)))
    order = jnp.where(found, jax.random.uniform(key, found.shape), -1.0)
    _, rows = jax.lax.top_k(order, count)
    return Candidates(members[rows], found[rows])


def _nearest(distance: jax.Array, centres: jax.Array) -> jax.Array:
    """int32 [U]: each unit's nearest centre, the first where several are."""
    return jnp.argmin(distance[:, centres], axis=1).astype(jnp.int32)
