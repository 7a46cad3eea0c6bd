"""Early rejection: what it lets through, what it learns, and that it is a searcher."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from nas import arch, cost, early_rejection, genomes, nsga2, searcher, surrogate

SPACE = arch.ArchSpace.from_fractions(4, 4, 8)
DIMS = cost.ModelDims(4, 16, 4, 4, 8, 5, 9)
SIZE = 8
REFERENCE = jnp.array([1.2, 1.2])
INNER = nsga2.nsga2(SPACE, population_size=SIZE, archive_capacity=32)


def _features(genome):
    return surrogate.gene_features(SPACE, genome)


def _costs(genome):
    return (cost.num_params(DIMS, genome) / cost.num_params(DIMS, arch.full(SPACE)))[None]


def _evaluate(population):
    """An error that is linear in the features, which a polynomial predicts exactly."""
    features = jax.vmap(_features)(population)
    error = 1 - features @ jnp.linspace(0.02, 0.14, 9)
    return jnp.stack([error, jax.vmap(_costs)(population)[:, 0]], axis=1)


def _wrap(model=None, **settings):
    model = surrogate.polynomial(1) if model is None else model
    settings = {"capacity": 64, **settings}
    return early_rejection.with_early_rejection(INNER, model, _features, _costs, **settings)


WRAPPED = _wrap()
INIT = jax.jit(WRAPPED.init, static_argnums=1)
ASK, TELL = jax.jit(WRAPPED.ask), jax.jit(WRAPPED.tell)


@pytest.fixture(scope="module")
def told():
    """The state after four generations, and all that was evaluated."""
    state, evaluated = INIT(jax.random.key(0), 2, REFERENCE), []
    for number in range(4):
        population = ASK(jax.random.key(number), state)
        evaluated.append((population, _evaluate(population)))
        state, _ = TELL(state, population, evaluated[-1][1])
    return state, evaluated


def _made(key, state, factor=4):
    """All children that the wrapped searcher offers, in its order."""
    keys = jax.random.split(key, factor)
    made = jax.vmap(INNER.ask, (0, None))(keys, state._replace(memory=state.memory.inner))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), made)


def _rows(population):
    leaves = [np.asarray(leaf).reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(population)]
    return [tuple(row) for row in np.concatenate(leaves, axis=1).tolist()]


def test_a_whole_search_is_one_program_and_segments_are_the_same():
    key = jax.random.key(3)
    result = jax.jit(
        lambda k: searcher.search(k, WRAPPED, _evaluate, num_generations=6, reference=REFERENCE)
    )(key)
    state = searcher.init_state(key, WRAPPED, _evaluate, reference=REFERENCE)
    run = jax.jit(lambda s: searcher.run(key, s, WRAPPED, _evaluate, num_generations=3)[0])
    segmented = run(run(state))
    chex.assert_trees_all_equal(segmented.memory.genomes, result.state.memory.genomes)
    np.testing.assert_allclose(segmented.objectives, result.objectives, rtol=1e-6)
    np.testing.assert_allclose(result.objectives, _evaluate(result.population), rtol=1e-6)
    assert int(result.state.memory.num_told) == 6 * SIZE


def test_nothing_is_rejected_before_the_first_population_is_told():
    state = INIT(jax.random.key(0), 2)
    chex.assert_trees_all_equal(ASK(jax.random.key(1), state), state.population)
    late = _wrap(min_points=3 * SIZE)
    state, _ = TELL(state, state.population, _evaluate(state.population))
    made = genomes.take(_made(jax.random.key(1), state), jnp.arange(SIZE))
    chex.assert_trees_all_equal(jax.jit(late.ask)(jax.random.key(1), state), made)


def test_memory_is_a_ring_of_what_was_told(told):
    state, evaluated = told
    small = _wrap(capacity=12)
    ring = jax.jit(small.init, static_argnums=1)(jax.random.key(0), 2)
    tell = jax.jit(small.tell)
    for population, objectives in evaluated[:2]:
        ring, _ = tell(ring, population, objectives)
    # 16 told, 12 places: the last 4 overwrite the first 4.
    errors = np.concatenate([objectives[:, 0] for _, objectives in evaluated[:2]])
    np.testing.assert_allclose(ring.memory.errors, np.concatenate([errors[12:], errors[4:12]]))
    known = state.memory
    np.testing.assert_allclose(known.errors[: 4 * SIZE], _evaluate(known.genomes)[: 4 * SIZE, 0])
    assert np.all(np.isnan(known.errors[4 * SIZE :]))


def test_children_are_new_and_chosen_among_those_offered(told):
    state, evaluated = told
    key = jax.random.key(9)
    chosen, offered = _rows(ASK(key, state)), _rows(_made(key, state))
    known = {row for population, _ in evaluated for row in _rows(population)}
    assert len(set(chosen)) == SIZE and set(chosen) <= set(offered) and not set(chosen) & known
    positions = [offered.index(row) for row in chosen]
    assert positions == sorted(positions)


def test_the_promising_stand_in_earlier_fronts_than_the_rejected(told):
    """With exact predictions, no new child left out dominates one that was taken."""
    state, evaluated = told
    key = jax.random.key(9)
    made = _made(key, state)
    taken = np.asarray(_evaluate(ASK(key, state)))
    chosen = set(_rows(ASK(key, state))) | {r for pop, _ in evaluated for r in _rows(pop)}
    left = np.asarray(_evaluate(made))[[row not in chosen for row in _rows(made)]]
    assert len(left)
    beaten = np.all(left[:, None] <= taken - 1e-3, axis=2)
    assert not beaten.any()


def test_only_the_clearly_dominated_are_rejected(told):
    state, _ = told
    key = jax.random.key(9)
    wary = _wrap(rule="dominated", margin=2.0)
    taken, offered = _rows(jax.jit(wary.ask)(key, state)), _rows(_made(key, state))
    made = _made(key, state)
    prediction = surrogate.polynomial(1).predict(state.memory.params, jax.vmap(_features)(made))
    bound = np.stack([prediction.mean - 2 * prediction.spread, _evaluate(made)[:, 1]], axis=1)
    parents = np.asarray(state.objectives)
    hopeless = np.array([
        np.any(np.all(parents <= row, axis=1) & np.any(parents < row, axis=1)) for row in bound
    ])  # fmt: skip
    known = set(_rows(genomes.take(state.memory.genomes, jnp.arange(4 * SIZE))))
    expected = []
    for row, bad in zip(offered, hopeless, strict=True):
        if not bad and row not in known and row not in expected:
            expected.append(row)
    assert 0 < hopeless.sum() < hopeless.size and len(expected) >= SIZE
    assert taken == expected[:SIZE]


def test_reported_quality_is_that_of_predictions_made_before(told):
    state, evaluated = told
    before = INIT(jax.random.key(0), 2, REFERENCE)
    assert np.isnan(before.memory.quality.kendall_tau)
    for population, objectives in evaluated[:2]:
        earlier = before.memory.params
        before, _ = TELL(before, population, objectives)
    population, objectives = evaluated[1]
    predicted = surrogate.polynomial(1).predict(earlier, jax.vmap(_features)(population)).mean
    expected = stats.kendalltau(predicted, objectives[:, 0]).statistic
    np.testing.assert_allclose(before.memory.quality.kendall_tau, expected, atol=1e-5)
    mean = early_rejection.mean_quality(state)
    assert int(state.memory.num_judged.kendall_tau) == 3
    assert float(mean.kendall_tau) > 0.8


def test_a_surrogate_that_orders_badly_is_switched_off(told):
    state, _ = told
    wary = jax.jit(_wrap(min_correlation=0.5).ask)
    key = jax.random.key(9)
    chex.assert_trees_all_equal(wary(key, state), ASK(key, state))
    bad = state.memory.quality._replace(kendall_tau=jnp.asarray(0.2))
    spoilt = state._replace(memory=state.memory._replace(quality=bad))
    made = genomes.take(_made(key, state), jnp.arange(SIZE))
    chex.assert_trees_all_equal(wary(key, spoilt), made)


def test_failed_evaluations_teach_nothing_and_do_not_stop_the_search(told):
    state, _ = told
    population = ASK(jax.random.key(9), state)
    objectives = _evaluate(population).at[0, 0].set(jnp.nan).at[1, 0].set(jnp.inf)
    after, _ = TELL(state, population, objectives)
    assert np.isnan(after.memory.errors[4 * SIZE : 4 * SIZE + 2]).all()
    mean = surrogate.polynomial(1).predict(after.memory.params, jax.vmap(_features)(population))
    assert np.all(np.isfinite(mean.mean))
    nothing, _ = TELL(state, population, jnp.full((SIZE, 2), jnp.nan))
    assert len(set(_rows(ASK(jax.random.key(10), nothing)))) == SIZE


def test_constraints_known_in_advance_come_first(told):
    state, _ = told
    limited = _wrap(violation=lambda genome: jnp.maximum(_costs(genome)[0] - 0.6, 0))
    key = jax.random.key(9)
    made = _made(key, state)
    known = set(_rows(genomes.take(state.memory.genomes, jnp.arange(4 * SIZE))))
    small = [
        row for row, size in zip(_rows(made), _evaluate(made)[:, 1], strict=True)
        if size <= 0.6 and row not in known
    ]  # fmt: skip
    taken = jax.jit(limited.ask)(key, state)
    within = int(np.sum(_evaluate(taken)[:, 1] <= 0.6))
    assert within == min(SIZE, len(set(small)))
    assert within > int(np.sum(_evaluate(ASK(key, state))[:, 1] <= 0.6)) or within == SIZE


def test_wrong_arguments_are_refused(told):
    for settings, message in (
        ({"rule": "best"}, "unknown rule"),
        ({"factor": 0}, "factor"),
        ({"margin": -1.0}, "margin"),
        ({"min_correlation": 2.0}, "min_correlation"),
    ):
        with pytest.raises(ValueError, match=message):
            _wrap(**settings)
    with pytest.raises(ValueError, match="raise capacity"):
        _wrap(capacity=SIZE - 1).init(jax.random.key(0), 2)
    wrong = early_rejection.with_early_rejection(
        INNER, surrogate.polynomial(1), _features, lambda genome: jnp.zeros(2), capacity=64
    )
    with pytest.raises(ValueError, match="costs returned shape"):
        wrong.ask(jax.random.key(0), told[0])
