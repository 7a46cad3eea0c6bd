"""Reassembly: distances, groups, candidates and their rules against plain loops; whole models."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fed import reassembly, stitching
from fed.cka import linear_cka

HEADERS = reassembly.units_of([(0, 0, 1)] * 4)
MIXED = reassembly.units_of([(0, 1), (0, 0, 1, 1), (0, 0, 0, 1), (0, 1, 1)])
grow = jax.jit(
    lambda units, groups, distance, k: reassembly.candidates(
        HEADERS if units == 0 else MIXED, groups, distance, k
    ),
    static_argnums=(0, 3),
)


def alignment(x, y):
    """In float64, from feature covariances, where the library uses Gram matrices."""
    x, y = (m - m.mean(0) for m in (np.asarray(x, np.float64), np.asarray(y, np.float64)))
    cross, *own = (np.linalg.norm(a.T @ b) for a, b in ((x, y), (x, x), (y, y)))
    return cross**2 / (own[0] * own[1])


def test_alignment_sees_through_rotation_scale_and_shift_and_little_in_noise():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 100, 8)).astype(np.float32)
    rotation, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    same = jax.jit(linear_cka)(x[0], (3 * x[0] @ rotation + 1).astype(np.float32))
    assert same == pytest.approx(1, abs=1e-5)
    independent = jax.jit(jax.vmap(linear_cka))(x[::2], x[1::2])
    assert np.mean(independent) == pytest.approx(0.07, abs=0.01)


def test_distances_are_those_of_the_definition_whatever_the_widths():
    rng = np.random.default_rng(1)
    shapes = ((5, 3), (5, 7), (3, 2), (2, 2, 4))
    inputs, outputs = ([rng.normal(size=(30, *s[k:])) for s in shapes] for k in (0, 1))
    inputs.append(inputs[1]), outputs.append(-2 * outputs[1] + 5)
    arrays = [
        reassembly.pad_columns([jnp.asarray(m, jnp.float32) for m in part])
        for part in (inputs, outputs)
    ]
    assert arrays[0].shape == (5, 30, 35)
    found = np.asarray(jax.jit(reassembly.unit_distances)(*arrays))
    flat = [[m.reshape(30, -1) for m in part] for part in (inputs, outputs)]
    for i, j in itertools.product(range(5), repeat=2):
        expected = 1 / sum(alignment(part[i], part[j]) for part in flat)
        assert found[i, j] == pytest.approx(expected, rel=1e-4)
    assert found[1, 4] == pytest.approx(0.5, abs=1e-5) and np.allclose(np.diag(found), 0.5)


def planted(rng, sizes, far=5.0):
    """Distances of points around far centres, shuffled, and their true groups."""
    truth = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    points = far * np.eye(len(sizes))[truth] + 0.3 * rng.normal(size=(len(truth), len(sizes)))
    distance = 0.5 + np.linalg.norm(points[:, None] - points[None], axis=-1)
    return distance.astype(np.float32), truth


@pytest.mark.parametrize("sizes", [(7,), (5, 5), (9, 2, 6), (3, 8, 1, 4)])
def test_planted_groups_are_found(sizes):
    group = jax.jit(reassembly.group, static_argnums=1)
    for seed in range(5):
        distance, truth = planted(np.random.default_rng(seed), sizes)
        found = np.asarray(group(distance, len(sizes)))
        together, expected = (labels[:, None] == labels[None] for labels in (found, truth))
        assert np.array_equal(together, expected)


def test_equal_units_are_one_group_and_the_others_stay_empty():
    found = reassembly.group(jnp.full((4, 4), 0.5), 3)
    assert np.array_equal(found, np.zeros(4))


def kept_rules(units, members, groups, num_groups):
    """R1 to R4, as the paper words them."""
    layers, kinds = units.layer[members], units.operation[members]
    return (
        all(a < b for a, b in itertools.pairwise(layers)),
        all(a <= b for a, b in itertools.pairwise(kinds)),
        set(kinds) == set(units.operation),
        set(groups[members]) == set(range(num_groups)),
    )


def grown_by_hand(units, groups, distance, num_groups):
    """The greedy search with sets and loops."""
    numbers = range(len(units.layer))

    def fits(a, b):
        a, b = sorted((a, b), key=lambda u: units.layer[u])
        return units.layer[a] < units.layer[b] and units.operation[a] <= units.operation[b]

    found = set()
    for pair in itertools.combinations(numbers, 2):
        chosen = list(pair)
        if not fits(*pair) or groups[pair[0]] != groups[pair[1]]:
            continue
        while {groups[u] for u in chosen} != set(range(num_groups)):
            open_ = [
                u
                for u in numbers
                if groups[u] not in {groups[c] for c in chosen} and all(fits(u, c) for c in chosen)
            ]
            if not open_:
                break
            chosen.append(min(open_, key=lambda u: sum(distance[u, c] for c in chosen)))
        chosen.sort(key=lambda u: units.layer[u])
        if all(kept_rules(units, np.asarray(chosen), groups, num_groups)):
            found.add(tuple(chosen))
    return found


@pytest.mark.parametrize(("which", "num_groups"), [(0, 2), (1, 2), (1, 3)])
def test_candidates_are_those_of_plain_loops_and_keep_all_rules(which, num_groups):
    units = (HEADERS, MIXED)[which]
    count = len(units.layer)
    total = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        groups = rng.integers(num_groups, size=count)
        distance = rng.uniform(0.5, 3, size=(count, count)).astype(np.float32)
        distance += distance.T
        candidates = grow(which, groups, distance, num_groups)
        rows = np.asarray(candidates.members)[np.asarray(candidates.found)]
        for members in rows:
            assert all(kept_rules(units, members, groups, num_groups))
        assert len({tuple(row) for row in rows}) == len(rows)  # none comes twice
        assert {tuple(row) for row in rows.tolist()} == grown_by_hand(
            units, groups, distance, num_groups
        )
        total += len(rows)
    assert total > 20


def test_more_groups_than_the_layers_can_hold_leave_no_candidates():
    rng = np.random.default_rng(3)
    groups, distance = rng.permutation(np.arange(12) % 3), np.ones((12, 12), np.float32)
    assert not np.any(grow(0, groups, distance, 3).found)
    assert np.any(grow(0, groups % 2, distance, 2).found)


def test_each_rule_is_seen_to_be_broken():
    # Client 0 has units 0, 1, 2 of layers 0, 1, 2; the last layer is of another kind.
    groups = jnp.asarray([0, 1, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0])
    for members, expected in (
        ([0, 4, 5], (True, True, True, True)),
        ([4, 0, 5], (False, True, True, True)),  # layers 1, 0, 2
        ([0, 3, 5], (False, True, True, True)),  # twice layer 0
        ([2, 0, 1], (False, False, True, True)),
        ([0, 1], (True, True, False, True)),
        ([0, 4, 8], (True, True, True, False)),
    ):
        found = reassembly.rules(HEADERS, jnp.asarray(members), groups, 2)
        assert tuple(map(bool, found)) == expected
        assert expected == kept_rules(HEADERS, np.asarray(members), np.asarray(groups), 2)


def test_a_draw_takes_what_was_found_first():
    found = jnp.arange(10) % 3 == 0  # rows 0, 3, 6, 9
    rows = reassembly.Candidates(jnp.stack([jnp.arange(10)] * 2, axis=1), found)
    draw = jax.jit(reassembly.draw, static_argnums=2)
    seen = set()
    for seed in range(10):
        few, all_, more = (draw(jax.random.key(seed), rows, n) for n in (2, 6, 12))
        assert few.found.all() and len(set(few.members[:, 0].tolist())) == 2
        seen |= set(few.members[:, 0].tolist())
        assert set(all_.members[:4, 0].tolist()) == {0, 3, 6, 9}
        assert all_.found.tolist() == [True] * 4 + [False] * 2
        assert more.members.shape == (12, 2) and more.found.sum() == 4
    assert seen == {0, 3, 6, 9}


def test_errors():
    with pytest.raises(ValueError, match="num_groups must be from 1 to 4 units, got 5"):
        reassembly.group(jnp.ones((4, 4)), 5)
    single = reassembly.units_of([(0,), (0,)])
    with pytest.raises(ValueError, match="at least two layers"):
        reassembly.candidates(single, jnp.zeros(2, int), jnp.ones((2, 2)), 1)


# Whole models: signals of 12 steps through convolutions, then dense layers; of different depths,
# numbers of channels and widths.

NUM_CLASSES = 3
ARCHITECTURES = (((2,), (6,)), ((2, 3), (8,)), ((3,), (6, 5)), ((4, 2), ()))


def make_model(rng, channels, widths):
    """Layers as (kind, kernel, whether the last); convolutions are circular, three steps wide."""
    layers, read = [], 1
    for count in channels:
        layers.append((0, rng.normal(size=(3, read, count)) / np.sqrt(3 * read), False))
        read = count
    read *= 12
    for place, count in enumerate((*widths, NUM_CLASSES)):
        kernel = rng.normal(size=(read, count)) * np.sqrt(2 / read)
        layers.append((1, kernel, place == len(widths)))
        read = count
    return [(kind, jnp.asarray(kernel, jnp.float32), last) for kind, kernel, last in layers]


def width_read(layer):
    return layer[1].shape[0] if layer[0] else 12 * layer[1].shape[1]


def through(layer, values):
    """Flat activations [N, P] -> [N, Q]."""
    kind, kernel, last = layer
    if kind:
        values = values @ kernel
    else:
        signal = values.reshape(len(values), 12, -1)
        shifted = [jnp.roll(signal, 1 - step, axis=1) @ kernel[step] for step in range(3)]
        values = sum(shifted).reshape(len(values), -1)
    return values if last else jax.nn.relu(values)


def passes(layers, values):
    found = [values]
    for layer in layers:
        found.append(through(layer, found[-1]))
    return found


def stitched(layers, stitches, values):
    for layer, stitch in zip(layers, stitches, strict=True):
        values = through(layer, values if stitch is None else stitching.apply(stitch, values))
    return values


def stitch_all(layers, reads, values):
    """A stitch wherever the width that a layer reads is not what comes."""
    stitches = []
    for layer, read in zip(layers, reads, strict=True):
        fits = values.shape[1] == width_read(layer)
        stitches.append(None if fits else stitching.fit(values, read))
        values = stitched([layer], stitches[-1:], values)
    return stitches


def test_whole_models_of_different_architectures_are_reassembled():
    rng = np.random.default_rng(5)
    models = [make_model(rng, *architecture) for architecture in ARCHITECTURES]
    # The layer that gives logits is a kind of its own.
    units = reassembly.units_of([[kind + last for kind, _, last in model] for model in models])
    assert units.operation.tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 1, 1, 2, 0, 0, 2]
    inputs = jnp.asarray(rng.normal(size=(80, 12)), jnp.float32)
    labels = jnp.asarray(inputs[:, :4].argmax(1) % NUM_CLASSES)
    passed = [jax.jit(functools.partial(passes, model))(inputs) for model in models]
    layers = [layer for model in models for layer in model]
    reads = [read for each in passed for read in each[:-1]]
    gives = [given for each in passed for given in each[1:]]
    distance = reassembly.unit_distances(*map(reassembly.pad_columns, (reads, gives)))
    groups = reassembly.group(distance, 2)
    candidates = reassembly.candidates(units, groups, distance, 2)
    rows = np.asarray(candidates.members)[np.asarray(candidates.found)]
    mixed = [row for row in rows if len(set(units.owner[row])) > 1]
    assert len(mixed) > 3
    for row in mixed[:2]:
        assert all(kept_rules(units, row, np.asarray(groups), 2))
        chosen, targets = [layers[u] for u in row], [reads[u] for u in row]

        @jax.jit
        def tuned(inputs, chosen=chosen, targets=targets):
            """Losses of the stitches as fitted and after a step on public labels."""

            def loss(stitches):
                out = stitched(chosen, stitches, inputs)
                assert out.shape == (80, NUM_CLASSES)
                return optax.softmax_cross_entropy_with_integer_labels(out, labels).mean()

            stitches = stitch_all(chosen, targets, inputs)
            before, gradients = jax.value_and_grad(loss)(stitches)
            after = jax.tree.map(lambda p, g: p - 0.05 * g, stitches, gradients)
            return before, loss(after)

        before, after = tuned(inputs)
        assert after < before
    # A candidate of one model's own units is that model.
    out = jax.jit(lambda x: stitched(models[1], stitch_all(models[1], passed[1][:-1], x), x))
    np.testing.assert_allclose(out(inputs), passed[1][-1], rtol=1e-6)
