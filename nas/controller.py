"""An LSTM policy over cells, trained with REINFORCE (ENAS, Pham et al. 2018; ACME, ICDCS 2025).

The policy writes a cell block by block: two inputs by attention over the earlier nodes, then
two operations. All logits pass through a bounded tanh, so it can never collapse: the
probability of an operation stays below 0.413 (the first two) or 0.277 (the others). The answer
of a search must therefore come from sampling cells and evaluating them.

Deviation from ENAS: the baseline starts at the first reward instead of zero, which would make
the first few hundred advantages all positive.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from nas.cells import OPS, Cell, CellSpace

TEMPERATURE = 5.0
INPUT_TANH = 1.10
OP_TANH = INPUT_TANH / 2.5
OP_BIAS = (10.0, 10.0, 0.0, 0.0, 0.0, 0.0)
"""Initial value of the learnable operation bias."""
OP_OFFSET = (0.25, 0.25, -0.25, -0.25, -0.25, -0.25)
"""Fixed offset of the operation logits, outside the tanh."""

_ABSENT = -1e9  # logit of a node that does not exist yet; finite, so that 0 * log 0 stays 0

Params = dict[str, jax.Array]


class ControllerState(NamedTuple):
    """Everything the next REINFORCE update needs."""

    params: Params
    opt_state: Any
    baseline: jax.Array  # [] moving average of the rewards
    step: jax.Array  # [] int32, updates made


class ControllerInfo(NamedTuple):
    """Diagnostics of one update."""

    loss: jax.Array  # []
    advantage: jax.Array  # [] reward minus baseline
    log_prob: jax.Array  # [] of the rewarded cell, before the update
    entropy: jax.Array  # [] nats, summed over the cell's draws


class Controller(NamedTuple):
    """A REINFORCE learner as pure functions; close over it, never pass it through jit."""

    init: Callable[[jax.Array], ControllerState]
    sample: Callable[[jax.Array, ControllerState], Cell]
    update: Callable[[ControllerState, Cell, jax.Array], tuple[ControllerState, ControllerInfo]]


class _Memory(NamedTuple):
    """LSTM state and the nodes written so far; Z = hidden units."""

    hidden: jax.Array  # [Z]
    cell: jax.Array  # [Z]
    anchors: jax.Array  # [B + 2, Z] LSTM input after a node was drawn
    keys: jax.Array  # [B + 2, Z] attention keys of the nodes


def init_params(key: jax.Array, *, hidden_size: int = 100) -> Params:
    """Draws the policy's weights from U(-0.1, 0.1) (ENAS); Z = `hidden_size` units."""
    shapes = {
        "embedding": (len(OPS) + 1, hidden_size),  # start token, then one row an operation
        "lstm_input": (hidden_size, 4 * hidden_size),
        "lstm_hidden": (hidden_size, 4 * hidden_size),
        "lstm_bias": (4 * hidden_size,),
        "attention_key": (hidden_size, hidden_size),
        "attention_query": (hidden_size, hidden_size),
        "attention_vector": (hidden_size,),
        "op_kernel": (hidden_size, len(OPS)),
    }
    sizes = [math.prod(shape) for shape in shapes.values()]
    # one draw for all, because each shape's generator would be compiled anew
    flat = jax.random.uniform(key, (sum(sizes),), minval=-0.1, maxval=0.1)
    pieces = jnp.split(flat, list(itertools.accumulate(sizes))[:-1])
    params = {
        name: piece.reshape(shape)
        for piece, (name, shape) in zip(pieces, shapes.items(), strict=True)
    }
    return {**params, "op_bias": jnp.asarray(OP_BIAS)}


def sample(key: jax.Array, params: Params, space: CellSpace) -> tuple[Cell, jax.Array, jax.Array]:
    """Draws one cell from the policy.

    Returns:
      The cell, its log-probability [] and the entropy [] (nats) summed over its draws.
    """
    # Gumbel-max with all noise drawn at once: one generator in the compiled program, not four
    noise = jax.random.gumbel(key, (space.num_blocks, 4, max(space.num_nodes, len(OPS))))
    return _write(params, space, noise, lambda source, logits: (source + logits).argmax())


def log_prob(params: Params, cell: Cell) -> jax.Array:
    """Log-probability [] that `sample` draws `cell`; differentiable in `params`."""
    return _replay(params, cell)[0]


def reinforce(
    space: CellSpace,
    *,
    hidden_size: int = 100,
    learning_rate: float = 2.5e-3,
    baseline_rate: float = 0.01,
    entropy_weight: float = 1e-4,
) -> Controller:
    """A REINFORCE learner with a moving-average baseline (defaults of ENAS and ACME).

    `update(state, cell, reward)` expects a cell that `sample` drew with the same state. The
    entropy bonus is a constant for the gradient, as in ENAS: it only shifts the reward.
    """
    optimizer = optax.adam(learning_rate, b1=0.1, b2=0.999, eps=1e-3)

    def init(key: jax.Array) -> ControllerState:
        params = init_params(key, hidden_size=hidden_size)
        return ControllerState(
            params, optimizer.init(params), jnp.zeros(()), jnp.zeros((), jnp.int32)
        )

    def draw(key: jax.Array, state: ControllerState) -> Cell:
        return sample(key, state.params, space)[0]

    def update(
        state: ControllerState, cell: Cell, reward: jax.Array
    ) -> tuple[ControllerState, ControllerInfo]:
        def loss_of(params: Params) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            log_probability, entropy = _replay(params, cell)
            total = reward + entropy_weight * lax.stop_gradient(entropy)
            start = jnp.where(state.step == 0, total, state.baseline)
            baseline = start - baseline_rate * (start - total)
            advantage = total - baseline
            return -log_probability * advantage, (baseline, advantage, log_probability, entropy)

        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        baseline, advantage, log_probability, entropy = aux
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return (
            ControllerState(params, opt_state, baseline, state.step + 1),
            ControllerInfo(loss, advantage, log_probability, entropy),
        )

    return Controller(init, draw, update)


def _replay(params: Params, cell: Cell) -> tuple[jax.Array, jax.Array]:
    choices = jnp.concatenate([cell.inputs, cell.ops], axis=-1)  # [B, 4]
    space = CellSpace(cell.inputs.shape[-2])
    _, log_probability, entropy = _write(params, space, choices, lambda choice, _: choice)
    return log_probability, entropy


def _write(
    params: Params,
    space: CellSpace,
    sources: jax.Array,
    pick: Callable[[jax.Array, jax.Array], jax.Array],
) -> tuple[Cell, jax.Array, jax.Array]:
    """Writes a cell; `pick(source, logits)` makes each draw from `sources` [B, 4, ...].

    One scan over all LSTM steps, each of one of three kinds, so that the program stays small:
    a step that ends a node (kind 0, storing its key), a draw of an input (1) or of an
    operation (2).
    """
    hidden_size, num_blocks = params["lstm_hidden"].shape[0], space.num_blocks
    width = max(space.num_nodes, len(OPS))  # both kinds of logits are padded to it
    start = params["embedding"][0]
    kinds = jnp.asarray([0, 0] + [1, 1, 2, 2, 0] * num_blocks)
    nodes = jnp.asarray([0, 1] + [b + 2 for b in range(num_blocks) for _ in range(5)])
    padded = jnp.concatenate([sources, sources[:, :1]], axis=1)  # the node step ignores its own
    flat = padded.reshape(5 * num_blocks, *sources.shape[2:])
    steps = (kinds, nodes, jnp.concatenate([flat[:1], flat[:1], flat]))

    def step(carry: tuple[_Memory, jax.Array], xs: Any) -> tuple[Any, Any]:
        (memory, token), (kind, node, source) = carry, xs
        memory = _lstm(params, memory, token)
        by_input = _widen(_input_logits(params, memory, node), width)
        logits = jnp.where(kind == 1, by_input, _widen(_op_logits(params, memory), width))
        choice = pick(source, logits)
        log_probs = jax.nn.log_softmax(logits)
        drawn = jnp.where(kind > 0, 1.0, 0.0)

        ends = jnp.where(kind == 0, 1.0, 0.0)
        here = ends * jax.nn.one_hot(node, space.num_nodes)
        anchor = memory.hidden * (node >= 2)  # the cell's inputs keep zero anchors (ENAS)
        memory = memory._replace(
            anchors=memory.anchors + here[:, None] * anchor[None],
            keys=memory.keys + here[:, None] * (memory.hidden @ params["attention_key"])[None],
        )
        after_input = memory.anchors[jnp.minimum(choice, space.num_nodes - 1)]
        after_op = params["embedding"][jnp.minimum(choice, len(OPS) - 1) + 1]
        token = jnp.where(kind == 1, after_input, jnp.where(kind == 2, after_op, start))
        entropy = -(jnp.exp(log_probs) * log_probs).sum()
        return (memory, token), (choice, drawn * log_probs[choice], drawn * entropy)

    blank, table = jnp.zeros(hidden_size), jnp.zeros((space.num_nodes, hidden_size))
    memory = _Memory(blank, blank, table, table)
    _, (choices, totals, entropies) = lax.scan(step, (memory, start), steps)
    genes = choices[2:].reshape(num_blocks, 5).astype(jnp.int32)
    return Cell(genes[:, :2], genes[:, 2:4]), totals.sum(), entropies.sum()


def _lstm(params: Params, memory: _Memory, token: jax.Array) -> _Memory:
    gates = (
        token @ params["lstm_input"] + memory.hidden @ params["lstm_hidden"] + params["lstm_bias"]
    )
    enter, forget, leave, value = jnp.split(gates, 4)
    cell = jax.nn.sigmoid(forget) * memory.cell + jax.nn.sigmoid(enter) * jnp.tanh(value)
    return memory._replace(hidden=jax.nn.sigmoid(leave) * jnp.tanh(cell), cell=cell)


def _input_logits(params: Params, memory: _Memory, num_nodes: jax.Array) -> jax.Array:
    """Logits [B + 2] of the nodes to read; only the first `num_nodes` exist."""
    query = memory.hidden @ params["attention_query"]
    scores = jnp.tanh(memory.keys + query[None]) @ params["attention_vector"]
    logits = INPUT_TANH * jnp.tanh(scores / TEMPERATURE)
    return jnp.where(jnp.arange(logits.shape[0]) < num_nodes, logits, _ABSENT)


def _op_logits(params: Params, memory: _Memory) -> jax.Array:
    """Logits [6] of the operations."""
    scores = memory.hidden @ params["op_kernel"] + params["op_bias"]
    return OP_TANH * jnp.tanh(scores / TEMPERATURE) + jnp.asarray(OP_OFFSET)


def _widen(logits: jax.Array, width: int) -> jax.Array:
    return jnp.pad(logits, (0, width - logits.shape[0]), constant_values=_ABSENT)
