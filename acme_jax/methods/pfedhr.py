"""pFedHR (NeurIPS 2023): each client's teacher is put together of the layers of all headers."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array

from acme_jax.blocks import Params
from acme_jax.methods.controls import held, own_flops
from acme_jax.methods.method import Built, Method, MethodError, Payload
from acme_jax.methods.mlp_header import dense, prefix_masks
from acme_jax.methods.problem import Problem
from fed.algorithms.pfedhr import PfedhrMessage, PfedhrServer, pfedhr
from fed.algorithms.pfedhr_server import PfedhrConfig
from fed.chain import Chain, activations
from fed.clients import replicate

NAMES = ("first", "second", "last")
PUBLIC_SAMPLES = 512
"""At most that many of the edge's samples are used, spread over all: alignment is quadratic in
them. The paper's public data are a tenth of the clients'."""
CONFIG = PfedhrConfig()


def build(problem: Problem, config: PfedhrConfig = CONFIG) -> Built:
    """Clients hold headers of the first units of both hidden layers.

    Args:
      problem: of the comparison.
      config: settings.

    Raises:
      MethodError: no public samples to compare and fine-tune layers on.
    """
    if problem.public is None:
        raise MethodError(
            "pfedhr compares and stitches layers on public samples at the edge, and this problem "
            "has none; fedavg, heterofl and acme do without"
        )
    header = problem.header
    masks = jax.tree.map(np.asarray, prefix_masks(header, problem.capacities))
    chain = header_chain(problem, masks)
    start = jax.tree.map(
        lambda leaf, mask: leaf * mask, replicate(problem.start, problem.num_clients), masks
    )
    clients = _layers(start)
    algorithm = pfedhr(
        chain, problem.schedule.optimizer(), config, jax.random.fold_in(problem.key, 7)
    )
    features, labels = problem.public
    rows = np.linspace(0, len(labels) - 1, min(PUBLIC_SAMPLES, len(labels))).astype(int)
    server = algorithm.server_init(clients, features[rows], labels[rows])

    def part(owner: int, name: str) -> Params:
        return jax.tree.map(lambda leaf: leaf[owner], masks[name])

    def up(update: Any, row: int) -> Payload:
        pairs = zip(update, NAMES, strict=True)
        return [each for layer, name in pairs for each in held(layer, part(row, name))]

    def down(message: PfedhrMessage, row: int) -> Payload:
        del row
        candidate, payload = message.candidate, []
        if not message.found:
            return []
        for layer, name, owner in zip(candidate.layers, NAMES, candidate.owners, strict=True):
            payload += held(layer, part(int(owner), name))
        for place, stitch in enumerate(candidate.stitches):
            before, after = (chain.widths[int(candidate.owners[place + i]), place] for i in (0, 1))
            if candidate.bridged[place]:
                kernel, bias = np.asarray(stitch.kernel), np.asarray(stitch.bias)
                payload += [kernel[:before, :after], bias[:after]]
        return payload

    def logits(server: PfedhrServer, client: Any, row: Array, features: Array) -> Array:
        del server, row
        return activations(chain, client, features)[-1]

    return Built(
        algorithm,
        server,
        clients,
        logits,
        # The teacher's forward pass counts as one of a full header.
        own_flops(problem) + header.flops(),
        down,
        up,
        down_bytes=lambda metrics: 4 * metrics["down_floats"].astype(np.int64).sum(axis=0),
    )


def header_chain(problem: Problem, masks: Params) -> Chain:
    """The headers of a problem as chains of three layers.

    Args:
      problem: of the comparison.
      masks: of its clients' headers, leaves [C, ...].
    """
    count = problem.num_clients
    units = [problem.header.units(float(c)) for c in problem.capacities]
    sizes = [
        sum(np.asarray(leaf).reshape(count, -1).sum(axis=1) for leaf in jax.tree.leaves(layer))
        for layer in _layers(masks)
    ]

    def hidden(layer: Params, inputs: Array) -> Array:
        return jax.nn.relu(dense(layer, inputs))

    return Chain(
        (hidden, hidden, dense),
        (0, 0, 1),
        np.stack([units, units], axis=1),
        np.stack(sizes, axis=1).astype(int),
    )


def _layers(params: Params) -> tuple[Params, ...]:
    return tuple(params[name] for name in NAMES)


METHOD = Method(
    "pfedhr",
    "pFedHR",
    "Each client distils from a header that is put together of all clients' layers.",
    build,
    needs_public=True,
)
