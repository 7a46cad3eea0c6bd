"""A device's final model as a folder: written at the end of a run, loaded by one line.

    model = acme_jax.device_model.load("runs/mnist5k/devices/000")
    model.predict(images)

The folder holds `model.safetensors` (sliced backbone, header, gate mask) and `model.json`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import load_file, save_file

from acme_jax import header, slicing
from acme_jax.header_layout import HeaderDims
from acme_jax.run_dir import write_json
from acme_jax.vit import Params, ViTConfig
from nas.cells import StaticCell

_SEPARATOR = "/"


class ModelError(ValueError):
    """A folder that holds no usable model; the message says what is wrong."""


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceModel:
    """A personal model: sliced backbone and pruned header."""

    vit: ViTConfig
    header_dims: HeaderDims
    cell: StaticCell
    backbone: Params
    header: Params
    mask: Array
    """[G], 0 where a gate is pruned."""

    def logits(self, images: np.ndarray | Array) -> Array:
        """Logits [B, C] of images [B, height, width, channels] in [0, 1].

        Raises:
          ModelError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1:] != self.vit.image_shape:
            raise ModelError(
                f"images have shape {images.shape}; this model takes [B, "
                f"{', '.join(str(n) for n in self.vit.image_shape)}] in [0, 1]"
            )
        return self._forward(self.backbone, self.header, self.mask, jnp.asarray(images))

    def predict(self, images: np.ndarray | Array) -> np.ndarray:
        """Classes, int [B]."""
        return np.asarray(jnp.argmax(self.logits(images), axis=-1))

    @functools.cached_property
    def _forward(self) -> Any:
        def forward(backbone: Params, weights: Params, mask: Array, images: Array) -> Array:
            tokens = slicing.features(backbone, images, self.vit)
            return header.apply(weights, self.cell, self.header_dims, tokens, mask=mask)

        return jax.jit(forward)


def save(model: DeviceModel, directory: Path, facts: dict[str, Any]) -> None:
    """Writes the folder; `facts` (JSON-ready) are stored beside the sizes for the reader."""
    directory.mkdir(parents=True, exist_ok=True)
    tree = {"backbone": model.backbone, "header": model.header, "mask": model.mask}
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in _flatten(tree).items()}
    save_file(tensors, directory / "model.safetensors")
    description = {
        "vit": dataclasses.asdict(model.vit),
        "header": dataclasses.asdict(model.header_dims),
        "cell": [[int(gene) for gene in block] for block in model.cell],
        "facts": facts,
    }
    write_json(directory / "model.json", description)


def load(directory: str | Path) -> DeviceModel:
    """Reads a folder written by `save`.

    Raises:
      ModelError: a missing or damaged file.
    """
    directory = Path(directory)
    try:
        description = json.loads((directory / "model.json").read_text())
        flat = load_file(directory / "model.safetensors")
        return _assemble(description, flat)
    except FileNotFoundError as error:
        raise ModelError(
            f"{directory} holds no model ({Path(error.filename or '').name or error} is missing); "
            "expected a folder under devices/ of a finished run"
        ) from error
    except Exception as error:  # safetensors raises its own, undocumented error types
        raise ModelError(f"the model in {directory} is damaged: {error}") from error


def _assemble(description: dict[str, Any], flat: dict[str, np.ndarray]) -> DeviceModel:
    """The model of the two files' contents; raises whatever parts that do not fit cause."""
    tree = _unflatten({name: jnp.asarray(leaf) for name, leaf in flat.items()})
    vit = description["vit"]
    dims = HeaderDims(**description["header"])
    cell = tuple((x, op_x, y, op_y) for x, op_x, y, op_y in description["cell"])
    # Empty groups have no tensors: a cell without weighted operations has no "ops".
    weights = {"ops": {}, **tree["header"]}
    expected = jax.eval_shape(lambda: header.init(jax.random.key(0), cell, dims))
    if jax.tree.map(jnp.shape, weights) != jax.tree.map(jnp.shape, dict(expected)):
        raise ValueError("the weights of the header are not those of its cell")
    return DeviceModel(
        vit=ViTConfig(**{**vit, "image_shape": tuple(vit["image_shape"])}),
        header_dims=dims,
        cell=cell,
        backbone=tree["backbone"],
        header=weights,
        mask=tree["mask"],
    )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list):
        items = [(f"[{index}]", value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flatten(value, f"{prefix}{_SEPARATOR}{key}" if prefix else key)
    return flat


def _unflatten(flat: dict[str, Any]) -> Any:
    if "" in flat:
        return flat[""]
    groups: dict[str, dict[str, Any]] = {}
    for name, leaf in flat.items():
        key, _, rest = name.partition(_SEPARATOR)
        groups.setdefault(key, {})[rest] = leaf
    if all(key.startswith("[") for key in groups):
        return [_unflatten(groups[f"[{index}]"]) for index in range(len(groups))]
    return {key: _unflatten(group) for key, group in groups.items()}
