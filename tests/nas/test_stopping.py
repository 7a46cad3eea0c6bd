"""The stopping rule against a plain loop; volumes exact, in part, and by Monte Carlo."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas import stopping
from nas.hypervolume import hypervolume

REFERENCE = jnp.array([1.0, 1.1, 1.0, 1.2])
IDEAL = jnp.zeros(4)
POINTS = jnp.asarray(np.random.default_rng(0).uniform(0, 1.1, (30, 4)).astype(np.float32))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from([np.nan, 0.0, 1.0, 1.05, 1.2, 1.25, 3.0]), min_size=12, max_size=12),
    st.sampled_from([0.0, 0.1]),
    st.integers(1, 4),
)
def test_rule_matches_a_plain_loop(volumes, tolerance, patience):
    rule, state = stopping.StoppingRule(tolerance, patience), stopping.init()
    best, quiet = 0.0, 0
    for volume in volumes:
        if volume > best * (1 + tolerance):
            best, quiet = volume, 0
        elif best > 0:
            quiet += 1
        state = stopping.update(rule, state, jnp.asarray(volume))
        assert bool(state.stopped) == (quiet >= patience)


def test_nothing_found_never_stops_and_small_steps_add_up():
    rule = stopping.StoppingRule(tolerance=0.1, patience=2)
    state = stopping.init()
    for volume in (0.0, jnp.nan, 0.0, 0.0):
        state = stopping.update(rule, state, jnp.asarray(volume))
        assert not bool(state.stopped)
    for volume in (1.0, 1.06, 1.12, 1.19, 1.25):  # every second step passes the tolerance
        state = stopping.update(rule, state, jnp.asarray(volume))
        assert not bool(state.stopped)
    for volume in (1.26, 1.26):
        state = stopping.update(rule, state, jnp.asarray(volume))
    assert bool(state.stopped)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"tolerance": float("inf")}, "tolerance"),
        ({"patience": 0}, "patience"),
    ],
)
def test_bad_rules_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        stopping.StoppingRule(**settings)


def test_exact_measures_the_chosen_columns():
    padded = jnp.concatenate([POINTS, jnp.full((3, 4), jnp.nan)])
    measure = stopping.exact((2, 0))
    expected = hypervolume(POINTS[:, jnp.array([2, 0])], REFERENCE[jnp.array([2, 0])])
    np.testing.assert_allclose(measure(padded, REFERENCE), expected, rtol=1e-6)
    whole = stopping.exact()(padded, REFERENCE)
    np.testing.assert_allclose(whole, hypervolume(POINTS, REFERENCE), rtol=1e-6)


def test_monte_carlo_is_as_near_as_its_standard_error():
    exact = float(hypervolume(POINTS, REFERENCE))
    box = float(jnp.prod(REFERENCE))
    num_samples = 2048
    estimates = [
        float(stopping.monte_carlo(key, IDEAL, num_samples=num_samples)(POINTS, REFERENCE))
        for key in jax.random.split(jax.random.key(0), 40)
    ]
    error = float(stopping.monte_carlo_error(exact, box, num_samples))
    share = exact / box
    np.testing.assert_allclose(error, box * np.sqrt(share * (1 - share) / num_samples), rtol=1e-5)
    spread = np.sqrt(np.mean((np.array(estimates) - exact) ** 2))
    assert 0.7 * error < spread < 1.35 * error  # 40 draws: +- 11 % is one standard deviation
    assert abs(np.mean(estimates) - exact) < 4 * error / np.sqrt(40)


def test_monte_carlo_is_deterministic_monotone_and_bounded_by_the_box():
    measure = stopping.monte_carlo(jax.random.key(1), IDEAL, num_samples=512)
    again = stopping.monte_carlo(jax.random.key(1), IDEAL, num_samples=512)
    volumes = []
    for count in (0, 5, 20, 30):
        rows = jnp.where((jnp.arange(30) < count)[:, None], POINTS, jnp.nan)
        volumes.append(float(measure(rows, REFERENCE)))
        assert volumes[-1] == float(again(rows, REFERENCE))
    assert volumes[0] == 0.0
    assert np.all(np.diff(volumes) >= 0)
    beyond = jnp.full((1, 4), -5.0)
    np.testing.assert_allclose(measure(beyond, REFERENCE), jnp.prod(REFERENCE), rtol=1e-6)
    assert float(measure(POINTS, IDEAL)) == 0.0  # an empty box


def test_monte_carlo_tracks_columns():
    measure = stopping.monte_carlo(jax.random.key(2), IDEAL, num_samples=4096, columns=(1, 3))
    chosen = jnp.array([1, 3])
    exact = float(hypervolume(POINTS[:, chosen], REFERENCE[chosen]))
    error = stopping.monte_carlo_error(exact, 1.1 * 1.2, 4096)
    assert abs(float(measure(POINTS, REFERENCE)) - exact) < 4 * float(error)


@pytest.mark.parametrize("columns", [(), (0, 0), (-1,), (4,), ((0, 1),)])
def test_bad_columns_are_refused(columns):
    with pytest.raises(ValueError, match="columns"):
        stopping.exact(columns)(POINTS, REFERENCE)
    with pytest.raises(ValueError, match="columns"):
        stopping.monte_carlo(jax.random.key(0), IDEAL, columns=columns)


def test_bad_estimates_are_refused():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="num_samples"):
        stopping.monte_carlo(key, IDEAL, num_samples=0)
    with pytest.raises(ValueError, match="ideal"):
        stopping.monte_carlo(key, jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match="ideal"):
        stopping.monte_carlo(key, jnp.zeros(3))(POINTS, REFERENCE)


def test_state_keeps_its_types():
    state = stopping.init()
    after = stopping.update(stopping.StoppingRule(), state, jnp.asarray(1.0))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
