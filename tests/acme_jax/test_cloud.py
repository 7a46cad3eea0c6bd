"""Importance by finite differences, reordering, accuracy of populations, search and choice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from acme_jax import cloud, layout, slicing, supernet
from acme_jax.config import ConfigError, SearchConfig
from acme_jax.fleet import REFERENCE_PROFILE
from nas import cost, nsga2
from nas.arch import canonical, to_mask
from nas.archive import Archive
from nas.importance import ImportanceOrder

CONFIG, SPACE = tiny.CONFIG, tiny.SPACE
PARAMS = tiny.make_params()
IMAGES, LABELS = tiny.make_images(26)
DIMS = dataclasses.replace(CONFIG.dims, num_classes=0)
BATCH = 8  # three batches; two images are left over


@functools.cache
def scores():
    """Raw scores of `measure_importance`, before they are sorted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cloud, "importance_order", lambda heads, neurons: (heads, neurons))
        return jax.tree.map(
            np.asarray,
            jax.jit(lambda: cloud.measure_importance(PARAMS, IMAGES, LABELS, CONFIG, BATCH))(),
        )


@functools.cache
def numpy_scores():
    """[3, L, H] and [3, L, F, 2]: signed derivatives of each batch by central differences."""
    params = tiny.to_float64(PARAMS)
    mlp = params["blocks"]["mlp"]
    step = 1e-4
    batches = [slice(BATCH * i, BATCH * (i + 1)) for i in range(3)]

    def derivative(batch, change):
        values = []
        for sign in (1, -1):
            undo, scale = change(1 + sign * step)
            logits = tiny.numpy_vit(params, IMAGES[batch], CONFIG, scale=scale)[0]
            values.append(tiny.cross_entropy(logits, LABELS[batch]))
            undo()
        return (values[0] - values[1]) / (2 * step)

    def scale_head(layer, head):
        def change(factor):
            scale = np.ones((4, 4))
            scale[layer, head] = factor
            return lambda: None, scale

        return change

    def scale_weights(*places):
        def change(factor):
            kept = [leaf[index].copy() for leaf, index in places]
            for leaf, index in places:
                leaf[index] *= factor

            def undo():
                for (leaf, index), old in zip(places, kept, strict=True):
                    leaf[index] = old

            return undo, None

        return change

    heads, neurons = np.zeros((3, 4, 4)), np.zeros((3, 4, 8, 2))
    for number, batch in enumerate(batches):
        for layer in range(4):
            for head in range(4):
                heads[number, layer, head] = derivative(batch, scale_head(layer, head))
            for i in range(8):
                up = scale_weights(
                    (mlp["up_kernel"], (layer, slice(None), i)),
                    (mlp["up_bias"], (layer, slice(i, i + 1))),
                )
                down = scale_weights((mlp["down_kernel"], (layer, i)))
                neurons[number, layer, i] = derivative(batch, up), derivative(batch, down)
    return heads, neurons


def test_head_scores_are_sums_over_batches_of_absolute_derivatives():
    derivatives = numpy_scores()[0]
    expected = np.abs(derivatives).sum(axis=0)
    np.testing.assert_allclose(scores()[0], expected, rtol=2e-4, atol=2e-6)
    # Not the absolute value of the sum, as with gradients that are never cleared.
    assert not np.allclose(expected, np.abs(derivatives.sum(axis=0)), rtol=0.05)


def test_neuron_scores_add_both_sides_of_a_neuron():
    derivatives = numpy_scores()[1]
    expected = np.abs(derivatives).sum(axis=(0, 3))
    np.testing.assert_allclose(scores()[1], expected, rtol=2e-4, atol=2e-6)
    assert not np.allclose(expected, np.abs(derivatives.sum(axis=3)).sum(axis=0), rtol=0.05)
    assert not np.allclose(expected, np.abs(derivatives.sum(axis=0)).sum(axis=2), rtol=0.05)


measure = jax.jit(lambda params: cloud.measure_importance(params, IMAGES, LABELS, CONFIG, BATCH))


def test_order_falls_and_reordering_really_sorts():
    order = jax.tree.map(np.asarray, measure(PARAMS))
    for permutation, score in zip(order, scores(), strict=True):
        sorted_scores = np.take_along_axis(score, permutation, axis=1)
        assert np.all(np.diff(sorted_scores, axis=1) <= 0)
        assert not np.array_equal(
            permutation, np.broadcast_to(np.arange(permutation.shape[1]), permutation.shape)
        )
    sorted_params = jax.jit(cloud.reorder)(PARAMS, ImportanceOrder(*order))
    for permutation, before, after in zip(measure(sorted_params), scores(), (4, 8), strict=True):
        identity = np.broadcast_to(np.arange(after), permutation.shape)
        falling = -np.sort(-before, axis=1)
        gaps = np.abs(np.diff(falling, axis=1)).min()
        assert gaps > 1e-5  # no ties that rounding could turn around
        np.testing.assert_array_equal(permutation, identity)


def test_reordering_leaves_the_full_network_alone_but_not_the_others():
    order = measure(PARAMS)
    reordered = cloud.reorder(PARAMS, order)
    apply = jax.jit(lambda p, mask: supernet.apply(p, IMAGES, CONFIG, mask))
    for index, same in ((0, True), (2, False)):
        mask = to_mask(SPACE, tiny.GENOMES[index])
        before, after = apply(PARAMS, mask), apply(reordered, mask)
        for first, second in zip(before, after, strict=True):
            assert np.allclose(first, second, rtol=1e-5, atol=1e-5) == same
    for name in ("embed", "cls", "position", "norm", "classifier"):
        tiny.assert_trees_equal(reordered[name], PARAMS[name])


def test_reordering_permutes_whole_heads_and_neurons():
    rng = np.random.default_rng(0)
    order = ImportanceOrder(
        jnp.asarray(np.stack([rng.permutation(4) for _ in range(4)])),
        jnp.asarray(np.stack([rng.permutation(8) for _ in range(4)])),
    )
    before, after = (
        jax.tree.map(np.asarray, p["blocks"]) for p in (PARAMS, cloud.reorder(PARAMS, order))
    )
    for layer in range(4):
        for new, old in enumerate(np.asarray(order.heads[layer])):
            a, b = after["attention"], before["attention"]
            for name, axis in (("qkv_kernel", 2), ("qkv_bias", 1), ("out_kernel", 0)):
                np.testing.assert_array_equal(
                    np.take(a[name][layer], new, axis), np.take(b[name][layer], old, axis)
                )
        for new, old in enumerate(np.asarray(order.neurons[layer])):
            a, b = after["mlp"], before["mlp"]
            for name, axis in (("up_kernel", 1), ("up_bias", 0), ("down_kernel", 0)):
                np.testing.assert_array_equal(
                    np.take(a[name][layer], new, axis), np.take(b[name][layer], old, axis)
                )


def test_importance_of_less_than_one_batch_is_refused():
    with pytest.raises(ConfigError, match="batch of 8 samples, but the select split has 7"):
        cloud.measure_importance(PARAMS, IMAGES[:7], LABELS[:7], CONFIG, BATCH)


def population(num):
    return [*tiny.GENOMES, *tiny.random_genomes(num - len(tiny.GENOMES), seed=9)]


@functools.cache
def sliced_accuracy(num):
    """One after the other, from dense networks."""
    result = []
    for arch in population(num):
        logits = slicing.apply(slicing.slice_params(PARAMS, arch), IMAGES, CONFIG).logits
        result.append(np.mean(np.asarray(logits).argmax(axis=1) == np.asarray(LABELS)))
    return np.array(result)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_accuracy_of_a_population_is_that_of_its_sliced_networks(num_devices):
    mesh = layout.make_mesh(num_devices)
    run = jax.jit(lambda archs: cloud.accuracy(PARAMS, IMAGES, LABELS, CONFIG, SPACE, archs, mesh))
    actual = run(tiny.stack(population(6)))
    assert len(np.unique(sliced_accuracy(6))) > 2  # they do differ
    np.testing.assert_allclose(actual, sliced_accuracy(6), rtol=1e-6)


def test_a_population_that_the_devices_do_not_divide_runs_on_fewer():
    run = jax.jit(
        lambda archs: cloud.accuracy(
            PARAMS, IMAGES, LABELS, CONFIG, SPACE, archs, layout.make_mesh(2)
        )
    )
    actual = run(tiny.stack(population(5)))
    np.testing.assert_allclose(actual, sliced_accuracy(6)[:5], rtol=1e-6)


def test_the_form_for_accelerators_gives_the_same(monkeypatch):
    """Masked and vmapped; here on CPU, by a mesh that says it is something else."""
    monkeypatch.setattr(cloud, "_runs_dense", lambda mesh: False)
    run = jax.jit(
        lambda archs: cloud.accuracy(
            PARAMS, IMAGES, LABELS, CONFIG, SPACE, archs, layout.make_mesh(1)
        )
    )
    np.testing.assert_allclose(run(tiny.stack(population(6))), sliced_accuracy(6), rtol=1e-6)


def test_costs_are_those_of_the_sliced_networks():
    archs = population(6)
    actual = np.asarray(cloud.costs(DIMS, tiny.stack(archs), REFERENCE_PROFILE))
    assert cloud.OBJECTIVES == ("error", "size_bytes", "latency_s", "energy_j")
    profile = REFERENCE_PROFILE
    for row, arch in zip(actual, archs, strict=True):
        sliced = slicing.slice_params(PARAMS, arch)
        size = 4 * (tiny.count(sliced) - tiny.count(sliced["classifier"]))
        flops = float(cost.num_flops(DIMS, arch))
        latency = max(flops / profile.flops_per_s, size / profile.bytes_per_s)
        latency += profile.overhead_s * len(sliced["blocks"])
        energy = latency * profile.idle_power_w + flops * profile.energy_per_flop_j
        energy += size * profile.energy_per_byte_j
        np.testing.assert_allclose(row, [size, latency, energy], rtol=1e-5)


def evaluate_with(limit, mesh):
    return cloud.make_evaluate(
        PARAMS,
        IMAGES,
        LABELS,
        CONFIG,
        SPACE,
        mesh,
        dims=DIMS,
        profile=REFERENCE_PROFILE,
        size_limit=limit,
    )


SIZE = int(cost.size_bytes(DIMS, tiny.GENOMES[2]))  # a limit between the extremes


@functools.cache
def found():
    """A whole search inside one program, on two devices."""
    searcher = nsga2.nsga2(SPACE, population_size=6)
    evaluate = evaluate_with(SIZE, layout.make_mesh(2))
    reference = jnp.asarray([1.0, 1e6, 1.0, 1.0])

    def run(key):
        result = nsga2.search(key, searcher, evaluate, num_generations=5, reference=reference)
        again = evaluate(result.population)
        return result, again

    return jax.jit(run)(jax.random.key(0))


def test_search_inside_one_program_keeps_the_limit():
    result, (objectives, violation) = found()
    np.testing.assert_allclose(result.objectives, objectives, rtol=1e-6)
    np.testing.assert_allclose(result.violation, violation, rtol=1e-6)
    size = np.asarray(objectives[:, cloud.SIZE_COLUMN], np.float64)
    np.testing.assert_allclose(violation, np.maximum(size / SIZE - 1, 0), rtol=1e-5, atol=1e-6)
    valid = np.asarray(result.archive.valid)
    rows = np.asarray(result.archive.objectives)[valid]
    assert len(rows) >= 1
    assert rows[:, cloud.SIZE_COLUMN].max() <= SIZE
    for i, row in enumerate(rows):
        others = np.delete(rows, i, axis=0)
        assert not np.any(np.all(others <= row, axis=1) & np.any(others < row, axis=1))
    assert np.all(np.diff(result.hypervolume) >= -1e-6 * np.abs(result.hypervolume[:-1]))


def test_found_genomes_have_the_reported_objectives():
    result, _ = found()
    for index in np.flatnonzero(result.archive.valid)[:4]:
        arch = jax.tree.map(lambda leaf, i=index: leaf[i], result.archive.genomes)
        tiny.assert_trees_equal(arch, canonical(SPACE, arch))
        sliced = slicing.slice_params(PARAMS, arch)
        logits = np.asarray(slicing.apply(sliced, IMAGES, CONFIG).logits)
        error = 1 - np.mean(logits.argmax(axis=1) == np.asarray(LABELS))
        size = 4 * (tiny.count(sliced) - tiny.count(sliced["classifier"]))
        row = result.archive.objectives[index]
        np.testing.assert_allclose(row[0], error, rtol=1e-5, atol=1e-6)
        assert float(row[cloud.SIZE_COLUMN]) == size


def test_limits_below_the_smallest_network_are_refused_with_its_size():
    smallest = tiny.genome(1, [1] * 4, [2] * 4)
    size = int(cost.size_bytes(DIMS, smallest))
    cloud.check_limits(DIMS, SPACE, [size, 10 * size])
    message = rf"edge 1: .* {size - 1:,} bytes .* smallest sub-network has {size:,} bytes"
    with pytest.raises(ConfigError, match=message):
        cloud.check_limits(DIMS, SPACE, [size, size - 1])


# error, size, latency, energy. Rows 1 to 3 lie in cells of the grid where a larger
# network represents them; the last places are empty.
ROWS = np.array(
    [
        [0.10, 1000, 9e-3, 9.0],
        [0.20, 600, 6e-3, 5.0],
        [0.21, 590, 5.9e-3, 5.9],
        [0.35, 300, 3e-3, 3.0],
        [0.80, 100, 1e-3, 1.0],
    ]
)
LIMITS = [1000.0, 650.0, 599.0, 300.0, 299.0]


def make_state(rows):
    capacity = 8
    genomes = tiny.stack(tiny.random_genomes(capacity, seed=4))
    objectives = np.full((capacity, 4), np.nan, np.float32)
    objectives[: len(rows)] = rows
    valid = jnp.arange(capacity) < len(rows)
    archive = Archive(genomes, jnp.asarray(objectives), valid)
    nothing = jnp.zeros(())
    return nsga2.SearchState(nothing, nothing, nothing, nothing, nothing, archive)


def expected_row(rule, limit):
    low, high = ROWS.min(axis=0), ROWS.max(axis=0)
    normal = (ROWS - low) / (high - low)
    score = {
        "lowest_error": ROWS[:, 0],
        "trade_off": ROWS[:, 0] + 0.5 * (normal[:, 1] + normal[:, 3]),
        "nearest_ideal": (normal**2).sum(axis=1),
    }[rule]
    return int(np.argmin(np.where(ROWS[:, 1] <= limit, score, np.inf)))


@pytest.mark.parametrize("rule", ["lowest_error", "trade_off", "nearest_ideal"])
def test_every_edge_gets_the_best_network_within_its_limit(rule):
    state = make_state(ROWS)
    choices = cloud.choose_backbones(state, LIMITS, SearchConfig(rule=rule))
    for choice, limit in zip(choices, LIMITS, strict=True):
        assert choice.row == expected_row(rule, limit)
        assert choice.objectives[cloud.SIZE_COLUMN] <= limit
        np.testing.assert_allclose(choice.objectives, ROWS[choice.row], rtol=1e-6)
        archived = jax.tree.map(lambda leaf, i=choice.row: leaf[i], state.archive.genomes)
        tiny.assert_trees_equal(choice.arch, archived)
        assert np.ndim(choice.arch.depth) == 0


def test_rules_choose_differently():
    picks = {
        rule: [c.row for c in cloud.choose_backbones(make_state(ROWS), LIMITS, config)]
        for rule in ("lowest_error", "trade_off", "nearest_ideal", "paper")
        for config in [SearchConfig(rule=rule)]
    }
    assert picks["lowest_error"] == [0, 1, 2, 3, 4]
    assert len({tuple(p) for p in picks.values()}) > 1


def test_the_papers_rule_falls_back_where_its_grid_hides_every_small_network():
    """One cell holds all; its representative is the one nearest to the ideal, too large."""
    rows = np.array(
        [
            [0.1, 1000, 1e-3, 1.0],
            [0.5, 900, 5e-3, 5.0],
            [0.6, 890, 6e-3, 6.0],
            [0.9, 2e3, 9e-3, 9.0],
        ]
    )
    config = SearchConfig(rule="paper", num_divisions=1)
    chosen = cloud.choose_backbones(make_state(rows), [1000.0, 950.0], config)
    assert [choice.row for choice in chosen] == [0, 1]


def test_no_network_within_the_limit_is_an_error():
    with pytest.raises(ConfigError, match="no sub-network within 99 bytes for edge 1"):
        cloud.choose_backbones(make_state(ROWS), [1000.0, 99.0], SearchConfig())


@pytest.mark.parametrize("batch_size", [1, 3, 5, 8])
def test_accuracy_in_batches_equals_all_at_once(batch_size):
    images, labels = tiny.make_images(5)
    archs = tiny.stack(tiny.GENOMES)
    mesh = layout.make_mesh(1)
    whole, parts = (
        cloud.accuracy(tiny.make_params(), images, labels, CONFIG, SPACE, archs, mesh, size)
        for size in (None, batch_size)
    )
    np.testing.assert_array_equal(whole, parts)
