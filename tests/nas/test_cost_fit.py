"""Fits of nas.cost_fit: known constants come back, SciPy agrees, bad measurements are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from nas import arch, cost, cost_fit, latency_table

SPACE = arch.ArchSpace(6, 4, 64, (1, 3, 6), (1, 2, 4), (16, 32, 64))
DIMS = cost.ModelDims(6, 32, 4, 8, 64, 17, 49)
POWER = cost.DeviceProfile(1.0, 1.0, 0.0, 2.0, 1e-10, 2e-9)
RANDOM = arch.sample(jax.random.key(0), SPACE, 40)
GRID = arch.grid(SPACE)


def uniform_grid():
    rows = [
        arch.Arch(jnp.int32(d), jnp.full(6, h), jnp.full(6, n))
        for d in (1, 6)
        for h in SPACE.head_choices
        for n in SPACE.neuron_choices
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


UNIFORM = uniform_grid()


def latencies(archs, profile):
    return np.asarray(jax.vmap(lambda a: cost.latency_s(DIMS, a, profile))(archs), np.float64)


def noisy(values, spread, seed=0):
    return values * np.random.default_rng(seed).uniform(1 - spread, 1 + spread, values.shape)


def test_a_rooflines_own_latencies_give_its_constants():
    ratio = np.asarray(
        jax.vmap(lambda a: cost.num_flops(DIMS, a) / cost.size_bytes(DIMS, a))(RANDOM)
    )
    kink = float(np.median(ratio))  # half of the networks on either side
    true = POWER._replace(flops_per_s=5e9, bytes_per_s=5e9 / kink, overhead_s=2e-5)
    found = cost_fit.fit_roofline(DIMS, RANDOM, latencies(RANDOM, true), POWER)
    np.testing.assert_allclose(found, true, rtol=1e-3)
    error = cost_fit.prediction_error(latencies(GRID, found), noisy(latencies(GRID, true), 0.05))
    assert error.mape < 0.05
    assert found.idle_power_w == 2.0


@pytest.mark.parametrize("bound", ["compute", "memory"])
def test_a_rate_that_binds_no_network_is_where_the_roofs_touch(bound):
    if bound == "compute":
        true = POWER._replace(flops_per_s=5e9, bytes_per_s=1e15, overhead_s=2e-5)
    else:
        true = POWER._replace(flops_per_s=1e18, bytes_per_s=5e9, overhead_s=2e-5)
    measured = latencies(RANDOM, true)
    found = cost_fit.fit_roofline(DIMS, RANDOM, measured, POWER)
    np.testing.assert_allclose(latencies(RANDOM, found), measured, rtol=1e-4)
    flops, size = (
        np.asarray(jax.vmap(lambda a, f=f: f(DIMS, a))(RANDOM), np.float64)
        for f in (cost.num_flops, cost.size_bytes)
    )
    compute, memory = flops / found.flops_per_s, size / found.bytes_per_s
    other, binding = (memory, compute) if bound == "compute" else (compute, memory)
    assert np.all(other <= binding * (1 + 1e-6))
    np.testing.assert_allclose((other / binding).max(), 1.0, rtol=1e-6)


def test_roofline_beats_every_roofline_near_it():
    measured = noisy(latencies(RANDOM, POWER._replace(flops_per_s=5e9, bytes_per_s=6e8)), 0.3)

    def loss(log_constants):
        profile = POWER._replace(
            flops_per_s=np.exp(log_constants[0]),
            bytes_per_s=np.exp(log_constants[1]),
            overhead_s=np.exp(log_constants[2]),
        )
        return float(np.sum((latencies(RANDOM, profile) / measured - 1) ** 2))

    found = cost_fit.fit_roofline(DIMS, RANDOM, measured, POWER)
    best = loss(np.log(np.maximum(found[:3], 1e-12)))
    rng = np.random.default_rng(0)
    for _ in range(30):
        assert loss(np.log(np.maximum(found[:3], 1e-7)) + rng.normal(0, 0.3, 3)) >= best - 1e-6


def test_the_papers_form_comes_back():
    true = cost.PaperConstants(base_latency_s=3e-4, latency_per_unit_s=2e-5)
    found = cost_fit.fit_paper(DIMS, RANDOM, latencies(RANDOM, true))
    np.testing.assert_allclose(found, true, rtol=1e-4)


def test_a_tables_own_latencies_give_its_entries():
    block_s = np.random.default_rng(1).uniform(1e-5, 1e-4, (3, 3))
    true = latency_table.latency_table(
        SPACE.head_choices, SPACE.neuron_choices, block_s, 3e-5,
        idle_power_w=2.0, energy_per_flop_j=1e-10, energy_per_byte_j=2e-9,
    )  # fmt: skip
    grids = SPACE.head_choices, SPACE.neuron_choices
    found = cost_fit.fit_latency_table(DIMS, UNIFORM, latencies(UNIFORM, true), *grids, POWER)
    for value, expected in zip(found, true, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(latencies(RANDOM, found), latencies(RANDOM, true), rtol=1e-4)
    mixed = cost_fit.fit_latency_table(
        DIMS,
        jax.tree.map(lambda a, b: jnp.concatenate([a, b]), UNIFORM, RANDOM),
        noisy(np.concatenate([latencies(UNIFORM, true), latencies(RANDOM, true)]), 0.02),
        *grids,
        POWER,
    )
    np.testing.assert_allclose(mixed.block_s, block_s, rtol=0.05)


def test_measurements_that_leave_an_entry_open_are_refused():
    grids = SPACE.head_choices, SPACE.neuron_choices
    deep = jax.tree.map(lambda leaf: leaf[9:], UNIFORM)  # one depth only: base stays unknown
    with pytest.raises(ValueError, match=r"determine only 9 of the table's 10 .* two depths"):
        cost_fit.fit_latency_table(DIMS, deep, np.ones(9), *grids, POWER)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1e-5])
def test_measurements_that_are_no_times_are_refused(bad):
    measured = latencies(RANDOM, POWER)
    measured[7] = bad
    for fit in (
        lambda: cost_fit.fit_roofline(DIMS, RANDOM, measured, POWER),
        lambda: cost_fit.fit_paper(DIMS, RANDOM, measured),
        lambda: cost_fit.fit_latency_table(DIMS, RANDOM, measured, [1, 4], [16, 64], POWER),
        lambda: cost_fit.prediction_error(np.ones(40), measured),
    ):
        with pytest.raises(ValueError, match=f"positive and finite; got entry 7 is {bad}"):
            fit()


def test_too_few_or_uninformative_measurements_are_refused():
    two = jax.tree.map(lambda leaf: leaf[:2], RANDOM)
    with pytest.raises(ValueError, match="at least 3 measurements"):
        cost_fit.fit_roofline(DIMS, two, np.ones(2), POWER)
    depth = np.asarray(RANDOM.depth, np.float64)
    with pytest.raises(ValueError, match="do not grow"):
        cost_fit.fit_roofline(DIMS, RANDOM, depth, POWER)
    with pytest.raises(ValueError, match="as many measurements"):
        cost_fit.prediction_error(np.ones(3), np.ones(4))


def test_errors_are_those_of_scipy():
    rng = np.random.default_rng(0)
    for ties in (1, 3, 40):
        predicted, measured = (np.ceil(rng.uniform(0, 40, 30) / ties) for _ in range(2))
        error = cost_fit.prediction_error(predicted, measured)
        relative = predicted / measured - 1
        np.testing.assert_allclose(error[:3], [abs(relative).mean(), abs(relative).max(),
                                               relative.mean()])  # fmt: skip
        if ties == 40:
            assert np.isnan(error.kendall) and np.isnan(error.spearman)
            continue
        kendall = scipy.stats.kendalltau(predicted, measured).statistic
        spearman = scipy.stats.spearmanr(predicted, measured).statistic
        np.testing.assert_allclose(error[3:], [kendall, spearman], rtol=1e-5)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_nonnegative_least_squares_is_scipys(seed, rows, columns, duplicate):
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(rows, columns)), rng.normal(size=rows)
    if duplicate:  # not unique then: compare residuals only
        matrix[:, -1] = matrix[:, 0]
    found = cost_fit.nonnegative_least_squares(matrix, target)
    expected, residual = scipy.optimize.nnls(matrix, target)
    assert found.min() >= 0
    np.testing.assert_allclose(np.linalg.norm(matrix @ found - target), residual, atol=1e-7)
    if rows >= columns and not duplicate:
        np.testing.assert_allclose(found, expected, atol=1e-5)
