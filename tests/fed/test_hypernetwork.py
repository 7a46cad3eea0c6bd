"""The hyper-network and its pull-back: against NumPy and finite differences in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fed import hypernetwork
from fed.algorithms.pa3dfl import pull_back

TEMPLATE = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}
NETWORK = hypernetwork.init(
    jax.random.key(1), TEMPLATE, num_clients=5, embedding_size=3, hidden=(6, 4)
)
generate = jax.jit(jax.vmap(hypernetwork.generate, (None, 0)))


def generated_by_numpy(network, row):
    network = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), network)
    x = np.maximum(network.embeddings @ network.encoder[0][0] + network.encoder[0][1], 0)
    encoded = x @ network.encoder[1][0] + network.encoder[1][1]
    made = {}
    for name in TEMPLATE:
        scores = encoded @ encoded[row] / np.exp(network.log_temperature[name])
        attention = np.exp(scores) / np.exp(scores).sum()
        decoded = np.tensordot(encoded.T @ attention, network.decoders[name], 1)
        made[name] = network.start[name] + decoded
    return made


def test_hypernetwork_equals_numpy_and_equal_embeddings_get_equal_arrays():
    made = generate(NETWORK, jnp.arange(5))
    for row in range(5):
        for name, expected in generated_by_numpy(NETWORK, row).items():
            np.testing.assert_allclose(made[name][row], expected, atol=1e-5)
    np.testing.assert_allclose(jnp.exp(NETWORK.log_temperature["a"]), 2.0, rtol=1e-6)
    twins = NETWORK._replace(embeddings=NETWORK.embeddings.at[3].set(NETWORK.embeddings[1]))
    made = generate(twins, jnp.arange(5))
    for leaf in jax.tree.leaves(made):
        np.testing.assert_array_equal(leaf[3], leaf[1])
        assert np.abs(leaf[2] - leaf[1]).max() > 1e-3
    with pytest.raises(ValueError, match="at least one width"):
        hypernetwork.init(jax.random.key(1), TEMPLATE, num_clients=5, hidden=())


def test_pull_back_is_the_gradient_of_the_distance_to_the_trained_arrays():
    """Against finite differences in float64; a client that is not heard does not count."""
    rng = np.random.default_rng(5)
    rows = np.asarray([4, 1, 2])
    change = {name: rng.normal(size=(3, *leaf.shape)) for name, leaf in TEMPLATE.items()}
    as_float32 = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    found = jax.jit(pull_back)(
        NETWORK, as_float32(change), jnp.asarray([1.0, 0.0, 3.0]), jnp.asarray(rows)
    )
    start = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), NETWORK)
    targets = [
        {name: leaf + change[name][place] for name, leaf in generated_by_numpy(start, row).items()}
        for place, row in enumerate(rows)
    ]

    def distance(network):
        return sum(
            0.5 * share * ((generated_by_numpy(network, rows[place])[name] - target) ** 2).sum()
            for place, share in ((0, 0.25), (2, 0.75))
            for name, target in targets[place].items()
        )

    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(lambda leaf, rng=rng: rng.normal(size=leaf.shape), start)
        step = 1e-5
        ends = [
            distance(jax.tree.map(lambda leaf, d, s=s: leaf + s * d, start, direction))
            for s in (step, -step)
        ]
        slope = sum(
            (np.asarray(g) * d).sum()
            for g, d in zip(jax.tree.leaves(found), jax.tree.leaves(direction), strict=True)
        )
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-3)
