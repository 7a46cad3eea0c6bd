"""NSGA-II and its archive: fronts found, constraints kept, segments and ask/tell identical."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas import arch, archive, cost, genomes, nsga2, pareto

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
