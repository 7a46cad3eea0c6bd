"""What every method is given: clients, capacities, the header and where it starts."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh

from acme_jax.blocks import Params
from acme_jax.methods.mlp_header import MlpHeader
from fed.algorithms.local_sgd import LossFn
from fed.clients import Batch, ClientData


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The same for all methods."""

    rounds: int = 10
    epochs: int = 1
    batch_size: int = 16
    learning_rate: float = 0.02
    momentum: float = 0.5
    weight_decay: float = 1e-4

    def optimizer(
        self, *, decays: bool = True, max_norm: float | None = None
    ) -> optax.GradientTransformation:
        """The clients' SGD.

        Args:
          decays: weights decay; not for a method whose absent units must come back as sent.
          max_norm: gradients are clipped to it, for a method that diverges without; None: not.
        """
        return optax.chain(
            optax.identity() if max_norm is None else optax.clip_by_global_norm(max_norm),
            optax.add_decayed_weights(self.weight_decay) if decays else optax.identity(),
            optax.sgd(self.learning_rate, momentum=self.momentum),
        )


class Public(NamedTuple):
    """Samples that the edge holds; methods that need some say so."""

    features: Array  # [N, F]
    labels: Array  # [N]


class Problem(NamedTuple):
    """One comparison's clients. Methods must not change it."""

    key: Array
    header: MlpHeader
    start: Params
    """Of the full header, trained on the edge's public data: where every method begins."""
    data: ClientData
    """Training features [C, N, F] of frozen backbones, each client's own, and labels [C, N]."""
    capacities: np.ndarray
    """[C] in (0, 1]: the part of the hidden units that a client can hold in the end."""
    public: Public | None
    schedule: Schedule
    mesh: Mesh

    @property
    def num_clients(self) -> int:
        """C."""
        return int(self.data.size.shape[0])

    def loss(self) -> LossFn:
        """Cross-entropy of the header for `fed.algorithms`; metrics have loss and accuracy."""
        return header_loss(self.header)


def header_loss(header: MlpHeader) -> LossFn:
    """See `Problem.loss`."""

    def loss_fn(params: Params, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        del key
        return weighted_loss(header.logits(params, batch.inputs), batch)

    return loss_fn


def weighted_loss(logits: Array, batch: Batch) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy over the batch's real samples, and metrics."""
    total = jnp.maximum(batch.weight.sum(), 1.0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    loss = jnp.sum(losses * batch.weight) / total
    correct = (jnp.argmax(logits, axis=-1) == batch.labels) * batch.weight
    return loss, {"loss": loss, "accuracy": jnp.sum(correct) / total}
