"""Random search and plain evolution: what they ask for and who survives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas import arch, controls

TIED = arch.ArchSpace.from_fractions(8, 4, 64, per_layer=False)
SPACE = arch.ArchSpace.from_fractions(6, 4, 64)


def _told(*index):
    return jax.tree.map(lambda leaf: leaf[jnp.array(index)], arch.grid(TIED))


def _rows(population):
    leaves = jax.tree.leaves(population)
    size = leaves[0].shape[0]
    return np.concatenate([np.asarray(leaf).reshape(size, -1) for leaf in leaves], axis=1)


def test_tchebycheff_matches_a_plain_loop():
    rng = np.random.default_rng(0)
    objectives = rng.uniform(-3, 9, (12, 3))
    weights = rng.dirichlet(np.ones(3), 5)
    feasible = rng.random(12) < 0.7
    scores = controls.tchebycheff(
        jnp.asarray(objectives, jnp.float32), jnp.asarray(feasible), jnp.asarray(weights)
    )
    low, high = objectives[feasible].min(axis=0), objectives[feasible].max(axis=0)
    for i, row in enumerate((objectives - low) / (high - low)):
        for j, weight in enumerate(weights):
            expected = (weight * row).max() + 0.05 * (weight * row).sum()
            expected = expected if feasible[i] else np.inf
            np.testing.assert_allclose(scores[i, j], expected, rtol=1e-5, atol=1e-6)


def test_evolution_keeps_the_best_of_every_weight_distinct_genomes_and_the_feasible():
    made = controls.evolution(TIED, population_size=6, archive_capacity=8)
    tell = jax.jit(made.tell)
    state = jax.jit(lambda key: made.init(key, 2, jnp.array([10.0, 10.0])))(jax.random.key(0))
    values = jnp.array([[1, 5], [1, 5], [5, 1], [jnp.nan, 0], [-jnp.inf, 0], [0, 0.0]])
    state, info = tell(state, _told(0, 0, 1, 2, 3, 4), values, jnp.array([0.0, 0, 0, 0, 0, 1]))
    # (0, 0) is infeasible and NaN, infinity and the repeated genome come behind it.
    np.testing.assert_array_equal(np.sort(state.objectives[:2, 0]), [1, 5])
    np.testing.assert_array_equal(state.violation[:3], [0, 0, 1])
    np.testing.assert_array_equal(info.rank, [0, 0, 1, 2, 2, 2])
    values = jnp.array([[3, 3], [6, 6], [7, 7], [8, 8], [9, 9], [2, 4.0]])
    state, info = tell(state, _told(5, 6, 7, 8, 9, 10), values, jnp.zeros(6))
    np.testing.assert_array_equal(np.sort(state.objectives[:, 0]), [1, 2, 3, 5, 6, 7])
    assert len(np.unique(_rows(state.population), axis=0)) == 6
    assert np.all(np.diff(info.rank) >= 0)


def test_evolution_survives_all_infeasible_generations_by_violation():
    made = controls.evolution(TIED, population_size=4, archive_capacity=8)
    state = made.init(jax.random.key(0), 2)
    values = jnp.array([[1, 1], [2, 2], [3, 3], [4, 4.0]])
    state, _ = jax.jit(made.tell)(state, _told(0, 1, 2, 3), values, jnp.array([4.0, 1, 3, 2]))
    np.testing.assert_array_equal(state.violation, [1, 2, 3, 4])
    assert not np.asarray(state.archive.valid).any()


@pytest.mark.parametrize("factory", [controls.evolution, controls.random_search])
def test_the_first_question_is_the_initial_population(factory):
    initial = jax.tree.map(lambda leaf: leaf[:5], arch.grid(SPACE))
    made = factory(SPACE, population_size=8, initial=initial)
    state = made.init(jax.random.key(0), 2)
    asked = jax.jit(made.ask)(jax.random.key(1), state)
    np.testing.assert_array_equal(_rows(asked), _rows(state.population))
    np.testing.assert_array_equal(_rows(asked)[:5], _rows(initial))


def test_random_search_asks_whatever_it_was_told():
    """Later questions depend on the key alone, and are no copies of the population."""
    made = controls.random_search(SPACE, population_size=8)
    state = made.init(jax.random.key(0), 2)
    ask = jax.jit(made.ask)
    later = state._replace(generation=jnp.int32(3))
    other = later._replace(population=arch.sample(jax.random.key(5), SPACE, 8))
    first = _rows(ask(jax.random.key(1), later))
    np.testing.assert_array_equal(first, _rows(ask(jax.random.key(1), other)))
    assert np.any(first != _rows(ask(jax.random.key(2), later)))
    assert np.any(first != _rows(later.population))


def test_evolution_asks_for_relatives_of_its_population():
    """Without mutation or crossover, children are members, drawn without preference."""
    made = controls.evolution(
        SPACE, population_size=8, mutation_rate=0.0, crossover_rate=0.0, num_retries=0
    )
    state = made.init(jax.random.key(0), 2)._replace(generation=jnp.int32(1))
    members = _rows(state.population)
    keys = jax.random.split(jax.random.key(1), 100)
    asked = jax.jit(jax.vmap(lambda key: made.ask(key, state)))(keys)
    asked = _rows(jax.tree.map(lambda leaf: leaf.reshape(800, *leaf.shape[2:]), asked))
    counts = (asked[:, None] == members[None]).all(axis=2).sum(axis=0)
    assert counts.sum() == 800  # members are distinct
    assert counts.min() > 50 and counts.max() < 160  # 100 each; tournaments by order: 23 to 177


@pytest.mark.parametrize("factory", [controls.evolution, controls.random_search])
def test_bad_settings_are_refused(factory):
    with pytest.raises(ValueError, match="population_size"):
        factory(SPACE, population_size=1)
    with pytest.raises(ValueError, match="archive_capacity"):
        factory(SPACE, population_size=4, archive_capacity=-1)
    with pytest.raises(ValueError, match="fit"):
        factory(SPACE, population_size=2, initial=arch.grid(SPACE))
