"""Federated sub-networks: buckets against masks, and averages against plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from acme_jax import arch_buckets, slicing, subnet_clients, supernet
from acme_jax.vit import ViTConfig
from fed import simulate
from fed.clients import stack_clients
from nas.arch import Arch, ArchSpace, full, sample, to_mask

CONFIG = ViTConfig((8, 8, 1), 4, 16, num_layers=2, num_heads=2, num_neurons=24, num_classes=3)
SPACE = ArchSpace.from_fractions(2, 2, 24)
PARAMS = tiny.make_params(CONFIG)
OPTIMIZER = optax.sgd(0.05, momentum=0.9)
NUM_CLIENTS = 5
RNG = np.random.default_rng(0)
IDS = jnp.arange(NUM_CLIENTS)
KEY = jax.random.key(0)


def clients_archs():
    """Two alike, the full network, and two others; every layer chooses for itself."""
    population = sample(jax.random.key(5), SPACE, 3)
    drawn = [jax.tree.map(lambda leaf, i=i: leaf[i], population) for i in range(3)]
    rows = [drawn[0], full(SPACE), drawn[1], drawn[0], drawn[2]]
    return [jax.tree.map(np.asarray, arch) for arch in rows]


ARCHS = clients_archs()
STACKED = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *ARCHS)
DATA = stack_clients(
    [(RNG.random((n, 8, 8, 1)).astype(np.float32), RNG.integers(0, 3, n)) for n in (5, 8, 6, 7, 4)]
)
OPTIONS = {"client_ids": IDS, "batch_size": 4, "num_steps": 2}


@functools.cache
def run(max_buckets, chunk_size=None):
    """One round; `max_buckets="masked"` is the oracle."""
    algorithm = subnet_clients.masked(CONFIG, SPACE, OPTIMIZER)
    buckets = None
    if max_buckets != "masked":
        buckets = subnet_clients.buckets(CONFIG, SPACE, OPTIMIZER, STACKED, max_buckets)
    call = functools.partial(
        simulate.run_round, algorithm, buckets=buckets, chunk_size=chunk_size, **OPTIONS
    )
    state, _, metrics = jax.jit(call)(algorithm.server_init(PARAMS, STACKED), (), DATA, KEY, 0)
    return state.params, metrics.client["loss"]


@pytest.mark.parametrize(
    ("max_buckets", "chunk_size"), [(None, None), (2, None), (2, 4)], ids=["own", "two", "vmapped"]
)
def test_sliced_equals_masked(max_buckets, chunk_size):
    sliced, losses = run(max_buckets, chunk_size)
    masked, expected = run("masked")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    tiny.assert_trees_close(sliced, masked, rtol=0, atol=1e-5)


def test_average_is_over_the_clients_that_hold_a_weight():
    """Client by client in NumPy, with the masks that the gradient itself shows."""
    algorithm = subnet_clients.masked(CONFIG, SPACE, OPTIMIZER)
    state = algorithm.server_init(PARAMS, STACKED)
    _, updates, _ = simulate.run_clients(
        algorithm, jnp.arange(NUM_CLIENTS), (), DATA, KEY, 0, server_state=state, **OPTIONS
    )
    images = jnp.asarray(RNG.random((4, 8, 8, 1)), jnp.float32)

    @jax.jit
    def touched(mask):
        def loss(params):
            return jnp.square(supernet.apply(params, images, CONFIG, mask).logits).sum()

        return jax.tree.map(lambda leaf: leaf != 0, jax.grad(loss)(PARAMS))

    held = [touched(to_mask(SPACE, arch)) for arch in ARCHS]
    sizes = np.asarray(DATA.size, np.float64)

    def average(old, new, *masks):
        weights = np.stack(
            [np.asarray(m, np.float64) * n for m, n in zip(masks, sizes, strict=True)]
        )
        total = (weights * np.asarray(new, np.float64)).sum(axis=0)
        cover = weights.sum(axis=0)
        return np.where(cover > 0, total / np.maximum(cover, 1e-30), old)

    expected = jax.tree.map(average, PARAMS, updates, *held)
    found, _ = run("masked")
    tiny.assert_trees_close(found, expected, rtol=1e-4, atol=1e-6)


def test_held_weights_are_those_of_the_slice():
    for arch in ARCHS:
        held = subnet_clients.held_params(PARAMS, to_mask(SPACE, arch))
        count = sum(int(leaf.sum()) for leaf in jax.tree.leaves(held))
        assert count == tiny.count(slicing.slice_params(PARAMS, arch))


def test_put_back_undoes_the_slice():
    shape = arch_buckets.common_shape([ARCHS[0], ARCHS[2]])
    sliced = arch_buckets.slice_blocks(PARAMS, shape)
    blank = jax.tree.map(jnp.zeros_like, PARAMS)
    back = arch_buckets.put_back(blank, sliced, shape)
    held = [subnet_clients.held_params(PARAMS, to_mask(SPACE, ARCHS[i])) for i in (0, 2)]
    for part in held:
        tiny.assert_trees_close(
            jax.tree.map(jnp.multiply, back, part), jax.tree.map(jnp.multiply, PARAMS, part)
        )
    tiny.assert_trees_close(arch_buckets.put_back(PARAMS, sliced, shape), PARAMS)


def test_a_shape_holds_all_members_and_nothing_more():
    small = Arch(np.int32(2), np.asarray([1, 1, 1, 1]), np.asarray([6, 6, 6, 6]))
    other = Arch(np.int32(2), np.asarray([2, 1, 1, 1]), np.asarray([6, 6, 12, 6]))
    assert slicing.kept_blocks(small) == (0, 2)  # of four
    shape = arch_buckets.common_shape([small, other])
    assert shape.layers == (0, 2)
    assert shape.heads == (2, 1) and shape.neurons == (6, 12)
    assert shape.kept_by_all == (True, True) and shape.one_width == (False, False)
    deeper = small._replace(depth=np.int32(4))
    shape = arch_buckets.common_shape([small, deeper])
    assert shape.kept_by_all == (True, False, True, False) and all(shape.one_width)


def test_joining_takes_the_pair_that_wastes_least():
    def arch(heads, neurons):
        return Arch(np.int32(4), np.full(4, heads), np.full(4, neurons))

    archs = [arch(1, 6), arch(1, 7), arch(2, 24), arch(1, 6)]
    shapes = arch_buckets.assign_shapes(archs, CONFIG.dims)
    assert len(set(shapes)) == 3 and shapes[0] == shapes[3]
    shapes = arch_buckets.assign_shapes(archs, CONFIG.dims, max_buckets=2)
    assert shapes[0] == shapes[1] == shapes[3] != shapes[2]
    assert shapes[0].neurons == (7, 7, 7, 7)
    assert len(set(arch_buckets.assign_shapes(archs, CONFIG.dims, max_buckets=1))) == 1
    with pytest.raises(ValueError, match="one bucket, got 4 and 0"):
        arch_buckets.assign_shapes(archs, CONFIG.dims, max_buckets=0)
