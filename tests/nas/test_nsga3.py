"""NSGA-III: directions, normalisation, niches against a float64 oracle, and its results."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas import arch, controls, genomes, nsga2, nsga3, pareto, searcher

LEVELS = 20
NUM_GENES = 7
TIED = arch.ArchSpace.from_fractions(8, 4, 64, per_layer=False)


def _mutate(key, genome, rate):
    draws = jax.random.uniform(key, (2, NUM_GENES))
    other = (genome + 1 + jnp.floor(draws[1] * LEVELS).astype(jnp.int32)) % (LEVELS + 1)
    return jnp.where(draws[0] < rate, other, genome)


OPERATORS = genomes.Operators(
    num_genes=NUM_GENES,
    sample=lambda key, num: jax.random.randint(key, (num, NUM_GENES), 0, LEVELS + 1),
    mutate=_mutate,
    crossover=lambda key, a, b: jnp.where(jax.random.bernoulli(key, 0.5, a.shape), a, b),
)


def _dtlz2(population):
    """DTLZ2 with 4 objectives, every variable an integer from 0 to 20: [P, 4]."""
    x = population / LEVELS
    radius = 1 + jnp.sum(jnp.square(x[:, 3:] - 0.5), axis=1)
    cosine, sine = jnp.cos(x[:, :3] * jnp.pi / 2), jnp.sin(x[:, :3] * jnp.pi / 2)
    a, b, c = cosine.T
    return jnp.stack(
        [radius * a * b * c, radius * a * b * sine[:, 2], radius * a * sine[:, 1],
         radius * sine[:, 0]], axis=1
    )  # fmt: skip


def _fresh_memory(num_objectives):
    return nsga3.Memory(
        jnp.full((num_objectives,), jnp.inf), jnp.full((num_objectives, num_objectives), jnp.inf)
    )


@pytest.mark.parametrize(("num_objectives", "divisions"), [(2, 9), (3, 4), (4, 6), (4, 1)])
def test_directions_are_the_whole_lattice(num_objectives, divisions):
    directions = nsga3.reference_directions(num_objectives, divisions)
    expected = sorted(
        counts
        for counts in itertools.product(range(divisions + 1), repeat=num_objectives)
        if sum(counts) == divisions
    )
    assert len(expected) == math.comb(divisions + num_objectives - 1, num_objectives - 1)
    np.testing.assert_allclose(directions * divisions, expected, atol=1e-9)


def test_two_layers_put_the_second_inside():
    directions = nsga3.reference_directions(4, (2, 1))
    assert directions.shape == (10 + 4, 4)
    np.testing.assert_allclose(directions.sum(axis=1), 1)
    inside = directions[(directions > 0).all(axis=1)]
    np.testing.assert_allclose(np.sort(inside, axis=1), [[0.125] * 3 + [0.625]] * 4)


@pytest.mark.parametrize(
    ("num_objectives", "divisions", "message"),
    [(1, 3, "objectives"), (3, 0, "divisions"), (3, (2, 0), "divisions"), (3, (1, 1, 1), "div")],
)
def test_bad_directions_are_refused(num_objectives, divisions, message):
    with pytest.raises(ValueError, match=message):
        nsga3.reference_directions(num_objectives, divisions)


@pytest.mark.parametrize(("size", "expected"), [(4, 1), (9, 1), (10, 2), (83, 5), (84, 6)])
def test_most_divisions_fill_the_population(size, expected):
    assert nsga3.most_divisions(4, size) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_objectives": 1}, "at least 2 objectives"),
        ({"num_objectives": 30}, "for 30 objectives"),
        ({"num_objectives": 4, "divisions": 6}, "84 reference directions"),
        ({"num_objectives": 4, "mutation_rate": 2.0}, "mutation_rate"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        nsga3.nsga3(TIED, population_size=20, **settings)


def test_association_matches_a_float64_oracle():
    rng = np.random.default_rng(0)
    scaled = rng.uniform(0, 1.5, (200, 4)).astype(np.float32)
    directions = nsga3.reference_directions(4, 5)
    unit = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    niche, distance = jax.jit(nsga3.associate)(scaled, jnp.asarray(unit, jnp.float32))
    expected = np.empty((200, len(directions)))
    for i, row in enumerate(scaled.astype(np.float64)):
        for j, w in enumerate(directions):
            expected[i, j] = np.linalg.norm(row - (w @ row) * w / (w @ w))
    np.testing.assert_array_equal(niche, expected.argmin(axis=1))
    np.testing.assert_allclose(distance, expected.min(axis=1), atol=1e-5)
    np.testing.assert_array_equal(
        np.bincount(niche, minlength=len(directions)),
        np.bincount(expected.argmin(axis=1), minlength=len(directions)),
    )


@pytest.mark.parametrize("seed", range(4))
def test_levels_choose_what_the_papers_loop_chooses(seed):
    """Algorithm 4 as a loop: the counts of every niche after filling the population."""
    rng = np.random.default_rng(seed)
    size, wanted, num_niches = 60, 31, 9
    niche = rng.integers(0, num_niches, size)
    rank = np.sort(rng.choice(4, size, p=[0.2, 0.2, 0.4, 0.2]))[rng.permutation(size)]
    distance = rng.random(size).astype(np.float32)

    last = np.sort(rank)[wanted - 1]
    chosen = list(np.flatnonzero(rank < last))
    count = np.bincount(niche[chosen], minlength=num_niches)
    left = set(np.flatnonzero(rank == last))
    while len(chosen) < wanted:
        open_niches = sorted({int(niche[i]) for i in left})
        scarce = min(open_niches, key=lambda j: count[j])
        nearest = min((i for i in left if niche[i] == scarce), key=lambda i: distance[i])
        chosen.append(nearest)
        left.remove(nearest)
        count[scarce] += 1

    level = np.asarray(jax.jit(nsga3.niche_level)(jnp.asarray(niche), jnp.asarray(rank), distance))
    survivors = np.lexsort((niche, level, rank))[:wanted]
    assert sorted(survivors.tolist()) == sorted(int(i) for i in chosen)
    np.testing.assert_array_equal(np.bincount(niche[survivors], minlength=num_niches), count)


def test_normalisation_finds_the_plane_whatever_the_units():
    """Points on the plane sum(f / scale) = 1 above an ideal: intercepts are the scale."""
    scale, ideal = np.array([2e6, 3e-3, 40.0, 0.5]), np.array([1e5, 1e-3, 7.0, -2.0])
    lattice = nsga3.reference_directions(4, 4)
    objectives = jnp.asarray(ideal + lattice * scale, jnp.float32)
    rank = np.zeros(len(lattice), np.int32)
    everyone = np.ones(len(lattice), bool)
    scaled, memory = jax.jit(nsga3.normalise)(_fresh_memory(4), objectives, rank, everyone)
    np.testing.assert_allclose(scaled, lattice, atol=1e-4)
    np.testing.assert_allclose(memory.ideal, ideal, rtol=1e-5)
    # Extreme points are remembered when the next generation has lost them.
    inner = jnp.where((lattice > 0.9).any(axis=1)[:, None], jnp.float32(jnp.nan), objectives)
    kept = np.isfinite(np.asarray(inner)).all(axis=1)
    scaled, _ = nsga3.normalise(memory, inner, jnp.where(kept, 0, 1), jnp.asarray(kept))
    np.testing.assert_allclose(scaled[kept], lattice[kept], atol=1e-4)


@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 2.0, 3.0]],
        [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]],
        [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]],
        [[0.0, 1.0, 5.0], [0.5, 0.5, 5.0], [1.0, 0.0, 5.0]],
    ],
)
def test_degenerate_planes_fall_back_to_the_front(rows):
    """Finite, ideal at 0 and the front within [0, 1]."""
    objectives = jnp.asarray(rows)
    rank = jnp.zeros(len(rows), jnp.int32)
    scaled, _ = nsga3.normalise(_fresh_memory(3), objectives, rank, jnp.ones(len(rows), bool))
    span = np.ptp(np.asarray(rows), axis=0)
    expected = (np.asarray(rows) - np.min(rows, axis=0)) / np.where(span > 0, span, 1)
    np.testing.assert_allclose(scaled, expected, atol=1e-6)


def test_normalisation_without_feasible_rows_remembers_nothing():
    memory = _fresh_memory(2)
    scaled, after = nsga3.normalise(
        memory, jnp.array([[1.0, jnp.nan], [3.0, 4.0]]), jnp.arange(2), jnp.zeros(2, bool)
    )
    np.testing.assert_array_equal(scaled, [[0, 0], [3, 4]])
    assert np.isinf(after.ideal).all() and np.isinf(after.extremes).all()


@pytest.fixture(scope="module")
def small():
    """`tell` and the first state of a population of six with two objectives."""
    made = nsga3.nsga3(TIED, population_size=6, num_objectives=2, divisions=2, archive_capacity=8)
    state = jax.jit(lambda key: made.init(key, 2, jnp.array([10.0, 10.0])))(jax.random.key(0))
    return made, jax.jit(made.tell), state


def _told(*index):
    return jax.tree.map(lambda leaf: leaf[jnp.array(index)], arch.grid(TIED))


def test_duplicates_nan_and_infinity_survive_last(small):
    _, tell, state = small
    told = _told(0, 0, 1, 2, 3, 4)
    values = jnp.array([[1, 5], [1, 5], [5, 1], [jnp.nan, 0], [-jnp.inf, 0], [6, 6]])
    state, info = tell(state, told, values, jnp.zeros(6))
    np.testing.assert_array_equal(np.sort(state.objectives[:3, 0]), [1, 5, 6])
    np.testing.assert_array_equal(info.rank[:3], [0, 0, 1])
    assert np.all(np.asarray(info.rank)[3:] == 2)
    assert np.isfinite(state.memory.ideal).all()
    told = _told(5, 6, 7, 8, 9, 10)
    values = jnp.array([[2, 2], [2, 9], [3, 8], [9, 2], [8, 3], [9, 9.0]])
    state, _ = tell(state, told, values, jnp.zeros(6))
    assert np.isfinite(state.objectives).all()
    np.testing.assert_array_equal(state.memory.ideal, [1, 1])


def test_infeasible_rows_survive_by_violation_only(small):
    _, tell, state = small
    values = jnp.array([[1, 1], [2, 2], [9, 9], [3, 3], [0, 0], [4, 4.0]])
    told = _told(0, 1, 2, 3, 4, 5)
    state, info = tell(state, told, values, jnp.array([5.0, 1, 0, 2, 9, 3]))
    np.testing.assert_array_equal(state.violation, [0, 1, 2, 3, 5, 9])
    assert int(info.num_feasible) == 1
    np.testing.assert_array_equal(state.memory.ideal, [9, 9])


def test_all_infeasible_survive_by_violation(small):
    _, tell, state = small
    values = jnp.full((6, 2), 3.0)
    state, info = tell(state, _told(0, 1, 2, 3, 4, 5), values, jnp.array([5.0, 1, 7, 2, 9, 3]))
    np.testing.assert_array_equal(state.violation, [1, 2, 3, 5, 7, 9])
    assert int(info.num_feasible) == 0
    assert not np.asarray(state.archive.valid).any()


def test_wrong_numbers_of_objectives_are_refused(small):
    made, _, state = small
    with pytest.raises(ValueError, match="expected"):
        made.tell(state, _told(0, 1, 2, 3, 4, 5), jnp.zeros((6, 3)))
    three = made.init(jax.random.key(0), 3)
    with pytest.raises(ValueError, match="num_objectives"):
        made.tell(three, _told(0, 1, 2, 3, 4, 5), jnp.zeros((6, 3)))


def test_population_spreads_better_than_nsga2_and_random_on_dtlz2():
    """Equal evaluations; hypervolume of the population, every one of three seeds."""
    reference = jnp.full((4,), 1.2)
    settings = {"population_size": 56, "archive_capacity": 0, "track_hypervolume": False}
    volumes = {}
    for name, made in (
        ("nsga3", nsga3.nsga3(OPERATORS, num_objectives=4, **settings)),
        ("nsga2", nsga2.nsga2(OPERATORS, **settings)),
        ("random", controls.random_search(OPERATORS, **settings)),
    ):

        def final(key, made=made):
            result = searcher.search(key, made, _dtlz2, num_generations=30, reference=reference)
            return pareto.hypervolume(result.objectives, reference)

        volumes[name] = jax.jit(lambda keys, final=final: jax.lax.map(final, keys))(
            jax.random.split(jax.random.key(0), 3)
        )
    assert np.all(volumes["nsga3"] > 1.05 * volumes["nsga2"]), volumes
    assert np.all(volumes["nsga2"] > 1.05 * volumes["random"]), volumes
