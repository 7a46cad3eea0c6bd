"""Chains of layers that differ between clients in width only, and chains put together of them.

All are padded to one shape, so that which client a layer comes from is an integer array and one
program serves every choice: stitches (`fed.stitching`) are always there, and bypassed where widths
agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fed import stitching
from fed.clients import take_row
from fed.stitching import Stitch

Layers = tuple[Any, ...]
"""Parameters of a model's S layers; zeros beyond its widths."""


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """C models of S layers; static.

    Raises:
      ValueError: parts that do not fit each other.
    """

    apply: tuple[Callable[[Any, jax.Array], jax.Array], ...]
    """Of each layer, with its nonlinearity: (parameters, inputs [N, P]) -> outputs [N, Q]. With
    zeros beyond a width, outputs there are 0 and parameters get no gradient."""

    operations: tuple[int, ...]
    """Kinds of the layers, see `fed.reassembly.Units`."""

    widths: np.ndarray
    """int [C, S - 1]: real outputs of each layer but the last."""

    sizes: np.ndarray
    """int [C, S]: real parameters of each layer."""

    def __post_init__(self) -> None:
        num_layers, num_clients = len(self.apply), len(self.sizes)
        shapes = len(self.operations), self.widths.shape, self.sizes.shape
        if num_layers < 2 or shapes != (
            num_layers,
            (num_clients, num_layers - 1),
            (num_clients, num_layers),
        ):
            raise ValueError(
                "C chains of S >= 2 layers need S operations, widths [C, S - 1] and sizes [C, S]; "
                f"got S = {num_layers}, {shapes[0]} operations, widths of shape {shapes[1]} and "
                f"sizes of shape {shapes[2]}"
            )


class Candidate(NamedTuple):
    """A chain put together; what is real of it lies within its owners' widths."""

    layers: Layers
    stitches: tuple[Stitch, ...]  # S - 1, each in front of a layer; 0 where there is none
    bridged: jax.Array  # bool [S - 1]; False: widths agree, and there is no stitch
    owners: jax.Array  # int32 [S], the clients that the layers come from


def activations(chain: Chain, layers: Layers, inputs: jax.Array) -> tuple[jax.Array, ...]:
    """What every layer of a client's own model reads, and at the end its logits: S + 1 arrays."""
    passed = [inputs]
    for apply, params in zip(chain.apply, layers, strict=True):
        passed.append(apply(params, passed[-1]))
    return tuple(passed)


def logits(chain: Chain, candidate: Candidate, inputs: jax.Array) -> jax.Array:
    """Inputs [N, P] -> logits [N, Y]."""
    values = chain.apply[0](candidate.layers[0], inputs)
    for place, stitch in enumerate(candidate.stitches):
        bridged = jnp.where(candidate.bridged[place], stitching.apply(stitch, values), values)
        values = chain.apply[place + 1](candidate.layers[place + 1], bridged)
    return values


def assemble(
    chain: Chain, models: Layers, owners: jax.Array, reads: tuple[jax.Array, ...]
) -> Candidate:
    """A chain of other models' layers, its stitches fitted on public samples.

    Args:
      chain: of all models.
      models: leaves [C, ...].
      owners: int32 [S], whose layer stands at each place.
      reads: S arrays [C, N, P], what each model's layers read on the public samples.
    """
    layers = tuple(take_row(layer, owner) for layer, owner in zip(models, owners, strict=True))
    widths = jnp.asarray(chain.widths)
    bridged, stitches = [], []
    values = reads[0][owners[0]]
    for place in range(1, len(layers)):
        values = chain.apply[place - 1](layers[place - 1], values)
        owner = owners[place]
        needed = widths[owners[place - 1], place - 1] != widths[owner, place - 1]
        fitted = stitching.fit(values, reads[place][owner])
        stitch = jax.tree.map(lambda leaf, used=needed: jnp.where(used, leaf, 0.0), fitted)
        values = jnp.where(needed, stitching.apply(stitch, values), values)
        bridged.append(needed)
        stitches.append(stitch)
    return Candidate(layers, tuple(stitches), jnp.stack(bridged), owners)


def whole(layers: Layers, stitches: tuple[Stitch, ...], row: jax.Array) -> Candidate:
    """A client's own model as a candidate; of the stitches, which it lacks, the shapes count."""
    return Candidate(
        layers,
        jax.tree.map(jnp.zeros_like, stitches),
        jnp.zeros(len(stitches), bool),
        jnp.full(len(layers), row, jnp.int32),
    )


def num_floats(chain: Chain, candidate: Candidate) -> jax.Array:
    """int32 []: real parameters of a candidate, stitches included."""
    places = jnp.arange(len(chain.apply))
    total = jnp.asarray(chain.sizes)[candidate.owners, places].sum()
    widths = jnp.asarray(chain.widths)
    before = widths[candidate.owners[:-1], places[:-1]]
    after = widths[candidate.owners[1:], places[:-1]]
    return (total + jnp.where(candidate.bridged, (before + 1) * after, 0).sum()).astype(jnp.int32)
