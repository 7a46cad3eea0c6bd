"""Round trips, lengths against the ideal, codes known without arithmetic coding, any bytes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed.range_coder import TOTAL, Decoder, _carry, encode


def edges(sizes):
    return np.concatenate([[0], np.cumsum(sizes)])


def random_table(rng, alphabet, skew):
    """Edges of a table with A - 1 free sizes, from even to all but certain."""
    weights = rng.dirichlet(np.full(alphabet, skew))
    sizes = 1 + np.floor(weights * (TOTAL - alphabet)).astype(np.int64)
    sizes[sizes.argmax()] += TOTAL - sizes.sum()
    return edges(sizes)


def ideal_bits(sizes):
    return -np.log2(sizes / TOTAL).sum()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    alphabet=st.sampled_from([1, 2, 3, 17, 256, 1000]),
    length=st.integers(0, 300),
    num_tables=st.integers(1, 3),
    skew=st.sampled_from([0.001, 0.1, 1.0, 100.0]),
    batch=st.integers(1, 100),
)
def test_round_trip_and_length(seed, alphabet, length, num_tables, skew, batch):
    rng = np.random.default_rng(seed)
    tables = [random_table(rng, alphabet, skew) for _ in range(num_tables)]
    which = rng.integers(num_tables, size=length)
    # Half as the tables expect, half against them: rare symbols, carries.
    values = rng.integers(TOTAL, size=length)
    even = rng.integers(alphabet, size=length)
    stacked = np.stack(tables)
    expected = (values[:, None] >= stacked[which]).sum(axis=1) - 1
    symbols = np.where(rng.random(length) < 0.5, even, expected)
    code = encode(stacked[which, symbols], np.diff(stacked)[which, symbols])
    decoder = Decoder(code)
    parts = [decoder.decode(tables, which[i : i + batch]) for i in range(0, length, batch)]
    np.testing.assert_array_equal(np.concatenate([*parts, np.zeros(0, int)]), symbols)
    assert 8 * len(code) < ideal_bits(np.diff(stacked)[which, symbols]) + 1e-6 + 9


def test_bytes_under_an_even_table_are_themselves():
    symbols = np.random.default_rng(0).integers(1, 256, 1000)
    assert encode(symbols * 256, np.full(1000, 256)) == bytes(symbols.tolist())


def test_a_prefix_code_s_probabilities_give_its_bits():
    # Sizes that are powers of 2 leave no rounding: the code is the words' bits one after another.
    words = ["0", "10", "110", "1110", "1111"]
    starts = np.asarray([int(word.ljust(16, "0"), 2) for word in words])
    sizes = np.asarray([1 << (16 - len(word)) for word in words])
    symbols = np.random.default_rng(1).choice(5, 999, p=sizes / TOTAL)
    bits = "".join(words[s] for s in symbols)
    bits = bits.ljust(-(-len(bits) // 8) * 8, "0")
    expected = int(bits, 2).to_bytes(len(bits) // 8, "big").rstrip(b"\0")
    assert encode(starts[symbols], sizes[symbols]) == expected


def test_carries_run_through_full_words():
    assert _carry([0, 0xFFFF, 0xFFFF, 0x1_0002]) == bytes([0, 1, 0, 0, 0, 0, 0, 2])
    # 1/3 + 2/9 + 2/27 + ... stays just below 2/3; then all sequences of ends are tried.
    sizes = np.asarray([21845, 21846, 21845])
    table = edges(sizes)
    for end in itertools.product(range(3), repeat=4):
        symbols = np.asarray([1] + [2] * 60 + list(end))
        code = encode(table[symbols], sizes[symbols])
        np.testing.assert_array_equal(Decoder(code).decode([table], np.zeros(65, int)), symbols)


def test_nearly_certain_symbols_cost_what_they_should():
    # Each 2.2e-5 bits: coarse arithmetic would lose as much again.
    table = edges([TOTAL - 1, 1])
    symbols = np.zeros(400_000, int)
    symbols[::40_000] = 1
    code = encode(table[symbols], np.diff(table)[symbols])
    assert ideal_bits(np.asarray([TOTAL - 1])) == pytest.approx(2.2e-5, rel=0.01)
    assert 8 * len(code) < ideal_bits(np.diff(table)[symbols]) + 9
    np.testing.assert_array_equal(Decoder(code).decode([table], np.zeros(400_000, int)), symbols)


@settings(max_examples=60, deadline=None)
@given(code=st.binary(max_size=40), sizes=st.sampled_from([[TOTAL], [1, TOTAL - 1], [65000, 536]]))
def test_any_bytes_give_some_symbols(code, sizes):
    symbols = Decoder(code).decode([edges(sizes)], np.zeros(100, int))
    assert symbols.shape == (100,)
    assert ((symbols >= 0) & (symbols < len(sizes))).all()


@pytest.mark.parametrize(
    ("starts", "sizes", "message"),
    [
        ([0], [0], "at least 1"),
        ([-1], [1], "lie in"),
        ([TOTAL - 1], [2], "lie in"),
        ([0, 1], [1], "same shape"),
        ([[0]], [[1]], "same shape"),
    ],
)
def test_errors(starts, sizes, message):
    with pytest.raises(ValueError, match=message):
        encode(starts, sizes)
