"""Factorised layers: the paper's product, pruning as restriction, payload."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fed import factorised
from fed.factorised import FactorisedLayer

CAPACITIES = [0.1, 0.2, 0.25, 0.3, 0.5, 0.7, 0.9, 1.0]
CONVOLUTION = FactorisedLayer(20, 10, kernel_size=3, order="block")
LINEAR = FactorisedLayer(30, 20, order="block")


def random_factors(layer, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=layer.general_shape), rng.normal(size=layer.personal_shape)


@functools.partial(jax.jit, static_argnums=0)
def composed(layer, theta_u, theta_v, capacity):
    mask = factorised.capacity_mask(layer, capacity)
    weights = factorised.compose(theta_u, theta_v, mask, layer)
    return weights, factorised.output_mask(layer, mask)


@pytest.mark.parametrize("layer", [CONVOLUTION, LINEAR], ids=["convolution", "linear"])
def test_composition_is_the_papers_matrix_product_and_pruning_a_restriction(layer):
    """theta_u [k^2 R1, R2] times theta_v [R2, (T/R1) S] in float64; channels {a T/R1 + g}."""
    theta_u, theta_v = random_factors(layer)
    blocks, size, _ = layer.general_shape
    rank, places, inputs = layer.personal_shape
    assert blocks == round(layer.outputs * layer.min_capacity)
    assert rank == (10 if layer is CONVOLUTION else blocks)
    product = theta_u.reshape(-1, rank) @ theta_v.reshape(rank, -1)
    product = product.reshape(blocks, size, places, inputs).transpose(0, 2, 3, 1)
    side = round(size**0.5)
    shape = (layer.outputs, inputs) if side == 1 else (layer.outputs, inputs, side, side)
    full, kept = composed(layer, theta_u, theta_v, 1.0)
    np.testing.assert_allclose(full, product.reshape(shape), atol=1e-5)
    assert kept.all()
    for capacity in CAPACITIES:
        pruned, kept = composed(layer, theta_u, theta_v, capacity)
        wanted = [
            a * places + g
            for a in range(blocks)
            for g in range(places)
            if g < round(capacity * 100) * layer.outputs // blocks // 100
        ]
        assert np.flatnonzero(kept).tolist() == wanted
        first = round(capacity * 100) * inputs // 100
        expected = np.zeros_like(full)
        expected[wanted, :first] = np.asarray(full)[wanted, :first]
        np.testing.assert_array_equal(pruned, expected)


def test_gradients_outside_the_mask_are_zero():
    theta_u, theta_v = (jnp.asarray(x) for x in random_factors(CONVOLUTION))

    @jax.jit
    def gradient(theta_v, capacity):
        return jax.grad(lambda v: (composed(CONVOLUTION, theta_u, v, capacity)[0] ** 2).sum())(
            theta_v
        )

    found = np.array(gradient(theta_v, 0.3))
    assert (found[:, :3, :3] != 0).all()
    found[:, :3, :3] = 0
    assert (found == 0).all()


def test_masked_layers_equal_a_dense_network_of_the_kept_channels():
    """Prefix order: the next layer's kept inputs are this layer's kept outputs, for all p."""
    first = FactorisedLayer(15, 6, min_capacity=0.2, prune_inputs=False)
    second = FactorisedLayer(5, 15, min_capacity=0.2, prune_outputs=False, input_blocks=3)
    assert first.num_blocks == second.input_blocks
    factors = [random_factors(layer, seed) for seed, layer in enumerate((first, second))]
    x = np.random.default_rng(2).normal(size=(7, 6))
    bias = np.random.default_rng(3).normal(size=15)
    for capacity, places in ((0.2, 1), (0.5, 2), (0.7, 3), (1.0, 5)):
        (w1, kept), (w2, _) = (
            map(np.asarray, composed(layer, *pair, capacity))
            for layer, pair in zip((first, second), factors, strict=True)
        )
        masked = np.maximum(x @ w1.T + bias, 0) @ w2.T
        width = 3 * places
        assert np.flatnonzero(kept).tolist() == list(range(width))
        # theta[(a, g), s] = sum_r u[a, r] v[r, g, s], channel (a, g) at g R1 + a.
        dense = [
            np.einsum("ar,rgs->gas", u[:, 0], v).reshape(layer.outputs, layer.inputs)
            for layer, (u, v) in zip((first, second), factors, strict=True)
        ]
        small = np.maximum(x @ dense[0][:width].T + bias[:width], 0) @ dense[1][:, :width].T
        np.testing.assert_allclose(masked, small, rtol=1e-4, atol=1e-4)


def test_payload_counter_equals_the_formula():
    """rho(p) of the paper, at sizes where R1 and the kept parts are whole."""
    for layer in (
        FactorisedLayer(120, 60, kernel_size=3),
        FactorisedLayer(60, 120, kernel_size=1),
        FactorisedLayer(40, 20, kernel_size=5, min_capacity=0.25),
    ):
        plain = layer.outputs * layer.inputs * layer.kernel_size**2
        for percent in range(10, 101, 10):
            capacity = percent / 100
            if capacity < layer.min_capacity or (percent * layer.group_size) % 100:
                continue
            ratio = factorised.size_ratio(
                capacity,
                outputs=layer.outputs,
                inputs=layer.inputs,
                kernel_size=layer.kernel_size,
                min_capacity=layer.min_capacity,
            )
            np.testing.assert_allclose(factorised.num_floats(layer, capacity) / plain, ratio)


def test_payload_numbers_of_the_specification():
    """S = 64, T = 128, k = 3; a least capacity of 1 % costs a full client 5.6 plain layers."""

    def ratio(capacity, least):
        return factorised.size_ratio(
            capacity, outputs=128, inputs=64, kernel_size=3, min_capacity=least
        )

    found = [ratio(p, 0.1) for p in (0.1, 0.25, 0.5, 1.0)]
    np.testing.assert_allclose(found, [0.106, 0.135, 0.239, 0.656], atol=5e-4)
    assert round(ratio(1.0, 0.01), 1) == 5.6
    # The published bound 1 / (k^2 p_min / p^2 + p_min) does not hold for small p.
    assert ratio(0.1, 0.1) > 1 / (9 * 0.1 / 0.1**2 + 0.1)


def test_general_factors_have_one_shape_and_places_are_whole():
    odd = FactorisedLayer(128, 64, kernel_size=3)
    assert odd.num_blocks == 8 and odd.group_size == 16  # 12.8 blocks would not divide 128
    assert FactorisedLayer(7, 3).num_blocks == 1
    theta_u, theta_v = factorised.init(jax.random.key(0), odd)
    assert theta_u.shape == odd.general_shape == (8, 9, 64)
    assert theta_v.shape == odd.personal_shape == (64, 16, 64)
    weights, _ = composed(odd, theta_u, theta_v, 1.0)
    np.testing.assert_allclose(float(weights.var()), 2 / (64 * 9), rtol=0.1)
    shapes = {jax.eval_shape(functools.partial(composed, odd), theta_u, theta_v, p)[0].shape
              for p in CAPACITIES}  # fmt: skip
    assert shapes == {(128, 64, 3, 3)}
