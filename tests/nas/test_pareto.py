"""Ranks, crowding, hypervolume, the Pareto Front Grid and selection, against plain loops."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acme_jax.experiments import paper_candidates
from nas import pareto


def _dominates(a, b):
    return bool(np.all(a <= b) and np.any(a < b))


def _rank_oracle(objectives, violation=None):
    objectives = np.asarray(objectives, np.float64)
    violation = np.zeros(len(objectives)) if violation is None else np.asarray(violation)

    def beats(i, j):
        if np.isnan(objectives[i]).any():
            return False
        if np.isnan(objectives[j]).any():
            return True
        if max(violation[i], 0) != max(violation[j], 0):
            return max(violation[i], 0) < max(violation[j], 0)
        return violation[i] <= 0 and _dominates(objectives[i], objectives[j])

    rank, left, front = np.zeros(len(objectives), int), set(range(len(objectives))), 0
    while left:
        best = {i for i in left if not any(beats(j, i) for j in left)}
        for i in best:
            rank[i] = front
        left -= best
        front += 1
    return rank


def _crowding_oracle(objectives, rank):
    distance = np.zeros(len(objectives))
    for front in set(rank):
        rows = [i for i in range(len(rank)) if rank[i] == front]
        for column in np.asarray(objectives, np.float64).T:
            order = sorted(rows, key=lambda i, c=column: (c[i], i))
            distance[order[0]] = distance[order[-1]] = np.inf
            span = column[order[-1]] - column[order[0]]
            for before, row, after in zip(order, order[1:], order[2:], strict=False):
                distance[row] += (column[after] - column[before]) / span if span > 0 else 0
    return distance


def _hypervolume_oracle(objectives, reference):
    """Sum of the cells of the points' own grid that some point dominates, float64."""
    objectives = np.asarray(objectives, np.float64)
    axes = [
        np.unique([*column[column < r], r])
        for column, r in zip(objectives.T, reference, strict=True)
    ]
    volume = 0.0
    for corner in itertools.product(*(range(len(axis) - 1) for axis in axes)):
        low = np.array([axis[i] for axis, i in zip(axes, corner, strict=True)])
        if np.any(np.all(objectives <= low, axis=1)):
            volume += np.prod([axis[i + 1] - axis[i] for axis, i in zip(axes, corner, strict=True)])
    return volume


def _cases():
    rng = np.random.default_rng(0)
    yield "random", rng.random((70, 3))
    yield "ties", rng.integers(0, 4, (65, 3)).astype(float)
    yield "two objectives", rng.integers(0, 9, (33, 2)).astype(float)
    yield "four objectives", rng.random((40, 4))
    with_nan = rng.integers(0, 5, (40, 3)).astype(float)
    with_nan[[0, 7, 39], [0, 1, 2]] = np.nan
    yield "nan", with_nan
    yield "one row", np.ones((1, 2))
    yield "negative", rng.integers(-3, 3, (50, 2)).astype(float) * -0.5


CASES = dict(_cases())


@pytest.mark.parametrize("name", CASES)
def test_rank_and_crowding_match_the_oracles(name):
    objectives = CASES[name]
    rank = pareto.non_dominated_rank(jnp.asarray(objectives, jnp.float32))
    assert rank.dtype == jnp.int32
    np.testing.assert_array_equal(rank, _rank_oracle(objectives))
    valid = ~np.isnan(objectives).any(1)
    distance = pareto.crowding_distance(jnp.asarray(objectives, jnp.float32), rank)
    expected = _crowding_oracle(objectives[valid], np.asarray(rank)[valid])
    np.testing.assert_allclose(np.asarray(distance)[valid], expected, rtol=1e-5, atol=1e-6)
    assert not np.isnan(distance).any()


@pytest.mark.parametrize("name", CASES)
def test_constrained_rank_matches_the_oracle(name):
    objectives = CASES[name]
    violation = np.random.default_rng(1).integers(-1, 4, len(objectives)).astype(np.float32)
    for values in (violation, np.abs(violation) + 1):
        rank = pareto.non_dominated_rank(jnp.asarray(objectives, jnp.float32), jnp.asarray(values))
        np.testing.assert_array_equal(rank, _rank_oracle(objectives, values))


def test_duplicates_share_a_rank_and_order_does_not_matter():
    objectives = np.random.default_rng(2).integers(0, 5, (40, 3)).astype(np.float32)
    doubled = jnp.asarray(np.concatenate([objectives, objectives]))
    rank = np.asarray(pareto.non_dominated_rank(doubled))
    np.testing.assert_array_equal(rank[:40], rank[40:])
    np.testing.assert_array_equal(rank[:40], pareto.non_dominated_rank(jnp.asarray(objectives)))
    order = np.random.default_rng(3).permutation(80)
    np.testing.assert_array_equal(pareto.non_dominated_rank(doubled[order]), rank[order])


def test_early_stop_ranks_the_rows_needed_and_shares_the_next_rank():
    objectives = jnp.asarray(CASES["random"], jnp.float32)
    full = np.asarray(pareto.non_dominated_rank(objectives))
    part = np.asarray(pareto.non_dominated_rank(objectives, num_needed=20))
    last = full[np.argsort(full, kind="stable")[19]]
    np.testing.assert_array_equal(part, np.minimum(full, last + 1))


@pytest.mark.parametrize(("num_objectives", "num"), [(1, 5), (2, 30), (3, 14), (4, 7)])
def test_hypervolume_is_exact(num_objectives, num):
    rng = np.random.default_rng(num)
    reference = np.linspace(0.9, 1.1, num_objectives)
    for objectives in (
        rng.random((num, num_objectives)) * 1.2,
        rng.integers(0, 4, (num, num_objectives)) / 3,
    ):
        objectives = objectives.astype(np.float32)
        volume = pareto.hypervolume(jnp.asarray(objectives), jnp.asarray(reference, jnp.float32))
        np.testing.assert_allclose(volume, _hypervolume_oracle(objectives, reference), rtol=1e-5)


def test_points_beyond_the_reference_and_nan_add_nothing():
    points = jnp.array([[0.5, 0.5, 0.5], [0.0, 0.0, 1.0], [-5.0, 2.0, -5.0], [jnp.nan, 0.0, 0.0]])
    np.testing.assert_allclose(pareto.hypervolume(points, jnp.ones(3)), 0.125, rtol=1e-6)
    assert float(pareto.hypervolume(points[1:], jnp.ones(3))) == 0.0


@pytest.fixture(scope="module")
def paper():
    """The paper's 400 candidates: its cost models and the refitted accuracy, in float64."""
    printed = [-0.4668, 1.9262, 1.0589, -0.9848, -0.0558, -0.5416]
    np.testing.assert_allclose(paper_candidates.coefficients(), printed, atol=6e-5)
    found = paper_candidates.candidates()
    return {
        "A": found.accuracy, "S": found.size, "T": found.latency, "E": found.energy,
        "units": found.units,
    }  # fmt: skip


def _paper_select(paper, rule, limit=0.8):
    objectives = jnp.asarray(np.stack([1 - paper["A"], paper["T"], paper["E"]], 1), jnp.float32)
    sizes = jnp.asarray(paper["S"], jnp.float32)
    return pareto.select(
        objectives, sizes, limit, rule=rule, ideal=jnp.zeros(3), nadir=jnp.ones(3), num_divisions=10
    )


@pytest.mark.parametrize(
    ("rule", "units", "expected"),
    [
        ("paper", (11, 8), (0.8959773, 0.6667294, 0.5685462)),
        ("lowest_error", (11, 9), (0.9154639, 0.7500418, 0.6490205)),
        ("trade_off", (8, 6), None),
        ("nearest_ideal", (3, 9), None),
    ],
)
def test_pareto_front_grid_oracle(paper, rule, units, expected):
    choice = _paper_select(paper, rule)
    assert bool(choice.feasible)
    index = int(choice[0])
    assert tuple(paper["units"][index]) == units
    values = [paper[name][index] for name in "ASE"]
    if expected:
        np.testing.assert_allclose(values, expected, atol=5.1e-8)
    score = values[0] - 0.5 * (values[1] + values[2])
    reported = {"paper": 0.278, "lowest_error": 0.216, "trade_off": 0.384, "nearest_ideal": 0.252}
    np.testing.assert_allclose(score, reported[rule], atol=5.1e-4)


def test_the_papers_largest_feasible_candidate(paper):
    index = max(
        (i for i in range(400) if paper["S"][i] <= 0.8),
        key=lambda i: (paper["S"][i], paper["E"][i]),
    )
    assert tuple(paper["units"][index]) == (12, 9)
    values = [paper[name][index] for name in "ASE"]
    np.testing.assert_allclose(values, [0.9133655, 0.7500627, 0.7164179], atol=5.1e-8)


def test_front_grid_counts_of_the_paper_and_a_loop(paper):
    objectives = np.stack([1 - paper["A"], paper["T"], paper["E"]], 1)
    chosen = np.asarray(
        pareto.front_grid(
            jnp.asarray(objectives, jnp.float32),
            ideal=jnp.zeros(3),
            nadir=jnp.ones(3),
            num_divisions=10,
        )
    )
    cells = {}
    for i, row in enumerate(objectives):
        cell = tuple(np.ceil((row + 1e-6) / ((1 + 2e-6) / 10)).astype(int))
        if all(1 <= c <= 10 for c in cell):
            cells.setdefault(cell, []).append(i)
    best = {min(rows, key=lambda i: (np.sum(objectives[i] ** 2), i)) for rows in cells.values()}
    assert set(np.flatnonzero(chosen)) == best
    assert chosen.sum() == 45
    front = pareto.non_dominated_rank(jnp.asarray(objectives[chosen], jnp.float32))
    assert int((front == 0).sum()) == 17


def test_front_grid_leaves_out_what_lies_outside_and_scales_with_units():
    points = jnp.array(
        [[0.1, 0.1], [0.15, 0.12], [0.9, 0.2], [1.2, 0.5], [jnp.nan, 0.5], [0.5, -0.1]]
    )
    kwargs = {"num_divisions": 4}
    chosen = pareto.front_grid(points, ideal=jnp.zeros(2), nadir=jnp.ones(2), **kwargs)
    np.testing.assert_array_equal(chosen, [1, 0, 1, 0, 0, 0])
    scale, shift = jnp.array([1e6, 3.0]), jnp.array([5.0, -2.0])
    moved = points * scale[None, :] + shift[None, :]
    np.testing.assert_array_equal(
        pareto.front_grid(moved, ideal=shift, nadir=scale + shift, **kwargs), chosen
    )
    with pytest.raises(ValueError, match="divisions"):
        pareto.front_grid(points, ideal=jnp.zeros(2), nadir=jnp.ones(2), num_divisions=10**5)


def _select_oracle(objectives, constraint, limit, rule):
    low, high = objectives.min(0), objectives.max(0)
    scaled = (objectives - low) / (high - low)
    size = (constraint - constraint.min()) / (constraint.max() - constraint.min())
    score = {
        "trade_off": objectives[:, 0] + 0.5 * (size + scaled[:, -1]),
        "nearest_ideal": np.sum(scaled**2, 1),
        "lowest_error": objectives[:, 0],
    }[rule]
    feasible = [i for i in range(len(score)) if constraint[i] <= limit]
    return min(feasible, key=lambda i: (score[i], i)) if feasible else None


@pytest.mark.parametrize("rule", ["paper", "trade_off", "nearest_ideal", "lowest_error"])
def test_select_vmapped_over_1000_limits_equals_a_loop(rule):
    rng = np.random.default_rng(5)
    objectives = rng.random((60, 4)).astype(np.float32)
    objectives[[3, 8]] = np.nan  # empty places of an archive
    sizes = objectives[:, 1] * 100
    limits = np.linspace(-5, 105, 1000).astype(np.float32)
    chex.clear_trace_counter()
    one = jax.jit(
        chex.assert_max_traces(
            lambda limit: pareto.select(
                jnp.asarray(objectives), jnp.asarray(sizes), limit, rule=rule, num_divisions=3
            ),
            n=2,  # once alone, once vmapped
        )
    )
    many = jax.vmap(one)(jnp.asarray(limits))
    loop = [one(limit) for limit in limits[::20]]
    np.testing.assert_array_equal(many[0][::20], [int(choice[0]) for choice in loop])
    np.testing.assert_array_equal(many.feasible[::20], [bool(choice.feasible) for choice in loop])
    assert not bool(many.feasible[0])
    assert int(many[0][0]) == 60
    if rule != "paper":
        rows = np.flatnonzero(~np.isnan(objectives).any(1))
        for limit, index in zip(limits[::20], np.asarray(many[0])[::20], strict=True):
            best = _select_oracle(objectives[rows].astype(float), sizes[rows], limit, rule)
            assert index == (60 if best is None else rows[best])


def test_select_serves_nothing_when_all_rows_are_empty_and_refuses_unknown_rules():
    nothing = pareto.select(jnp.full((4, 2), jnp.nan), jnp.ones(4), 2.0, rule="trade_off")
    assert not bool(nothing.feasible)
    with pytest.raises(IndexError):
        np.arange(4)[int(nothing[0])]
    with pytest.raises(ValueError, match="nearest_ideal"):
        pareto.select(jnp.ones((4, 2)), jnp.ones(4), 2.0, rule="best")


def test_rank_and_hypervolume_trace_once():
    chex.clear_trace_counter()
    rank = jax.jit(chex.assert_max_traces(pareto.non_dominated_rank, n=1))
    volume = jax.jit(chex.assert_max_traces(pareto.hypervolume, n=1))
    for seed in range(3):
        points = jax.random.uniform(jax.random.key(seed), (9, 3))
        rank(points)
        volume(points, jnp.ones(3))
