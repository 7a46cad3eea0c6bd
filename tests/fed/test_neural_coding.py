"""Images coded by a learning network: exact round trips, a plain model, costs, damage."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_batches import SMALL, batches, blobs

from fed import pixel_model
from fed.errors import SegmentError
from fed.neural_coding import Settings, code_length, decode, encode, start
from fed.range_coder import TOTAL


def send(parts, settings=SMALL, state=None):
    state = start(settings, parts[0].shape[1:]) if state is None else state
    segments = []
    for part in parts:
        state, segment = encode(settings, state, part)
        segments.append(segment)
    return state, segments


def raw(tree):
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("settings", "shape", "levels"),
    [
        (SMALL, (15, 4, 4, 1), 17),
        (Settings(alphabet=256, batch_size=3, hidden=5, reach=2, steps=2), (7, 3, 2, 3), 256),
        (Settings(alphabet=2, batch_size=8, hidden=4, components=1, reach=1), (8, 1, 5, 1), 2),
    ],
)
def test_round_trip(settings, shape, levels):
    rng = np.random.default_rng(levels)
    images = rng.binomial(levels - 1, 0.3, shape).astype(np.uint8)
    images.flat[:2] = 0, levels - 1
    sender = receiver = start(settings, shape[1:])
    for part in batches(images, settings):
        ideal = code_length(settings, sender, part) / 8
        sender, segment = encode(settings, sender, part)
        receiver, read = decode(settings, receiver, segment, len(part))
        np.testing.assert_array_equal(read, part)
        assert read.dtype == np.uint8
        assert raw(receiver) == raw(sender)  # theta, the optimiser and the checksum
        assert len(segment) <= 1.005 * ideal + 8
    assert raw(sender.theta) != raw(start(settings, shape[1:]).theta)


def plain_table(settings, theta, image, row, column, channel):
    """Sizes of one value's intervals by loops over Python's floats, not rounded: [A]."""
    height, width, channels = image.shape
    inputs = []
    for r in range(row - settings.reach, row + 1):
        for c in range(column - settings.reach, column + settings.reach + 1):
            for ch in range(channels):
                inside = r >= 0 and 0 <= c < width
                known = inside and (r, c, ch) < (row, column, channel)
                inputs.append(
                    2 * float(image[r, c, ch]) / (settings.alphabet - 1) - 1 if known else 0
                )
    for at, size in ((row, height), (column, width)):
        inputs += [math.cos(math.pi * wave * (at + 0.5) / size) for wave in (1, 2, 3)]
    inputs += [float(ch == channel) for ch in range(channels)]
    theta = type(theta)(*(np.asarray(leaf, np.float64) for leaf in theta))
    hidden = np.tanh(np.asarray(inputs) @ theta.first + theta.first_bias)
    hidden = np.tanh(hidden @ theta.second + theta.second_bias)
    outputs = hidden @ theta.last + np.asarray(inputs) @ theta.direct + theta.bias
    logits, means, widths = outputs.reshape(3, -1)
    weights = np.exp(logits) / np.exp(logits).sum()
    edges = [0.0]
    for level in range(settings.alphabet - 1):
        point = 2 * (level + 0.5) / (settings.alphabet - 1) - 1
        edges.append(float(weights @ (1 / (1 + np.exp(-(point - means) / np.exp(widths))))))
    return 1 + np.diff([*edges, 1.0]) * (TOTAL - settings.alphabet)


def test_tables_equal_a_plain_model():
    settings = Settings(alphabet=9, batch_size=2, hidden=6, components=3, reach=2, seed=3)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 9, (2, 4, 3, 2)).astype(np.uint8)
    theta = jax.tree.map(
        lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32),
        pixel_model.init_theta(settings, 2),
    )
    bits = 0.0
    for place in pixel_model.places((4, 3, 2)):
        inputs = pixel_model.inputs_at(settings, images, *place)
        tables = np.asarray(pixel_model.frequencies(settings, theta, inputs))
        for image, table in zip(images, tables, strict=True):
            expected = plain_table(settings, theta, image, *place)
            np.testing.assert_allclose(table, expected, atol=1.2)  # 2^-16; floors, float32
            bits -= math.log2(expected[image[place]] / TOTAL)
    state = start(settings, (4, 3, 2), theta)
    assert code_length(settings, state, images) == pytest.approx(bits, rel=1e-3)


def test_the_step_minimises_what_the_code_costs():
    settings = dataclasses.replace(SMALL, learning_rate=0.001)
    images = blobs(6)
    state = start(settings, (4, 4, 1))
    after, _ = encode(settings, state, images)
    before, then = (code_length(settings, own, images) for own in (state, after))
    assert then < before
    # Adam's first step is the learning rate times the gradient's sign: compare with differences of
    # the code's own length, computed by other means than the gradient of the cost.
    moved = np.asarray(after.theta.bias - state.theta.bias)
    for place in range(6):
        lengths = []
        for side in (0.05, -0.05):
            bias = state.theta.bias.at[place].add(side)
            other = state._replace(theta=state.theta._replace(bias=bias))
            lengths.append(code_length(settings, other, images))
        assert np.sign(moved[place]) == np.sign(lengths[1] - lengths[0])
        assert abs(moved[place]) == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("alphabet", [2, 17, 256])
def test_tables_are_whole(alphabet, scale):
    settings = dataclasses.replace(SMALL, alphabet=alphabet)
    rng = np.random.default_rng(1)
    theta = jax.tree.map(
        lambda leaf: scale * rng.normal(size=leaf.shape).astype(np.float32),
        pixel_model.init_theta(settings, 1),
    )
    inputs = rng.uniform(-1, 1, (6, len(theta.first))).astype(np.float32)
    tables = pixel_model.frequencies(settings, theta, inputs)
    assert tables.dtype == jnp.uint32 and tables.shape == (6, alphabet)
    assert (np.asarray(tables).sum(axis=1) == TOTAL).all() and (np.asarray(tables) >= 1).all()


def test_inputs_know_only_the_past():
    rng = np.random.default_rng(2)
    images = rng.integers(0, 17, (2, 5, 4, 3)).astype(np.uint8)
    order = pixel_model.places((5, 4, 3))
    assert len(set(order)) == 60
    settings = dataclasses.replace(SMALL, reach=2)
    for index, place in enumerate(order):
        other = images.reshape(2, -1).copy()
        other[:, index:] = rng.integers(0, 17, (2, 60 - index))
        here = pixel_model.inputs_at(settings, images, *place)
        np.testing.assert_array_equal(
            here, pixel_model.inputs_at(settings, other.reshape(images.shape), *place)
        )
        other = images.reshape(2, -1).copy()
        if index:  # the value just before is known unless it stands a row above, out of reach
            other[:, index - 1] ^= 1
            new = pixel_model.inputs_at(settings, other.reshape(images.shape), *place)
            near = abs(order[index - 1][1] - place[1]) <= 2
            assert (new != here).any() == near


def test_cost_falls_on_a_shifted_distribution():
    start_up, _ = send(batches(blobs(120, seed=1)))
    parts = batches(blobs(240, seed=2, level=4.0))
    costs = {}
    for rate in (0.01, 0.0):
        settings = dataclasses.replace(SMALL, learning_rate=rate)
        state, bits = start(settings, (4, 4, 1), start_up.theta), []
        for part in parts:
            bits.append(code_length(settings, state, part) / part.size)
            state, _ = encode(settings, state, part)
        costs[rate] = np.asarray(bits)
        assert (raw(state.theta) == raw(start_up.theta)) == (rate == 0)
    adapted, fixed = costs[0.01], costs[0.0]
    assert adapted[0] == fixed[0]  # the first batch costs the same as without adaptation
    quarters = adapted.reshape(4, -1).mean(axis=1)
    assert (np.diff(quarters) < 0).all() and quarters[-1] < 0.9 * adapted[0]
    assert abs(np.diff(fixed.reshape(2, -1).mean(axis=1))[0]) < 0.1  # it is not the data
    assert adapted[20:].mean() < fixed[20:].mean() - 0.2


def test_another_order_fails():
    parts = batches(blobs(18, seed=3))
    _, segments = send(parts)
    state = start(SMALL, (4, 4, 1))
    later, _ = decode(SMALL, state, segments[0], 6)
    for own, segment, number in (
        (state, segments[1], 6),
        (later, segments[2], 6),
        (later, segments[0], 6),
        (later, segments[1], 5),
    ):
        with pytest.raises(SegmentError, match="fails its checksum"):
            decode(SMALL, own, segment, number)
    # Even without adaptation, and with the same images in every batch.
    fixed = dataclasses.replace(SMALL, learning_rate=0.0)
    _, (first, second) = send([parts[0], parts[0]], fixed)
    assert first[:-4] == second[:-4]
    with pytest.raises(SegmentError):
        decode(fixed, start(fixed, (4, 4, 1)), second, 6)


def test_other_floats_fail():
    images = blobs(6, seed=4)
    state = start(SMALL, (4, 4, 1))
    _, (segment,) = send([images])
    # One weight's last bit: too little to change a table, but not the checksum.
    bias = np.asarray(state.theta.bias).copy()
    bias[2] = np.nextafter(bias[2], np.float32(9))
    nearly = state._replace(theta=state.theta._replace(bias=jnp.asarray(bias)))
    with pytest.raises(SegmentError, match="another type of device"):
        decode(SMALL, nearly, segment, 6)
    for settings in (
        dataclasses.replace(SMALL, learning_rate=0.011),
        dataclasses.replace(SMALL, seed=1),
    ):
        with pytest.raises(SegmentError):
            decode(settings, start(settings, (4, 4, 1)), segment, 6)


def test_damage_fails_and_can_be_mended():
    images = blobs(6, seed=5)
    _, (good,) = send([images])
    state = start(SMALL, (4, 4, 1))
    before = raw(state)
    bad = [bytes([*good[:i], good[i] ^ 1, *good[i + 1 :]]) for i in range(0, len(good), 3)]
    for segment in (*bad, good[:-1], good[1:], good + b"\0", b"\0" + good, b"", good[:3]):
        with pytest.raises(SegmentError):
            decode(SMALL, state, segment, 6)
    assert raw(state) == before
    np.testing.assert_array_equal(decode(SMALL, state, good, 6)[1], images)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 4, 4, 1)), "must be integers"),
        (np.zeros((2, 4, 4), int), "must be .n, 4, 4, 1."),
        (np.zeros((7, 4, 4, 1), int), "1 to 6 images, got 7"),
        (np.zeros((0, 4, 4, 1), int), "got 0"),
        (np.full((1, 4, 4, 1), 17), "from 0 to 16"),
        (np.full((1, 4, 4, 1), -1), "from 0 to 16"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        encode(SMALL, start(SMALL, (4, 4, 1)), images)


def test_bad_settings_and_starts():
    for change in (
        {"alphabet": 1},
        {"batch_size": 0},
        {"hidden": 0},
        {"reach": 0},
        {"learning_rate": math.nan},
        {"steps": 0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(change))} must be from"):
            Settings(**change)
    with pytest.raises(ValueError, match="H, W, channels"):
        start(SMALL, (4, 4))
    with pytest.raises(ValueError, match="smaller batch_size"):
        start(SMALL, (4096, 4096, 1))
    theta = pixel_model.init_theta(dataclasses.replace(SMALL, hidden=9), 1)
    with pytest.raises(ValueError, match=r"theta\.first must be float32"):
        start(SMALL, (4, 4, 1), theta)
    state = start(SMALL, (4, 4, 1))
    lost = state._replace(theta=state.theta._replace(bias=state.theta.bias + jnp.nan))
    with pytest.raises(ValueError, match="no longer finite"):
        encode(SMALL, lost, blobs(6))
