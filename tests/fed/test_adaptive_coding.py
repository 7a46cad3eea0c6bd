"""Streams: exact round trips, a plain reference model, ideal lengths, damage, sizes."""

import dataclasses
import heapq
import math
import time
import zlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed.adaptive_coding import Rules, code_length, decode, encode, start
from fed.coding_sizes import importance_stream, measure
from fed.errors import SegmentError


def send(rules, messages, state=None):
    state = start(rules) if state is None else state
    segments = []
    for message in messages:
        state, segment = encode(rules, state, message)
        segments.append(segment)
    return state, segments


def receive(rules, segments, shapes, state=None):
    state = start(rules) if state is None else state
    messages = []
    for segment, shape in zip(segments, shapes, strict=True):
        state, message = decode(rules, state, segment, shape)
        messages.append(message)
    return state, messages


def ideal_bits(rules, messages):
    state, bits = start(rules), []
    for message in messages:
        bits.append(code_length(rules, state, message))
        state, _ = encode(rules, state, message)
    return np.asarray(bits)


def masks(num_rounds=20, num_gates=1024, pruned=10, seed=0):
    rng = np.random.default_rng(seed)
    mask, result = np.ones(num_gates, np.uint8), []
    for _ in range(num_rounds):
        mask = mask.copy()
        mask[rng.choice(np.flatnonzero(mask), pruned, replace=False)] = 0
        result.append(mask)
    return result


@st.composite
def streams(draw):
    alphabet = draw(st.sampled_from([2, 3, 16, 255, 256]))
    rules = Rules(
        alphabet=alphabet,
        prediction=draw(st.sampled_from(["previous", "none"])),
        num_contexts=draw(st.integers(1, min(alphabet, 5))),
        batch_size=draw(st.sampled_from([1, 3, 64, 1000])),
        increment=draw(st.sampled_from([0, 1, 16, 1000])),
        limit=draw(st.sampled_from([2 * alphabet, 1 << 15])),
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    length, messages = draw(st.integers(0, 70)), []
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):  # otherwise as long as the one before
            length = draw(st.integers(0, 70))
        rows = draw(st.sampled_from([(), (1,), (3,)]))
        weights = rng.dirichlet(np.full(alphabet, 0.1))
        messages.append(rng.choice(alphabet, (*rows, length), p=weights).astype(np.uint8))
    return rules, messages


@settings(max_examples=80, deadline=None)
@given(streams())
def test_round_trip(stream):
    rules, messages = stream
    sender, segments = send(rules, messages)
    receiver, read = receive(rules, segments, [message.shape for message in messages])
    for message, other in zip(messages, read, strict=True):
        np.testing.assert_array_equal(other, message)
        assert other.dtype == np.uint8
    assert receiver.counts.tobytes() == sender.counts.tobytes()
    assert receiver.digest == sender.digest
    lengths = np.asarray([len(segment) for segment in segments])
    assert (lengths <= 1.005 * ideal_bits(rules, messages) / 8 + 8).all()


def plain_code_length(rules, messages):
    """The model symbol by symbol in Python's integers and fractions: bits of each message."""
    counts = [[1] * rules.alphabet for _ in range(1 + rules.num_contexts)]
    above, bits = [], []
    for message in messages:
        probability = Fraction(1)
        for row in np.atleast_2d(message).tolist():
            known = len(above) == len(row)
            coded = []
            for place, symbol in enumerate(row):
                other = above[place] if known else 0
                context = 1 + other * rules.num_contexts // rules.alphabet if known else 0
                if rules.prediction == "previous":
                    symbol = (symbol - other) % rules.alphabet
                coded.append((context, symbol))
            for first in range(0, len(row), rules.batch_size):
                batch = coded[first : first + rules.batch_size]
                for context, symbol in batch:
                    table, free = counts[context], 65536 - rules.alphabet
                    low, high = (sum(table[:s]) * free // sum(table) for s in (symbol, symbol + 1))
                    probability *= Fraction(1 + high - low, 65536)
                for context, symbol in batch:
                    counts[context][symbol] += rules.increment
                for context, table in enumerate(counts):
                    while sum(table) > rules.limit:
                        table = counts[context] = [(count + 1) // 2 for count in table]
            above = row
        bits.append(math.log2(probability.denominator) - math.log2(probability.numerator))
    return bits


@pytest.mark.parametrize("prediction", ["previous", "none"])
@pytest.mark.parametrize(("alphabet", "contexts"), [(2, 2), (7, 3), (256, 1)])
def test_model_equals_a_plain_one(prediction, alphabet, contexts):
    rng = np.random.default_rng(alphabet)
    rules = Rules(alphabet, prediction, contexts, batch_size=10, increment=20, limit=600)
    shapes = [(40,), (40,), (3, 25), (25,), (40,)]
    weights = rng.dirichlet(np.full(alphabet, 0.2))
    messages = [rng.choice(alphabet, shape, p=weights) for shape in shapes]
    expected = plain_code_length(rules, messages)
    np.testing.assert_allclose(ideal_bits(rules, messages), expected, rtol=1e-9)


@pytest.mark.parametrize("damage", ["flip", "cut", "append", "empty"])
def test_damage_is_one_error_and_can_be_mended(damage):
    rules, messages = Rules(), importance_stream(0, num_rounds=3, num_gates=50)
    _, segments = send(rules, messages)
    state, _ = receive(rules, segments[:1], [(50,)])
    before = (state.counts.copy(), state.above.copy(), state.digest)
    good = segments[1]
    bad = {
        "flip": [
            bytes([*good[:i], good[i] ^ 1 << bit, *good[i + 1 :]])
            for i in range(len(good))
            for bit in (0, 7)
        ],
        "cut": [good[:i] for i in range(1, len(good))] + [good[1:]],
        "append": [good + b"\0", b"\0" + good, good + b"x", good + good],
        "empty": [b""],
    }[damage]
    for segment in bad:
        with pytest.raises(SegmentError, match="fails its checksum"):
            decode(rules, state, segment, (50,))
    for old, new in zip(before, state, strict=True):
        np.testing.assert_array_equal(old, new)
    _, rest = receive(rules, segments[1:], [(50,)] * 2, state)
    np.testing.assert_array_equal(rest, messages[1:])


@pytest.mark.parametrize("increment", [0, 16])
def test_order_loss_and_repetition_fail(increment):
    rules = Rules(increment=increment, prediction="none")
    messages = importance_stream(1, num_rounds=4, num_gates=30)
    _, segments = send(rules, messages)
    for order in ([1, 0, 2], [0, 2, 1], [0, 2, 3], [0, 0, 1], [3]):
        with pytest.raises(SegmentError):
            receive(rules, [segments[i] for i in order], [(30,)] * len(order))
    # Even a repeated message is not the same segment again.
    _, (first, second) = send(Rules(increment=0, prediction="none"), [messages[0]] * 2)
    assert first[:-4] == second[:-4] and first != second


def test_other_rules_start_or_shape_fail():
    rules, messages = Rules(), importance_stream(2, num_rounds=1, num_gates=30)
    _, (segment,) = send(rules, messages)
    other = start(rules, np.full((2, 256), 2))
    wrong = Rules(increment=17)
    for arguments in (
        (rules, other, segment, (30,)),
        (wrong, start(wrong), segment, (30,)),
        (rules, start(rules), segment, (29,)),
        (rules, start(rules), segment, (31,)),
        (rules, start(rules), segment, (2, 15)),
    ):
        with pytest.raises(SegmentError):
            decode(*arguments)


def test_first_batch_costs_the_same_as_without_adaptation():
    rules, message = Rules(batch_size=64), importance_stream(3, num_rounds=1)[0]
    fixed = dataclasses.replace(rules, increment=0)
    for rule in (rules, fixed):
        assert code_length(rule, start(rule), message[:64]) == pytest.approx(512, abs=1e-9)
    codes = [encode(rule, start(rule), message[:64])[1][:-4] for rule in (rules, fixed)]
    assert codes[0] == codes[1] == bytes(message[:64].tolist()).rstrip(b"\0")
    longer = [code_length(rule, start(rule), message[:128]) for rule in (rules, fixed)]
    assert longer[0] != pytest.approx(longer[1])


def test_cost_falls_to_the_entropy_of_shifted_data():
    rng = np.random.default_rng(4)
    weights = rng.dirichlet(np.full(256, 0.05))
    entropy = -(weights * np.log2(weights, where=weights > 0, out=np.zeros(256))).sum()
    messages = rng.choice(256, (600, 64), p=weights)
    bits = ideal_bits(Rules(prediction="none", limit=1 << 20), messages) / 64
    costs = bits[0], bits[1:5].mean(), bits[5:40].mean(), bits[40:200].mean(), bits[200:].mean()
    assert costs[0] == pytest.approx(8) and (np.diff(costs) < 0).all()
    assert abs(costs[-1] / entropy - 1) < 0.01
    # After theta_0 of the same source, already the first message costs no more.
    rules = Rules(prediction="none", batch_size=1000)
    state, _ = send(rules, messages[:300])
    rest = np.ravel(messages[300:])
    assert code_length(rules, start(rules, state.counts), rest) < 1.02 * entropy * rest.size


def test_masks_cost_their_combinations():
    rules = Rules(alphabet=2, num_contexts=2)
    ideal = [math.log2(math.comb(1024 - 10 * t, 10)) for t in range(20)]
    assert ideal[0] == pytest.approx(78, abs=0.3)
    bits = ideal_bits(rules, masks())
    assert bits[5:].sum() < 1.06 * sum(ideal[5:])
    _, segments = send(rules, masks())
    assert max(len(segment) for segment in segments[2:]) <= 4 + 11


def test_momentum_is_what_saves():
    total = {}
    for momentum in (0.9, 0.0):
        stream = importance_stream(0, momentum=momentum)
        sizes = measure(Rules(), stream)
        total[momentum] = {name: value.sum() for name, value in sizes._asdict().items()}
        lengths = [len(segment) for segment in send(Rules(), stream)[1]]
        np.testing.assert_array_equal(sizes.adaptive_bytes, lengths)
        assert (sizes.zlib_bytes == [len(zlib.compress(m.tobytes(), 9)) for m in stream]).all()
        assert (sizes.raw_bytes == 1024).all() and (sizes.float16_bytes == 2048).all()
        assert (sizes.static_bytes <= 1024 + 4).all()
    smooth, rough = total[0.9], total[0.0]
    # 20 rounds of 1,024 gates: 6.4 kB of 20.5 kB raw; every round by itself 14.9 kB.
    assert smooth["adaptive_bytes"] < 0.33 * smooth["raw_bytes"]
    assert smooth["adaptive_bytes"] < 0.8 * smooth["zlib_difference_bytes"]
    assert smooth["adaptive_bytes"] < 0.36 * min(smooth["zlib_bytes"], smooth["huffman_bytes"])
    assert 0.6 * rough["raw_bytes"] < rough["adaptive_bytes"] < rough["zlib_difference_bytes"]


def test_expectations_follow_a_changing_scale():
    rules, rng = Rules(), np.random.default_rng(7)
    stream = (importance_stream(7, num_rounds=8, num_gates=400) // 2).astype(int)
    slope, offset = rng.uniform(0.8, 1.2, 8), rng.integers(0, 90, 8)
    messages = np.rint(slope[:, None] * stream + offset[:, None]).astype(int)
    in_new_scale = np.rint(slope[1:, None] * stream[:-1] + offset[1:, None]).astype(int)
    sender, receiver, lengths = start(rules), start(rules), []
    for message, other in zip(messages, [None, *in_new_scale], strict=True):
        before = receiver
        sender, segment = encode(rules, sender, message, expected=other)
        receiver, read = decode(rules, receiver, segment, (400,), expected=other)
        np.testing.assert_array_equal(read, message)
        lengths.append(len(segment))
    with pytest.raises(SegmentError):
        decode(rules, before, segment, (400,), expected=np.roll(other, 1))
    with pytest.raises(SegmentError):
        decode(rules, before, segment, (400,))
    blind = [len(segment) for segment in send(rules, messages)[1]]
    assert sum(lengths[1:]) < 0.6 * sum(blind[1:])
    with pytest.raises(ValueError, match="expected has rows"):
        encode(rules, sender, messages[0], expected=messages[0][:-1])


def test_expectations_equal_to_the_row_above_change_nothing():
    messages = importance_stream(8, num_rounds=3, num_gates=100)
    rules = Rules(num_contexts=3)
    _, segments = send(rules, messages)
    state = start(rules)
    for index, message in enumerate(messages):
        expected = messages[index - 1] if index else None
        state, segment = encode(rules, state, message, expected=expected)
        assert segment == segments[index]
    above = np.concatenate([messages[-1:], messages[:2]])
    lengths = [code_length(rules, state, messages, expected=other) for other in (None, above)]
    assert lengths[0] == lengths[1]


def test_rows_of_a_sketch_follow_one_another():
    values = np.sort(np.random.default_rng(5).normal(size=(32, 64)), axis=0)
    sketch = np.rint(255 * (values - values.min()) / np.ptp(values)).astype(np.uint8)
    sizes = measure(Rules(), [sketch])
    assert sizes.adaptive_bytes[0] < 0.55 * sizes.raw_bytes[0]
    assert sizes.adaptive_bytes[0] < sizes.zlib_bytes[0]


def test_huffman_baseline_is_optimal():
    messages = [*masks(3), np.asarray([0, 1, 2, 2, 3, 3, 3, 3] * 10)]
    sizes = measure(Rules(alphabet=4), messages)
    weights = np.bincount(np.concatenate(messages)).tolist()
    heapq.heapify(weights)
    bits = 0  # the cost of a Huffman tree is the sum of its inner nodes
    while len(weights) > 1:
        both = heapq.heappop(weights) + heapq.heappop(weights)
        bits += both
        heapq.heappush(weights, both)
    assert bits <= 8 * (sizes.huffman_bytes.sum() - 4) < bits + 8 * len(messages)
    same = measure(Rules(alphabet=4), [np.zeros(16, int)])
    assert same.huffman_bytes[0] == 2 + 4 and same.raw_bytes[0] == 4


def test_a_hundred_thousand_symbols_take_seconds():
    stream = importance_stream(6, num_rounds=100)
    begin = time.perf_counter()
    _, segments = send(Rules(), stream)
    receive(Rules(), segments, [(1024,)] * 100)
    assert time.perf_counter() - begin < 8  # 0.5 s on an idle core


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alphabet": 1}, "alphabet must be from 2 to 256"),
        ({"alphabet": 257}, "alphabet"),
        ({"num_contexts": 0}, "num_contexts"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"increment": -1}, "increment"),
        ({"limit": 511}, "limit must be from 512"),
        ({"prediction": "linear"}, "'previous' or 'none'"),
    ],
)
def test_bad_rules(change, message):
    with pytest.raises(ValueError, match=message):
        Rules(**change)


@pytest.mark.parametrize(
    ("symbols", "message"),
    [
        (np.zeros(3), "quantise them first"),
        (np.asarray([0, 16]), "from 0 to 15"),
        (np.asarray([-1]), "from 0 to 15"),
        (np.zeros((1, 1, 1), int), "shape"),
    ],
)
def test_bad_symbols(symbols, message):
    rules = Rules(alphabet=16)
    with pytest.raises(ValueError, match=message):
        encode(rules, start(rules), symbols)


@pytest.mark.parametrize("counts", [np.ones((1, 256)), np.zeros((2, 256)), np.full((2, 256), 200)])
def test_bad_start(counts):
    with pytest.raises(ValueError, match="counts must have shape"):
        start(Rules(), counts.astype(int))
