"""Searches the sub-networks of an MLP-Mixer, a model that `nas` knows nothing about.

    python scripts/examples/search_mixer.py [STEPS [GENERATIONS]]

Trains one Mixer on 8 x 8 digits so that all of its 5^8 sub-networks work, searches them for few
FLOPs and a low selection error, and prints the front with test errors, read once. About 35 s.
"""

import sys
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from nas import integer, nsga2

TOKENS, DIM = 16, 32
UNITS = (8, 16) * 4  # of 8 MLPs, over tokens and over channels; gene g from 0 to 4 keeps g * UNITS
TRAIN, SELECT, TEST = slice(0, 900), slice(900, 1350), slice(1350, None)


class Mixer(nn.Module):
    """Classifies digits with the hidden units that a sub-network, 8 genes, keeps."""

    @nn.compact
    def __call__(self, images: jax.Array, net: jax.Array) -> jax.Array:
        """Logits [B, 10] of images [B, 64] by the network of genes [8]."""
        patches = (images / 16).reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, TOKENS, 4)
        x = nn.Dense(DIM)(patches)
        for i, units in enumerate(UNITS):
            axis = 1 if i % 2 == 0 else 2
            hidden = nn.gelu(nn.Dense(4 * units)(nn.LayerNorm()(x).swapaxes(axis, 2)))
            hidden *= jnp.arange(4 * units) < net[i] * units
            x += nn.Dense((TOKENS, DIM)[i % 2], use_bias=False)(hidden).swapaxes(axis, 2)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=1))


def main(steps: int = 1000, generations: int = 25) -> None:
    """Trains, searches and prints."""
    order = jax.random.permutation(jax.random.key(0), 1797)
    images, labels = (jnp.asarray(x)[order] for x in load_digits(return_X_y=True))
    apply: Callable = Mixer().apply
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    space = integer.integer_operators(integer.genes(num=8, cardinality=5))

    def step(carry: tuple, key: jax.Array) -> tuple:
        keys = jax.random.split(key)
        rows, nets = jax.random.randint(keys[0], (64,), 0, TRAIN.stop), space.sample(keys[1], 64)

        def loss(params: dict) -> jax.Array:  # every image goes through another sub-network
            logits = jax.vmap(apply, (None, 0, 0))(params, images[rows, None], nets)[:, 0]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

        updates, state = adam.update(jax.grad(loss)(carry[0]), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    def evaluate(nets: jax.Array, split: slice = SELECT) -> jax.Array:
        logits = jax.vmap(apply, (None, None, 0))(params, images[split], nets)
        error = jnp.mean(logits.argmax(axis=-1) != labels[split], axis=1)
        return jnp.stack([error, 4 * TOKENS * DIM * (nets @ jnp.array(UNITS))], axis=1)

    params = Mixer().init(jax.random.key(1), images[:1], jnp.full(8, 4))
    keys = jax.random.split(jax.random.key(2), steps)
    params = jax.jit(lambda p: jax.lax.scan(step, (p, adam.init(p)), keys)[0][0])(params)
    searcher = nsga2.nsga2(space, population_size=40)
    search = jax.jit(lambda k: nsga2.search(k, searcher, evaluate, num_generations=generations))
    front = search(jax.random.key(3)).archive
    nets, values = front.genomes[front.valid], front.objectives[front.valid]
    rows = zip(values.tolist(), evaluate(nets, TEST).tolist(), nets.tolist(), strict=True)
    print("kFLOP  selection error  test error  network")
    for (error, flops), (test, _), net in sorted(rows, key=lambda row: row[0][1]):
        print(f"{flops / 1e3:5.0f}  {error:15.3f}  {test:10.3f}  {net}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
