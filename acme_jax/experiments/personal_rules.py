"""Variations of the refinement that its mixing weights cannot say, for any rows of one cohort.

`wrap` changes `acme_jax.device.refinement` for `acme_jax.experiments.cohorts`. A row may prune by
random numbers instead of importances (what is importance worth?), prune everything after the
first round instead of a part after every one, and send up its header besides its importances, to
get back the mean that is mixed by the same weights. That is personalised federated averaging,
which ACME does not do: there no weights leave a device. A classifier's bias always stays where it
is: it holds what a device knows of its own classes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from acme_jax import header
from acme_jax.blocks import Params
from acme_jax.experiments.cohorts import Wrap
from acme_jax.header_layout import HeaderDims
from acme_jax.importance_rounds import DeviceState, Downlink, EdgeState, LocalState
from fed.aggregate import personalized_mean
from fed.algorithm import FedAlgorithm
from fed.clients import Batch
from nas.cells import Cell


class Rule(NamedTuple):
    """What is different for the rows of one method; the default is nothing."""

    random: bool = False
    """Importances are drawn uniformly."""
    one_shot: bool = False
    """All gates are pruned by the first set, none by later ones."""
    shares: bool = False
    """The header is averaged over the devices as well, by the weights that mix importances."""


class _EdgeState(NamedTuple):
    edge: EdgeState
    headers: Params  # [K, ...], of the K rows that share


class _Message(NamedTuple):
    down: Downlink
    header: Params
    random: Array  # bool []
    one_shot: Array  # bool []
    shares: Array  # bool []


class _Step(NamedTuple):
    inner: LocalState
    key: Array

    @property
    def device(self) -> DeviceState:
        return self.inner.device


@functools.lru_cache(maxsize=32)
def wrap(rules: tuple[Rule, ...], count: int, dims: HeaderDims, rounds: int) -> Wrap:
    """The change for a cohort of M methods with C devices each; equal arguments share it.

    Args:
      rules: of the methods, in their order.
      count: C.
      dims: of the headers.
      rounds: of the refinement.
    """
    flags = np.repeat(np.asarray(rules), count, axis=0)  # [M * C, fields of Rule]
    shares = flags[:, Rule._fields.index("shares")]
    # One row at least, so that there is always something to index.
    sharing = np.flatnonzero(shares) if shares.any() else np.arange(1)
    place = np.zeros(len(flags), np.int32)
    place[sharing] = np.arange(len(sharing))

    def change(algorithm: FedAlgorithm) -> FedAlgorithm:
        def server_init(weights: Array) -> _EdgeState:
            headers = jax.tree.map(
                lambda leaf: jnp.zeros((len(sharing), *leaf.shape)), _header_shape(dims)
            )
            return _EdgeState(algorithm.server_init(weights), headers)

        def server_message(state: _EdgeState, row: Array) -> _Message:
            sent = jax.tree.map(lambda leaf: leaf[jnp.asarray(place)[row]], state.headers)
            return _Message(
                algorithm.server_message(state.edge, row), sent, *jnp.asarray(flags)[row]
            )

        def client_init(message: _Message, device: DeviceState, key: Array) -> _Step:
            number = message.down.rounds
            params = jax.tree.map(
                lambda sent, own: jnp.where(message.shares & (number > 0), sent, own),
                message.header,
                device.params,
            )
            params["classifier"]["bias"] = device.params["classifier"]["bias"]
            gates = device.prune_per_round
            once = jnp.where(number == 1, gates * rounds, 0)
            started = algorithm.client_init(
                message.down,
                device._replace(
                    params=params, prune_per_round=jnp.where(message.one_shot, once, gates)
                ),
                key,
            )
            kept = started.device._replace(prune_per_round=gates)
            return _Step(started._replace(device=kept), key)

        def client_step(state: _Step, batch: Batch) -> tuple[_Step, Any]:
            inner, metrics = algorithm.client_step(state.inner, batch)
            return state._replace(inner=inner), metrics

        def client_final(message: _Message, state: _Step) -> tuple[DeviceState, Any]:
            device, importance = algorithm.client_final(message.down, state.inner)
            noise = jax.random.uniform(state.key, importance.shape)
            return device, (jnp.where(message.random, noise, importance), device.params)

        def server_update(
            state: _EdgeState, updates: Any, sizes: Array, rows: Array
        ) -> tuple[_EdgeState, dict[str, Array]]:
            importances, headers = updates
            edge, metrics = algorithm.server_update(state.edge, importances, sizes, rows)
            weights = edge.weights[sharing][:, sharing]
            sent = jax.tree.map(lambda leaf: leaf[sharing], headers)
            return _EdgeState(edge, personalized_mean(weights, sent)), metrics

        return FedAlgorithm(
            server_init, server_message, client_init, client_step, client_final, server_update
        )

    return change


def _header_shape(dims: HeaderDims) -> Any:
    """Shapes of a header's weights in the uniform form of `acme_jax.header_slots`."""
    genes = jnp.zeros((dims.blocks, 2), jnp.int32)
    return jax.eval_shape(
        lambda key: header.gather(header.init_shared(key, dims), Cell(genes, genes), dims),
        jax.random.key(0),
    )
