"""FedDH: aggregation weights that learn how much a client's label skew should count.

The first part of FedDHAD (arXiv 2507.10430). Client k of n_k samples and degree of skew d_k
(`fed.label_skew.skew_degree`) counts with

    q_k = n_k / (lambda_k d_k + b_k + epsilon),    w+ = sum_k q_k w_k / sum_k q_k,

and each round the server moves lambda and b of the clients it heard down the gradient of the
loss through w+. The pure functions work on any trees with a leading client axis, importance sets
too. Arrays [K] belong to the clients heard in a round, arrays [C] to all.

Deviations: d_k, lambda_k and b_k belong to the client, not to its place among the sampled (the
published code confuses them); epsilon, 0 in the paper, keeps a client with d_k = b_k = 0 finite;
the rate decays by `decay` once a round, where the code's exponents compound; no update is
discarded for its loss. With lambda = 1 and b = 0, where the paper starts, a client counts in
inverse proportion to its skew, so nearly unskewed ones can take almost all the weight.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from fed.aggregate import weighted_mean
from fed.algorithm import FedAlgorithm
from fed.algorithms.local_sgd import LossFn, SgdState, make_step, start
from fed.clients import Batch

Scaling = Literal["min_max", "signed"]


class SkewWeights(NamedTuple):
    """What is learned about every client; not negative."""

    scale: jax.Array  # [C] lambda
    offset: jax.Array  # [C] b


class ServerState(NamedTuple):
    """The server's model and what it has learned of the clients."""

    params: Any
    learned: SkewWeights
    skew: jax.Array  # [C] d
    num_updates: jax.Array  # [] int32, the rounds from which something arrived


class Update(NamedTuple):
    """What a client sends."""

    params: Any
    num_steps: jax.Array  # [] float32, of this round


class _Client(NamedTuple):
    sgd: SgdState
    num_steps: jax.Array


def initial_weights(num_clients: int) -> SkewWeights:
    """The paper's start: lambda = 1, b = 0."""
    return SkewWeights(jnp.ones(num_clients), jnp.zeros(num_clients))


def aggregation_weights(
    sizes: jax.Array, skew: jax.Array, learned: SkewWeights, *, epsilon: float = 1e-3
) -> jax.Array:
    """How much each client counts: q_k / sum q, [K].

    Where lambda_k d_k + b_k is the same for all, these are FedAvg's n_k / n.

    Args:
      sizes: [K] n_k, 0: does not count; with a positive sum (otherwise the result is NaN).
      skew: [K] d_k in [0, 1].
      learned: leaves [K].
      epsilon: added to the denominators.
    """
    quotients = sizes / (learned.scale * skew + learned.offset + epsilon)
    return quotients / jnp.sum(quotients)


def aggregate(
    sizes: jax.Array, skew: jax.Array, learned: SkewWeights, tree: Any, *, epsilon: float = 1e-3
) -> Any:
    """w+ = sum_k q_k w_k / sum_k q_k of leaves [K, ...]; see `aggregation_weights`."""
    return weighted_mean(aggregation_weights(sizes, skew, learned, epsilon=epsilon), tree)


def weight_gradients(
    sizes: jax.Array,
    skew: jax.Array,
    learned: SkewWeights,
    tree: Any,
    gradient: Any,
    *,
    epsilon: float = 1e-3,
) -> SkewWeights:
    """Derivatives of the loss by lambda and b through w+, leaves [K].

    The vector-Jacobian product of `aggregate` with the loss's gradient g at w+, which is

        dL/dlambda_k = -(q_k d_k / (lambda_k d_k + b_k + epsilon)) <w_k - w+, g> / sum q

    and without d_k for b. Only the K weights are differentiated: <w_k, g> is the derivative by
    client k's weight. A constant does not count there, since weights sum to 1, so models are
    compared with one of them: their differences are small, and exact in float32.

    Args:
      sizes: [K].
      skew: [K].
      learned: leaves [K].
      tree: leaves [K, ...], what is aggregated.
      gradient: leaves [...], g.
      epsilon: as in `aggregation_weights`.
    """

    def weights_of(learned: SkewWeights) -> jax.Array:
        return aggregation_weights(sizes, skew, learned, epsilon=epsilon)

    weights, pull_back = jax.vjp(weights_of, learned)
    largest = jnp.argmax(sizes)

    def inner(leaf: jax.Array, slope: jax.Array) -> jax.Array:
        gap = (leaf - leaf[largest][None]).astype(weights.dtype).reshape(leaf.shape[0], -1)
        return jnp.matmul(gap, slope.astype(weights.dtype).reshape(-1), precision="highest")

    products = jax.tree.leaves(jax.tree.map(inner, tree, gradient))
    (gradients,) = pull_back(sum(products))
    return gradients


def descend(
    learned: SkewWeights,
    gradients: SkewWeights,
    heard: jax.Array,
    rates: SkewWeights,
    *,
    scaling: Scaling = "min_max",
) -> SkewWeights:
    """lambda_k <- |lambda_k - rate * s_k| with the gradients scaled to s; b likewise.

    `"min_max"` maps the gradients of the clients heard to [0, 1], as the paper does: every step is
    down until it is reflected at 0, and the largest gradient falls fastest. `"signed"` divides by
    the largest magnitude, so a step goes where the loss falls. Equal gradients are no reason to
    move in the first, zero ones in the second.

    Args:
      learned: leaves [C].
      gradients: leaves [C].
      heard: bool [C]; the others stay as they are.
      rates: leaves [], step sizes of lambda and b.
      scaling: see above.

    Raises:
      ValueError: an unknown scaling.
    """
    if scaling not in get_args(Scaling):
        raise ValueError(f"unknown scaling {scaling!r}; expected one of {get_args(Scaling)}")

    def move(value: jax.Array, gradient: jax.Array, rate: jax.Array) -> jax.Array:
        if scaling == "min_max":
            low = jnp.min(jnp.where(heard, gradient, jnp.inf))
            span = jnp.max(jnp.where(heard, gradient, -jnp.inf)) - low
            step = jnp.where(span > 0, gradient - low, 0)
        else:
            span = jnp.max(jnp.where(heard, jnp.abs(gradient), 0))
            step = gradient
        step = step / jnp.where(span > 0, span, 1)
        return jnp.where(heard, jnp.abs(value - rate * step), value)

    return SkewWeights(*map(move, learned, gradients, rates))


def feddh(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    scale_rate: float = 0.01,
    offset_rate: float = 0.01,
    decay: float = 0.99,
    scaling: Scaling = "min_max",
    epsilon: float = 1e-3,
) -> FedAlgorithm:
    """FedAvg's local training, FedDH's aggregation.

    `server_init` takes the parameters and the clients' degrees of skew [C]. The loss's gradient
    is estimated by what clients send anyway: g = sum_k (n_k / n) (w - w_k) / steps_k over those
    heard; the learning rate does not matter, since gradients by lambda and b are scaled. A late
    update is measured against the current w.

    Args:
      loss_fn: (params, batch, key) -> (loss, metrics); weighs samples by `batch.weight`.
      optimizer: the clients' optimiser.
      scale_rate: eta of lambda; the paper uses 1e-4 to 0.1.
      offset_rate: eta of b.
      decay: factor on both rates after each round.
      scaling: see `descend`.
      epsilon: see `aggregation_weights`.

    Raises:
      ValueError: an unknown scaling, or an epsilon that is not positive.
    """
    if scaling not in get_args(Scaling):
        raise ValueError(f"unknown scaling {scaling!r}; expected one of {get_args(Scaling)}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}; without it d = b = 0 divides")
    step = make_step(loss_fn, optimizer)

    def server_init(params: Any, skew: jax.Array) -> ServerState:
        skew = jnp.asarray(skew, jnp.float32)
        return ServerState(params, initial_weights(skew.shape[0]), skew, jnp.int32(0))

    def client_init(message: Any, client_state: tuple[()], key: jax.Array) -> _Client:
        del client_state
        return _Client(start(message, optimizer, key), jnp.float32(0))

    def client_step(state: _Client, batch: Batch) -> tuple[_Client, Any]:
        sgd, metrics = step(state.sgd, batch)
        return _Client(sgd, state.num_steps + 1), metrics

    def server_update(
        state: ServerState, updates: Update, weights: jax.Array, rows: jax.Array
    ) -> tuple[ServerState, dict[str, jax.Array]]:
        skew, own = state.skew[rows], SkewWeights(*(leaf[rows] for leaf in state.learned))
        params = aggregate(weights, skew, own, updates.params, epsilon=epsilon)
        gradient = _pseudo_gradient(state.params, updates, weights)
        by_update = weight_gradients(weights, skew, own, updates.params, gradient, epsilon=epsilon)
        nothing = jnp.zeros_like(state.skew)
        gradients = SkewWeights(*(nothing.at[rows].add(leaf) for leaf in by_update))
        heard = nothing.astype(bool).at[rows].max(weights > 0)
        fading = jnp.float32(decay) ** state.num_updates
        rates = SkewWeights(scale_rate * fading, offset_rate * fading)
        learned = descend(state.learned, gradients, heard, rates, scaling=scaling)
        shares = aggregation_weights(weights, skew, own, epsilon=epsilon)
        metrics = {"effective_clients": 1 / jnp.sum(shares**2)}
        return ServerState(params, learned, state.skew, state.num_updates + 1), metrics

    return FedAlgorithm(
        server_init=server_init,
        server_message=lambda state, row: state.params,
        client_init=client_init,
        client_step=client_step,
        client_final=lambda message, state: ((), Update(state.sgd.params, state.num_steps)),
        server_update=server_update,
    )


def _pseudo_gradient(params: Any, updates: Update, weights: jax.Array) -> Any:
    """sum_k (n_k / n) (w - w_k) / steps_k, leaves [...]; the learning rate times the gradient."""
    per_step = weights / jnp.maximum(updates.num_steps, 1)
    mean = weighted_mean(per_step, updates.params)
    share = jnp.sum(per_step) / jnp.sum(weights)
    return jax.tree.map(lambda own, leaf: share * (own - leaf), params, mean)
