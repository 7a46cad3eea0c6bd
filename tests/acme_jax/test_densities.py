"""Similarity by kernel densities: what is asked, what is answered, and what is made of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import untrained_edge

from acme_jax import densities, exchange, messages
from acme_jax.config import ConfigError, RefineConfig
from acme_jax.fleet_refinement import FleetSetup
from acme_jax.header_layout import HeaderDims
from acme_jax.post import Post
from acme_jax.progress import StopFlag
from acme_jax.session import StoppedError
from fed import similarity

CONFIG = untrained_edge.configuration(similarity="kde", num_references=50, kde_dims=5)


def draw(count, num_features=9, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, num_features)) + shift).astype(np.float32)


def ask(shared, num_dims=4, num_references=30):
    return densities.question(
        jax.random.key(0), jnp.asarray(shared), num_dims=num_dims, num_references=num_references
    )


def fitted_sigma(points):
    """One bandwidth by EM on the leave-one-out likelihood, in plain loops and float64."""
    count, num_dims = points.shape
    sigma, before = 0.1, -np.inf
    for _ in range(50):
        total, likelihood = 0.0, 0.0
        for i in range(count):
            square = ((points - points[i]) ** 2).sum(axis=1)
            log = -square / (2 * sigma**2) - 0.5 * num_dims * np.log(2 * np.pi * sigma**2)
            log[i] = -np.inf
            likelihood += (scipy.special.logsumexp(log) - np.log(count)) / count
            total += (np.exp(log - scipy.special.logsumexp(log)) * square).sum()
        sigma, change = max(np.sqrt(total / (count * num_dims)), 0.01), likelihood - before
        if abs(change) <= 1e-4:
            break
        before = likelihood
    return sigma


def test_answers_equal_a_plain_estimate():
    shared, data = draw(60, seed=1), draw(25, shift=0.4, seed=2)
    asked = ask(shared)
    found = densities.answers(asked, jnp.asarray(data)[None], jnp.asarray([25]))
    points = data.astype(np.float64) @ asked.matrix + asked.offset
    sigma = fitted_sigma(points)
    kernels = scipy.stats.multivariate_normal(np.zeros(4), sigma**2)
    expected = [
        scipy.special.logsumexp(kernels.logpdf(point - points)) - np.log(25)
        for point in np.asarray(asked.references, np.float64)
    ]
    np.testing.assert_allclose(found.log_density[0], expected, rtol=1e-3)
    left_out = [
        scipy.special.logsumexp(kernels.logpdf(points[i] - np.delete(points, i, 0))) - np.log(25)
        for i in range(25)
    ]
    np.testing.assert_allclose(-found.outlier_score[0], left_out, rtol=1e-3)
    assert float(found.quality[0]) == pytest.approx(np.mean(left_out) / 4, rel=1e-3)


def test_the_edge_asks_in_its_own_points():
    shared = draw(60)
    asked = ask(shared)
    projected = shared @ asked.matrix + asked.offset
    np.testing.assert_allclose(projected.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(projected.std(axis=0), 1, rtol=1e-5)
    distance = np.abs(asked.references[:, None] - projected[None]).max(axis=2)
    assert (distance.min(axis=1) < 1e-4).all()
    assert len(set(distance.argmin(axis=1))) == 30


def test_padding_changes_nothing():
    asked, data = ask(draw(60)), np.stack([draw(20, seed=3), draw(20, seed=4)])
    data[1, 12:] = 1e3
    sizes = jnp.asarray([20, 12])
    both = densities.answers(asked, jnp.asarray(data), sizes)
    alone = densities.answers(asked, jnp.asarray(data[1:, :12]), sizes[1:])
    np.testing.assert_allclose(both.log_density[1], alone.log_density[0], rtol=1e-5)
    assert np.isneginf(both.outlier_score[1, 12:]).all()


def test_like_devices_are_near():
    asked = ask(draw(200), num_dims=6, num_references=120)
    data = [draw(80, shift=shift, seed=i) for i, shift in enumerate((-0.6, -0.6, 0.6, 0.6))]
    found = densities.answers(asked, jnp.asarray(np.stack(data)), jnp.full(4, 80))
    distance = np.asarray(densities.distances(found.log_density))
    assert distance.max() <= np.log(2)
    assert max(distance[0, 1], distance[2, 3]) < 0.5 * distance[:2, 2:].min()
    one = densities.answers(asked, jnp.asarray(np.stack(data)), jnp.asarray([80, 1, 2, 80]))
    assert np.isfinite(one.log_density).all()  # even one sample has an answer that can travel


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    with untrained_edge.opened(CONFIG, tmp_path_factory.mktemp("run")) as setting:
        yield setting


class Listening(Post):
    """Keeps what travels."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def send(self, message, **where):
        self.sent.append((where["direction"], message))
        return super().send(message, **where)


def test_only_answers_travel(setting):
    post = Listening()
    mixing = exchange.compare(setting.context, post, 0, setting.summaries, setting.shared)
    up = [message for direction, message in post.sent if direction == "up"]
    assert [type(message) for message in up] == [messages.LogDensities] * 3
    answers = np.stack([message.values for message in up])
    assert answers.shape == (3, 50)
    # By hand: prefix, header, 50 numbers, checksum; nothing depends on the number of samples.
    assert post.ledger.total(direction="up") == 3 * (10 + len('["f4:50"]') + 200 + 4)
    asked = (32 * 5 + 5 + 50 * 5) * 4 + 10 + len('["f4:32,5","f4:5","f4:50,5"]') + 4
    assert post.ledger.totals_by("direction", "kind") == {
        ("down", "density_question"): 3 * asked,
        ("up", "log_densities"): post.ledger.total(direction="up"),
    }
    distance = densities.distances(jnp.asarray(answers))
    np.testing.assert_allclose(mixing.distance, distance, rtol=1e-5, atol=1e-6)
    expected = similarity.weights(distance, temperature=CONFIG.refine.temperature)
    np.testing.assert_allclose(mixing.wasserstein, expected, rtol=1e-4)
    assert np.ptp(mixing.wasserstein) > 0.1
    # No value of a device's features, raw or projected, is among the numbers that it sends.
    asked = post.sent[0][1]
    features = np.asarray(setting.summaries.inputs)
    for values in (features, features @ asked.matrix + asked.offset):
        for place, size in enumerate(np.asarray(setting.summaries.size)):
            assert not np.isin(answers[place], values[place, :size]).any()


def test_a_stopped_run_goes_on_to_the_same_end(setting, tmp_path):
    whole = Post()
    mixing, cohort = untrained_edge.refined(setting, whole)
    stop = StopFlag()

    class StopsInRoundTwo(Post):
        def send(self, message, **where):
            stop.requested = where["round"] == 2
            return super().send(message, **where)

    with untrained_edge.opened(CONFIG, tmp_path, stop) as again, pytest.raises(StoppedError):
        untrained_edge.refined(again, StopsInRoundTwo())
    resumed = Post()
    with untrained_edge.opened(CONFIG, tmp_path) as again:
        found, ended = untrained_edge.refined(again, resumed)
    assert resumed.to_records() == whole.to_records()
    jax.tree.map(np.testing.assert_array_equal, (found, ended), (mixing, cohort))


def test_an_edge_without_shared_data_is_refused(setting):
    with pytest.raises(ConfigError, match="this edge has no reference points"):
        exchange.compare(setting.context, Post(), 0, setting.summaries)
    cell = untrained_edge.CELL
    with pytest.raises(ConfigError, match="simulated fleet's edges have no reference points"):
        FleetSetup(cell, HeaderDims(2, 2, 4, 4, 2, 2, 3), RefineConfig(similarity="kde"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kde_dims": 33}, "kde_dims is 33, but features have 32"),
        ({"num_references": 351}, "num_references is 351, but an edge shares only 350"),
    ],
)
def test_impossible_questions_are_refused_before_any_work(changes, message, tmp_path):
    config = untrained_edge.configuration(similarity="kde", **changes)
    with pytest.raises(ConfigError, match=message), untrained_edge.opened(config, tmp_path):
        pass
    other = dataclasses.replace(config.refine, similarity="flat")
    densities.check(other, 1, 1)


def test_bad_fields():
    with pytest.raises(ConfigError, match="no sketch travels"):
        RefineConfig(similarity="kde", sketch_format="linear8")
    with pytest.raises(ConfigError, match="kde_dims must be positive"):
        RefineConfig(kde_dims=0)
