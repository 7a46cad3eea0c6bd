"""Copies of the committed tiny checkpoints, changed in one place."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

CHECKPOINTS = Path(__file__).parent / "fixtures" / "checkpoints"


def expected(kind):
    with np.load(CHECKPOINTS / kind / "expected.npz") as arrays:
        return dict(arrays)


def copy(kind, directory, *, config=None, tensors=None, drop=()):
    """Copies a checkpoint; fields of `config` set to None are removed, `tensors` is a function
    from all tensors to all tensors, files in `drop` are left out."""
    target = Path(directory) / kind
    shutil.copytree(CHECKPOINTS / kind, target)
    if config:
        path = target / "config.json"
        fields = {**json.loads(path.read_text()), **config}
        path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    if tensors:
        path = target / "model.safetensors"
        # Read whole before the file is written over; contiguous, or save_file stores them askew.
        changed = tensors(load_file(path))
        save_file({name: np.asarray(value, order="C") for name, value in changed.items()}, path)
    for name in drop:
        (target / name).unlink()
    return target


def shard(directory, num_shards=2):
    """Replaces the single file by shards and their index, as transformers names them."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    weight_map = {}
    for index in range(num_shards):
        name = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        part = dict(list(tensors.items())[index::num_shards])
        save_file(part, directory / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
