"""Bases of Co-LoRA for the comparison's header: one for each size of sub-header, aligned."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from acme_jax.blocks import Params
from acme_jax.methods.mlp_header import MlpHeader
from fed import co_lora
from fed.co_lora import Basis
from fed.co_lora_alignment import ModuleSamples, align

MODULES = ("first", "second", "last")
"""The header's layers, all of which are adapted."""


def held_units(header: MlpHeader, units: Sequence[int]) -> Array:
    """[L, H] 0/1: the units of either hidden layer that sub-headers of these sizes have."""
    counts = jnp.asarray(units)
    return (jnp.arange(header.num_hidden)[None] < counts[:, None]).astype(jnp.float32)


def run_layers(
    params: Params,
    held: Array,
    features: Array,
    added: Callable[[str, Array], Array] | None = None,
) -> dict[str, ModuleSamples]:
    """What goes into and comes out of the three layers of a sub-header.

    Args:
      params: of the header.
      held: [H] 0/1, the units of either hidden layer that it has.
      features: [B, F].
      added: (layer, its inputs [B, d_in]) -> [B, d_out], what an adapter adds; None: nothing.

    Returns:
      By layer; the last one's outputs are the logits.
    """
    samples, inputs = {}, features
    for name in MODULES:
        outputs = inputs @ params[name]["kernel"] + params[name]["bias"][None]
        if added is not None:
            outputs = outputs + added(name, inputs)
        if name != "last":
            outputs = outputs * held[None]
        samples[name] = ModuleSamples(inputs, outputs)
        inputs = jax.nn.relu(outputs)
    return samples


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def aligned_bases(
    header: MlpHeader,
    units: tuple[int, ...],
    rank: int,
    start: Params,
    features: Array,
    key: Array,
) -> dict[str, Basis]:
    """Bases of sub-headers with which one core does the same in all; by layer, leaves [L, ...].

    The smallest one's bases are random, the others' are aligned with them. Where both have the
    same inputs or outputs, as in the first and after the last layer, they share A or B.

    Args:
      header: sizes; static.
      units: of each sub-header, the smallest first; static.
      rank: of the modules, as far as their sizes allow it in the smallest; static.
      start: parameters of the header.
      features: public, [N, F].
      key: consumed.
    """
    held = held_units(header, units)
    small = run_layers(start, held[0], features)
    ends = jnp.ones(header.num_features), jnp.ones(header.num_classes)
    ranks = {"first": min(rank, header.num_features, units[0]), "second": min(rank, units[0])}
    ranks["last"] = min(rank, units[0], header.num_classes)

    sides = itertools.pairwise((ends[0], held[0], held[0], ends[1]))
    reference = {
        name: co_lora.init_basis(jax.random.fold_in(key, place), *side, rank=ranks[name])
        for place, (name, side) in enumerate(zip(MODULES, sides, strict=True))
    }

    def aligned(own: Array) -> dict[str, Basis]:
        large = run_layers(start, own, features)
        found = {name: align(reference[name], small[name], large[name]) for name in MODULES}
        found["first"] = found["first"]._replace(a=reference["first"].a)
        found["last"] = found["last"]._replace(b=reference["last"].b)
        return found

    stacked = jax.tree.map(lambda leaf: leaf[None], reference)
    if len(units) == 1:
        return stacked
    # One size after the other: batches of decompositions block one another on XLA's CPU threads.
    others = jax.lax.map(aligned, held[1:])
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), stacked, others)
