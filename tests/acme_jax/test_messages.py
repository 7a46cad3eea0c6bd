"""Round trips, sizes and damage of the messages that travel."""

import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from acme_jax import messages
from acme_jax.number_formats import CodedArray
from nas.arch import Arch
from nas.cost import DeviceProfile

PROFILE = DeviceProfile(2e9, 1.7e9, 3.1e-4, 1.25, 3e-11, 1e-10)
PARAMS = {
    "blocks": [{"kernel": np.ones((3, 2), np.float32)}, {"kernel": np.zeros((1, 2), np.float32)}],
    "head": (np.arange(4, dtype=np.float16), {"bias": np.array(1.5, np.float32)}),
    "empty": {},
    "none": np.zeros((0, 3), np.int32),
}
ARCH = Arch(np.int32(3), np.array([1, 2, 4], np.int32), np.array([8, 64, 32], np.int32))
EXAMPLES = {
    "device_profile": messages.DeviceProfileMessage(3, 123_456, 160, PROFILE),
    "cluster_profile": messages.ClusterProfile(1, 2, np.array([100, 2**40]), PROFILE),
    "backbone": messages.BackboneMessage(ARCH, PARAMS),
    "header": messages.HeaderMessage(((0, 1, 1, 5), (2, 0, 0, 3)), PARAMS),
    "feature_sketch": messages.FeatureSketch(np.linspace(0, 1, 12).astype("f2").reshape(3, 4)),
    "importance_set": messages.ImportanceSet(np.geomspace(1e-9, 1, 256).astype("f4")),
    "personalized_importance": messages.PersonalizedImportance(np.ones(5, np.float32)),
    "density_question": messages.DensityQuestion(
        np.eye(4, 2, dtype="f4"), np.ones(2, "f4"), np.arange(6, dtype="f4").reshape(3, 2)
    ),
    "log_densities": messages.LogDensities(np.linspace(-900, 2, 7).astype("f4")),
    "data_quality": messages.DataQuality(np.float32(-2.5), np.float32(1.25), None, None),
}


def coded(scheme, bits, shape, seed=0):
    """An array of random codes that use all their bits."""
    codes = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)
    return CodedArray(scheme, bits, codes, -3.25, 1.5)


CODED = {
    "log8": messages.ImportanceSet(coded("log", 8, 384)),
    "log4": messages.PersonalizedImportance(coded("log", 4, 7)),
    "log2": messages.ImportanceSet(coded("log", 2, 5)),
    "linear8": messages.FeatureSketch(coded("linear", 8, (4, 3))),
    "empty": messages.ImportanceSet(coded("log", 3, 0)),
}


def assert_same(left, right):
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert sorted(left) == sorted(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert left.tobytes() == right.tobytes()
    else:
        assert left == right


def as_arrays(tree):
    """NumPy scalars as arrays: what a decoded tree holds."""
    if isinstance(tree, np.generic):
        return np.asarray(tree)
    return Arch(*map(np.asarray, tree)) if isinstance(tree, Arch) else tree


def test_the_examples_are_all_kinds():
    assert list(EXAMPLES) == [name for name, _ in messages.KINDS]


@pytest.mark.parametrize("name", EXAMPLES)
def test_round_trip(name):
    message = EXAMPLES[name]
    back = messages.decode(messages.encode(message))
    assert_same(back, type(message)(*map(as_arrays, message)))
    assert messages.kind(message) == name


leaves = hnp.arrays(
    st.sampled_from(["bool", "i1", "u2", "i4", "i8", "f2", ">f4", "f8"]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.dictionaries(st.text(max_size=4), inner, max_size=3)
        | st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(trees)
def test_any_tree_of_arrays_comes_back(tree):
    def native(node):
        if isinstance(node, dict):
            return {key: native(child) for key, child in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(native(child) for child in node)
        return node.astype(node.dtype.newbyteorder("="))

    back = messages.decode(messages.encode(messages.HeaderMessage((), tree)))
    assert_same(back.params, native(tree))


def test_jax_arrays_and_bfloat16():
    params = {"a": jnp.arange(3.0), "b": jnp.arange(3, dtype=jnp.bfloat16)}
    back = messages.decode(messages.encode(messages.HeaderMessage((), params))).params
    assert back["b"].dtype == jnp.bfloat16
    for name, leaf in params.items():
        np.testing.assert_array_equal(back[name], np.asarray(leaf))


def test_decoded_arrays_are_writable_and_own_their_memory():
    back = messages.decode(messages.encode(EXAMPLES["importance_set"]))
    back.importance[0] = 7.0


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 8), st.integers(0, 40), st.integers(0, 99))
def test_codes_of_any_bits_come_back(bits, count, seed):
    message = messages.ImportanceSet(coded("log", bits, count, seed))
    data = messages.encode(message)
    assert_same(messages.decode(data), message)
    assert len(data) == 10 + len(f'["log{bits}:{count}"]') + 8 + -(-count * bits // 8) + 4


@pytest.mark.parametrize("name", CODED)
def test_coded_messages(name):
    message, data = CODED[name], messages.encode(CODED[name])
    assert_same(messages.decode(data), message)
    assert messages.kind(message) in EXAMPLES
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x41
        for bad in (bytes(damaged), data[:place]):
            with pytest.raises(messages.MessageError):
                messages.decode(bad)


def test_bytes_written_before_there_were_codes_are_still_read_and_written():
    for text, message in (
        (
            "41434d450105080000005b2266343a32225d0000803f00000040e404828b",
            messages.ImportanceSet(np.array([1, 2], np.float32)),
        ),
        (
            "41434d4501040a0000005b2266323a322c31225d003c0040c55a32aa",
            messages.FeatureSketch(np.array([[1], [2]], np.float16)),
        ),
    ):
        assert messages.encode(message) == bytes.fromhex(text)
        assert_same(messages.decode(bytes.fromhex(text)), message)


def test_equal_messages_give_equal_bytes():
    a, b = np.ones(3, np.float32), np.arange(6.0).reshape(2, 3)
    first = messages.HeaderMessage((), {"x": a, "y": b})
    second = messages.HeaderMessage((), {"y": np.asfortranarray(b), "x": a[::-1]})
    assert messages.encode(first) == messages.encode(second)


def test_sizes():
    sizes = {name: len(messages.encode(message)) for name, message in EXAMPLES.items()}
    assert sizes["device_profile"] < 100
    assert sizes["cluster_profile"] < 200
    assert sizes["importance_set"] <= 256 * 4 + 40
    sketch = messages.FeatureSketch(np.zeros((32, 768), np.float16))
    assert 49_152 < len(messages.encode(sketch)) < 49_152 + 40


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_changed_byte_is_noticed(name):
    data = messages.encode(EXAMPLES[name])
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 0x41
        with pytest.raises(messages.MessageError):
            messages.decode(bytes(damaged))


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_truncation_and_extension_is_noticed(name):
    data = messages.encode(EXAMPLES[name])
    for size in range(len(data)):
        with pytest.raises(messages.MessageError):
            messages.decode(data[:size])
    with pytest.raises(messages.MessageError):
        messages.decode(data + b"\0")


def resealed(data: bytes, **changes: int) -> bytes:
    """The message with a changed prefix and a checksum that fits."""
    magic, version, kind, size = struct.unpack_from("<4sBBI", data)
    fields = {"version": version, "kind": kind, "size": size, **changes}
    body = struct.pack("<4sBBI", magic, *fields.values()) + data[10:-4]
    return body + struct.pack("<I", zlib.crc32(body))


def test_each_error_says_what_is_wrong():
    data = messages.encode(EXAMPLES["importance_set"])
    for bad, pattern in (
        (b"PK\3\4" + data[4:], "not a message"),
        (data[:8], "truncated message: 8 bytes"),
        (data[:-1], "checksum"),
        (data[:12], "truncated"),
        (resealed(data, version=9), "format 9 is not supported"),
        (resealed(data, kind=200), "unknown message kind 200"),
        (resealed(data, kind=4), "float16 with 2 axes"),
        (resealed(data, kind=0), "malformed device_profile"),
        (resealed(data, size=3), "malformed importance_set"),
    ):
        with pytest.raises(messages.MessageError, match=pattern):
            messages.decode(bad)


def sealed(kind: int, header: bytes, payload: bytes = b"") -> bytes:
    body = struct.pack("<4sBBI", b"ACME", 1, kind, len(header)) + header + payload
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{}", b"5", b"null", b'["f4:-1"]', b'["f4:2"]', b'["f4:0","f4:0"]', b'["q7:0"]',
        b'["f4:x"]', b"[[]]", b'[["set"]]', b'["f4:99999999999999999999"]', b"[true]", b"[1.5]",
        b"[" * 5000, b'[["arch"]]', b'["profile"]', b"\xff", b'[{"a":["list"]}]', b'["log4:9"]',
        b'["log9:1"]', b'["log4:-2"]',
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", range(7))
def test_wrong_headers_with_a_right_checksum_are_message_errors(kind, header):
    with pytest.raises(messages.MessageError):
        messages.decode(sealed(kind, header))


@pytest.mark.parametrize(
    ("message", "pattern"),
    [
        (messages.ImportanceSet(np.ones(3)), "must be float32 with 1 axes"),
        (messages.FeatureSketch(np.full((2, 2), np.inf, np.float16)), "NaN or infinite"),
        (messages.LogDensities(np.full(2, -np.inf, np.float32)), "NaN or infinite"),
        (messages.LogDensities(None), "must be float32 with 1 axes"),
        (messages.DataQuality(np.float32(np.nan), None, None, None), "NaN or infinite"),
        (messages.HeaderMessage((), {"a": "text"}), "cannot send str"),
        (messages.HeaderMessage((), {1: np.ones(2)}), "keys must be strings"),
        (messages.DeviceProfileMessage(0, 1.5, 2, PROFILE), "budget_bytes must be int"),
        (messages.DeviceProfileMessage(0, 1, 2, (1.0,) * 6), "profile must be DeviceProfile"),
        ({"importance": np.ones(3)}, "dict is no message"),
        (messages.ImportanceSet(coded("linear", 8, 3)), "must not be linear codes"),
        (messages.FeatureSketch(coded("linear", 8, 3)), "must be uint8 with 2 axes"),
        (messages.ClusterProfile(0, 1, coded("log", 8, 3), PROFILE), "must not be log codes"),
        (
            messages.ImportanceSet(coded("log", 8, 3)._replace(low=np.nan)),
            "was coded from NaN, infinite or, for logarithms, negative",
        ),
    ],
)
def test_unsendable_records(message, pattern):
    with pytest.raises(messages.MessageError, match=pattern):
        messages.encode(message)


def test_centralized_baseline():
    up, down = messages.centralized_baseline([100, 20], 28 * 28, [1000, 2500])
    assert (up, down) == (120 * (28 * 28 + 1), 3500)
    assert messages.centralized_baseline([4, 2], 17.25, [0])[0] == 110  # 6 texts and labels
