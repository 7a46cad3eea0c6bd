"""Hand-written gradients against JAX's own of the plain forms, and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import special, stats

from acme_jax import vit_ops

RNG = np.random.default_rng(0)


def draw(*shape, scale=1.0):
    return jnp.asarray(scale * RNG.normal(size=shape), jnp.float32)


def plain_attention(qkv):
    query, key, value = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
    scores = query @ key.transpose(0, 1, 3, 2) / np.sqrt(qkv.shape[-1])
    return (nn.softmax(scores) @ value).transpose(0, 2, 1, 3)


def plain_norm(x):
    return nn.LayerNorm(use_scale=False, use_bias=False, use_fast_variance=False).apply({}, x)


CASES = {
    "normalise": (vit_ops.normalise, plain_norm, (draw(6, 5, 16, scale=3.0) + 2.0,)),
    "gelu": (vit_ops.gelu, lambda x: nn.gelu(x, approximate=False), (draw(40, 8, scale=3.0),)),
    "project_down": (vit_ops.project_down, jnp.matmul, (draw(12, 32), draw(32, 4))),
    "attend": (vit_ops.attend, plain_attention, (draw(3, 7, 3, 2, 5, scale=2.0),)),
    "attention by products": (
        vit_ops._attend_by_products,
        plain_attention,
        (draw(3, 7, 3, 2, 5, scale=2.0),),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_plain_form(name):
    function, plain, arguments = CASES[name]
    upstream = draw(*plain(*arguments).shape)
    results = []
    for form in (function, plain):
        value, pull = jax.vjp(form, *arguments)
        results.append((value, *pull(upstream)))
    for ours, expected in zip(*results, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_vmapped_equals_looped(name):
    function, _, arguments = CASES[name]
    stacked = [jnp.stack([leaf, 0.5 * leaf]) for leaf in arguments]

    def gradient(*args):
        return jax.grad(lambda *a: jnp.sin(function(*a)).sum(), argnums=range(len(args)))(*args)

    together = jax.vmap(gradient)(*stacked)
    for row in range(2):
        alone = gradient(*(leaf[row] for leaf in stacked))
        for ours, expected in zip(together, alone, strict=True):
            np.testing.assert_allclose(ours[row], expected, rtol=1e-5, atol=1e-6)


def test_gelu_and_its_derivative_in_float64():
    x = np.linspace(-8.0, 8.0, 1001)
    value, derivative = jax.vmap(jax.value_and_grad(vit_ops.gelu))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(value, x * special.ndtr(x), atol=1e-6)
    np.testing.assert_allclose(derivative, special.ndtr(x) + x * stats.norm.pdf(x), atol=1e-6)


def test_gelu_keeps_the_left_tail_in_bfloat16():
    x = jnp.asarray([-4.0, -3.0, -2.0, -1.0, 0.5, 3.0], jnp.bfloat16)
    value, derivative = jax.jit(jax.vmap(jax.value_and_grad(vit_ops.gelu)))(x)
    exact = np.asarray(x, np.float64)
    expected = special.ndtr(exact) + exact * stats.norm.pdf(exact)
    np.testing.assert_allclose(value.astype(jnp.float32), exact * special.ndtr(exact), rtol=0.01)
    np.testing.assert_allclose(derivative.astype(jnp.float32), expected, rtol=0.01)


@pytest.mark.parametrize("name", ["project_down", "attend"])
def test_the_form_for_accelerators_is_the_same_function(name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    test_values_and_gradients_equal_the_plain_form(name)


def test_normalise_has_no_trouble_with_a_large_mean():
    x = np.asarray(RNG.normal(size=(4, 64)) + 300.0, np.float32)
    exact = x.astype(np.float64)
    exact = (exact - exact.mean(1, keepdims=True)) / np.sqrt(exact.var(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(vit_ops.normalise(jnp.asarray(x)), exact, atol=1e-4)


def test_bfloat16_stays_bfloat16_with_moments_in_float32():
    x = draw(4, 64, scale=5.0).astype(jnp.bfloat16)
    assert vit_ops.normalise(x).dtype == vit_ops.gelu(x).dtype == jnp.bfloat16
    expected = vit_ops.normalise(x.astype(jnp.float32))
    np.testing.assert_allclose(vit_ops.normalise(x).astype(jnp.float32), expected, atol=0.02)
    assert jax.grad(lambda v: vit_ops.normalise(v).sum().astype(jnp.float32))(x).dtype == x.dtype
