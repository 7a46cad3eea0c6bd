"""The folder of a device's model: its files, written whole or not at all, and read back.

```
model.safetensors  sliced backbone and dense header, float32
config.json        sizes, cell, kept channels, class names, inputs and facts of the run
README.md          the model card
tokenizer.json     of text models
predict.py         stand-alone: needs NumPy and onnxruntime or JAX, not this package
model.stablehlo    with `acme_jax.export`: raw inputs -> logits, any batch size
model.onnx         likewise
```
"""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from acme_jax import dense_header, encoders, model_card, slicing
from acme_jax.bert import BertConfig
from acme_jax.device_model import DeviceModel, ModelError
from acme_jax.header_layout import HeaderDims

WEIGHTS, DESCRIPTION, CARD, SCRIPT = "model.safetensors", "config.json", "README.md", "predict.py"
_SEPARATOR = "/"


def write(
    model: DeviceModel,
    directory: Path,
    facts: Mapping[str, Any],
    programs: Mapping[str, bytes] | None = None,
) -> None:
    """Writes the folder beside its place and then renames it, so that it is never half there.

    Args:
      model: what to write.
      directory: the folder; one that exists is replaced.
      facts: JSON-ready, kept in `config.json`; `acme_jax.model_card` says which it prints.
      programs: more files, name -> content, from `acme_jax.export`.

    Raises:
      ModelError: the folder cannot be written; what was there before is still there.
    """
    description = describe(model, facts)
    tree = {"backbone": model.backbone, "header": model.header}
    tensors = {name: np.ascontiguousarray(leaf) for name, leaf in _flatten(tree).items()}
    files = {
        WEIGHTS: save_tensors(tensors),
        DESCRIPTION: (json.dumps(description, indent=1) + "\n").encode(),
        SCRIPT: _predict_script(),
        **(programs or {}),
    }
    files[CARD] = model_card.render(description, {name: len(b) for name, b in files.items()})
    temporary, old = (directory.with_name(f".{directory.name}.{end}") for end in ("tmp", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, content in files.items():
            write_bytes(temporary / name, content)
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
        temporary.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise ModelError(
            f"cannot write {directory} ({error.strerror or error}); nothing was changed"
        ) from error


def add_programs(directory: Path, programs: Mapping[str, bytes]) -> None:
    """Adds files to a folder of `write` and brings its card up to date.

    Each file is the old or the whole new one.

    Raises:
      ModelError: no such folder, or a file cannot be written.
    """
    description = read_description(directory)
    try:
        for name, content in programs.items():
            write_bytes(directory / name, content)
        sizes = {p.name: p.stat().st_size for p in directory.iterdir() if p.name != CARD}
        write_bytes(directory / CARD, model_card.render(description, sizes))
    except OSError as error:
        raise ModelError(f"cannot write into {directory} ({error.strerror or error})") from error


def read(directory: Path) -> tuple[DeviceModel, dict[str, Any]]:
    """The model and the facts of a folder.

    Raises:
      ModelError: a missing or damaged file.
    """
    description = read_description(directory)
    try:
        flat = load_tensors((directory / WEIGHTS).read_bytes())
        return _assemble(description, flat), description["facts"]
    except FileNotFoundError:
        raise _missing(directory, WEIGHTS) from None
    except Exception as error:  # safetensors raises its own, undocumented error types
        raise ModelError(f"the model in {directory} is damaged: {_reason(error)}") from error


def read_description(directory: Path) -> dict[str, Any]:
    """The content of `config.json`.

    Raises:
      ModelError: missing or damaged.
    """
    try:
        description = json.loads((directory / DESCRIPTION).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(directory, DESCRIPTION) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"the model in {directory} is damaged: {error}") from error
    if not isinstance(description, dict) or "kept_channels" not in description:
        raise ModelError(
            f"the model in {directory} is damaged: {DESCRIPTION} is not that of a device's model"
        )
    return description


def describe(model: DeviceModel, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `config.json`; arrays are left out."""
    encoder, text = model.encoder, isinstance(model.encoder, BertConfig)
    classes = model.header_dims.num_classes
    inputs: dict[str, Any] = {
        "kind": "token ids" if text else "image",
        "shape": list(encoder.input_shape),
    }
    if isinstance(encoder, BertConfig):
        inputs |= {"pad_id": encoder.pad_id, "vocab_size": encoder.vocab_size}
    else:
        inputs |= {"range": "float in [0, 1], or uint8; resized and normalised inside the model"}
    return {
        "encoder": encoders.to_dict(encoder),
        "blocks": [
            {
                "heads": int(block["attention"]["out_kernel"].shape[0]),
                "neurons": int(block["mlp"]["up_bias"].shape[0]),
            }
            for block in model.backbone["blocks"]
        ],
        "header": vars(model.header_dims),
        "cell": [[int(gene) for gene in block] for block in model.cell],
        "kept_channels": [list(channels) for channels in model.kept],
        "num_params": model.num_params,
        "class_names": list(model.class_names) or [str(i) for i in range(classes)],
        "inputs": inputs,
        "facts": dict(facts),
    }


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it; nothing stays behind on failure."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _assemble(description: dict[str, Any], flat: dict[str, np.ndarray]) -> DeviceModel:
    """The model of the two files' contents; raises whatever parts that do not fit cause."""
    tree = _unflatten({name: jnp.asarray(leaf) for name, leaf in flat.items()})
    encoder = encoders.from_dict(description["encoder"])
    dims = HeaderDims(**description["header"])
    cell = tuple((x, op_x, y, op_y) for x, op_x, y, op_y in description["cell"])
    kept = tuple(tuple(channels) for channels in description["kept_channels"])
    # Empty groups have no tensors: a cell without weighted operations has no "ops".
    layers = [{"ops": {}, **layer} for layer in tree["header"]["layers"]]
    header = {**tree["header"], "layers": layers}
    expected = dense_header.shapes(cell, dims, kept)
    if jax.tree.map(jnp.shape, header) != jax.tree.map(jnp.shape, expected):
        raise ValueError("the weights of the header are not those of its cell and kept channels")
    names = tuple(str(name) for name in description["class_names"])
    model = DeviceModel(encoder, dims, cell, kept, tree["backbone"], header, names)
    dtype = jnp.int32 if isinstance(encoder, BertConfig) else jnp.float32
    inputs = jax.ShapeDtypeStruct((1, *encoder.input_shape), dtype)
    jax.eval_shape(lambda b, x: slicing.features(b, x, encoder), model.backbone, inputs)
    return model


def _missing(directory: Path, name: str) -> ModelError:
    return ModelError(
        f"{directory} holds no model ({name} is missing); "
        "expected a folder under devices/ of a finished run"
    )


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]


def _predict_script() -> bytes:
    return (importlib.resources.files("acme_jax") / "predict_template.py").read_bytes()


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
