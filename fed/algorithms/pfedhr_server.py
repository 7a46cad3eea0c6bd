"""What the server of pFedHR does with the models that it holds: assemble, fine-tune, match.

See `fed.algorithms.pfedhr` for the method and its source (arXiv 2308.08643).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from fed import chain as chains
from fed import reassembly
from fed.algorithms.local_sgd import make_step, start
from fed.chain import Candidate, Chain, Layers
from fed.clients import Batch, batch_indices

EPS = 1e-4
"""Of Adam. Gradients below it are little but rounding, which a smaller one would make steps of."""


@dataclasses.dataclass(frozen=True)
class PfedhrConfig:
    """Static settings.

    Raises:
      ValueError: values out of range.
    """

    kl_weight: float = 1.0
    """Lambda, of the divergence from the teacher; the authors' code: 0.1. Chosen on the digits,
    where 0.1 is hardly felt, and 3 better for even labels but worse for two a client."""

    num_candidates: int = 8
    """At most; the authors' code: 4."""

    tuned: Literal["stitches", "all"] = "stitches"
    """What is fine-tuned on public samples: stitches between layers that stay as clients trained
    them, or all, as the authors' code does, with copies of the clients that are to be matched."""

    tune_epochs: int = 3
    tune_batch: int = 16
    tune_rate: float = 1e-3  # of Adam

    def __post_init__(self) -> None:
        for name in ("num_candidates", "tune_epochs", "tune_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("kl_weight", "tune_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.tuned not in ("stitches", "all"):
            raise ValueError(f"unknown tuned {self.tuned!r}; expected 'stitches' or 'all'")


def choose_owners(
    key: jax.Array, chain: Chain, passed: tuple[jax.Array, ...], count: int
) -> tuple[jax.Array, jax.Array]:
    """Some of the candidates that keep all rules; the key is consumed.

    Args:
      key: for the draw.
      chain: of all models.
      passed: S + 1 arrays [C, N, P], the models' activations on public samples.
      count: G.

    Returns:
      int32 [G, S], the clients whose layers candidates are put together of (with as many units as
      there are layers they have one of each), and bool [G], whether there is such a candidate.
    """
    num_clients, num_layers = chain.sizes.shape
    units = reassembly.units_of([chain.operations] * num_clients)
    padded = jax.vmap(lambda *each: reassembly.pad_columns(each))
    inputs, outputs = (
        padded(*part).reshape(len(units.owner), passed[0].shape[1], -1)
        for part in (passed[:-1], passed[1:])
    )
    distance = reassembly.unit_distances(inputs, outputs)
    groups = reassembly.group(distance, num_layers - 1)
    grown = reassembly.candidates(units, groups, distance, num_layers - 1)
    drawn = reassembly.draw(key, grown, count)
    return jnp.asarray(units.owner, jnp.int32)[drawn.members], drawn.found


def make_candidates(
    key: jax.Array, chain: Chain, models: Layers, public: Batch, config: PfedhrConfig
) -> tuple[Candidate, jax.Array, jax.Array]:
    """New candidates, and which of them is every client's; the key is consumed.

    Args:
      key: for the draw and the order of the public samples.
      chain: of all models.
      models: leaves [C, ...].
      public: [N] samples.
      config: settings.

    Returns:
      Candidates with leaves [G, ...], whether each was found (bool [G]), and the choice of each
      client (int32 [C]; -1 where there are no candidates).
    """
    num_clients = chain.sizes.shape[0]
    draw_key, tune_key = jax.random.split(key)
    passed = jax.vmap(partial(chains.activations, chain), in_axes=(0, None))(models, public.inputs)
    owners, found = choose_owners(draw_key, chain, passed, config.num_candidates)
    made = jax.vmap(lambda each: chains.assemble(chain, models, each, passed[:-1]))(owners)
    if config.tuned == "stitches":
        made = fine_tune(tune_key, chain, made, public, config)
        own_logits = passed[-1]
    else:
        shapes = jax.tree.map(lambda leaf: leaf[0], made.stitches)
        rows = jnp.arange(num_clients, dtype=jnp.int32)
        own = jax.vmap(lambda layers, row: chains.whole(layers, shapes, row))(models, rows)
        both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), own, made)
        both = fine_tune(tune_key, chain, both, public, config)
        own, made = (
            jax.tree.map(lambda leaf, p=part: leaf[p], both)
            for part in (slice(num_clients), slice(num_clients, None))
        )
        own_logits = _all_logits(chain, own, public.inputs)
    alike = logit_similarity(own_logits, _all_logits(chain, made, public.inputs))
    best = jnp.argmax(jnp.where(found[None], alike, -jnp.inf), axis=1).astype(jnp.int32)
    return made, found, jnp.where(found.any(), best, -1)


def fine_tune(
    key: jax.Array, chain: Chain, candidates: Candidate, public: Batch, config: PfedhrConfig
) -> Candidate:
    """Candidates [G, ...] after cross-entropy on public samples; the key is consumed.

    All see the same batches. What is not there, beyond a width or where there is no stitch, stays.
    """
    size = public.labels.shape[0]
    plan = batch_indices(
        key,
        size,
        max_size=size,
        num_steps=config.tune_epochs * -(-size // config.tune_batch),
        batch_size=config.tune_batch,
    )
    optimizer = optax.adam(config.tune_rate, eps=EPS)

    def tune(candidate: Candidate) -> Candidate:
        def put(trained: tuple[Layers, Any]) -> Candidate:
            layers = trained[0] if config.tuned == "all" else candidate.layers
            return candidate._replace(layers=layers, stitches=trained[1])

        def loss(trained: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
            del key
            found = chains.logits(chain, put(trained), batch.inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(found, batch.labels)
            return (losses * batch.weight).sum() / batch.weight.sum(), ()

        step = make_step(loss, optimizer)

        def body(state: Any, each: Any) -> tuple[Any, None]:
            batch = Batch(public.inputs[each.indices], public.labels[each.indices], each.weight)
            return step(state, batch)[0], None

        layers = candidate.layers if config.tuned == "all" else ()
        first = start((layers, candidate.stitches), optimizer, key)
        return put(jax.lax.scan(body, first, plan)[0].params)

    return jax.vmap(tune)(candidates)


def logit_similarity(logits: jax.Array, others: jax.Array) -> jax.Array:
    """Mean cosine of the logits of models on the same samples.

    Args:
      logits: [C, N, Y].
      others: [G, N, Y].

    Returns:
      [C, G] in [-1, 1].
    """
    units = [
        each / jnp.maximum(jnp.linalg.norm(each, axis=-1, keepdims=True), 1e-12)
        for each in (logits, others)
    ]
    return jnp.einsum("cny,gny->cg", *units, precision="highest") / logits.shape[1]


def _all_logits(chain: Chain, candidates: Candidate, inputs: jax.Array) -> jax.Array:
    return jax.vmap(lambda candidate: chains.logits(chain, candidate, inputs))(candidates)
