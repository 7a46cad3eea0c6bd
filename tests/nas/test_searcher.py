"""The search loops: every searcher inside jit and outside, early stops, and bad input."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nas import arch, controls, nsga2, nsga3, searcher, stopping

SPACE = arch.ArchSpace.from_fractions(4, 4, 16)
REFERENCE = jnp.array([300.0, 90.0])
KEY = jax.random.key(7)
SETTINGS = {"population_size": 10, "archive_capacity": 16}
SEARCHERS = {
    "nsga2": nsga2.nsga2(SPACE, **SETTINGS),
    "nsga3": nsga3.nsga3(SPACE, num_objectives=2, divisions=7, **SETTINGS),
    "evolution": controls.evolution(SPACE, **SETTINGS),
    "random_search": controls.random_search(SPACE, **SETTINGS),
}


def _fitness(population):
    """Small integers, exact in float32, by arithmetic that NumPy and JAX share.

    An "error" falls with the sizes, a cost grows with them; at least 8 heads are demanded.
    """
    heads = population.heads.sum(axis=1)
    neurons = population.neurons.sum(axis=1)
    error = 256 - population.depth * heads - 2 * neurons
    cost = 4 * population.depth + heads + neurons
    objectives = [value.astype("float32") for value in (error, cost)]
    return objectives, (8 - heads).clip(0, 8).astype("float32")


def _evaluate(population):
    objectives, violation = _fitness(population)
    return jnp.stack(objectives, axis=1), violation


def _evaluate_in_numpy(population):
    objectives, violation = _fitness(jax.tree.map(np.asarray, population))
    return np.stack(objectives, axis=1), violation


def _search(name, num_generations, **options):
    made = SEARCHERS[name]
    return jax.jit(
        lambda key: searcher.search(
            key,
            made,
            _evaluate,
            num_generations=num_generations,
            reference=REFERENCE,
            **options,
        )
    )(KEY)


@pytest.fixture(scope="module")
def stopped():
    """A search of at most 40 generations that its rule ends."""
    return _search("nsga2", 40, stop=stopping.StoppingRule(tolerance=0.01, patience=3))


@pytest.mark.parametrize("name", SEARCHERS)
def test_ask_and_tell_with_numpy_fitness_equal_search_in_jit(name):
    made, num_generations = SEARCHERS[name], 6
    chex.clear_trace_counter()
    ask = jax.jit(chex.assert_max_traces(made.ask, n=1))
    tell = jax.jit(chex.assert_max_traces(made.tell, n=1))
    state = searcher.init_state(KEY, made, _evaluate, reference=REFERENCE)
    history = []
    for generation in range(num_generations):
        children = ask(jax.random.fold_in(KEY, generation + 1), state)
        state, info = tell(state, children, *_evaluate_in_numpy(children))
        history.append(float(info.hypervolume))
    result = _search(name, num_generations)
    chex.assert_trees_all_equal(state, result.state)
    np.testing.assert_array_equal(np.float32(history), result.hypervolume)
    # It searched: the constraint holds, the archive fills and the results are the genomes'.
    assert np.asarray(result.violation == 0).all()
    assert int(result.archive.valid.sum()) > 3
    np.testing.assert_array_equal(result.objectives, _evaluate(result.population)[0])
    assert int(result.num_generations) == num_generations
    assert np.isnan(result.archive_hypervolume).all()


def test_a_stop_ends_the_same_search_early(stopped):
    ran = int(stopped.num_generations)
    assert 4 < ran < 40
    assert int(stopped.state.generation) == ran
    for history in (stopped.hypervolume, stopped.archive_hypervolume):
        assert history.shape == (40,)
        assert np.isfinite(history[:ran]).all() and np.isnan(history[ran:]).all()
    whole = _search("nsga2", ran)
    chex.assert_trees_all_equal(whole.state, stopped.state)
    np.testing.assert_array_equal(whole.hypervolume, stopped.hypervolume[:ran])
    # The rule, applied by hand to the history, stops where the loop did and not before.
    rule, watch, flags = stopping.StoppingRule(tolerance=0.01, patience=3), stopping.init(), []
    for volume in stopped.archive_hypervolume[:ran]:
        watch = stopping.update(rule, watch, volume)
        flags.append(bool(watch.stopped))
    assert flags == [False] * (ran - 1) + [True]


def test_history_is_that_of_the_archive(stopped):
    measured = stopping.exact()(stopped.archive.objectives, REFERENCE)
    last = int(stopped.num_generations) - 1
    np.testing.assert_allclose(stopped.archive_hypervolume[last], measured, rtol=1e-6)
    both = np.stack([stopped.archive_hypervolume, stopped.hypervolume])[:, : last + 1]
    assert np.all(both[0] >= both[1] * (1 - 1e-6))  # nothing is cut off here: 16 places suffice


def test_tracking_without_a_stop_runs_to_the_end_and_segments_agree():
    made = SEARCHERS["nsga2"]
    measure = stopping.monte_carlo(jax.random.key(0), jnp.zeros(2), num_samples=256)
    rule = stopping.StoppingRule(tolerance=0.5, patience=6)

    @jax.jit
    def segment(state, watch):
        return searcher.run_until(
            KEY, state, made, _evaluate,
            num_generations=5, stop=rule, track=measure, stop_state=watch,
        )  # fmt: skip

    start = searcher.init_state(KEY, made, _evaluate, reference=REFERENCE)
    state, first, watch = segment(start, stopping.init())
    assert int(first.num_generations) == 5
    state, second, watch = segment(state, watch)  # patience counts across the segments
    assert bool(watch.stopped) and int(second.num_generations) < 5
    _, third, _ = segment(state, watch)
    assert int(third.num_generations) == 0 and np.isnan(third.hypervolume).all()

    ran = 5 + int(second.num_generations)
    whole = _search("nsga2", ran, track=measure)
    assert int(whole.num_generations) == ran
    chex.assert_trees_all_equal(whole.state, state)
    joined = np.concatenate([first.archive_hypervolume, second.archive_hypervolume])
    np.testing.assert_array_equal(whole.archive_hypervolume, joined[:ran])


def test_searches_under_vmap_stop_each_at_their_own_generation(stopped):
    rule = stopping.StoppingRule(tolerance=0.01, patience=3)
    keys = jnp.stack([KEY, jax.random.key(1), jax.random.key(2)])
    results = jax.jit(
        jax.vmap(
            lambda key: searcher.search(
                key, SEARCHERS["nsga2"], _evaluate,
                num_generations=40, reference=REFERENCE, stop=rule,
            )
        )
    )(keys)  # fmt: skip
    counts = np.asarray(results.num_generations)
    assert counts[0] == int(stopped.num_generations)
    assert len(set(counts.tolist())) > 1
    finite = np.isfinite(results.archive_hypervolume).sum(axis=1)
    np.testing.assert_array_equal(finite, counts)


def test_all_infeasible_never_stops_and_archives_nothing():
    def hopeless(population):
        objectives, violation = _evaluate(population)
        return objectives, violation + 1

    rule = stopping.StoppingRule(tolerance=0.01, patience=1)
    result = jax.jit(
        lambda key: searcher.search(
            key, SEARCHERS["nsga2"], hopeless, num_generations=5, reference=REFERENCE, stop=rule
        )
    )(KEY)
    assert int(result.num_generations) == 5
    np.testing.assert_array_equal(result.archive_hypervolume, np.zeros(5))
    assert not np.asarray(result.archive.valid).any()


@pytest.mark.parametrize("name", ["nsga2", "evolution", "random_search"])
def test_one_objective_is_plain_minimisation(name):
    def error_only(population):
        return _evaluate(population)[0][:, :1]

    result = jax.jit(
        lambda key: searcher.search(
            key, SEARCHERS[name], error_only, num_generations=25, reference=REFERENCE[:1]
        )
    )(KEY)
    archived = np.asarray(result.archive.objectives)[np.asarray(result.archive.valid)]
    assert archived.min() == np.asarray(result.objectives).min()
    assert np.all(archived == archived.min())
    if name != "random_search":
        assert archived.min() == 256 - 4 * 16 - 2 * 64  # the full network


@pytest.mark.parametrize(
    "bad",
    [
        lambda population: _evaluate(population)[0][:, 0],
        lambda population: _evaluate(population)[0][:-1],
        lambda population: (_evaluate(population)[0], jnp.zeros((10, 1))),
    ],
)
def test_evaluations_of_the_wrong_shape_are_refused(bad):
    with pytest.raises(ValueError, match=r"expected \[P, M\]"):
        searcher.search(KEY, SEARCHERS["nsga2"], bad, num_generations=2)


def test_stopping_without_an_archive_is_refused():
    made = nsga2.nsga2(SPACE, population_size=10, archive_capacity=0)
    with pytest.raises(ValueError, match="archive_capacity"):
        searcher.search(KEY, made, _evaluate, num_generations=2, stop=stopping.StoppingRule())
