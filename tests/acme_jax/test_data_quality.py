"""What devices report of their data: against plain counting, and what travels."""

import collections
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import untrained_edge
from fake_results import make_results

from acme_jax import data_quality, densities, exchange, tables
from acme_jax.bert import BertConfig
from acme_jax.post import Post
from nas.entropy import approximate_entropy

BERT = BertConfig(50, 10, 8, 1, 1, 8, 3, pad_id=0)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    config = untrained_edge.configuration(data_quality=True, num_references=50, kde_dims=5)
    with untrained_edge.opened(config, tmp_path_factory.mktemp("run")) as setting:
        yield setting


def device(inputs, labels):
    return types.SimpleNamespace(train=types.SimpleNamespace(inputs=inputs, labels=labels))


def counted_apen(sequence, window=2):
    def phi(size):
        windows = [tuple(sequence[i : i + size]) for i in range(len(sequence) - size + 1)]
        counts = collections.Counter(windows)
        return np.mean([np.log(counts[w] / len(windows)) for w in windows])

    return abs(phi(window + 1) - phi(window))


def counted_lempel_ziv(sequence):
    """n ln n over the sum of the shortest runs that have not occurred wholly before."""
    total = 0
    for i in range(len(sequence)):
        length = 1
        while i + length <= len(sequence) and any(
            sequence[j : j + length] == sequence[i : i + length] for j in range(i - length + 1)
        ):
            length += 1
        total += length
    return len(sequence) * np.log(len(sequence)) / total


def test_texts_have_entropies_of_their_words():
    """[CLS] 1, [SEP] 2 and padding are no part of a sequence; short texts say nothing."""
    words = [[5, 6, 5, 6, 5, 6, 7], [9, 9, 9, 9], [8, 7], [11, 12, 13, 14, 15]]
    ids = np.zeros((4, 10), np.int32)
    for row, text in zip(ids, words, strict=True):
        row[: len(text) + 2] = [1, *text, 2]
    found = data_quality.measure(device(ids, np.asarray([0, 0, 1, 2])), -1.5, BERT)
    long = [text for text in words if len(text) > 2]
    assert found.log_likelihood == np.float32(-1.5)
    np.testing.assert_allclose(found.label_entropy, 1.5 * np.log(2), rtol=1e-6)
    expected = np.mean([counted_apen(text) for text in long])
    np.testing.assert_allclose(found.approximate_entropy, expected, rtol=1e-5)
    expected = np.mean([counted_lempel_ziv(text) for text in long])
    np.testing.assert_allclose(found.lempel_ziv_entropy, expected, rtol=1e-5)


def test_what_is_unknown_is_none():
    short = np.asarray([[1, 5, 2, *[0] * 7]], np.int32)
    found = data_quality.measure(device(short, np.asarray([1])), -np.inf, BERT)
    assert found == (None, np.float32(0), None, None)
    images = data_quality.measure(
        device(np.zeros((4, 8, 8, 1)), np.asarray([0, 1, 2, 2])),
        1.0,
        tiny.CONFIG,
    )
    assert images[2:] == (None, None) and images.label_entropy > 1.0


def test_the_documented_traps_are_true():
    """The numbers that the module tells its reader; the fit's trap is a test of `nas`."""
    distinct = float(approximate_entropy(jnp.arange(50)))
    assert distinct == pytest.approx(np.log(49 / 48), rel=1e-4)
    assert f"{distinct:.4f}" == "0.0206" and "0.0206" in data_quality.__doc__
    rng = np.random.default_rng(0)
    found = [np.mean([float(approximate_entropy(jnp.asarray(rng.integers(0, 4, n))))
                      for _ in range(times)]) for n, times in ((50, 200), (2000, 1))]  # fmt: skip
    np.testing.assert_allclose(found, [0.83, 1.376], atol=0.03)


def test_devices_report_once(setting):
    post = Post()
    reports = data_quality.collect(setting.context, post, 0, setting.summaries, setting.shared)
    devices = [d for d in setting.context.devices if d.edge == 0]
    asked = exchange.density_question(setting.context, 0, setting.shared)
    found = densities.answers(asked, setting.summaries.inputs, setting.summaries.size)
    for place, (report, own) in enumerate(zip(reports, devices, strict=True)):
        shares = np.bincount(own.train.labels) / len(own.train)
        entropy = -sum(share * np.log(share) for share in shares if share)
        np.testing.assert_allclose(report.label_entropy, entropy, rtol=1e-5)
        scores = np.asarray(found.outlier_score[place])[: len(own.train)]
        np.testing.assert_allclose(report.log_likelihood, -scores.mean() / 5, rtol=1e-4)
    sent = post.ledger.totals_by("direction", "kind")
    one = 10 + len('["f4:","f4:",null,null]') + 8 + 4
    assert sent["up", "data_quality"] == 3 * one
    # The projection alone: nobody asks for densities.
    assert sent["down", "density_question"] == 3 * (
        10 + len('["f4:32,5","f4:5","f4:0,5"]') + 4 * 33 * 5 + 4
    )
    rows = data_quality.rows(devices, reports)
    assert [row["device"] for row in rows] == [d.id for d in devices]
    table = tables.quality_table({"data_quality": rows})
    assert len(table.rows) == 3 and table.rows[0][4:] == ("–", "–")  # noqa: RUF001
    assert "Lempel-Ziv" in table.note and not tables.quality_table(make_results()).rows


def test_with_kde_the_question_is_not_sent_again(setting):
    config = setting.context.config
    changed = dataclasses.replace(config.refine, similarity="kde")
    context = dataclasses.replace(
        setting.context, config=dataclasses.replace(config, refine=changed)
    )
    post = Post()
    again = data_quality.collect(context, post, 0, setting.summaries, setting.shared)
    plain = data_quality.collect(setting.context, Post(), 0, setting.summaries, setting.shared)
    assert list(post.ledger.totals_by("kind")) == [("data_quality",)]
    np.testing.assert_allclose(
        [r.log_likelihood for r in again], [r.log_likelihood for r in plain], rtol=1e-5
    )


def test_an_outlier_and_noise_lower_the_likelihood():
    rng = np.random.default_rng(3)
    clean = rng.normal(size=(60, 6)).astype(np.float32)
    odd, noisy = clean.copy(), clean + rng.normal(0, 2, clean.shape).astype(np.float32)
    odd[17] += 8
    asked = densities.question(
        jax.random.key(0),
        jnp.asarray(rng.normal(size=(100, 6)), jnp.float32),
        num_dims=4,
        num_references=5,
    )
    found = densities.answers(asked, jnp.asarray(np.stack([clean, odd, noisy])), jnp.full(3, 60))
    assert found.quality[0] > max(found.quality[1], found.quality[2])
    assert int(np.argmax(found.outlier_score[1])) == 17
