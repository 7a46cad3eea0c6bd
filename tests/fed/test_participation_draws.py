"""Who takes part: frequencies, independence of everyone else, times, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fed.participation import Participation, draw, round_seconds

KEY = jax.random.key(7)


@functools.partial(jax.jit, static_argnames=("participation", "num_rounds"))
def draws(key, ids, seconds, *, participation, num_rounds):
    """Roles with a leading [R]."""
    one = functools.partial(draw, participation=participation)
    return jax.vmap(one, in_axes=(None, 0, None, None))(key, jnp.arange(num_rounds), ids, seconds)


def fates(roles, ids):
    """For each round {client id: (dropped, late)}."""
    rounds = zip(*(np.asarray(part) for part in roles), strict=True)
    return [
        {int(ids[row]): (bool(d), bool(late)) for row, d, late in zip(*parts, strict=True)}
        for parts in rounds
    ]


MANY = Participation(num_sampled=4, dropout=0.3, deadline_s=1.0, jitter=0.5)


def test_a_fate_does_not_depend_on_the_order_of_the_cohort():
    ids, seconds = np.arange(10) * 3 + 1, np.linspace(0.5, 1.5, 10, dtype=np.float32)
    order = np.random.default_rng(1).permutation(10)
    options = {"participation": MANY, "num_rounds": 40}
    one = draws(KEY, ids, seconds, **options)
    other = draws(KEY, ids[order], seconds[order], **options)
    assert fates(one, ids) == fates(other, ids[order])
    assert np.all(np.diff(one.rows, axis=1) > 0) and np.all(np.diff(other.rows, axis=1) > 0)
    assert fates(one, ids) != fates(draws(jax.random.key(8), ids, seconds, **options), ids)


def test_a_fate_does_not_depend_on_who_else_exists():
    participation = Participation(dropout=0.3, deadline_s=1.0, jitter=0.5)
    ids, seconds = np.arange(10), np.linspace(0.5, 1.5, 10, dtype=np.float32)
    options = {"participation": participation, "num_rounds": 40}
    whole = fates(draws(KEY, ids, seconds, **options), ids)
    half = fates(draws(KEY, ids[3:8], seconds[3:8], **options), ids[3:8])
    assert half == [{client: fate[client] for client in range(3, 8)} for fate in whole]


def test_a_larger_sample_contains_the_smaller_one():
    ids = np.arange(10)
    small, large = (
        fates(draws(KEY, ids, None, participation=Participation(num), num_rounds=40), ids)
        for num in (3, 7)
    )
    assert all(one.keys() < other.keys() for one, other in zip(small, large, strict=True))


def test_sampling_and_dropout_are_as_frequent_as_they_should_be():
    num_rounds, num_clients, num_sampled, dropout = 4000, 10, 4, 0.3
    participation = Participation(num_sampled=num_sampled, dropout=dropout)
    rows, dropped, late = draws(
        KEY, np.arange(num_clients), None, participation=participation, num_rounds=num_rounds
    )
    assert not np.any(late)
    chosen = np.zeros((num_rounds, num_clients))
    np.put_along_axis(chosen, np.asarray(rows), 1.0, axis=1)
    np.testing.assert_array_equal(chosen.sum(axis=1), num_sampled)
    # Counts of a sample without replacement: the usual statistic, scaled by their variance.
    p = num_sampled / num_clients
    excess = (chosen.sum(axis=0) - num_rounds * p) ** 2 / (num_rounds * p * (1 - p))
    statistic = excess.sum() * (num_clients - 1) / num_clients
    assert 1e-3 < stats.chi2.sf(statistic, num_clients - 1) < 1 - 1e-3
    pair = p * (num_sampled - 1) / (num_clients - 1)
    pairs = (chosen.T @ chosen)[np.triu_indices(num_clients, 1)]
    assert np.all(np.abs(pairs - num_rounds * pair) < 4.5 * np.sqrt(num_rounds * pair * (1 - pair)))
    # Rounds do not remember: being sampled twice in a row is as frequent as chance has it.
    again = (chosen[1:] * chosen[:-1]).sum() / (num_clients * (num_rounds - 1))
    assert abs(again - p * p) < 0.01
    total = num_rounds * num_sampled
    spread = np.sqrt(total * dropout * (1 - dropout))
    assert abs(np.sum(dropped) - total * dropout) < 4 * spread
    arrived = (~np.asarray(dropped)).sum(axis=1)
    assert abs(arrived.mean() - num_sampled * (1 - dropout)) < 4 * spread / num_rounds
    # Whoever is sampled first drops out no more often than the others.
    by_client = np.bincount(np.asarray(rows).ravel(), np.asarray(dropped).ravel())
    by_client /= chosen.sum(axis=0)
    np.testing.assert_allclose(by_client, dropout, atol=4.5 * np.sqrt(0.21 / (num_rounds * p)))


def test_jitter_makes_clients_late_as_often_as_the_log_normal_says():
    seconds = np.asarray([0.4, 0.8, 1.0, 1.5, np.nan, np.inf], np.float32)
    participation = Participation(deadline_s=1.0, jitter=0.5)
    num_rounds = 4000
    _, _, late = draws(
        KEY, np.arange(6), seconds, participation=participation, num_rounds=num_rounds
    )
    expected = stats.lognorm.sf(1.0 / seconds[:4], 0.5)
    spread = 4.5 * np.sqrt(expected * (1 - expected) / num_rounds)
    assert np.all(np.abs(np.mean(late, axis=0)[:4] - expected) < spread)
    assert np.all(late[:, 4:])


def test_the_deadline_itself_is_in_time():
    roles = draw(KEY, 0, jnp.arange(3), jnp.asarray([0.9, 1.0, 1.1]), Participation(deadline_s=1.0))
    assert list(np.asarray(roles.late)) == [False, False, True]


def test_round_seconds_add_up():
    seconds = round_seconds(
        np.asarray([100, 300]),
        flops_per_sample=2e6,
        flops_per_s=np.asarray([1e8, 2e8]),
        down_bytes=4e6,
        up_bytes=1e6,
        down_bytes_per_s=np.asarray([8e6, 4e6]),
        up_bytes_per_s=np.asarray([1e6, 5e5]),
    )
    np.testing.assert_allclose(seconds, [0.5 + 2.0 + 1.0, 1.0 + 3.0 + 2.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sampled": 0}, "num_sampled must be at least 1"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
        ({"dropout": float("nan")}, r"dropout must be in \[0, 1\)"),
        ({"deadline_s": 0.0}, "deadline_s must be positive"),
        ({"deadline_s": 1.0, "late": "later"}, "late must be one of"),
        ({"deadline_s": 1.0, "jitter": -1.0}, "jitter must be"),
        ({"jitter": 0.1}, "without deadline_s nobody is late"),
        ({"late": "next_round"}, "without deadline_s nobody is late"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Participation(**options)
