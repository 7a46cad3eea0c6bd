"""A tiny Vision Transformer, its plain NumPy float64 twin, and data for the tests."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erf

from acme_jax import supernet
from acme_jax.vit import ViTConfig
from nas.arch import Arch, ArchSpace

# Neither square nor of one channel, so that mixed-up axes show.
CONFIG = ViTConfig((8, 12, 2), 4, 8, num_layers=4, num_heads=4, num_neurons=8, num_classes=3)
SPACE = ArchSpace.from_fractions(4, 4, 8)
WIDTHS = SPACE.widths


def make_params(config=CONFIG, seed=0, scale=0.3):
    """Parameters without any zero or one left from the initialisation."""
    rng = np.random.default_rng(seed)
    params = supernet.init(jax.random.key(seed), config)
    return jax.tree.map(
        lambda leaf: leaf + scale * rng.normal(size=leaf.shape).astype(np.float32), params
    )


def make_images(num=5, config=CONFIG, seed=1):
    """Images [num, height, width, channels] and labels [num]."""
    rng = np.random.default_rng(seed)
    images = rng.random((num, *config.image_shape), dtype=np.float32)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, config.num_classes, num), jnp.int32)


def genome(depth, heads, neurons):
    """An `Arch` of plain integers."""
    return Arch(jnp.int32(depth), jnp.asarray(heads, jnp.int32), jnp.asarray(neurons, jnp.int32))


# Every depth; equal and unequal layers; one non-canonical gene in a dropped block.
GENOMES = (
    genome(4, [4, 4, 4, 4], [8, 8, 8, 8]),
    genome(4, [1, 3, 2, 4], [2, 8, 6, 4]),
    genome(3, [2, 1, 4, 1], [4, 2, 2, 2]),
    genome(2, [1, 4, 2, 4], [6, 8, 2, 8]),
    genome(1, [1, 1, 1, 1], [2, 2, 2, 2]),
)


def random_genomes(num, seed=0):
    """Random genomes, not canonical."""
    rng = np.random.default_rng(seed)
    return [
        genome(
            rng.choice(SPACE.depth_choices),
            rng.choice(SPACE.head_choices, SPACE.num_layers),
            rng.choice(SPACE.neuron_choices, SPACE.num_layers),
        )
        for _ in range(num)
    ]


def stack(genomes):
    """Genomes with a leading [P]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *genomes)


def kept(num_layers, depth):
    """The kept blocks by DynaBERT's rule, in plain integers."""
    return [j * num_layers // depth for j in range(depth)]


def to_float64(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def _norm(x, weights):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * weights["scale"] + weights["bias"]


def numpy_vit(params, images, config, layers=None, heads=None, neurons=None, scale=None):
    """Forward pass by plain loops in float64: (logits, inputs of the blocks run, final).

    Args:
      params: float64 tree of the supernet.
      images: [B, height, width, channels].
      config: sizes.
      layers: indices of the blocks that run; None: all.
      heads: kept in each block, a prefix, [L]; None: all.
      neurons: kept in each block, a prefix, [L]; None: all.
      scale: [L, H], multiplies the heads' outputs.
    """
    size, head_size = config.patch_size, config.embed_dim // config.num_heads
    images = np.asarray(images, np.float64)
    states = []
    for image in images:
        tokens = [params["cls"][0]]
        for row in range(0, config.image_shape[0], size):
            for column in range(0, config.image_shape[1], size):
                patch = image[row : row + size, column : column + size].reshape(-1)
                tokens.append(patch @ params["embed"]["kernel"] + params["embed"]["bias"])
        states.append(np.stack(tokens) + params["position"])
    x, inputs = np.stack(states), []
    for layer in range(config.num_layers) if layers is None else layers:
        inputs.append(x)
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        attention, mlp = block["attention"], block["mlp"]
        y = _norm(x, attention["norm"])
        total = np.zeros_like(x) + attention["out_bias"]
        for head in range(config.num_heads if heads is None else heads[layer]):
            query, key, value = (
                y @ attention["qkv_kernel"][:, i, head] + attention["qkv_bias"][i, head]
                for i in range(3)
            )
            scores = query @ key.transpose(0, 2, 1) / np.sqrt(head_size)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            factor = 1.0 if scale is None else scale[layer, head]
            total += factor * (weights @ value) @ attention["out_kernel"][head]
        x = x + total
        width = config.num_neurons if neurons is None else neurons[layer]
        hidden = _norm(x, mlp["norm"]) @ mlp["up_kernel"][:, :width] + mlp["up_bias"][:width]
        hidden = 0.5 * hidden * (1 + erf(hidden / np.sqrt(2)))
        x = x + hidden @ mlp["down_kernel"][:width] + mlp["down_bias"]
    classifier = params["classifier"]
    logits = _norm(x[:, 0], params["norm"]) @ classifier["kernel"] + classifier["bias"]
    return logits, np.stack(inputs), x


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def cross_entropy(logits, labels):
    """Mean cross-entropy in float64."""
    return -log_softmax(logits)[np.arange(len(labels)), np.asarray(labels)].mean()


def count(tree):
    """Numbers in all leaves."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def assert_trees_close(first, second, atol=1e-6, rtol=1e-6):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), first, second)


def assert_trees_equal(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)
