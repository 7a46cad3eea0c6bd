"""Choices for a fleet against a plain NumPy loop, and what unusable input leads to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from nas import arch, cost, fleet, selection

NAMES = ("energy_j", "latency_s", "size_bytes")
RULES = ("paper", "trade_off", "nearest_ideal", "lowest_error")


def _case(seed, num_rows=40, num_devices=150):
    """Coarse values, so that ties and costs equal to their limits occur."""
    rng = np.random.default_rng(seed)
    objectives = (rng.integers(0, 12, (num_rows, 3)) / 8).astype(np.float32)
    costs = {n: rng.integers(1, 16, num_rows).astype(np.float32) for n in NAMES}
    limits = {n: rng.integers(1, 12, num_devices).astype(np.float32) for n in NAMES}
    return objectives, costs, limits


def _packed(ratio, index, num_rows):
    low = (1 << (num_rows - 1).bit_length()) - 1
    return (int(np.float32(ratio).view(np.int32)) & ~low) | index


def _loop(score, costs, limits):
    """index, closest and violated of every device, one at a time; costs(device, name, row)."""
    num_rows, num_devices = len(score), len(limits[NAMES[0]])
    index, closest, violated = [], [], []
    for device in range(num_devices):
        best, best_score, near, near_key = num_rows, np.inf, num_rows, np.inf
        for row in range(num_rows):
            paid = [costs(device, name, row) for name in NAMES]
            if not (np.isfinite(score[row]) and np.all(np.isfinite(paid))):
                continue
            allowed = [limits[name][device] for name in NAMES]
            if all(p <= a for p, a in zip(paid, allowed, strict=True)) and score[row] < best_score:
                best, best_score = row, score[row]
            ratio = max(
                [np.float32(0)]
                + [
                    np.float32(p) / np.float32(a)
                    for p, a in zip(paid, allowed, strict=True)
                    if a > 0
                ]
            )
            if _packed(ratio, row, num_rows) < near_key:
                near, near_key = row, _packed(ratio, row, num_rows)
        closest.append(near if best == num_rows else best)
        index.append(best)
        violated.append(
            [
                best == num_rows
                and not (near < num_rows and costs(device, n, near) <= limits[n][device])
                for n in NAMES
            ]
        )
    return np.array(index), np.array(closest), np.array(violated)


def _check(chosen, expected):
    index, closest, violated = expected
    np.testing.assert_array_equal(chosen.index, index)
    np.testing.assert_array_equal(chosen.closest, closest)
    for column, name in enumerate(NAMES):
        np.testing.assert_array_equal(chosen.violated[name], violated[:, column])


@functools.partial(jax.jit, static_argnames=("rule", "batch_size"))
def _select(objectives, costs, limits, rule="lowest_error", batch_size=64):
    return fleet.select(objectives, costs, limits, rule=rule, batch_size=batch_size)


@pytest.mark.parametrize("rule", RULES)
def test_equals_a_plain_loop(rule):
    objectives, costs, limits = _case(0)
    objectives[3, 1] = np.nan
    objectives[5, 0] = np.inf
    costs["latency_s"][7] = np.inf
    chosen = _select(objectives, costs, limits, rule=rule)
    columns = jnp.stack([jnp.asarray(costs[name]) for name in NAMES], axis=1)
    score = np.asarray(selection.score(jnp.asarray(objectives), columns, rule=rule))
    _check(chosen, _loop(score, lambda _, name, row: costs[name][row], limits))
    assert 20 < int(chosen.feasible.sum()) < 130  # both outcomes occur
    np.testing.assert_array_equal(chosen.feasible, np.asarray(chosen.index) < 40)
    for name in NAMES:
        np.testing.assert_array_equal(chosen.costs[name], costs[name][np.asarray(chosen.closest)])


@pytest.mark.parametrize("rule", ["paper", "nearest_ideal", "lowest_error"])
def test_one_limit_is_the_selection_of_nas(rule):
    objectives, costs, limits = (jax.tree.map(jnp.asarray, part) for part in _case(1))
    size, limit = costs["size_bytes"], limits["size_bytes"]
    chosen = fleet.select(objectives, {"s": size}, {"s": limit}, rule=rule)
    one = jax.vmap(lambda bound: selection.select(objectives, size, bound, rule=rule))(limit)
    np.testing.assert_array_equal(chosen.index, one.index)
    np.testing.assert_array_equal(chosen.feasible, one.feasible)


def test_costs_of_each_device_follow_its_profile():
    objectives, costs, limits = _case(2)
    rng = np.random.default_rng(3)
    speed = (2.0 ** rng.integers(-2, 3, 150)).astype(np.float32)  # divisions stay exact

    def own(profile):
        slow = jnp.asarray(costs["latency_s"]) / profile["speed"]
        return {"latency_s": slow, "energy_j": 2 * slow, "size_bytes": costs["size_bytes"]}

    def paid(device, name, row):
        value = costs["size_bytes" if name == "size_bytes" else "latency_s"][row]
        factor = {"latency_s": 1, "energy_j": 2, "size_bytes": speed[device]}[name]
        return np.float32(value * factor / speed[device])

    arguments = objectives, own, limits
    chosen = fleet.select(*arguments, rule="lowest_error", profiles={"speed": speed})
    _check(chosen, _loop(objectives[:, 0], paid, limits))
    # A rule that weighs costs ranks differently on every device.
    weighed = fleet.select(*arguments, rule="trade_off", profiles={"speed": speed})
    for device in range(0, 150, 15):
        mine = {n: np.array([paid(device, n, row) for row in range(40)]) for n in NAMES}
        alone = fleet.select(
            objectives, mine, {n: limits[n][device : device + 1] for n in NAMES}, rule="trade_off"
        )
        assert int(alone.index[0]) == int(weighed.index[device])


def test_modelled_latency_and_energy_of_real_genomes():
    space = arch.ArchSpace.from_fractions(4, 4, 64)
    dims = cost.ModelDims(4, 32, 4, 8, 64, num_tokens=17, patch_dim=16, num_classes=10)
    genomes = arch.sample(jax.random.key(0), space, 12)
    error = 1 / jnp.sum(genomes.heads + genomes.neurons, axis=1)

    def own(profile):
        return {
            "latency_s": jax.vmap(lambda a: cost.latency_s(dims, a, profile))(genomes),
            "size_bytes": jax.vmap(lambda a: cost.size_bytes(dims, a))(genomes),
        }

    scale = jnp.linspace(0.5, 2, 5)
    profiles = cost.DeviceProfile(*(scale * x for x in (1e9, 1e9, 1e-5, 1.0, 1e-10, 1e-10)))
    matrix = jax.vmap(own)(profiles)
    limits = {name: jnp.median(value, axis=1) * 1.001 for name, value in matrix.items()}
    chosen = fleet.select(error[:, None], own, limits, rule="lowest_error", profiles=profiles)
    fits = np.ones((5, 12), bool)
    for name, value in matrix.items():
        fits &= np.asarray(value) <= np.asarray(limits[name])[:, None]
    expected = np.where(fits, np.asarray(error)[None], np.inf).argmin(1)
    np.testing.assert_array_equal(chosen.index, expected)


@pytest.mark.parametrize("num_devices", [0, 1, 64, 65, 150])
def test_batches_change_nothing(num_devices):
    objectives, costs, limits = _case(4)
    limits = {name: value[:num_devices] for name, value in limits.items()}
    chosen = _select(objectives, costs, limits)
    whole = _select(objectives, costs, limits, batch_size=1024)
    jax.tree.map(np.testing.assert_array_equal, chosen, whole)
    assert chosen.index.shape == (num_devices,)


def test_devices_can_be_split_over_accelerators():
    objectives, costs, limits = _case(5)
    mesh = Mesh(np.array(jax.devices()[:2]), ("device",))
    spec = PartitionSpec("device")
    split = jax.jit(
        jax.shard_map(
            lambda part: fleet.select(objectives, costs, part, rule="lowest_error", batch_size=32),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=False,
        )
    )
    jax.tree.map(np.testing.assert_array_equal, split(limits), _select(objectives, costs, limits))


VALUES = st.sampled_from([0.0, -0.0, 1.0, 2.5, 3.0, 1e30, -1.0, np.inf, -np.inf, np.nan])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_input_is_served_within_its_limits_or_flagged(data):
    def draw(*shape):
        size = int(np.prod(shape))
        values = data.draw(st.lists(VALUES, min_size=size, max_size=size))
        return np.array(values, np.float32).reshape(shape)

    objectives = draw(6, 2)
    costs, limits = {n: draw(6) for n in NAMES}, {n: draw(5) for n in NAMES}
    chosen = _select(objectives, costs, limits)
    valid = np.isfinite(objectives).all(1) & np.isfinite([costs[n] for n in NAMES]).all(0)
    for device in range(5):
        fits = valid & np.all([costs[n] <= limits[n][device] for n in NAMES], axis=0)
        index, closest = int(chosen.index[device]), int(chosen.closest[device])
        assert bool(chosen.feasible[device]) == fits.any()
        assert (index == 6) == (not fits.any())
        assert (closest == 6) == (not valid.any())
        violated = [n for n in NAMES if chosen.violated[n][device]]
        if fits.any():
            best = np.where(fits, objectives[:, 0], np.inf)
            assert fits[index] and index == closest == best.argmin() and not violated
        elif valid.any():
            assert valid[closest]
            assert violated == [n for n in NAMES if not costs[n][closest] <= limits[n][device]]
            assert violated
        line = fleet.explain(chosen, limits, device)
        assert ("nothing fits" in line) == (not fits.any())


def test_a_limit_as_high_as_told_would_do():
    objectives, costs, limits = _case(6)
    chosen = _select(objectives, costs, limits)
    raised = {name: np.maximum(limits[name], chosen.costs[name]) for name in NAMES}
    assert not bool(chosen.feasible.all())
    again = _select(objectives, costs, raised)
    assert bool(again.feasible.all())
    served = np.asarray(chosen.feasible)
    np.testing.assert_array_equal(again.index[served], chosen.index[served])


def test_an_empty_archive_serves_nobody():
    _, costs, limits = _case(7)
    empty = np.full((40, 3), np.nan, np.float32)
    for rule in RULES:
        chosen = _select(empty, costs, limits, rule=rule)
        assert not chosen.feasible.any()
        assert bool((chosen.index == 40).all()) and bool((chosen.closest == 40).all())
        assert all(bool(chosen.violated[name].all()) for name in NAMES)
    assert "no candidate is valid" in fleet.explain(chosen, limits, 0)
    with pytest.raises(IndexError):
        _ = empty[np.asarray(chosen.index)]


def test_the_explanation_names_what_is_broken():
    objectives = np.array([[0.1], [0.5]], np.float32)
    costs = {"size_bytes": np.array([8.0, 4.0]), "latency_s": np.array([1.0, 1.0])}
    limits = {"size_bytes": np.array([8.0, 3.0, np.nan]), "latency_s": np.array([1.0, 1.0, 0.5])}
    chosen = fleet.select(objectives, costs, limits, rule="lowest_error")
    lines = [fleet.explain(chosen, limits, device) for device in range(3)]
    assert lines[0] == "device 0: candidate 0 (latency_s 1, size_bytes 8)"
    assert lines[1] == "device 1: nothing fits; candidate 1 would with size_bytes 4 instead of 3"
    assert lines[2] == (
        "device 2: nothing fits; candidate 0 would with latency_s 1 instead of 0.5 "
        "and size_bytes 8 instead of nan"
    )


def _broken(change):
    objectives, costs, limits = _case(8)
    arguments = {"objectives": objectives, "costs": costs, "limits": limits}
    arguments["rule"] = "lowest_error"
    change(arguments)
    return arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(objectives=np.zeros((0, 3))), "A at least 1"),
        (lambda a: a.update(objectives=np.zeros(40)), r"expected \[A, M\]"),
        (lambda a: a.update(rule="best"), "unknown rule 'best'"),
        (lambda a: a["limits"].pop("latency_s"), "expected the same names"),
        (lambda a: a.update(costs={}, limits={}), "at least one"),
        (lambda a: a["costs"].update(latency_s=np.ones(39)), r"expected \(40,\)"),
        (lambda a: a["limits"].update(latency_s=np.ones(9)), "one for each device"),
        (lambda a: a["limits"].update(latency_s=1.0), "one for each device"),
        (lambda a: a.update(profiles=np.ones(150)), "go with profiles"),
        (lambda a: a.update(costs=lambda profile: {}), "go with profiles"),
        (lambda a: a.update(costs=lambda profile: {}, profiles=np.ones(150)), "the same names"),
        (lambda a: a.update(batch_size=0), "batch_size"),
    ],
)
def test_input_that_does_not_go_together_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fleet.select(**_broken(change))


def test_profiles_of_another_length_are_refused():
    objectives, costs, limits = _case(9)
    with pytest.raises(ValueError, match="one for each device"):
        fleet.select(
            objectives, lambda _: costs, limits, rule="lowest_error", profiles=np.ones(149)
        )
