"""Tensors of a Hugging Face checkpoint directory, read one at a time.

The format is safetensors, in one file or in shards with an index. Names and shapes come from the
files' headers, so that a checkpoint is judged before any weight is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_MAX_NAMED = 6  # names in one message


class PretrainedError(ValueError):
    """A checkpoint that cannot be used; the message says what is wrong and how to mend it."""


Read = Callable[[str], np.ndarray]
"""The name of a tensor -> its values as float32."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: the file.

    Raises:
      PretrainedError: missing, unreadable or damaged, or not an object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PretrainedError(
            f"{path} is missing; expected a checkpoint directory as `save_pretrained` of "
            "transformers writes it"
        ) from None
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} is not valid JSON ({error}); get it again") from None
    if not isinstance(content, dict):
        raise PretrainedError(
            f"{path} holds a JSON {type(content).__name__}, expected an object; get it again"
        )
    return content


class CheckpointTensors:
    """The tensors of one checkpoint directory.

    Files are opened for each tensor and closed again: a mapped file counts as resident memory,
    and with all of it mapped a load would need the checkpoint's size once more.
    """

    def __init__(self, directory: Path, rename: Callable[[str], str]) -> None:
        """Reads the headers.

        Args:
          directory: where model.safetensors or its shards and index are.
          rename: the name of a tensor in the file -> the name it is known by here.

        Raises:
          PretrainedError: no safetensors files, a missing or damaged shard, a shard that does not
            hold what the index promises, or two tensors of one name.
        """
        self._where: dict[str, tuple[Path, str]] = {}
        self._dtypes: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, promised in _files(directory).items():
            for given, (dtype, shape) in _read_header(path, promised).items():
                name = rename(given)
                if name in self._where:
                    raise PretrainedError(
                        f"{directory} holds one tensor twice: {self.given(name)} and {given}; "
                        "keep one of them"
                    )
                self._where[name] = (path, given)
                self._dtypes[name], self.shapes[name] = dtype, shape
        self._directory = directory

    def given(self, name: str) -> str:
        """The name in the file, for messages; a name that is not there stays as it is."""
        return self._where[name][1] if name in self._where else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor.

        Args:
          name: as `rename` gave it.

        Raises:
          PretrainedError: it is missing.
        """
        self._require([name])
        return self.shapes[name]

    def check(
        self, expected: Mapping[str, tuple[int, ...]], ignored: Callable[[str], object]
    ) -> None:
        """Compares names and shapes with what the configuration promises.

        Args:
          expected: name -> shape, of every tensor that will be read.
          ignored: name -> whether a tensor beyond these is known to be of no use.

        Raises:
          PretrainedError: missing or extra tensors, other shapes, or no floating-point numbers.
        """
        found = self.shapes
        self._require(expected)
        extra = [self.given(name) for name in found if name not in expected and not ignored(name)]
        if extra:
            raise PretrainedError(
                f"{self._directory} has tensors that a model of its config.json does not: "
                f"{_listed(extra)}; another architecture or number of layers may have been saved"
            )
        wrong = [
            f"{self.given(name)} has shape {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if found[name] != shape
        ]
        if wrong:
            raise PretrainedError(
                f"{self._directory}: {_listed(wrong)}; the expected shapes follow from its "
                "config.json"
            )
        for name in expected:
            if self._dtypes[name] not in _DTYPES:
                raise PretrainedError(
                    f"{self._directory}: {self.given(name)} is stored as {self._dtypes[name]}, "
                    f"expected one of {', '.join(_DTYPES)}; quantised checkpoints are not read, "
                    "take the original"
                )

    def read(self, name: str) -> np.ndarray:
        """One tensor, widened to float32.

        Args:
          name: as `rename` gave it.

        Raises:
          PretrainedError: values that are no number or infinite.
        """
        path, given = self._where[name]
        with _opened(path) as file:
            values = np.asarray(file.get_tensor(given)).astype(np.float32)
        # A sum is not finite where a value is not, and needs no array of flags; finite values may
        # overflow it, so only the exact test accuses.
        if not math.isfinite(values.sum(dtype=np.float64)) and not np.isfinite(values).all():
            bad = values.size - int(np.isfinite(values).sum())
            raise PretrainedError(
                f"{path}: {bad} of {values.size} values of {given} are NaN or infinite; its "
                "training diverged or the file is damaged, take another checkpoint"
            )
        return values

    def _require(self, names: Collection[str]) -> None:
        missing = [name for name in names if name not in self.shapes]
        if missing:
            raise PretrainedError(
                f"{self._directory} has no tensor {_listed(missing)}, which its config.json "
                "promises; configuration and weights may belong to two models"
            )


def _files(directory: Path) -> dict[Path, Collection[str] | None]:
    """Each safetensors file with the tensors the index promises in it (None: no index)."""
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: None}
    if not (directory / INDEX).is_file():
        pickled = [path.name for path in sorted(directory.glob("pytorch_model*.bin*"))]
        raise PretrainedError(
            f"{directory} has {'only ' + pickled[0] if pickled else 'no weights'}, expected "
            f"{SINGLE} or {INDEX}; pytorch_model.bin is not read (unpickling runs code). Convert "
            "it once where torch and transformers are installed: "
            "`AutoModel...from_pretrained(dir).save_pretrained(dir, safe_serialization=True)`, "
            "with the class that config.json names under architectures"
        )
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PretrainedError(
            f"{directory / INDEX} has no weight_map of tensor names to files; get it again"
        )
    files: dict[Path, Collection[str] | None] = {}
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        # The index comes from outside; it must not lead out of the directory.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise PretrainedError(
                f"{directory / INDEX} says that {name} is in {shard!r}, expected the plain name of "
                "a file beside it"
            )
        shards.setdefault(shard, []).append(name)
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise PretrainedError(
            f"{directory} lacks {_listed(missing)} of the {len(shards)} files its {INDEX} names; "
            "get them too"
        )
    for shard, names in shards.items():
        files[directory / shard] = names
    return files


def _opened(path: Path) -> Any:
    """The file as safetensors' reader, a context manager."""
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise PretrainedError(
            f"{path} is truncated or damaged ({error}; {path.stat().st_size} bytes); get it again"
        ) from None


def _read_header(
    path: Path, promised: Collection[str] | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Data type and shape of each tensor of a file; with an index, of those it promises."""
    with _opened(path) as file:
        held = file.keys()
        lacking = sorted(set(promised or ()) - set(held))
        if lacking:
            raise PretrainedError(
                f"{path} lacks {_listed(lacking)}, which {INDEX} promises in it; get both again"
            )
        pieces = {name: file.get_slice(name) for name in (promised or held)}
        return {
            name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in pieces.items()
        }


def _listed(names: Collection[str]) -> str:
    """Some names, and how many more there are."""
    shown = list(names)[:_MAX_NAMED]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
