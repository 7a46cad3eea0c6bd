"""Co-LoRA: adapters of any width, and the alignment that gives their cores one meaning."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from fed import co_lora
from fed.co_lora import Basis, Core
from fed.co_lora_alignment import ModuleSamples, align, canonical_map, match_a

KEY = jax.random.key(0)
SCALE = 2.0


def core(rank, seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    draw = (size * rng.normal(size=shape) for shape in ((rank, rank), (rank,)))
    return Core(*(jnp.asarray(x, jnp.float32) for x in draw))


def basis(rank, d_in, d_out, seed=0):
    key = jax.random.key(seed)
    return co_lora.init_basis(key, jnp.ones(d_in), jnp.ones(d_out), rank=rank)


def isometry(rng, large, small):
    """R [large, small] with orthonormal columns."""
    return np.linalg.qr(rng.normal(size=(large, small)))[0]


def test_zero_cores_leave_the_module_as_it_is():
    rng = np.random.default_rng(1)
    weight, inputs = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 7), (4, 7)))
    zero = co_lora.zero_core(3)
    beta = co_lora.gate_value(jnp.ones(7), inputs)
    added = co_lora.apply(basis(3, 7, 5), zero, zero, beta, inputs, SCALE)
    np.testing.assert_array_equal(inputs @ weight.T + added, inputs @ weight.T)


@pytest.mark.parametrize("looks", [True, False])
def test_apply_is_the_gated_sum_of_two_adapters(looks):
    rng = np.random.default_rng(2)
    own, shared, module = core(3, 1), core(3, 2), basis(3, 7, 5)
    inputs = rng.normal(size=(2, 4, 7)).astype(np.float32)
    gate = rng.normal(size=7 if looks else ()).astype(np.float32)
    beta = co_lora.gate_value(jnp.asarray(gate), jnp.asarray(inputs))
    found = co_lora.apply(module, own, shared, beta, jnp.asarray(inputs), SCALE)
    a, b = (np.asarray(x, np.float64) for x in module)
    for place in np.ndindex(2, 4):
        x = inputs[place].astype(np.float64)
        one, other = (SCALE * b @ (np.asarray(p) @ a @ x + np.asarray(q)) for p, q in (own, shared))
        share = 1 / (1 + np.exp(-(x @ gate if looks else gate)))
        np.testing.assert_allclose(found[place], share * other + (1 - share) * one, atol=1e-5)


def test_a_gate_of_zero_is_a_half():
    inputs = jax.random.normal(KEY, (3, 6))
    np.testing.assert_array_equal(co_lora.gate_value(jnp.zeros(6), inputs), np.full((3, 1), 0.5))
    assert co_lora.gate_value(jnp.zeros(()), inputs) == 0.5


def test_only_the_local_core_gets_a_gradient():
    inputs, module = jax.random.normal(KEY, (3, 6)), basis(2, 6, 4)

    def output(local, shared):
        return co_lora.apply(module, local, shared, jnp.float32(0.25), inputs, SCALE).sum()

    local, shared = jax.grad(output, argnums=(0, 1))(core(2, 1), core(2, 2))
    np.testing.assert_array_equal(shared.p, np.zeros((2, 2)))
    np.testing.assert_array_equal(shared.q, np.zeros(2))
    assert np.abs(local.p).min() > 1e-3
    expected = 0.75 * SCALE * 3 * module.b.sum(axis=0)
    np.testing.assert_allclose(local.q, expected, rtol=1e-5)


def test_a_basis_is_orthonormal_in_the_units_that_a_model_has():
    held_in, held_out = (jnp.arange(size) < number for size, number in ((9, 6), (8, 5)))
    found = co_lora.init_basis(KEY, held_in.astype(jnp.float32), held_out * 1.0, rank=4)
    np.testing.assert_allclose(found.a @ found.a.T, np.eye(4), atol=1e-5)
    np.testing.assert_allclose(found.b.T @ found.b, np.eye(4), atol=1e-5)
    np.testing.assert_array_equal(found.a[:, 6:], np.zeros((4, 3)))
    np.testing.assert_array_equal(found.b[5:], np.zeros((3, 4)))


def test_reachable_updates_span_r_squared_directions():
    a, b = (np.asarray(x) for x in basis(3, 7, 5))
    units = np.eye(9).reshape(9, 3, 3)
    assert np.linalg.matrix_rank([(b @ p @ a).ravel() for p in units]) == 9


def test_nearest_orthonormal_rows():
    """Against the polar factor, and against random rivals."""
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(3, 6))
    found = np.asarray(co_lora.orthonormal_rows(jnp.asarray(matrix, jnp.float32)))
    expected = scipy.linalg.polar(matrix, side="left")[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    distance = np.linalg.norm(found - matrix)
    for _ in range(100):
        rival = isometry(rng, 6, 3).T
        assert np.linalg.norm(rival - matrix) > distance


@pytest.mark.parametrize("large", [5, 9])
def test_map_of_rotated_features_is_the_rotation(large):
    rng = np.random.default_rng(4)
    small = rng.normal(size=(100, 5)) * np.linspace(0.3, 3, 5)
    rotation = isometry(rng, large, 5)
    with jax.enable_x64(True):
        found = canonical_map(jnp.asarray(small), jnp.asarray(small @ rotation.T))
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, rotation, atol=1e-12)
    single = canonical_map(*(jnp.asarray(x, jnp.float32) for x in (small, small @ rotation.T)))
    np.testing.assert_allclose(single, rotation, atol=1e-4)


def test_map_against_numpy():
    rng = np.random.default_rng(5)
    small = rng.normal(size=(400, 4)) @ rng.normal(size=(4, 4))
    large = small @ rng.normal(size=(4, 6)) + rng.normal(size=(400, 6)) + 3
    ridge = 1e-3

    def variance(x):
        found = np.cov(x.T, bias=True)
        return found + ridge * np.linalg.eigvalsh(found).max() * np.eye(len(found))

    power = scipy.linalg.fractional_matrix_power
    s11, s33 = variance(small), variance(large)
    s31 = (large - large.mean(0)).T @ (small - small.mean(0)) / 400
    left, _, right = np.linalg.svd(power(s33, -0.5) @ s31 @ power(s11, -0.5), full_matrices=False)
    expected = power(s33, 0.5) @ left @ right @ power(s11, -0.5)
    found = canonical_map(*(jnp.asarray(x, jnp.float32) for x in (small, large)), ridge=ridge)
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def test_map_into_a_model_that_contains_the_small_one_is_regression():
    """Shared units move alike, the others as they are predicted from them."""
    rng = np.random.default_rng(6)
    small = rng.normal(size=(500, 3))
    others = small @ rng.normal(size=(3, 4)) + rng.normal(size=(500, 4))
    small, others = (x - x.mean(0) for x in (small, others))
    with jax.enable_x64(True):
        found = canonical_map(
            jnp.asarray(small), jnp.asarray(np.concatenate([small, others], 1)), ridge=1e-10
        )
    slopes = np.linalg.lstsq(small, others, rcond=None)[0].T
    np.testing.assert_allclose(found, np.concatenate([np.eye(3), slopes]), atol=1e-6)


def test_unrelated_directions_have_no_map():
    rng = np.random.default_rng(7)
    shared, own, other = (rng.normal(size=(1000, 2)) for _ in range(3))
    other -= (
        np.concatenate([shared, own], 1)
        @ np.linalg.lstsq(np.concatenate([shared, own], 1), other, rcond=None)[0]
    )
    other -= other.mean(0)
    stacked = (np.concatenate([shared, x], 1) for x in (own, other))
    found = canonical_map(*(jnp.asarray(x, jnp.float32) for x in stacked))
    np.testing.assert_allclose(found[2:, 2:], np.zeros((2, 2)), atol=0.05)
    assert np.abs(found[:2, :2] - np.eye(2)).max() < 0.1


def test_units_that_a_model_lacks_change_nothing():
    rng = np.random.default_rng(8)
    small = rng.normal(size=(200, 4))
    large = small @ rng.normal(size=(4, 6)) + rng.normal(size=(200, 6))
    inputs = small @ rng.normal(size=(4, 5)) + rng.normal(size=(200, 5))
    a, b = isometry(rng, 4, 3).T, isometry(rng, 4, 3)

    def aligned(extra):
        def pad(x):
            return jnp.pad(jnp.asarray(x, jnp.float32), ((0, 0), (0, extra)))

        samples = ModuleSamples(pad(small), pad(small)), ModuleSamples(pad(inputs), pad(large))
        return align(Basis(pad(a), pad(b.T).T), *samples)

    plain, padded = aligned(0), aligned(7)
    np.testing.assert_allclose(padded.a[:, :5], plain.a, atol=1e-4)
    np.testing.assert_allclose(padded.b[:6], plain.b, atol=1e-4)
    np.testing.assert_array_equal(padded.a[:, 5:], np.zeros((3, 7)))
    np.testing.assert_array_equal(padded.b[6:], np.zeros((7, 3)))


def test_matched_rows_of_rotated_inputs_are_rotated():
    rng = np.random.default_rng(9)
    small = rng.normal(size=(300, 5)) * np.linspace(0.5, 2, 5)
    rotation, a = isometry(rng, 8, 5), isometry(rng, 5, 3).T
    with jax.enable_x64(True):
        found = match_a(*(jnp.asarray(x) for x in (small @ rotation.T, small @ a.T)), ridge=1e-8)
        np.testing.assert_allclose(found, a @ rotation.T, atol=1e-6)


def test_matched_rows_are_orthonormal_and_near_the_best():
    """No random orthonormal rows come nearer to targets that cannot be met exactly."""
    rng = np.random.default_rng(10)
    inputs = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6))
    targets = inputs @ rng.normal(size=(6, 2)) / 3
    given = [jnp.asarray(x, jnp.float32) for x in (inputs, targets)]
    found = np.asarray(match_a(*given))
    np.testing.assert_allclose(found @ found.T, np.eye(2), atol=1e-5)

    def error(a):
        return ((inputs @ a.T - targets) ** 2).mean()

    rivals = [error(isometry(rng, 6, 2).T) for _ in range(200)]
    # Least squares alone has rows that are far from orthogonal, which the projection spoils.
    assert error(found) < 0.7 * error(np.asarray(match_a(*given, num_steps=0)))
    assert error(found) < min(rivals)


class Network:
    """Two layers with a rectifier; the wide one has every unit of the narrow one twice."""

    def __init__(self, rng, sizes):
        pairs = itertools.pairwise(sizes)
        self.weights = [rng.normal(size=(rows, columns)) / 2 for columns, rows in pairs]

    def twice(self):
        """Rotated inputs, doubled units; the outputs are the same."""
        wide = object.__new__(Network)
        double = np.concatenate([np.eye(len(self.weights[0]))] * 2) / np.sqrt(2)
        wide.weights = [double @ self.weights[0], self.weights[1] @ double.T]
        return wide

    def samples(self, inputs):
        """Both modules' samples."""
        hidden = inputs @ self.weights[0].T
        read = np.maximum(hidden, 0)
        pairs = (inputs, hidden), (read, read @ self.weights[1].T)
        return [ModuleSamples(*(jnp.asarray(x, jnp.float32) for x in pair)) for pair in pairs]

    def adapted(self, bases, cores, inputs):
        """Outputs with the cores as local ones, gate 0 and no shared ones."""
        values = jnp.asarray(inputs, jnp.float32)
        for place, (weight, module, own) in enumerate(zip(self.weights, bases, cores, strict=True)):
            values = jax.nn.relu(values) if place else values
            zero = co_lora.zero_core(own.q.shape[0])
            added = co_lora.apply(module, own, zero, jnp.float32(0.5), values, SCALE)
            values = values @ jnp.asarray(weight, jnp.float32).T + added
        return values


@pytest.mark.parametrize("aligned", [True, False])
def test_a_core_means_the_same_in_narrow_and_wide_models(aligned):
    """Any P, Q of the narrow model do in the wide one what they do in the narrow one."""
    rng = np.random.default_rng(11)
    narrow = Network(rng, (6, 5, 4))
    wide = narrow.twice()
    inputs = rng.normal(size=(400, 6))
    np.testing.assert_allclose(*(n.samples(inputs)[1].outputs for n in (narrow, wide)), atol=1e-5)
    bases = [basis(3, 6, 5, 1), basis(3, 5, 4, 2)]
    if aligned:
        pairs = zip(narrow.samples(inputs), wide.samples(inputs), strict=True)
        others = [align(b, *pair) for b, pair in zip(bases, pairs, strict=True)]
    else:
        others = [basis(3, 6, 10, 1), basis(3, 10, 4, 2)]
    assert others[0].b.shape == (10, 3)
    assert others[1].a.shape == (3, 10)
    cores = [core(3, seed, size=0.5) for seed in (1, 2)]
    plain = narrow.samples(inputs)[1].outputs
    small, large = (n.adapted(b, cores, inputs) for n, b in ((narrow, bases), (wide, others)))
    effect, difference = (np.linalg.norm(x) for x in (small - plain, large - small))
    assert effect > 10
    if aligned:
        assert difference < 0.01 * effect
    else:
        assert difference > 0.3 * effect


def test_errors():
    with pytest.raises(ValueError, match="rank must be from 1 to 3 for a module of 5 inputs and 3"):
        basis(4, 5, 3)
