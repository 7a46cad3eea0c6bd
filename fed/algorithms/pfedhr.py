"""pFedHR (Wang et al., NeurIPS 2023, arXiv 2308.08643): teachers put together of clients' layers.

Clients of different sizes send their models. The server takes them apart and puts the layers
together again (`fed.reassembly`, `fed.stitching`), fine-tunes what comes out on public labelled
samples, and sends each client the candidate whose logits are most like its own. A client trains
its own model by CE + lambda KL(own || candidate).

Here the models are chains of the same S layers (`fed.chain`), so that the layers of a candidate
are a choice of owners and all rounds are one program. Whole models of different depths are served
by the pure functions, not by this.

Deviations. K is S - 1: candidates are a pair of units of one group and one unit of each other
group, so with more groups there are none, and with fewer some layer is left out. Every model that
was ever sent takes part, as last sent, not only those of the round. Only stitches are fine-tuned
unless `PfedhrConfig.tuned` says otherwise; the unlabelled variant (SimCLR) is not here. Where
nothing can be put together, and in the first round, a client's own model as the round begins is
its teacher.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fed import chain as chains
from fed.algorithm import FedAlgorithm
from fed.algorithms.local_sgd import SgdState, make_step, start
from fed.algorithms.pfedhr_server import PfedhrConfig, make_candidates
from fed.arrivals import newest
from fed.chain import Candidate, Chain, Layers
from fed.clients import Batch, take_row


class PfedhrServer(NamedTuple):
    """State of the server."""

    received: Layers  # leaves [C, ...], as last sent
    candidates: Candidate  # leaves [G, ...]
    choice: jax.Array  # int32 [C], each client's candidate; -1: none
    public: Batch  # [N]
    round: jax.Array  # int32 []


class PfedhrMessage(NamedTuple):
    """What a client gets."""

    candidate: Candidate
    found: jax.Array  # bool []; False: nothing travels


class _Step(NamedTuple):
    sgd: SgdState
    teacher: Candidate


def pfedhr(
    chain: Chain, optimizer: optax.GradientTransformation, config: PfedhrConfig, key: jax.Array
) -> FedAlgorithm:
    """pFedHR; a client's state and its update are its layers, with which it predicts.

    `server_init` takes the layers that clients start with, leaves [C, ...], and public inputs
    [N, ...] and labels [N]. Each round starts a fresh optimiser. The server's metrics say how many
    floats went down to the clients heard (`down_floats` [K]) and how many candidates there are.

    Args:
      chain: of the clients' models.
      optimizer: the clients'.
      config: settings.
      key: for the server's draws, the same in every round.
    """

    def server_init(first: Layers, inputs: jax.Array, labels: jax.Array) -> PfedhrServer:
        public = Batch(inputs, labels, jnp.ones(labels.shape[0]))
        shapes, *_ = jax.eval_shape(
            lambda key: make_candidates(key, chain, first, public, config), key
        )
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        choice = jnp.full(chain.sizes.shape[0], -1, jnp.int32)
        return PfedhrServer(first, nothing, choice, public, jnp.int32(0))

    def server_message(state: PfedhrServer, row: jax.Array) -> PfedhrMessage:
        choice = state.choice[row]
        return PfedhrMessage(take_row(state.candidates, jnp.maximum(choice, 0)), choice >= 0)

    def client_init(message: PfedhrMessage, layers: Layers, key: jax.Array) -> _Step:
        sent = message.candidate
        own = chains.whole(layers, sent.stitches, jnp.int32(0))
        teacher = jax.tree.map(lambda a, b: jnp.where(message.found, a, b), sent, own)
        return _Step(start(layers, optimizer, key), teacher)

    def client_step(state: _Step, batch: Batch) -> tuple[_Step, Any]:
        known = chains.logits(chain, state.teacher, batch.inputs)
        total = jnp.maximum(batch.weight.sum(), 1e-6)

        def loss_fn(layers: Layers, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
            del key
            own = chains.activations(chain, layers, batch.inputs)[-1]
            losses = optax.softmax_cross_entropy_with_integer_labels(own, batch.labels)
            loss, divergence = (
                (batch.weight * each).sum() / total for each in (losses, kl_divergence(own, known))
            )
            metrics = {"loss": loss, "divergence": divergence}
            return loss + config.kl_weight * divergence, metrics

        sgd, metrics = make_step(loss_fn, optimizer)(state.sgd, batch)
        return _Step(sgd, state.teacher), metrics

    def client_final(message: PfedhrMessage, state: _Step) -> tuple[Layers, Layers]:
        del message
        return state.sgd.params, state.sgd.params

    def server_update(
        state: PfedhrServer, updates: Layers, weights: jax.Array, rows: jax.Array
    ) -> tuple[PfedhrServer, dict[str, jax.Array]]:
        messages = jax.vmap(server_message, in_axes=(None, 0))(state, rows)
        sizes = jax.vmap(lambda candidate: chains.num_floats(chain, candidate))(messages.candidate)
        received = newest(state.received, updates, weights > 0, rows)
        candidates, found, choice = make_candidates(
            jax.random.fold_in(key, state.round), chain, received, state.public, config
        )
        after = PfedhrServer(received, candidates, choice, state.public, state.round + 1)
        metrics = {
            "down_floats": jnp.where(messages.found, sizes, 0),
            "candidates": found.sum(),
        }
        return after, metrics

    return FedAlgorithm(
        server_init=server_init,
        server_message=server_message,
        client_init=client_init,
        client_step=client_step,
        client_final=client_final,
        server_update=server_update,
    )


def kl_divergence(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """KL(student || teacher) of the distributions that logits [B, Y] stand for: [B], in nats."""
    log_student, log_teacher = (jax.nn.log_softmax(each) for each in (student, teacher))
    return (jnp.exp(log_student) * (log_student - log_teacher)).sum(axis=-1)
