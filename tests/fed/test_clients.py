"""Stacked client data and batch plans."""

import jax
import numpy as np
import pytest

from fed import clients

batch_indices = jax.jit(
    clients.batch_indices, static_argnames=("max_size", "num_steps", "batch_size", "epochs")
)


def plan_of(size, *, max_size=None, num_steps=12, batch_size=4, epochs=None, seed=0):
    return batch_indices(
        jax.random.key(seed),
        size,
        max_size=max_size or size,
        num_steps=num_steps,
        batch_size=batch_size,
        epochs=epochs,
    )


def test_stack_pads_with_zeros():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(n, 2, 3)).astype(np.float32), np.full(n, n)) for n in (3, 5, 1)]
    data = clients.stack_clients(pairs)
    assert data.inputs.shape == (3, 5, 2, 3) and data.labels.dtype == np.int32
    assert data.size.tolist() == [3, 5, 1]
    for row, (inputs, labels) in enumerate(pairs):
        np.testing.assert_array_equal(data.inputs[row, : len(inputs)], inputs)
        np.testing.assert_array_equal(data.labels[row, : len(inputs)], labels)
        assert not np.any(data.inputs[row, len(inputs) :])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "no clients"),
        ([(np.ones((2, 3)), [0, 1]), (np.ones((0, 3)), [])], "client 1 has no samples"),
        ([(np.ones((2, 3)), [0])], "labels of shape"),
        ([(np.ones((2, 3)), [0, 1]), (np.ones((2, 4)), [0, 1])], "samples of shape"),
    ],
)
def test_stack_errors(pairs, message):
    with pytest.raises(ValueError, match=message):
        clients.stack_clients(pairs)


def test_replicate_adds_a_leading_axis():
    tree = clients.replicate({"w": np.arange(3.0), "n": 2}, 4)
    assert tree["w"].shape == (4, 3) and tree["n"].shape == (4,)


def test_every_epoch_is_a_new_permutation():
    size, batch_size, epochs = 10, 4, 3
    plan = plan_of(size, num_steps=9, batch_size=batch_size)
    orders = []
    for epoch in range(epochs):
        steps = slice(3 * epoch, 3 * epoch + 3)
        weight = np.asarray(plan.weight[steps])
        assert weight.sum(axis=1).tolist() == [4, 4, 2]
        orders.append(np.asarray(plan.indices[steps])[weight > 0].tolist())
        assert sorted(orders[-1]) == list(range(size))
    assert orders[0] != orders[1] != orders[2]
    assert plan.valid.all()


def test_permutations_are_uniform():
    keys = jax.random.split(jax.random.key(0), 600)
    plans = jax.vmap(lambda k: batch_indices(k, 3, max_size=3, num_steps=1, batch_size=3))(keys)
    counts = np.unique(plans.indices[:, 0], axis=0, return_counts=True)[1]
    assert len(counts) == 6
    # Chi-squared with 5 degrees of freedom: 20.5 is the 0.1 % point.
    assert ((counts - 100) ** 2 / 100).sum() < 20.5


@pytest.mark.parametrize("epochs", [None, 2])
def test_padding_changes_nothing(epochs):
    plain = plan_of(7, epochs=epochs)
    for max_size in (8, 50):
        padded = plan_of(7, max_size=max_size, epochs=epochs)
        for a, b in zip(plain, padded, strict=True):
            np.testing.assert_array_equal(a, b)


def test_epochs_end_at_the_client_s_own_size():
    assert plan_of(7, max_size=20, epochs=2).valid.tolist() == [True] * 4 + [False] * 8
    assert not plan_of(0, max_size=20, epochs=2).valid.any()
    assert not plan_of(0, max_size=20).valid.any()


def test_vmapped_plans_equal_single_ones():
    keys, sizes = jax.random.split(jax.random.key(3), 3), np.array([5, 1, 9])

    def make(key, size):
        return batch_indices(key, size, max_size=9, num_steps=6, batch_size=2, epochs=2)

    stacked = jax.vmap(make)(keys, sizes)
    for row in range(3):
        for a, b in zip(make(keys[row], sizes[row]), stacked, strict=True):
            np.testing.assert_array_equal(a, b[row])
