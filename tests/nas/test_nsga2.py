"""NSGA-II and its archive: fronts found, constraints kept, segments and ask/tell identical."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas import arch, archive, cost, genomes, integer, nsga2, pareto

TIED = arch.ArchSpace.from_fractions(8, 4, 64, per_layer=False)
SPACE = arch.ArchSpace.from_fractions(4, 4, 16)
REFERENCE = jnp.array([1.2, 1.2, 1.2])


def _objectives(space, genome):
    """A made-up error with diminishing returns, size and energy, all scaled to about 1."""
    dims = cost.ModelDims(space.num_layers, 16, 4, 4, space.num_neurons, 5, 9)
    depth, heads = genome.depth / space.num_layers, jnp.mean(genome.heads / 4)
    neurons = jnp.mean(genome.neurons / space.num_neurons)
    error = jnp.exp(-2 * depth) + 0.5 * jnp.exp(-3 * heads * neurons)
    size = cost.num_params(dims, genome) / cost.num_params(dims, arch.full(space))
    return jnp.stack([error, size, depth * (0.3 + 0.7 * heads**2)])


def _evaluate(space):
    return jax.vmap(lambda genome: _objectives(space, genome))


def _rows(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


@pytest.fixture(scope="module")
def tied_result():
    searcher = nsga2.nsga2(TIED, population_size=16, archive_capacity=32)
    evaluate = _evaluate(TIED)
    return jax.jit(
        lambda key: nsga2.search(key, searcher, evaluate, num_generations=15, reference=REFERENCE)
    )(jax.random.key(0))


def test_search_finds_the_whole_front_of_the_uniform_grid(tied_result):
    grid = arch.grid(TIED)
    objectives = _evaluate(TIED)(grid)
    front = np.asarray(pareto.non_dominated_rank(objectives)) == 0
    exhaustive = pareto.hypervolume(objectives, REFERENCE)
    np.testing.assert_allclose(tied_result.hypervolume[-1], exhaustive, rtol=1e-6)
    np.testing.assert_allclose(
        pareto.hypervolume(tied_result.archive.objectives, REFERENCE), exhaustive, rtol=1e-6
    )
    found = np.asarray(tied_result.archive.objectives)[np.asarray(tied_result.archive.valid)]
    expected = np.asarray(objectives)[front]
    order, expected_order = np.lexsort(found.T), np.lexsort(expected.T)
    np.testing.assert_allclose(found[order], expected[expected_order], rtol=1e-6)


def test_results_belong_to_their_genomes_and_hypervolume_never_falls(tied_result):
    evaluated = _evaluate(TIED)(tied_result.population)
    np.testing.assert_allclose(tied_result.objectives, evaluated, rtol=1e-6)
    valid = np.asarray(tied_result.archive.valid)
    archived = _evaluate(TIED)(tied_result.archive.genomes)
    np.testing.assert_allclose(
        np.asarray(tied_result.archive.objectives)[valid], np.asarray(archived)[valid], rtol=1e-6
    )
    assert np.all(np.diff(tied_result.hypervolume) >= -1e-6)
    assert int(tied_result.state.generation) == 15


def _constrained(genome):
    objectives = _evaluate(SPACE)(genome)
    return objectives, jnp.maximum(objectives[:, 1] - 0.5, 0.0)


@pytest.fixture(scope="module")
def constrained():
    """A jitted run of a constrained search, its searcher and the result of 8 generations."""
    searcher = nsga2.nsga2(SPACE, population_size=12, archive_capacity=20)
    key = jax.random.key(3)
    state = jax.jit(lambda key: nsga2.init_state(key, searcher, _constrained))(key)
    run = jax.jit(
        lambda state, n: nsga2.run(key, state, searcher, _constrained, num_generations=n),
        static_argnums=1,
    )
    return searcher, key, state, run, run(state, 8)


def test_constraint_is_respected(constrained):
    state, volumes = constrained[-1]
    assert bool(jnp.all(state.violation == 0))
    assert bool(jnp.all(state.objectives[:, 1] <= 0.5))
    valid = np.asarray(state.archive.valid)
    assert valid.any()
    assert np.all(np.asarray(state.archive.objectives)[valid, 1] <= 0.5)
    assert not np.isnan(volumes).any()
    chex.assert_trees_all_equal(
        state.population, jax.vmap(lambda a: arch.canonical(SPACE, a))(state.population)
    )


def test_segments_equal_one_scan_bitwise(constrained):
    _, _, state, run, (whole, volumes) = constrained
    first, first_volumes = run(state, 4)
    resumed = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), first)  # as if from disk
    second, second_volumes = run(resumed, 4)
    chex.assert_trees_all_equal(second, whole)
    np.testing.assert_array_equal(jnp.concatenate([first_volumes, second_volumes]), volumes)


def test_ask_and_tell_outside_equal_the_scan_bitwise(constrained):
    searcher, key, state, _, (whole, volumes) = constrained
    chex.clear_trace_counter()
    ask = jax.jit(chex.assert_max_traces(searcher.ask, n=1))
    tell = jax.jit(chex.assert_max_traces(searcher.tell, n=1))
    evaluate = jax.jit(_constrained)
    history = []
    for generation in range(8):
        children = ask(jax.random.fold_in(key, generation + 1), state)
        state, info = tell(state, children, *evaluate(children))
        history.append(info.hypervolume)
    chex.assert_trees_all_equal(state, whole)
    np.testing.assert_array_equal(jnp.stack(history), volumes)
    assert int(info.num_feasible) == 12
    assert np.all(np.diff(info.rank) >= 0)


@pytest.fixture(scope="module")
def four():
    """The jitted `tell` of a population of four with two objectives, and its first state."""
    searcher = nsga2.nsga2(TIED, population_size=4, archive_capacity=8)
    state = jax.jit(lambda key: searcher.init(key, 2, jnp.array([10.0, 10.0])))(jax.random.key(0))
    return jax.jit(searcher.tell), state


def test_tell_ranks_duplicates_and_nan_last(four):
    """Survivors of hand-made generations: distinct good genomes first."""
    tell, state = four
    grid = arch.grid(TIED)
    told = _rows(grid, jnp.array([0, 0, 1, 2]))
    values = jnp.array([[1.0, 5.0], [1.0, 5.0], [5.0, 1.0], [6.0, 6.0]])
    state, _ = tell(state, told, values, jnp.zeros(4))
    np.testing.assert_array_equal(np.sort(state.objectives[:3, 0]), [1, 5, 6])
    told = _rows(grid, jnp.array([3, 0, 4, 5]))
    values = jnp.array([[2.0, 2.0], [1.0, 5.0], [jnp.nan, 0.0], [7.0, 7.0]])
    state, info = tell(state, told, values, jnp.zeros(4))
    np.testing.assert_array_equal(np.sort(state.objectives[:, 0]), [1, 2, 5, 6])
    np.testing.assert_array_equal(info.rank, [0, 0, 0, 1])
    assert int(state.archive.valid.sum()) == 3


def test_infeasible_rows_survive_by_violation_only(four):
    tell, state = four
    values = jnp.array([[1.0, 1.0], [2.0, 2.0], [9.0, 9.0], [3.0, 3.0]])
    told = _rows(arch.grid(TIED), jnp.arange(4))
    state, info = tell(state, told, values, jnp.array([5.0, 1.0, 0.0, 2.0]))
    np.testing.assert_array_equal(state.violation, [0, 1, 2, 5])
    assert int(info.num_feasible) == 1
    assert int(state.archive.valid.sum()) == 1


def test_initial_genomes_begin_the_first_population():
    grid = arch.grid(SPACE)
    searcher = nsga2.nsga2(SPACE, population_size=20, initial=grid)
    state = jax.jit(lambda key: searcher.init(key, 3))(jax.random.key(0))
    chex.assert_trees_all_equal(_rows(state.population, slice(16)), grid)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"population_size": 1}, "population_size"),
        ({"population_size": 4, "mutation_rate": 1.5}, "mutation_rate"),
        ({"population_size": 4, "archive_capacity": -1}, "archive_capacity"),
        (
            {"population_size": 4, "initial": arch.Arch(jnp.ones(5), jnp.ones(5), jnp.ones(5))},
            "fit",
        ),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        nsga2.nsga2(SPACE, **kwargs)


def test_other_integer_genomes_plug_in():
    """Twelve bits, two objectives that conflict: the front is every number of ones."""

    def flip(key, genome, rate):
        return jnp.where(jax.random.bernoulli(key, rate, (12,)), 1 - genome, genome)

    operators = genomes.Operators(
        num_genes=12,
        sample=lambda key, num: jax.random.randint(key, (num, 12), 0, 2),
        mutate=flip,
        crossover=lambda key, a, b: jnp.where(jax.random.bernoulli(key, 0.5, (12,)), a, b),
    )
    searcher = nsga2.nsga2(operators, population_size=32, archive_capacity=0)

    def evaluate(population):
        leading = jnp.sum(jnp.cumprod(population, axis=1), axis=1)
        trailing = jnp.sum(jnp.cumprod(1 - population[:, ::-1], axis=1), axis=1)
        return jnp.stack([-leading, -trailing], axis=1).astype(jnp.float32)

    result = jax.jit(lambda key: nsga2.search(key, searcher, evaluate, num_generations=150))(
        jax.random.key(0)
    )
    front = np.asarray(result.objectives)[
        np.asarray(pareto.non_dominated_rank(result.objectives)) == 0
    ]
    assert {tuple(row) for row in front.tolist()} == {(-i, i - 12) for i in range(13)}
    assert result.archive.valid.shape == (0,)


def test_duplicates_match_a_loop():
    genes = np.random.default_rng(0).integers(0, 2, (50, 4)).astype(np.int32)
    population = arch.Arch(
        jnp.asarray(genes[:, 0]), jnp.asarray(genes[:, 1:3]), jnp.asarray(genes[:, 3:])
    )
    seen, expected = set(), []
    for row in genes.tolist():
        expected.append(tuple(row) in seen)
        seen.add(tuple(row))
    np.testing.assert_array_equal(genomes.duplicates(population), expected)


def test_archive_keeps_exactly_the_feasible_front_in_any_batching():
    rng = np.random.default_rng(1)
    objectives = rng.integers(0, 12, (60, 3)).astype(np.float32)
    objectives[5, 1] = np.nan
    violation = (rng.random(60) < 0.3).astype(np.float32)
    names = jnp.arange(60, dtype=jnp.int32)
    usable = (violation == 0) & ~np.isnan(objectives).any(1)
    expected = {
        i
        for i in np.flatnonzero(usable)
        if not any(
            np.all(objectives[j] <= objectives[i]) and np.any(objectives[j] < objectives[i])
            for j in np.flatnonzero(usable)
        )
    }
    insert = jax.jit(archive.insert)
    kept = archive.empty(names, 60, 3)
    for start in (0, 20, 40, 20):  # one batch twice: repeated genomes are not doubled
        rows = slice(start, start + 20)
        kept = insert(
            kept, names[rows], jnp.asarray(objectives[rows]), jnp.asarray(violation[rows])
        )
    valid = np.asarray(kept.valid)
    assert set(np.asarray(kept.genomes)[valid].tolist()) == expected
    assert valid.sum() == len(expected)
    assert np.all(np.isnan(np.asarray(kept.objectives)[~valid]))


def test_archive_truncates_the_crowded_and_keeps_the_ends():
    x = jnp.array([0.0, 0.1, 0.11, 0.12, 0.5, 0.7, 1.0])
    points = jnp.stack([x, 1 - x], axis=1)
    names = jnp.arange(7, dtype=jnp.int32)
    kept = archive.insert(archive.empty(names, 5, 2), names, points, jnp.zeros(7))
    np.testing.assert_array_equal(kept.genomes, [0, 3, 4, 5, 6])
    assert bool(kept.valid.all())


_bad = st.sampled_from([0.0, 1.0, 2.0, np.nan, np.inf, -np.inf])
_table = st.lists(st.tuples(_bad, _bad, _bad), min_size=6, max_size=6)  # of six genomes
_told = st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=2, max_size=2)


@settings(deadline=None, max_examples=40)
@given(_table, _told)
def test_any_evaluation_is_survived(four, table, generations):
    """Whatever is told, no bad row outlives a good one, and what is kept was told."""
    tell, state = four
    grid = arch.grid(TIED)
    table = np.array(table, np.float32)
    good = np.isfinite(table[:, :2]).all(axis=1) & (table[:, 2] <= 0)
    for names in map(np.array, generations):
        told = _rows(grid, jnp.asarray(names))
        state, info = tell(state, told, table[names, :2], table[names, 2])
        assert np.all(np.diff(info.rank) >= 0)
        assert not np.isnan(info.hypervolume)
    seen = np.unique(generations)
    kept = np.isfinite(state.objectives).all(axis=1) & (np.asarray(state.violation) <= 0)
    front = {tuple(row) for row in table[seen][good[seen], :2].tolist()}
    assert kept[: min(len(front), 4)].all()
    archived = np.asarray(state.archive.objectives)[np.asarray(state.archive.valid)]
    assert {tuple(row) for row in archived.tolist()} == {
        a for a in front if not any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in front)
    }


def test_duplicates_give_way_but_outlive_failures(four):
    tell, state = four
    told = _rows(arch.grid(TIED), jnp.array([0, 0, 2, 3]))
    values = jnp.array([[1.0, 1.0], [1.0, 1.0], [jnp.nan, 0.0], [5.0, 5.0]])
    state, _ = tell(state, told, values, jnp.zeros(4))
    np.testing.assert_array_equal(state.objectives[:2, 0], [1, 5])
    assert np.isfinite(np.asarray(state.objectives)).all()
    told = _rows(arch.grid(TIED), jnp.arange(4, 8))
    state, _ = tell(state, told, jnp.full((4, 2), -jnp.inf), jnp.zeros(4))
    np.testing.assert_array_equal(np.sort(state.objectives[:2, 0]), [1, 5])
    assert np.isfinite(np.asarray(state.objectives)).all()


def test_all_infeasible_populations_go_by_violation(four):
    tell, state = four
    told = _rows(arch.grid(TIED), jnp.arange(4))
    values = jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]])
    state, info = tell(state, told, values, jnp.array([4.0, 3.0, 2.0, 1.0]))
    np.testing.assert_array_equal(state.violation, [1, 2, 3, 4])
    assert int(info.num_feasible) == 0
    assert float(info.hypervolume) == 0
    assert not np.any(state.archive.valid)


def test_one_objective_is_minimised():
    operators = integer.integer_operators(integer.genes(12, 6))
    searcher = nsga2.nsga2(operators, population_size=20, archive_capacity=4)

    def evaluate(genes):
        return jnp.sum(jnp.square(genes - 2), axis=1, keepdims=True).astype(jnp.float32)

    result = jax.jit(lambda key: nsga2.search(key, searcher, evaluate, num_generations=60))(
        jax.random.key(0)
    )
    np.testing.assert_array_equal(result.population[0], np.full(12, 2))
    assert int(result.archive.valid.sum()) == 1


def test_initial_genomes_that_the_space_lacks_are_refused():
    wrong = arch.grid(TIED)._replace(depth=jnp.full((16,), 5))
    with pytest.raises(ValueError, match="depth 5"):
        nsga2.nsga2(TIED, population_size=20, initial=wrong)


def test_an_odd_population_breeds():
    operators = integer.integer_operators(integer.genes(6, 4))
    searcher = nsga2.nsga2(operators, population_size=7, num_retries=20)
    state = jax.jit(lambda key: searcher.init(key, 2))(jax.random.key(0))
    values = jnp.stack([jnp.arange(7.0), -jnp.arange(7.0)], axis=1)
    state, _ = jax.jit(searcher.tell)(state, state.population, values)
    children = jax.jit(searcher.ask)(jax.random.key(1), state)
    assert children.shape == (7, 6)
    together = genomes.duplicates(jnp.concatenate([state.population, children]))
    assert not np.any(together[7:])


def test_duplicates_are_exact_when_hashes_collide():
    """Genomes that differ by multiples whose weights cancel share the hash."""
    rng = np.random.default_rng(0)
    weights = rng.integers(2**31, size=2, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    base = np.array([[0, 0], [3, 4], [0, 0]], np.uint32)
    shift = np.array([[weights[1], 2**32 - int(weights[0])]], np.uint32)
    assert (shift * weights).sum(dtype=np.uint32) == 0
    genes = np.concatenate([base, base + shift, base]).astype(np.int32)
    expected, seen = [], set()
    for row in genes.tolist():
        expected.append(tuple(row) in seen)
        seen.add(tuple(row))
    np.testing.assert_array_equal(jax.jit(genomes.duplicates)(jnp.asarray(genes)), expected)


def test_a_space_that_is_not_wrapped_is_refused():
    with pytest.raises(ValueError, match="integer_operators"):
        nsga2.nsga2(integer.genes(4, 3), population_size=4)
