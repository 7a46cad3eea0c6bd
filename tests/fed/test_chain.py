"""Chains put together of several models' layers, and their stitches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fed import chain as chains
from fed import stitching

WIDTHS = np.asarray([[3, 3], [5, 5], [3, 5]])
NUM_INPUTS, PADDED, NUM_CLASSES = 4, 6, 2


def dense(params, inputs):
    return inputs @ params["kernel"] + params["bias"][None]


def hidden(params, inputs):
    return jax.nn.relu(dense(params, inputs))


def make_models(seed=0, widths=WIDTHS):
    """A chain of three layers and its models' padded parameters, leaves [C, ...]."""
    rng = np.random.default_rng(seed)
    counts = [(NUM_INPUTS, *row, NUM_CLASSES) for row in widths]
    layers, sizes = [], []
    for place in range(3):
        rows, columns = ((NUM_INPUTS, PADDED), (PADDED, PADDED), (PADDED, NUM_CLASSES))[place]
        kernel = np.zeros((len(widths), rows, columns), np.float32)
        bias = np.zeros((len(widths), columns), np.float32)
        for client, count in enumerate(counts):
            real = count[place], count[place + 1]
            kernel[client, : real[0], : real[1]] = rng.normal(size=real)
            bias[client, : real[1]] = rng.normal(size=real[1])
        layers.append({"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)})
        sizes.append([c[place] * c[place + 1] + c[place + 1] for c in counts])
    chain = chains.Chain((hidden, hidden, dense), (0, 0, 1), widths, np.asarray(sizes).T)
    return chain, tuple(layers)


CHAIN, MODELS = make_models()
PUBLIC = jnp.asarray(np.random.default_rng(1).normal(size=(40, NUM_INPUTS)), jnp.float32)


@jax.jit
def assembled(owners, inputs):
    passed = jax.vmap(lambda layers: chains.activations(CHAIN, layers, PUBLIC))(MODELS)
    candidate = chains.assemble(CHAIN, MODELS, owners, passed[:-1])
    return candidate, chains.logits(CHAIN, candidate, inputs), passed[-1]


def dense_layer(place, owner):
    """A client's layer at its real size, in float64."""
    shape = (NUM_INPUTS, *WIDTHS[owner], NUM_CLASSES)[place : place + 2]
    layer = jax.tree.map(lambda leaf: np.asarray(leaf[owner], np.float64), MODELS[place])
    return layer["kernel"][: shape[0], : shape[1]], layer["bias"][: shape[1]]


def by_hand(owners):
    """Logits on public samples and floats of a candidate, of real sizes and in float64."""
    passed, floats = {}, 0
    for owner in range(3):
        values = np.asarray(PUBLIC, np.float64)
        passed[owner] = [values]
        for place in range(2):
            kernel, bias = dense_layer(place, owner)
            values = np.maximum(values @ kernel + bias, 0)
            passed[owner].append(values)
    values = np.asarray(PUBLIC, np.float64)
    for place, owner in enumerate(owners):
        kernel, bias = dense_layer(place, owner)
        if values.shape[1] != kernel.shape[0]:
            target = passed[owner][place]
            x, y = values - values.mean(0), target - target.mean(0)
            ridge = stitching.RIDGE * (x**2).sum() / (x.std(0) > 0).sum()
            stitch = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ y)
            floats += stitch.size + y.shape[1]
            values = np.maximum(values @ stitch + target.mean(0) - values.mean(0) @ stitch, 0)
        floats += kernel.size + bias.size
        values = values @ kernel + bias
        values = values if place == 2 else np.maximum(values, 0)
    return values, floats


@pytest.mark.parametrize("owners", [(0, 0, 0), (0, 1, 2), (1, 0, 1), (2, 2, 2), (0, 2, 1)])
def test_a_candidate_equals_its_layers_at_their_real_sizes(owners):
    candidate, found, own = assembled(jnp.asarray(owners), PUBLIC)
    expected, floats = by_hand(owners)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-3)
    assert chains.num_floats(CHAIN, candidate) == floats
    outputs = [WIDTHS[owner, place] for place, owner in enumerate(owners[:-1])]
    inputs = [WIDTHS[owner, place] for place, owner in enumerate(owners[1:])]
    bridged = np.not_equal(outputs, inputs)
    assert np.array_equal(candidate.bridged, bridged)
    for place, stitch in enumerate(candidate.stitches):
        real = (outputs[place], inputs[place]) if bridged[place] else (0, 0)
        assert not np.any(np.asarray(stitch.kernel)[real[0] :])
        assert not np.any(np.asarray(stitch.kernel)[:, real[1] :])
        assert not np.any(np.asarray(stitch.bias)[real[1] :])
        assert bridged[place] == np.any(stitch.kernel)
    if len(set(owners)) == 1:  # its own units: its own logits
        assert not bridged.any()
        np.testing.assert_allclose(found, own[owners[0]], rtol=1e-5, atol=1e-5)


def test_a_whole_model_is_a_candidate_without_stitches():
    candidate, *_ = assembled(jnp.asarray((0, 1, 2)), PUBLIC)
    layers = jax.tree.map(lambda leaf: leaf[2], MODELS)
    own = chains.whole(layers, candidate.stitches, jnp.int32(2))
    expected = chains.activations(CHAIN, layers, PUBLIC)[-1]
    np.testing.assert_array_equal(chains.logits(CHAIN, own, PUBLIC), expected)
    assert chains.num_floats(CHAIN, own) == CHAIN.sizes[2].sum()


def test_what_lies_beyond_the_widths_gets_no_gradient():
    candidate, *_ = assembled(jnp.asarray((1, 2, 0)), PUBLIC)

    def loss(layers, stitches):
        model = candidate._replace(layers=layers, stitches=stitches)
        return (chains.logits(CHAIN, model, PUBLIC) ** 2).sum()

    layers, stitches = jax.jit(jax.grad(loss, argnums=(0, 1)))(candidate.layers, candidate.stitches)
    for gradient, values in ((layers, candidate.layers), (stitches, candidate.stitches)):
        for own, leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(values), strict=True):
            assert not np.any(np.asarray(own)[np.asarray(leaf) == 0])
    assert np.any(stitches[0].kernel) and np.any(stitches[1].kernel)


def test_a_stitch_is_the_linear_map_shrunk_by_the_ridge():
    """For inputs that are uncorrelated and of variance 1."""
    rng = np.random.default_rng(2)
    raw = rng.normal(size=(200, 5))
    x, _ = np.linalg.qr(raw - raw.mean(0))
    x = (np.sqrt(200) * x + 3).astype(np.float32)
    targets = (x - 3) @ rng.normal(size=(5, 3)) + 20  # so far from 0 that the ReLU does nothing
    stitch = stitching.fit(jnp.asarray(x), jnp.asarray(targets, jnp.float32))
    expected = 20 + (targets - 20) / (1 + stitching.RIDGE)
    np.testing.assert_allclose(stitching.apply(stitch, x), expected, rtol=1e-4)
    assert stitching.apply(stitch, -100 * x).min() == 0


def test_errors():
    with pytest.raises(ValueError, match=r"\[N, P\] and \[N, Q\], got \(3, 2\), \(4, 2\)"):
        stitching.fit(jnp.ones((3, 2)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"widths \[C, S - 1\].*got S = 3, 2 operations"):
        chains.Chain((hidden, hidden, dense), (0, 1), WIDTHS, CHAIN.sizes)
