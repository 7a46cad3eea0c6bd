"""Tri-matrix adapters: products, starts, what travels, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fed import tri_matrix
from fed.tri_matrix import TriMatrix

KEY = jax.random.key(3)


def test_apply_is_the_delta_without_forming_it():
    keys = jax.random.split(jax.random.key(1), 4)
    adapter = TriMatrix(
        *(jax.random.normal(k, s) for k, s in zip(keys, [(3, 6), (5, 3), (3, 3)], strict=False))
    )
    inputs = jax.random.normal(keys[3], (2, 7, 6))
    expected = inputs @ tri_matrix.delta(adapter, 0.7).T
    np.testing.assert_allclose(tri_matrix.apply(adapter, inputs, 0.7), expected, atol=1e-5)
    assert tri_matrix.delta(adapter, 0.7).shape == (5, 6)


def test_frozen_basis_is_orthonormal_and_keeps_the_norm():
    make = functools.partial(tri_matrix.init, jax.random.key(2), 20, 9, rank=4)
    adapter = jax.jit(lambda: make(start="frozen_basis"))()
    np.testing.assert_allclose(adapter.a @ adapter.a.T, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(adapter.b.T @ adapter.b, np.eye(4), atol=1e-5)
    core = jax.random.normal(jax.random.key(3), (4, 4))
    delta = tri_matrix.delta(adapter._replace(c=core), 1.5)
    np.testing.assert_allclose(jnp.linalg.norm(delta), 1.5 * jnp.linalg.norm(core), rtol=1e-5)
    paper = tri_matrix.init(jax.random.key(2), 4000, 9, rank=4)
    np.testing.assert_allclose(np.std(paper.a), 1e-3, rtol=0.05)
    np.testing.assert_array_equal(paper.c, np.eye(4))


def test_cores_travel_and_come_back():
    init = functools.partial(tri_matrix.init, rank=3)
    params = {
        "last": init(KEY, 4, 5),
        "blocks": jax.vmap(lambda key: init(key, 7, 7))(jax.random.split(KEY, 4)),
        "head": {"kernel": jnp.ones((2, 2)), "adapter": init(KEY, 6, 4)},
    }
    sent = tri_matrix.cores(params)
    assert sent.shape == (6, 3, 3)
    new = jax.random.normal(KEY, sent.shape)
    replaced = tri_matrix.with_cores(params, new)
    np.testing.assert_array_equal(tri_matrix.cores(replaced), new)
    np.testing.assert_array_equal(replaced["blocks"].c, new[:4])  # keys are in order
    back = tri_matrix.with_cores(replaced, sent)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tri_matrix.init(KEY, 4, 3, rank=4, start="frozen_basis"), "rank must be"),
        (lambda: tri_matrix.init(KEY, 4, 3, rank=0), "rank must be"),
        (lambda: tri_matrix.init(KEY, 4, 3, rank=1, start="zeros"), "unknown start"),
        (
            lambda: tri_matrix.cores([tri_matrix.init(KEY, 4, 3, rank=r) for r in (1, 2)]),
            "same rank",
        ),
        (lambda: tri_matrix.cores({"bias": jnp.zeros(3)}), "no TriMatrix"),
        (
            lambda: tri_matrix.with_cores(tri_matrix.init(KEY, 4, 3, rank=2), jnp.zeros((3, 2, 2))),
            "3 cores were given for 1 modules",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
