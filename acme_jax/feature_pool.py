"""Cached features of real images for simulated devices, and the header that all of them start with.

A small Vision Transformer is trained on the public images of Fashion-MNIST and frozen; the other
training images pass through it once, and each leaves four pooled tokens in a memory-mapped pool.
A header is trained on the public images' tokens. A quarter of the pool is held out: no device
trains on those, any device may be evaluated on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from acme_jax import datasets, header, messages, slicing, supernet
from acme_jax.blocks import Params
from acme_jax.config import DataConfig
from acme_jax.header_layout import HeaderDims
from acme_jax.splits import make_splits
from acme_jax.vit import ViTConfig
from fed import mapped
from fed.algorithms.local import local
from fed.clients import Batch, ClientData, replicate
from fed.simulate import run_clients
from nas.arch import ArchSpace, full
from nas.cells import OPS, StaticCell

VIT = ViTConfig((28, 28, 1), 7, 16, num_layers=2, num_heads=2, num_neurons=32, num_classes=10)
CELL: StaticCell = ((0, OPS.index("sep1x1"), 1, OPS.index("identity")),)
"""No depthwise kernel: thousands of different ones are as many tiny matrix products."""
DIMS = HeaderDims(2, 2, VIT.embed_dim, channels=8, num_classes=10, blocks=1, num_layers=1)
PUBLIC = DataConfig("fashion_mnist", public_train=4000, public_select=800, public_test=800)
POOL_STREAM = 4
"""Host random stream of the pool's order (see DESIGN's randomness rule)."""
HELD_OUT = 0.25
"""Part of the pool that nobody trains on."""

_EPOCHS, _BATCH_SIZE, _LEARNING_RATE = 10, 32, 3e-3
_POOL = "pool"


class FeaturePool(NamedTuple):
    """What devices draw their samples from, and what they start with."""

    features: np.ndarray  # [P, T, D] float16, zero mean and unit variance of the public images
    labels: np.ndarray  # [P] uint8
    num_train: int
    """Rows before this one are for training, the others are held out."""
    header: Params
    facts: dict[str, Any]
    """Accuracy of backbone and header on the public select split; bytes of the backbone."""


def open_or_make(
    directory: Path, seed: int, *, path: str | None = None, log: Callable[[str], None] = print
) -> FeaturePool:
    """Opens `directory`'s pool; makes it first where there is none, in about 20 s on 2 cores.

    Args:
      directory: of the data store.
      seed: of the images' division, of backbone and header.
      path: of the Fashion-MNIST files; None: found by itself.
      log: receives a line when the pool is made.

    Raises:
      MappedTreeError: the pool is damaged, or of another seed.
      DataError: no Fashion-MNIST.
    """
    if not (directory / _POOL).exists():
        log(f"training a small backbone and caching its features in {directory / _POOL} ...")
        _make(directory, seed, path)
    tree, meta = mapped.open_tree(directory / _POOL)
    expected = jax.eval_shape(lambda: header.init(jax.random.key(0), CELL, DIMS))
    if meta.get("seed") != seed:
        raise mapped.MappedTreeError(
            f"the pool in {directory} was made with seed {meta.get('seed')}, not {seed}; choose "
            "another --data-dir or that --seed"
        )
    if jax.tree.map(np.shape, tree.get("header")) != jax.tree.map(np.shape, expected):
        raise mapped.MappedTreeError(
            f"the header in {directory / _POOL} has other sizes than this version's; choose "
            "another --data-dir, or delete it"
        )
    return FeaturePool(
        # In memory: their size does not depend on the number of devices.
        np.array(tree["features"]),
        np.array(tree["labels"]),
        meta["num_train"],
        jax.tree.map(np.array, tree["header"]),
        meta["facts"],
    )


def _make(directory: Path, seed: int, path: str | None) -> None:
    config = dataclasses.replace(PUBLIC, path=path)
    splits = make_splits(datasets.load_images(config), config, seed)
    init_key, fit_key, head_key, refit_key = jax.random.split(jax.random.key(seed), 4)

    def classify(params: Params, images: Array) -> Array:
        return supernet.apply(params, images, VIT).logits

    backbone = _fit(
        fit_key, classify, supernet.init(init_key, VIT), splits.train.inputs, splits.train.labels
    )
    tokens = _tokens(backbone)
    public = tokens(splits.train.inputs)
    mean, scale = public.mean(axis=(0, 1)), 1.0 / (public.std(axis=(0, 1)) + 1e-6)

    def normalised(images: np.ndarray) -> np.ndarray:
        return ((tokens(images) - mean) * scale).astype(np.float16)

    def head(params: Params, inputs: Array) -> Array:
        return header.apply(params, CELL, DIMS, inputs)

    start = header.init(head_key, CELL, DIMS)
    inputs = normalised(splits.train.inputs).astype(np.float32)
    weights = _fit(refit_key, head, start, inputs, splits.train.labels)
    select = normalised(splits.select.inputs).astype(np.float32)
    arch = jax.tree.map(np.asarray, full(ArchSpace.from_fractions(2, 2, 32)))
    sliced = slicing.slice_params(jax.tree.map(np.asarray, backbone), arch)
    facts = {
        "backbone_accuracy": _accuracy(classify, backbone, splits.select.inputs, splits.select),
        "header_accuracy": _accuracy(head, weights, select, splits.select),
        "backbone_bytes": len(messages.encode(messages.BackboneMessage(arch, sliced))),
    }
    rows = np.random.default_rng((seed, POOL_STREAM, 0)).permutation(len(splits.device_pool))
    template = {
        "features": mapped.ArraySpec((rows.size, DIMS.grid_height * DIMS.grid_width, 16), "f2"),
        "labels": mapped.ArraySpec((rows.size,), "u1"),
        "header": weights,
    }
    meta = {"seed": seed, "num_train": round(rows.size * (1 - HELD_OUT)), "facts": facts}
    with mapped.building(directory / _POOL, template, meta) as tree:
        tree["features"][:] = normalised(splits.device_pool.inputs[rows])
        tree["labels"][:] = splits.device_pool.labels[rows]
        jax.tree.map(np.copyto, tree["header"], jax.tree.map(np.asarray, weights))


def _fit(
    key: Array,
    apply: Callable[[Params, Array], Array],
    params: Params,
    inputs: np.ndarray,
    labels: np.ndarray,
) -> Params:
    """Ten epochs of Adam on the cross-entropy: one client that trains alone."""

    def loss_fn(params: Params, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        logits = apply(params, batch.inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return jnp.sum(losses * batch.weight) / jnp.maximum(batch.weight.sum(), 1.0), {}

    data = ClientData(
        jnp.asarray(inputs)[None], jnp.asarray(labels)[None], jnp.full(1, len(labels), jnp.int32)
    )

    @jax.jit
    def train(params: Params, data: ClientData, key: Array) -> Params:
        algorithm = local(loss_fn, optax.adam(_LEARNING_RATE))
        states, _, _ = run_clients(
            algorithm,
            (),
            replicate(params, 1),
            data,
            key,
            0,
            client_ids=jnp.zeros(1, jnp.int32),
            batch_size=_BATCH_SIZE,
            epochs=_EPOCHS,
        )
        trained: Params = jax.tree.map(lambda leaf: leaf[0], states)
        return trained

    return train(params, data, key)


def _tokens(backbone: Params) -> Callable[[np.ndarray], np.ndarray]:
    """Images [N, 28, 28, 1] to the means of 2 x 2 neighbouring tokens, float32 [N, 4, D]."""
    rows, columns = VIT.grid

    @jax.jit
    def pooled(images: Array) -> Array:
        final = supernet.apply(backbone, images, VIT).final[:, 1:]
        grid = final.reshape(-1, rows // 2, 2, columns // 2, 2, VIT.embed_dim)
        return grid.mean(axis=(2, 4)).reshape(-1, rows * columns // 4, VIT.embed_dim)

    def tokens(images: np.ndarray, size: int = 2000) -> np.ndarray:
        parts = [pooled(images[i : i + size]) for i in range(0, len(images), size)]
        return np.concatenate([np.asarray(part) for part in parts])

    return tokens


def _accuracy(
    apply: Callable[[Params, Array], Array], params: Params, inputs: np.ndarray, split: Any
) -> float:
    predicted = jnp.argmax(jax.jit(apply)(params, jnp.asarray(inputs)), axis=-1)
    return float(np.mean(np.asarray(predicted) == split.labels))
