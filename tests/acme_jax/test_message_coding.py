"""Lossless coding of what goes up: round trips, sizes, damage, checkpoints, and the run with it."""

import json
import zlib

import jax
import numpy as np
import pytest
import untrained_edge

from acme_jax import message_coding, messages, number_formats
from acme_jax.config import ConfigError, RefineConfig
from acme_jax.fleet_refinement import FleetSetup
from acme_jax.header_layout import HeaderDims
from acme_jax.post import Post
from acme_jax.progress import StopFlag
from acme_jax.session import StoppedError
from fed.errors import SegmentError

FORMATS = ("float32", "log8", "log4", "log2")


def importances(num_rounds=8, num_gates=300, seed=0):
    """[rounds, gates]: squares that keep their order of magnitude; ten more are zero a round."""
    rng = np.random.default_rng(seed)
    scale, values = rng.normal(0, 3, num_gates), []
    order = rng.permutation(num_gates)
    for index in range(num_rounds):
        values.append(np.exp(scale) * rng.chisquare(1, (8, num_gates)).mean(axis=0) * 1e-6)
        values[-1][order[: 10 * index]] = 0
    return np.asarray(values, np.float32)


def importance_messages(form, **options):
    rows = importances(**options)
    return [messages.encode(messages.ImportanceSet(number_formats.importance(row, form)))
            for row in rows]  # fmt: skip


def sketch_messages(form, count=3):
    rng = np.random.default_rng(1)
    rows = np.sort(rng.normal(size=(count, 16, 40)), axis=1).astype(np.float32)
    return [messages.encode(messages.FeatureSketch(number_formats.sketch(row, form)))
            for row in rows]  # fmt: skip


STREAMS = {
    **{form: importance_messages(form) for form in FORMATS},
    **{form: sketch_messages(form) for form in ("float16", "linear8", "linear4")},
    "densities": [
        messages.encode(messages.LogDensities(-np.arange(60, dtype=np.float32) ** 2))
    ],
    "other sizes": [
        *importance_messages("log8", num_gates=70), *importance_messages("log8", num_gates=90),
        *importance_messages("log4", num_gates=5), *importance_messages("float32", num_gates=1),
    ],
    "all equal, all zero, none": [
        messages.encode(messages.ImportanceSet(number_formats.importance(values, "log4")))
        for values in (np.full(7, 0.25, "f4"), np.zeros(7, "f4"), np.full(7, 0.5, "f4"))
    ] + [messages.encode(messages.ImportanceSet(np.zeros(0, np.float32)))],
}  # fmt: skip


def send(stream):
    """Coded messages; both ends have memories of their own."""
    sender, receiver, coded = None, None, []
    for plain in stream:
        sender, sent = message_coding.encode(sender, plain)
        receiver, read = message_coding.decode(receiver, sent)
        assert read == plain
        assert message_coding.to_record(sender) == message_coding.to_record(receiver)
        coded.append(sent)
    return coded


@pytest.mark.parametrize("name", STREAMS)
def test_round_trip(name):
    send(STREAMS[name])


@pytest.mark.parametrize(("form", "part"), [("float32", 0.82), ("log8", 0.72), ("log4", 0.5)])
def test_sizes_fall_over_rounds(form, part):
    plain, coded = STREAMS[form], send(STREAMS[form])
    lengths = [len(message) for message in coded]
    assert sum(lengths) < part * sum(len(message) for message in plain)
    assert sum(lengths) < sum(len(zlib.compress(message, 9)) for message in plain)
    assert max(lengths[2:]) < lengths[0]


def test_the_header_travels_once():
    first, second, *_ = STREAMS["log8"]
    memory, coded = message_coding.encode(None, first)
    header = b'["log8:300"]'
    assert coded[:3] == bytes([0x80 + 5, 0, len(header)]) and coded[3:].startswith(header)
    scale = messages.split(first)[2][:8]
    assert coded[3 + len(header) :].startswith(scale)
    _, coded = message_coding.encode(memory, second)
    assert coded[:3] == bytes([0x80 + 5, 0, 0])


def test_expectations_are_old_values_in_new_codes():
    """By the codes' own definition, in plain floats; a pruned gate stays pruned."""
    sets = importances(num_rounds=2, num_gates=50)
    sets[0, 3] = 0
    first, second = (number_formats.importance(row, "log8") for row in sets)
    memory, _ = message_coding.encode(None, messages.encode(messages.ImportanceSet(first)))
    form = message_coding._Form("log", 8, (50,))
    raw = np.asarray([second.low, second.high], "<f4").tobytes()
    found = message_coding._expected(form, memory, raw)
    for code, expected in zip(first.codes.tolist(), found.tolist(), strict=True):
        if code == 0:
            assert expected == 0
            continue
        log = first.low + (code - 1) / 254 * (first.high - first.low)
        step = round((log - second.low) / (second.high - second.low) * 254)
        assert expected == 1 + min(max(step, 0), 254)


@pytest.mark.parametrize("name", ["float32", "log4", "linear8"])
def test_damage_is_one_error_and_can_be_mended(name):
    stream = STREAMS[name][:3]
    coded = send(stream)
    memory, _ = message_coding.decode(None, coded[0])
    rng = np.random.default_rng(0)
    places = {0, 1, 2, *rng.choice(len(coded[1]), 40).tolist(), len(coded[1]) - 1}
    for place in places:
        broken = bytearray(coded[1])
        broken[place] ^= 1 << int(rng.integers(8))
        with pytest.raises(SegmentError):
            message_coding.decode(memory, bytes(broken))
    for wrong in (coded[0], coded[2], coded[1][:-1], coded[1][:9], coded[1][:2], b""):
        with pytest.raises(SegmentError):
            message_coding.decode(memory, wrong)
    with pytest.raises(SegmentError, match="start both ends anew"):
        message_coding.decode(None, coded[1])
    assert message_coding.decode(memory, coded[1])[1] == stream[1]


def test_a_header_is_damaged():
    coded = send(STREAMS["log8"])[0]
    for place in range(3 + len('["log8:300"]')):
        broken = bytearray(coded)
        broken[place] ^= 1
        with pytest.raises(SegmentError):
            message_coding.decode(None, bytes(broken))


@pytest.mark.parametrize("name", ["float32", "log8"])
def test_a_checkpoint_goes_on_to_the_same_bytes(name):
    memory, coded = None, []
    for plain in STREAMS[name]:
        memory, sent = message_coding.encode(memory, plain)
        coded.append(sent)
        memory = message_coding.from_record(
            json.loads(json.dumps(message_coding.to_record(memory)))
        )
    assert coded == send(STREAMS[name])


def test_the_post_counts_what_is_coded():
    stream = [messages.decode(plain) for plain in STREAMS["log8"]]
    profile = messages.PersonalizedImportance(np.ones(4, np.float32))
    post, plain = Post("adaptive"), Post()
    for index, message in enumerate(stream, 1):
        for sender in (0, 7):  # links do not share what they know
            for each in (post, plain):
                read = each.send_up(message, sender=sender, round=index)
                assert messages.encode(read) == messages.encode(message)
    lengths = [len(coded) for coded in send(STREAMS["log8"])]
    for index, length in enumerate(lengths, 1):
        assert post.ledger.total(round=index) == 2 * length
    assert plain.ledger.total() == 2 * sum(len(message) for message in STREAMS["log8"])
    assert len(post.memories_to_records()) == 2 and not plain.memories_to_records()
    # Neither what goes down, nor other kinds.
    for message in (profile, stream[0]):
        before = post.ledger.total()
        post.send(message, tier="edge-device", direction="down", round=1, copies=3)
        assert post.ledger.total() - before == 3 * len(messages.encode(message))


FORMS = {"importance_format": "log4", "sketch_format": "linear8", "num_quantiles": 4}


def test_a_run_has_equal_results_and_fewer_bytes(tmp_path):
    found = {}
    # One configuration, whose programs are compiled once; the coding is the post's.
    config = untrained_edge.configuration(coding="adaptive", rounds=6, **FORMS)
    for coding in ("none", "adaptive"):
        with untrained_edge.opened(config, tmp_path / coding) as setting:
            post = Post(coding)
            found[coding] = untrained_edge.refined(setting, post), post.ledger
    jax.tree.map(np.testing.assert_array_equal, found["none"][0], found["adaptive"][0])
    plain, coded = (found[coding][1] for coding in ("none", "adaptive"))
    assert coded.total(direction="down") == plain.total(direction="down")
    for where in ({"kind": "feature_sketch"}, {"round": 6}):
        assert coded.total(direction="up", **where) < plain.total(direction="up", **where)

    stop = StopFlag()

    class StopsInRoundThree(Post):
        def send(self, message, **where):
            stop.requested = where["round"] == 3
            return super().send(message, **where)

    again = tmp_path / "again"
    with untrained_edge.opened(config, again, stop) as setting, pytest.raises(StoppedError):
        untrained_edge.refined(setting, StopsInRoundThree("adaptive"))
    resumed = Post("adaptive")
    with untrained_edge.opened(config, again) as setting:
        ended = untrained_edge.refined(setting, resumed)
    assert resumed.to_records() == coded.to_records()
    jax.tree.map(np.testing.assert_array_equal, ended, found["adaptive"][0])


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"RefineConfig\.coding is 'zlib'"):
        RefineConfig(coding="zlib")
    with pytest.raises(ConfigError, match="leave it at 'none'"):
        FleetSetup(
            untrained_edge.CELL, HeaderDims(2, 2, 4, 4, 2, 2, 3), RefineConfig(coding="adaptive")
        )
    with pytest.raises(ValueError, match="cannot code"):
        message_coding.encode(None, messages.encode(messages.DensityQuestion(
            np.eye(2, dtype="f4"), np.ones(2, "f4"), np.eye(2, dtype="f4")
        )))  # fmt: skip
