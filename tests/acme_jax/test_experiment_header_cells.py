"""Searches of cells: what they propose, and that they cost the same."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acme_jax import header
from acme_jax.config import HeaderConfig
from acme_jax.experiments import cell_contest, cell_searchers
from acme_jax.experiments.study import EdgeData
from acme_jax.header_layout import HeaderDims
from nas import cells
from nas.cells import OPS, Cell, CellSpace

DIMS = HeaderDims(2, 3, 5, 4, 7, 2, 1)
SPACE = CellSpace(2)


def test_a_mutation_changes_one_gene_to_any_other_value():
    cell = cells.from_static(((0, 0, 1, 3), (2, 4, 0, 5)))
    keys = jax.random.split(jax.random.key(0), 2000)
    changed = jax.vmap(lambda key: cell_searchers.mutate(key, cell))(keys)
    assert np.asarray(jax.vmap(cells.is_valid)(changed)).all()
    before = np.concatenate([np.ravel(cell.inputs), np.ravel(cell.ops)])
    after = np.concatenate(
        [np.asarray(genes).reshape(2000, -1) for genes in (changed.inputs, changed.ops)], axis=1
    )
    assert ((after != before).sum(axis=1) == 1).all()
    alternatives = [1, 1, 2, 2] + [len(OPS) - 1] * 4
    assert [len(set(column) - {old}) for column, old in zip(after.T, before, strict=True)] == (
        alternatives
    )


CONFIG = HeaderConfig(search_epochs=6, controller_steps=6, num_candidates=5, batch_size=8)
COUNT = cell_contest.num_rewards(CONFIG)
FACTORIES = {
    "controller": cell_searchers.policy_gradient(SPACE, COUNT, CONFIG.num_candidates),
    "random": cell_searchers.random(SPACE, COUNT),
    "evolution": cell_searchers.aging_evolution(SPACE, COUNT),
}


def identities(cell):
    """A reward without noise: how many operations are the identity."""
    return (cell.ops == OPS.index("identity")).sum().astype(jnp.float32)


@pytest.mark.parametrize("searcher", cell_contest.SEARCHERS)
def test_searches_reward_equally_many_cells(searcher):
    calls = []

    def reward(key, cell):
        del key
        jax.debug.callback(lambda ops: calls.append(ops), cell.ops, ordered=True)
        return identities(cell)

    found = jax.jit(lambda key: FACTORIES[searcher](key, reward))(jax.random.key(1))
    jax.effects_barrier()
    assert COUNT == 36 and len(calls) == COUNT
    np.testing.assert_array_equal(np.stack(calls), found.cells.ops)
    expected = (np.asarray(found.cells.ops) == OPS.index("identity")).sum((1, 2))
    np.testing.assert_array_equal(found.rewards, expected)
    assert np.asarray(jax.vmap(cells.is_valid)(found.cells)).all()
    assert len(cell_searchers.candidates(found.proposals, 5)) == 5


def test_evolution_learns_and_lets_the_old_die():
    keys = jax.random.split(jax.random.key(2), 8)
    reward = lambda key, cell: identities(cell)  # noqa: E731
    found = jax.jit(jax.vmap(lambda key: FACTORIES["evolution"](key, reward)))(keys)
    rewards = np.asarray(found.rewards)
    assert rewards[:, -6:].mean() > rewards[:, :6].mean() + 1.0
    best = np.asarray(identities(jax.tree.map(lambda genes: genes[0, 0], found.proposals)))
    assert best == rewards[0].max()
    # Every child differs by one gene from one of the six latest cells.
    genes = np.concatenate([np.asarray(part).reshape(8, 36, -1) for part in found.cells], axis=2)
    for run, born in itertools.product(range(8), range(6, 36)):
        living = genes[run, born - 6 : born]
        assert ((living != genes[run, born]).sum(1) == 1).any()


def test_the_contest_counts_equal_cost_and_ranks_on_the_whole_select_split(monkeypatch):
    """With a made-up header, whose every call is counted."""
    rng, calls = np.random.default_rng(0), []
    tokens = jnp.asarray(rng.normal(size=(30, 6, 5)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 7, 30), jnp.int32)
    data = EdgeData(tokens, labels, tokens[:9], labels[:9])

    def logits_of(table, cell, features):
        chosen = cell.inputs.sum() + 3 * cell.ops.sum()
        return features.sum(axis=1) @ table[chosen % table.shape[0]]

    def apply_shared(params, cell, dims, features):
        del dims
        jax.debug.callback(lambda: calls.append(features.shape[0]))
        return logits_of(params["table"], cell, features)

    monkeypatch.setattr(header, "apply_shared", apply_shared)
    table = rng.normal(size=(11, 5, 7)).astype(np.float32)
    select = np.asarray(data.select_tokens), np.asarray(data.select_labels)
    for searcher in cell_contest.SEARCHERS:
        calls.clear()
        found = cell_contest.search(
            jax.random.key(5), searcher, {"table": table}, data, DIMS, CONFIG
        )
        jax.effects_barrier()
        assert collections.Counter(calls) == {8: 36, 9: 5}
        assert (found.num_rewards, found.num_ranked) == (36, 5)
        assert 0.0 <= found.late_reward <= 1.0
        cell = Cell(*(np.asarray(part) for part in cells.from_static(found.cell)))
        hits = logits_of(table, cell, select[0]).argmax(-1) == select[1]
        assert found.shared_accuracy == pytest.approx(hits.mean())
