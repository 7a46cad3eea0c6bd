"""Statistics by class: against NumPy, merged and padded, drawn from, counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from class_statistics_reference import reference

from fed import class_statistics, clients

NUM_CLASSES = 5
KINDS = ("shared", "diagonal", "full")


def random_parts(seed=0):
    """Clients of different sizes, without class 3; class 1 is on one of them only."""
    rng = np.random.default_rng(seed)
    parts = []
    for number, size in enumerate((9, 4, 14)):
        labels = rng.choice([0, 1, 2, 4] if number == 1 else [0, 2, 4], size)
        parts.append((rng.normal(size=(size, 3)) + labels[:, None] + number, labels))
    return parts


@functools.partial(jax.jit, static_argnames="kind")
def of_clients(data, kind):
    real = jnp.arange(data.labels.shape[1])[None] < data.size[:, None]
    one = functools.partial(class_statistics.from_samples, num_classes=NUM_CLASSES, kind=kind)
    return jax.vmap(one)(
        jnp.where(real[..., None], data.inputs, jnp.nan),
        jnp.where(real, data.labels, 99),
        real.astype(jnp.float32),
    )


merge = jax.jit(class_statistics.merge)


def stacked_statistics(parts, kind):
    """By one vmap over the padded clients; NaN and a wrong label in the padding."""
    return of_clients(clients.stack_clients(parts), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_statistics_equal_the_central_ones(kind):
    parts = random_parts()
    stacked = stacked_statistics(parts, kind)
    for row, (features, labels) in enumerate(parts):
        for found, expected in zip(
            clients.take_row(stacked, row),
            reference(features, labels, kind, NUM_CLASSES),
            strict=True,
        ):
            np.testing.assert_allclose(found, expected, atol=1e-5)
    merged = merge(stacked)
    together = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    expected = reference(*together, kind, NUM_CLASSES)
    for found, value in zip(merged, expected, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-5)
    # An integer weight is that many copies of the client.
    weighted = merge(stacked, jnp.asarray([2.0, 0.0, 1.0]))
    copies = [np.concatenate([parts[i][j] for i in (0, 0, 2)]) for j in (0, 1)]
    for found, value in zip(weighted, reference(*copies, kind, NUM_CLASSES), strict=True):
        np.testing.assert_allclose(found, value, atol=1e-5)


def test_the_spread_of_clients_means_counts():
    """Equal clients with means 0 and 2, variance 0.7 each: 1.7 together, not 0.7."""
    deviation = 0.7**0.5
    values = np.asarray([[-deviation, deviation], [2 - deviation, 2 + deviation]])
    merged = merge(
        stacked_statistics([(row[:, None], np.zeros(2, int)) for row in values], "shared")
    )
    np.testing.assert_allclose(merged.variance, 1.7, atol=1e-5)
    np.testing.assert_allclose(merged.mean[0], 1.0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_one_client_is_all_clients_and_unseen_classes_keep_what_was_known(kind):
    own = stacked_statistics(random_parts()[:1], kind)
    merged = merge(own)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[0], atol=1e-6), merged, own)
    old = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7.0), merged)
    prefer = jax.jit(class_statistics.prefer)
    kept = prefer(merged, old)
    unseen = np.asarray(merged.size) == 0
    assert unseen.tolist() == [False, True, False, True, False]
    np.testing.assert_array_equal(kept.mean[unseen], 7.0)
    np.testing.assert_array_equal(kept.mean[~unseen], merged.mean[~unseen])
    none = class_statistics.empty(NUM_CLASSES, 3, kind)
    jax.tree.map(np.testing.assert_array_equal, prefer(none, old), old)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_statistics_they_were_drawn_from(kind):
    statistics = merge(stacked_statistics(random_parts(), kind))
    labels = np.repeat([0, 2, 4], 30_000)

    @jax.jit
    def draw(key, statistics, labels):
        deviation = class_statistics.deviations(statistics, 1e-6)
        return class_statistics.sample(key, statistics.mean, deviation, labels)

    drawn = draw(jax.random.key(0), statistics, labels)
    _, mean, variance = reference(drawn, labels, kind, NUM_CLASSES)
    seen = np.asarray([0, 2, 4])
    np.testing.assert_allclose(mean[seen], statistics.mean[seen], atol=0.03)
    if kind == "shared":
        np.testing.assert_allclose(variance, statistics.variance, rtol=0.03)
    else:
        np.testing.assert_allclose(variance[seen], statistics.variance[seen], atol=0.05)


def test_payload_of_statistics():
    """The specification's numbers for p = 512 and 100 classes, plus one count a class."""
    for kind, expected in (("shared", 101 * 512), ("diagonal", 2 * 100 * 512)):
        floats = class_statistics.num_floats(100, 512, kind)
        assert floats == expected + 100
        arrays = class_statistics.empty(100, 512, kind)
        assert floats == sum(leaf.size for leaf in arrays)
    assert class_statistics.num_floats(2, 3, "full") == 2 * (1 + 3 + 6)
    for call in (class_statistics.num_floats, class_statistics.empty):
        with pytest.raises(ValueError, match="unknown kind"):
            call(2, 3, "round")
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        class_statistics.from_samples(
            jnp.zeros(3), jnp.zeros(3, int), jnp.ones(3), num_classes=2, kind="full"
        )
