"""Linear CKA against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fed import cka

linear_cka = jax.jit(cka.linear_cka)


def cka_reference(x, y):
    """With centring matrices and Hilbert-Schmidt inner products, in float64."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    centre = np.eye(len(x)) - 1 / len(x)

    def hsic(a, b):
        return np.trace(a @ a.T @ centre @ b @ b.T @ centre)

    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


def test_cka_equals_its_definition_and_knows_rotations():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(9, 4)) + 3, rng.normal(size=(9, 6))
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    x, y, rotated = (np.asarray(m, np.float32) for m in (x, y, -2.5 * x @ rotation))
    value = linear_cka(x, y)
    assert value == pytest.approx(cka_reference(x, y), abs=1e-5)
    assert 0.05 < value < 0.95
    assert linear_cka(x, rotated) == pytest.approx(1, abs=1e-6)
    assert linear_cka(x, 1e-12 * rotated) == pytest.approx(1, abs=1e-6)
    stretched = x * np.asarray([[10, 1, 1, 1]], np.float32)
    assert linear_cka(x, stretched) < 0.95
    padded = [np.concatenate([m, np.full((2, m.shape[1]), 9, np.float32)]) for m in (x, y)]
    mask = np.arange(11) < 9
    assert linear_cka(*padded, mask=mask) == pytest.approx(float(value), abs=1e-6)


def test_cka_of_matrices_without_structure():
    x, flat = np.eye(4, dtype=np.float32), np.full((4, 4), 0.1, np.float32)
    assert linear_cka(x, flat) == 0 and linear_cka(flat, np.zeros_like(flat)) == 1


def test_pairwise_cka_is_the_mean_over_modules():
    cores = np.random.default_rng(3).normal(size=(3, 2, 5, 5)).astype(np.float32)
    result = np.asarray(jax.jit(cka.pairwise_cka)(cores))
    for i in range(3):
        for j in range(3):
            expected = np.mean([cka_reference(cores[i, m], cores[j, m]) for m in range(2)])
            assert result[i, j] == pytest.approx(expected, abs=1e-5)
    np.testing.assert_array_equal(result, result.T)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cka.linear_cka(jnp.ones((2, 3)), jnp.ones((3, 3))), r"\[N, p\]"),
        (lambda: cka.pairwise_cka(jnp.ones((2, 3, 3))), r"\[C, M, p, q\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
