"""Sliced networks equal their masked twins, and are as small as the cost model says."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from acme_jax import slicing, supernet
from nas import cost
from nas.arch import to_mask

CONFIG, SPACE = tiny.CONFIG, tiny.SPACE
PARAMS = tiny.make_params()
IMAGES, _ = tiny.make_images()
ALL = (*tiny.GENOMES, *tiny.random_genomes(2))
INDICES = range(len(ALL))

masked = jax.jit(lambda mask: supernet.apply(PARAMS, IMAGES, CONFIG, mask))
apply = jax.jit(functools.partial(slicing.apply, config=CONFIG))


@pytest.mark.parametrize("index", INDICES)
def test_sliced_equals_masked(index):
    arch = ALL[index]
    sliced = apply(slicing.slice_params(PARAMS, arch), IMAGES)
    whole = masked(to_mask(SPACE, arch))
    layers = np.asarray(tiny.kept(CONFIG.num_layers, int(arch.depth)))
    for actual, expected in (
        (sliced.logits, whole.logits),
        (sliced.inputs, whole.inputs[layers]),
        (sliced.final, whole.final),
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("index", INDICES)
def test_cost_model_counts_the_leaves(index):
    sliced = slicing.slice_params(PARAMS, ALL[index])
    assert int(cost.num_params(CONFIG.dims, ALL[index])) == tiny.count(sliced)
    without = {name: part for name, part in sliced.items() if name != "classifier"}
    dims = dataclasses.replace(CONFIG.dims, num_classes=0)
    assert int(cost.num_params(dims, ALL[index])) == tiny.count(without)
    assert float(cost.size_bytes(dims, ALL[index])) == 4 * tiny.count(without)


def test_full_slice_is_the_whole_network():
    sliced = slicing.slice_params(PARAMS, tiny.GENOMES[0])
    assert tiny.count(sliced) == tiny.count(PARAMS)
    unstacked = [jax.tree.map(lambda leaf, i=i: leaf[i], PARAMS["blocks"]) for i in range(4)]
    tiny.assert_trees_equal(sliced["blocks"], unstacked)


@pytest.mark.parametrize("index", INDICES)
def test_kept_blocks_follow_the_papers_rule(index):
    arch = ALL[index]
    expected = tuple(tiny.kept(CONFIG.num_layers, int(arch.depth)))
    assert slicing.kept_blocks(arch) == expected
    assert len(slicing.slice_params(PARAMS, arch)["blocks"]) == int(arch.depth)


def test_genomes_of_numpy_integers_do_as_well():
    """As read from a message or a checkpoint."""
    arch = jax.tree.map(np.asarray, tiny.GENOMES[1])
    tiny.assert_trees_equal(
        slicing.slice_params(PARAMS, arch), slicing.slice_params(PARAMS, tiny.GENOMES[1])
    )


def test_features_are_the_last_state_without_the_class_token():
    sliced = slicing.slice_params(PARAMS, tiny.GENOMES[2])
    features = jax.jit(functools.partial(slicing.features, config=CONFIG))(sliced, IMAGES)
    assert features.shape == (IMAGES.shape[0], CONFIG.dims.num_tokens - 1, CONFIG.embed_dim)
    np.testing.assert_allclose(features, apply(sliced, IMAGES).final[:, 1:], rtol=1e-6, atol=1e-6)


def test_features_are_row_major_over_the_patch_grid():
    """Without blocks' mixing, a bright patch changes its own token only."""
    params = jax.tree.map(np.asarray, PARAMS)
    quiet = jax.tree.map(np.zeros_like, params["blocks"])
    sliced = slicing.slice_params({**params, "blocks": quiet}, tiny.GENOMES[4])
    image = np.zeros((1, *CONFIG.image_shape), np.float32)
    dark = np.asarray(slicing.features(sliced, image, CONFIG))
    image[0, 4:8, 8:12] = 1.0  # second row, third column of the 2 x 3 grid
    bright = np.asarray(slicing.features(sliced, image, CONFIG))
    assert np.flatnonzero(np.abs(bright - dark).max(axis=(0, 2))).tolist() == [5]


def test_a_population_is_refused():
    with pytest.raises(ValueError, match="index the population first"):
        slicing.slice_params(PARAMS, tiny.stack(tiny.GENOMES))


@pytest.mark.parametrize(("heads", "neurons"), [(5, 8), (4, 9)])
def test_a_genome_of_a_larger_network_is_refused(heads, neurons):
    arch = tiny.genome(4, [1, 1, heads, 1], [2, 2, neurons, 2])
    message = f"up to {heads} heads and {neurons} neurons, but the network has 4 and 8"
    with pytest.raises(ValueError, match=message):
        slicing.slice_params(PARAMS, arch)
