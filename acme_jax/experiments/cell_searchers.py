"""Three ways to search cells by noisy rewards: random sampling, aging evolution, the controller.

All spend the same: `num_rewards` cells are rewarded on one batch each, and `num_candidates`
different cells are then proposed for an evaluation on the whole select split. Every search is one
`lax.scan` over its rewards, so a cell's reward can depend on all earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from nas import cells, controller
from nas.cells import OPS, Cell, CellSpace, StaticCell

Reward = Callable[[Array, Cell], Array]
"""(key, cell) -> reward [] of one batch; traceable."""

POPULATION_PART = 1 / 6
"""Of the rewards: the population of aging evolution, which begins as random cells."""
TOURNAMENT_PART = 1 / 4
"""Of the population: the cells that a parent is the best of (Real et al. 2019: 25 of 100)."""
OVERSAMPLING = 4
"""Cells that the trained controller draws for each candidate, because it repeats itself."""


class Search(NamedTuple):
    """What a search did."""

    cells: Cell  # [num_rewards], in the order of their rewards
    rewards: Array  # [num_rewards]
    proposals: Cell  # cells for the evaluation on the select split, best first


Searcher = Callable[[Array, Reward], Search]
"""(key, reward) -> what was found; traceable."""


def random(space: CellSpace, num_rewards: int) -> Searcher:
    """Uniform cells; the best by their one reward are proposed."""

    def search(key: Array, reward: Reward) -> Search:
        def step(_: None, key: Array) -> tuple[None, tuple[Cell, Array]]:
            cell_key, reward_key = jax.random.split(key)
            cell = cells.sample(cell_key, space)
            return None, (cell, reward(reward_key, cell))

        _, (seen, rewards) = lax.scan(step, None, jax.random.split(key, num_rewards))
        return Search(seen, rewards, _best_first(seen, rewards))

    return search


def aging_evolution(space: CellSpace, num_rewards: int) -> Searcher:
    """Regularised evolution (Real et al., AAAI 2019) by mutations of one gene.

    The population is the latest `POPULATION_PART` of the rewarded cells: each child of the
    best of a tournament replaces the oldest cell, so that a lucky reward does not last. The best
    of all rewarded cells are proposed.
    """
    population = max(2, round(POPULATION_PART * num_rewards))
    tournament = max(2, round(TOURNAMENT_PART * population))

    def search(key: Array, reward: Reward) -> Search:
        random_key, evolve_key = jax.random.split(key)
        first = random(space, population)(random_key, reward)

        def step(living: tuple[Cell, Array], key: Array) -> tuple[Any, tuple[Cell, Array]]:
            entrant_key, mutate_key, reward_key = jax.random.split(key, 3)
            entrants = jax.random.choice(entrant_key, population, (tournament,), replace=False)
            parent = entrants[jnp.argmax(living[1][entrants])]
            cell = mutate(mutate_key, jax.tree.map(lambda genes: genes[parent], living[0]))
            born = (cell, reward(reward_key, cell))
            living = jax.tree.map(
                lambda old, new: jnp.concatenate([old[1:], new[None]]), living, born
            )
            return living, born

        keys = jax.random.split(evolve_key, num_rewards - population)
        _, later = lax.scan(step, (first.cells, first.rewards), keys)
        seen, rewards = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b]), (first.cells, first.rewards), later
        )
        return Search(seen, rewards, _best_first(seen, rewards))

    return search


def policy_gradient(space: CellSpace, num_rewards: int, num_candidates: int) -> Searcher:
    """The LSTM controller with REINFORCE; the trained policy draws the proposals, as in ENAS."""
    policy = controller.reinforce(space)

    def search(key: Array, reward: Reward) -> Search:
        init_key, train_key, draw_key = jax.random.split(key, 3)

        def step(state: Any, key: Array) -> tuple[Any, tuple[Cell, Array]]:
            cell_key, reward_key = jax.random.split(key)
            cell = policy.sample(cell_key, state)
            found = reward(reward_key, cell)
            return policy.update(state, cell, found)[0], (cell, found)

        keys = jax.random.split(train_key, num_rewards)
        state, (seen, rewards) = lax.scan(step, policy.init(init_key), keys)
        draws = jax.random.split(draw_key, OVERSAMPLING * num_candidates)
        return Search(seen, rewards, jax.vmap(policy.sample, in_axes=(0, None))(draws, state))

    return search


def mutate(key: Array, cell: Cell) -> Cell:
    """Another cell: one gene, drawn uniformly, gets another value, drawn uniformly."""
    gene_key, value_key = jax.random.split(key)
    num_inputs = jnp.broadcast_to(
        jnp.arange(2, 2 + cell.inputs.shape[0])[:, None], cell.inputs.shape
    ).reshape(-1)
    sizes = jnp.concatenate([num_inputs, jnp.full(cell.ops.size, len(OPS))])
    genes = jnp.concatenate([cell.inputs.reshape(-1), cell.ops.reshape(-1)])
    gene = jax.random.randint(gene_key, (), 0, genes.size)
    # Adding 1 to size - 1 modulo the size reaches every other value once.
    shift = jax.random.randint(value_key, (), 1, sizes[gene])
    genes = genes.at[gene].set((genes[gene] + shift) % sizes[gene])
    inputs, ops = jnp.split(genes, 2)
    return Cell(inputs.reshape(cell.inputs.shape), ops.reshape(cell.ops.shape))


def candidates(proposals: Cell, count: int) -> list[StaticCell]:
    """The first `count` different proposals; fewer when there are fewer."""
    genomes = (
        cells.to_static(Cell(inputs, ops))
        for inputs, ops in zip(np.asarray(proposals.inputs), np.asarray(proposals.ops), strict=True)
    )
    return list(dict.fromkeys(genomes))[:count]


def _best_first(seen: Cell, rewards: Array) -> Cell:
    order = jnp.argsort(-rewards)
    return jax.tree.map(lambda genes: genes[order], seen)
