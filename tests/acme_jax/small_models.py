"""Small finished models of devices, for the tests of their folders and formats."""

import jax
import numpy as np
import tiny

from acme_jax import device_model, header, slicing, supernet
from acme_jax.bert import BertConfig
from acme_jax.header_layout import HeaderDims, num_gates
from acme_jax.vit import ViTConfig
from nas.arch import Arch
from nas.cells import OPS

SEP1, SEP3, SEP5, AVG, MAX, IDENTITY = (
    OPS.index(name) for name in ("sep1x1", "sep3x3", "sep5x5", "avgpool3", "maxpool3", "identity")
)
WEIGHTED = ((0, SEP3, 1, MAX), (2, SEP5, 0, IDENTITY))
PLAIN = ((0, IDENTITY, 1, AVG), (1, MAX, 0, IDENTITY))
"""No operation of this cell has weights."""

ENCODERS = {
    "vit": tiny.CONFIG,
    "deit, resized": ViTConfig(
        (8, 12, 3), 4, 8, 4, 4, 8, 3, num_prefix_tokens=2, norm_epsilon=1e-12,
        source_shape=(11, 9, 1), pixel_mean=(0.4, 0.5, 0.6), pixel_std=(0.2, 0.3, 0.4),
    ),
    "bert": BertConfig(30, 7, 8, 4, 4, 8, 3, pad_id=2),
}  # fmt: skip
ARCH = Arch(*(np.asarray(x, np.int32) for x in (3, [2, 1, 4, 3], [4, 2, 8, 6])))


def make_dims(encoder, blocks=2, channels=4):
    return HeaderDims(*encoder.grid, encoder.embed_dim, channels, encoder.num_classes, blocks, 3)


def make_header(dims, cell, seed=3):
    """Compact weights without any zero or one left from the initialisation."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32),
        header.init(jax.random.key(seed), cell, dims),
    )


def make_mask(dims, cell, kept=0.7, seed=5):
    rng = np.random.default_rng(seed)
    return (rng.random(num_gates(dims, cell)) < kept).astype(np.float32)


def make_parts(encoder, cell=WEIGHTED, kept=0.7, seed=0):
    """Backbone (NumPy leaves, as a run slices it), compact header and mask."""
    rng, dims = np.random.default_rng(seed), make_dims(encoder, len(cell))
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32)),
        supernet.init(jax.random.key(seed), encoder),
    )
    backbone = slicing.slice_params(params, ARCH)
    del backbone["classifier"]
    return backbone, make_header(dims, cell), make_mask(dims, cell, kept)


def make_model(encoder=tiny.CONFIG, cell=WEIGHTED, kept=0.7, names=("cat", "dog", "owl")):
    backbone, weights, mask = make_parts(encoder, cell, kept)
    dims = make_dims(encoder, len(cell))
    return device_model.from_masked(encoder, dims, cell, backbone, weights, mask, names)
