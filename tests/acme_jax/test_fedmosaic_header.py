"""FedMosaic on the comparison's header: bases of sub-headers, what one core does in them, bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acme_jax import layout
from acme_jax.methods import fedmosaic
from acme_jax.methods.fedmosaic_bases import MODULES, aligned_bases, held_units, run_layers
from acme_jax.methods.method import MethodError
from acme_jax.methods.mlp_header import MlpHeader, prefix_masks
from acme_jax.methods.problem import Problem, Public, Schedule
from fed import co_lora
from fed.clients import stack_clients, take_row
from fed.co_lora import Basis, Core

HEADER = MlpHeader(num_features=10, num_hidden=24, num_classes=5)
UNITS = (12, 18, 24)
CAPACITIES = np.asarray([1.0, 0.5, 0.75, 0.5])
START = HEADER.init(jax.random.key(1))
RNG = np.random.default_rng(0)
FEATURES = jnp.asarray(RNG.normal(size=(300, 10)), jnp.float32)


@functools.lru_cache
def bases():
    return aligned_bases(HEADER, UNITS, 4, START, FEATURES, jax.random.key(2))


@pytest.fixture(scope="module")
def problem():
    rows = [(RNG.normal(size=(n, 10)).astype(np.float32), np.arange(n) % 5) for n in (9, 20, 5, 7)]
    return Problem(
        key=jax.random.key(0),
        header=HEADER,
        start=START,
        data=stack_clients(rows),
        capacities=CAPACITIES,
        public=Public(FEATURES, jnp.zeros(300, jnp.int32)),
        schedule=Schedule(rounds=2, batch_size=8),
        mesh=layout.make_mesh(1),
    )


def test_bases_are_those_of_the_clients_own_units():
    found = bases()
    for level, units in enumerate(UNITS):
        first, second, last = (take_row(found[name], level) for name in MODULES)
        for a in (first.a, second.a, last.a):
            np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-4)
        for absent in (first.b[units:], second.b[units:], second.a[:, units:], last.a[:, units:]):
            np.testing.assert_array_equal(absent, np.zeros_like(absent))
        for present in (first.b[:units], second.b[:units]):
            assert (np.abs(present).max(axis=1) > 1e-4).all()
    np.testing.assert_array_equal(found["first"].a[2], found["first"].a[0])
    np.testing.assert_array_equal(found["last"].b[2], found["last"].b[0])


def effects(found, seed):
    """What one random core does to the logits of every size of header: [L, N * Y]."""
    rng = np.random.default_rng(seed)
    cores = {
        name: Core(*(jnp.asarray(0.3 * rng.normal(size=s), jnp.float32) for s in ((4, 4), (4,))))
        for name in MODULES
    }

    @jax.jit
    @jax.vmap
    def effect(module, held):
        def added(name, inputs):
            zero = co_lora.zero_core(4)
            return co_lora.apply(module[name], cores[name], zero, jnp.float32(0.5), inputs, 2.0)

        plain, adapted = (run_layers(START, held, FEATURES, f) for f in (None, added))
        return (adapted["last"].outputs - plain["last"].outputs).ravel()

    return np.asarray(effect(found, held_units(HEADER, UNITS)))


def test_a_core_does_alike_in_narrow_and_wide_headers():
    """With aligned bases, and not with bases drawn for each size."""

    ends = jnp.ones(10), jnp.ones(5)

    def random(place):
        held, key = held_units(HEADER, UNITS)[place], jax.random.fold_in(jax.random.key(5), place)
        sides = {"first": (ends[0], held), "second": (held, held), "last": (held, ends[1])}
        return {
            name: co_lora.init_basis(jax.random.fold_in(key, i), *sides[name], rank=4)
            for i, name in enumerate(MODULES)
        }

    drawn = jax.jit(lambda: jax.lax.map(random, jnp.arange(3)))()

    def alike(found):
        cosines = []
        for seed in range(3):
            unit = effects(found, seed)
            unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
            cosines.append((unit @ unit.T)[0, 1:])
        return np.mean(cosines, axis=0)

    aligned, not_aligned = alike(bases()), alike(drawn)
    assert aligned.min() > 0.4
    assert np.abs(not_aligned).max() < 0.15


def test_layers_are_those_of_the_masked_header():
    masks = prefix_masks(HEADER, CAPACITIES)
    for row, units in enumerate((24, 12, 18, 12)):
        masked = jax.tree.map(lambda leaf, mask, r=row: leaf * mask[r], START, masks)
        found = run_layers(START, held_units(HEADER, (units,))[0], FEATURES)["last"].outputs
        np.testing.assert_allclose(found, HEADER.logits(masked, FEATURES), atol=1e-5)


def test_what_travels(problem):
    """Cores of 3 modules, 40 % of the rows of the smallest header's task vector; bases once."""
    built = fedmosaic.build(problem)
    ranks = {"first": 10, "second": 12, "last": 5}
    cores = sum(r * r + r for r in ranks.values())
    message = built.algorithm.server_message(built.server, 0)
    assert sum(a.nbytes for a in built.down(message, 0)) == 4 * cores
    state = take_row(built.clients, 0)
    step = built.algorithm.client_init(message, state, problem.key)
    _, update = built.algorithm.client_final(message, step)
    assert sum(a.nbytes for a in built.up(update, 0)) == 4 * (cores + 4 * 12)
    # First B, second A and B, last A, of the client's own units; the smallest have the seed.
    for row, units in enumerate((24, 12, 18, 12)):
        sent = sum(a.nbytes for a in built.setup_down(row))
        assert sent == (0 if units == 12 else 4 * units * (10 + 2 * 12 + 5))
    assert not list(built.setup_up(0))


def test_clients_of_equal_capacity_share_their_basis(problem):
    (own, held), units = fedmosaic.build(problem).clients.adapters.fixed, (24, 12, 18, 12)
    np.testing.assert_array_equal(held.sum(axis=1), units)
    assert isinstance(own["second"], Basis)
    np.testing.assert_array_equal(own["second"].b[1], own["second"].b[3])
    assert np.abs(own["second"].b[0] - own["second"].b[2]).max() > 1e-3


def test_it_needs_public_samples(problem):
    with pytest.raises(MethodError, match="needs public samples at the edge to align its bases"):
        fedmosaic.build(problem._replace(public=None))
