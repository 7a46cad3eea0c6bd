"""Refinement where devices are missing: who hears whom, and each set applied once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from acme_jax import device, header, header_slots
from acme_jax.config import RefineConfig
from acme_jax.device import EdgeState
from acme_jax.header_layout import HeaderDims
from acme_jax.importance_rounds import Downlink
from fed import simulate
from fed.clients import replicate, stack_clients
from fed.participation import Participation
from nas.cells import OPS

DIMS = HeaderDims(2, 2, embed_dim=5, channels=4, num_classes=3, blocks=1, num_layers=2)
CELL = ((0, OPS.index("sep1x1"), 1, OPS.index("identity")),)
CONFIG = RefineConfig(rounds=3, batch_size=4, learning_rate=0.05, prune_per_round=2)
ALGORITHM = device.refinement(DIMS, CONFIG)
LENGTH = header_slots.num_points(DIMS) * DIMS.channels
NUM_DEVICES, NUM_ROUNDS = 4, 8
# The first device listens to itself only, the second to the last two only.
MIXING = np.asarray(
    [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]
)


def edge_state():
    rng = np.random.default_rng(0)
    sets = jnp.asarray(rng.random((NUM_DEVICES, LENGTH)), jnp.float32)
    return EdgeState(jnp.asarray(MIXING, jnp.float32), sets, jnp.asarray([3, 4, 4, 4], jnp.int32))


def test_sets_are_renormalised_over_those_that_arrived():
    before = edge_state()
    updates = np.random.default_rng(1).random((3, LENGTH)).astype(np.float32)
    updates[1] = np.nan  # did not arrive
    rows = jnp.asarray([1, 2, 3], jnp.int32)
    after, _ = ALGORITHM.server_update(before, updates, jnp.asarray([7.0, 0.0, 2.0]), rows)
    expected = np.asarray(before.personalized, np.float64)
    expected[1] = updates[2]
    expected[2] = (0.2 * updates[0] + 0.4 * updates[2]) / 0.6
    expected[3] = (updates[0] + updates[2]) / 2
    np.testing.assert_allclose(after.personalized, expected, rtol=1e-6)
    # The first device hears nobody: it keeps its set, bit by bit, and the set's number.
    np.testing.assert_array_equal(after.personalized[0], before.personalized[0])
    np.testing.assert_array_equal(after.rounds, [3, 5, 5, 5])


def test_a_late_and_a_fresh_set_of_one_device_count_as_their_mean():
    updates = np.random.default_rng(2).random((4, LENGTH)).astype(np.float32)
    rows = jnp.asarray([2, 3, 2, 3], jnp.int32)
    weights = jnp.asarray([5.0, 0.0, 1.0, 9.0])  # sizes are in the mixing weights already
    after, _ = ALGORITHM.server_update(edge_state(), updates, weights, rows)
    both = (updates[0].astype(np.float64) + updates[2]) / 2
    np.testing.assert_allclose(after.personalized[1], (both + updates[3]) / 2, rtol=1e-6)
    np.testing.assert_allclose(
        after.personalized[2], (0.3 * both + 0.4 * updates[3]) / 0.7, rtol=1e-6
    )


def initial_device():
    params = header.init(jax.random.key(0), CELL, DIMS)
    state = device.init_device(params, CELL, DIMS, CONFIG.prune_per_round, CONFIG)
    return jax.tree.map(jnp.asarray, state)


def test_a_device_applies_each_set_once():
    init = jax.jit(ALGORITHM.client_init)
    sets = jnp.asarray(np.random.default_rng(3).random((2, LENGTH)), jnp.float32)
    key = jax.random.key(1)
    first = init(Downlink(sets[0], jnp.int32(1)), initial_device(), key).device
    again = init(Downlink(sets[1], jnp.int32(1)), first, key).device
    jax.tree.map(np.testing.assert_array_equal, first, again)
    later = init(Downlink(sets[1], jnp.int32(4)), first, key).device  # two sets were missed
    assert int(later.rounds) == 4
    assert [int(d.mask.sum()) for d in (first, later)] == [
        int(initial_device().mask.sum()) - num for num in (2, 4)
    ]


def test_refinement_with_absent_and_late_devices():
    """Counts of pruned gates and numbers of sets, followed by hand through all rounds."""
    rng = np.random.default_rng(4)
    data = stack_clients(
        [
            (rng.normal(size=(n, 4, 5)).astype(np.float32), rng.integers(0, 3, n))
            for n in (5, 3, 6, 4)
        ]
    )
    states = replicate(initial_device(), NUM_DEVICES)
    edge = ALGORITHM.server_init(jnp.asarray(MIXING, jnp.float32))
    run = functools.partial(
        simulate.run_rounds,
        ALGORITHM,
        num_rounds=NUM_ROUNDS,
        client_ids=jnp.arange(NUM_DEVICES),
        batch_size=4,
        epochs=1,
        participation=Participation(
            num_sampled=3, dropout=0.3, deadline_s=1.0, late="next_round", jitter=0.5
        ),
        seconds=jnp.asarray([0.5, 0.8, 1.0, 1.0]),
    )
    start = simulate.with_late(ALGORITHM, edge, states, 3)
    edge, after, metrics = jax.jit(run)(start, states, data, jax.random.key(5))
    sets = np.zeros(NUM_DEVICES, int)
    applied, pruned = np.zeros(NUM_DEVICES, int), np.zeros(NUM_DEVICES, int)
    waiting = np.zeros(NUM_DEVICES, bool)
    for rows, dropped, late in zip(*(np.asarray(part) for part in metrics.roles), strict=True):
        heard, waiting = waiting, np.zeros(NUM_DEVICES, bool)
        for row in rows[~dropped]:
            pruned[row] += CONFIG.prune_per_round * (sets[row] > applied[row])
            applied[row] = sets[row]
        heard[rows[~dropped & ~late]] = True
        waiting[rows[late]] = True
        sets += (MIXING * heard).sum(axis=1) > 0
    np.testing.assert_array_equal(edge.state.rounds, sets)
    np.testing.assert_array_equal(after.rounds, applied)
    np.testing.assert_array_equal(states.mask.sum(axis=1) - after.mask.sum(axis=1), pruned)
    assert np.ptp(sets) > 0 and np.ptp(pruned) > 0
    assert np.asarray(metrics.roles.late).any() and np.asarray(metrics.roles.dropped).any()
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((edge, after)))
