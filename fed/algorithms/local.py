"""Training alone: nothing travels. The baseline that any sharing must beat."""

from __future__ import annotations

from typing import Any

import jax
import optax

from fed.algorithm import FedAlgorithm
from fed.algorithms.local_sgd import LossFn, SgdState, make_step, start


def local(loss_fn: LossFn, optimizer: optax.GradientTransformation) -> FedAlgorithm:
    """Each client trains its own model; message and update are `()`.

    The client state is the client's parameters. As in `fedavg`, each round starts a fresh
    optimiser, so the two differ in the sharing only. Equal starting points come from
    `fed.clients.replicate(params, num_clients)`.

    Args:
      loss_fn: (params, batch, key) -> (loss, metrics); weighs samples by `batch.weight`.
      optimizer: the clients' optimiser.
    """

    def client_init(message: tuple[()], params: Any, key: jax.Array) -> SgdState:
        del message
        return start(params, optimizer, key)

    return FedAlgorithm(
        server_init=lambda *initial: (),
        server_message=lambda state, row: (),
        client_init=client_init,
        client_step=make_step(loss_fn, optimizer),
        client_final=lambda message, state: (state.params, ()),
        server_update=lambda state, updates, weights, rows: (state, {}),
    )
