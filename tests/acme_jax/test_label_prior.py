"""The log prior of a device's labels: by hand, against Bayes' rule, and in both refinements."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from acme_jax import fleet_refinement, header, label_prior, refine
from acme_jax.config import ConfigError, RefineConfig
from acme_jax.device import Mixing
from acme_jax.fleet_refinement import EdgeData, FleetSetup, Shared
from acme_jax.header_layout import HeaderDims
from fed.clients import stack_clients

DIMS = HeaderDims(2, 2, 6, 4, 3, 1, 2)
CELL = ((0, small_models.SEP1, 1, small_models.IDENTITY),)
PARAMS = small_models.make_header(DIMS, CELL)
CONFIG = RefineConfig(rounds=1, batch_size=4, learning_rate=1e-9, prune_per_round=0)


def test_by_hand():
    found = label_prior.log_prior(jnp.asarray([[3, 1, 0], [2, 2, 2]]), 1.0)
    np.testing.assert_allclose(found[0], np.log([12 / 7, 6 / 7, 3 / 7]), rtol=1e-6)
    np.testing.assert_allclose(found[1], 0, atol=1e-6)


def test_padding_is_not_counted():
    data = stack_clients([(np.zeros((n, 1)), np.asarray(y)) for n, y in ((3, [0, 0, 1]), (1, [2]))])
    found = label_prior.log_priors(data, 3, 0.5)
    expected = np.log([[2.5, 1.5, 0.5], [0.5, 0.5, 1.5]]) + np.log(3 / np.asarray([[4.5], [2.5]]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_added_to_a_balanced_classifier_it_gives_the_posterior_of_other_shares():
    # Gaussians of variance 1 about three means: the balanced posterior is a linear classifier.
    means = np.asarray([[0.0, 0.0], [2.0, 0.0], [0.0, 1.5]])
    bias = -0.5 * (means**2).sum(axis=1)
    counts = np.asarray([90, 9, 1])
    params = {"classifier": {"kernel": means.T, "bias": jnp.asarray(bias, jnp.float32)}}
    tiny = 1e-6  # hardly smoothed
    changed = label_prior.add_to_classifier(params, label_prior.log_prior(counts, tiny))
    points = np.random.default_rng(0).normal(size=(50, 2))
    densities = np.exp(-0.5 * ((points[:, None] - means) ** 2).sum(-1)) * counts / counts.sum()
    expected = densities / densities.sum(axis=1, keepdims=True)
    logits = points @ means.T + np.asarray(changed["classifier"]["bias"], np.float64)
    found = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert params["classifier"]["bias"][0] == 0.0  # the given ones stay


def test_streamed_edges_begin_with_it():
    rng = np.random.default_rng(1)
    rows = [(rng.normal(size=(6, 4, 6)).astype(np.float32), np.full(6, y)) for y in (0, 2)]
    data = stack_clients(rows)
    edge = EdgeData(data, data)
    shared = Shared(PARAMS, jax.random.key(0))

    def accuracies(prior):
        config = dataclasses.replace(CONFIG, class_prior=prior)
        setup = FleetSetup(CELL, DIMS, config)
        return fleet_refinement.refine_edge(setup, shared, edge, jnp.int32(0), chunk_size=2)

    without, strong = accuracies(None), accuracies(1e-12)
    np.testing.assert_array_equal(without.accuracy_before, strong.accuracy_before)
    # No training to speak of: who has one class names it always, given such a prior.
    np.testing.assert_array_equal(strong.accuracy_after, 1.0)
    assert np.asarray(without.accuracy_after).min() < 1.0


class _Context:
    """What `refine.initial_cohort` reads of a context."""

    header_dims = DIMS

    class config:
        refine = CONFIG


def test_every_method_and_the_linear_header_begin_with_it():
    mixing = Mixing(*[np.full((2, 2), 0.5)] * len(Mixing._fields))
    linear = header.init_linear(jax.random.key(1), DIMS.embed_dim, DIMS.num_classes)
    prior = jnp.asarray([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]])
    plain, changed = (
        refine.initial_cohort(_Context(), CELL, PARAMS, linear, mixing, given)
        for given in (None, prior)
    )
    moved = (
        changed.devices.params["classifier"]["bias"] - plain.devices.params["classifier"]["bias"]
    )
    np.testing.assert_allclose(moved, np.tile(prior, (len(refine.METHODS), 1)), atol=1e-6)
    moved = changed.linear["classifier"]["bias"] - plain.linear["classifier"]["bias"]
    np.testing.assert_allclose(moved, prior, atol=1e-6)
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()),
        plain.devices._replace(params={**plain.devices.params, "classifier": ()}),
        changed.devices._replace(params={**changed.devices.params, "classifier": ()}),
    )
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_pseudo_count_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="class_prior must be more than 0"):
        RefineConfig(class_prior=value)
