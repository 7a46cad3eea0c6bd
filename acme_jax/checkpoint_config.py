"""The config.json of a Hugging Face checkpoint, field by field.

The file comes from outside: every field is checked for its type and range where it is read, and
settings that would change the computation are refused instead of being ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from acme_jax.checkpoint_tensors import CheckpointTensors, PretrainedError, read_json

CONFIG = "config.json"


class CheckpointConfig:
    """Fields of one config.json; each getter raises `PretrainedError` on another type."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / CONFIG
        self._fields = read_json(self.path)

    def model_type(self) -> str:
        """Such as "vit"; empty if the file does not say."""
        return str(self._fields.get("model_type") or "")

    def architecture(self, supported: Mapping[str, Collection[str]]) -> tuple[str, str]:
        """The model type and the class that was saved ("" if the file does not say).

        Args:
          supported: model type -> names of classes.

        Raises:
          PretrainedError: another type or class; the message lists the supported ones.
        """
        kind = self.model_type()
        given = self._fields.get("architectures") or [""]
        if not isinstance(given, list) or not isinstance(given[0], str):
            raise self.error("architectures", "a list of class names")
        if kind not in supported or (given[0] and given[0] not in supported[kind]):
            names = "; ".join(f"{kind} ({', '.join(names)})" for kind, names in supported.items())
            raise PretrainedError(
                f"{self.path} describes model_type {kind or None!r}, architecture "
                f"{given[0] or None!r}, which cannot be read here; supported are: {names}"
            )
        return kind, given[0]

    def size(self, name: str, default: int | None = None) -> int:
        """A positive whole number; with a default, the field may be absent."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.error(name, "a positive whole number")
        return value

    def pair(self, name: str, default: int) -> tuple[int, int]:
        """A positive whole number, which counts twice, or two of them (height, width)."""
        value = self._value(name, default)
        numbers = value if isinstance(value, list) else [value, value]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
        if len(numbers) != 2 or not whole:
            raise self.error(name, "a positive whole number or two of them (height, width)")
        return numbers[0], numbers[1]

    def epsilon(self, default: float) -> float:
        """LayerNorm's epsilon."""
        value = self._value("layer_norm_eps", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise self.error("layer_norm_eps", "a number between 0 and 1")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def index(self, name: str, default: int, size: int) -> int:
        """A whole number from 0 to below `size`."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
            raise self.error(name, f"a whole number from 0 to {size - 1}")
        return value

    def num_held_classes(self, tensors: CheckpointTensors, heads: Sequence[str]) -> int:
        """Number of classes that the checkpoint tells apart; 0: it has no classification layer.

        Args:
          tensors: the checkpoint's.
          heads: names of the classification layers that its architecture has.

        Raises:
          PretrainedError: the layer is missing, or has another number of outputs than there are
            labels.
        """
        if not heads:
            return 0
        kernel = tensors.shape(f"{heads[0]}.weight")
        if len(kernel) != 2:
            raise PretrainedError(
                f"{self.path.parent}: {tensors.given(heads[0] + '.weight')} has shape "
                f"{list(kernel)}, expected two axes: classes and embedding"
            )
        held = kernel[0]
        labels = self._fields.get("id2label")
        named = len(labels) if isinstance(labels, dict) else self._fields.get("num_labels")
        if named is not None and named != held:
            raise PretrainedError(
                f"{self.path} names {named} classes, but the checkpoint's "
                f"{tensors.given(heads[0] + '.weight')} tells {held} apart; configuration and "
                "weights may belong to two models"
            )
        return held

    def num_classes(self, wanted: int | None, held: int) -> int:
        """Number of classes of the result.

        Args:
          wanted: by the caller; None: the checkpoint's.
          held: by the checkpoint; 0: it has no classification layer.

        Raises:
          PretrainedError: neither says it, or it is not positive.
        """
        if wanted is None and held:
            return held
        if wanted is None or wanted <= 0:
            raise PretrainedError(
                f"num_classes is {wanted}, expected a positive number"
                if wanted is not None
                else f"{self.path.parent} has no classification layer; give num_classes, and a "
                "new one is made"
            )
        return wanted

    def require(self, **settings: Any) -> None:
        """Refuses settings that change the computation.

        Args:
          **settings: field -> the only value supported; absent and null fields pass.
        """
        for name, wanted in settings.items():
            value = self._fields.get(name)
            if value is not None and value != wanted:
                raise PretrainedError(
                    f"{self.path}: {name} is {value!r}, supported is only {wanted!r}; take a "
                    "checkpoint of that kind"
                )

    def heads(self, embed_dim: int) -> int:
        """Number of attention heads, which must divide the embedding.

        Args:
          embed_dim: D.
        """
        heads = self.size("num_attention_heads")
        if embed_dim % heads:
            raise PretrainedError(
                f"{self.path}: hidden_size {embed_dim} is no multiple of num_attention_heads "
                f"{heads}"
            )
        self.require(head_dim=embed_dim // heads)
        return heads

    def _value(self, name: str, default: Any) -> Any:
        """A field; absent and null are one, as transformers writes either."""
        value = self._fields.get(name)
        return default if value is None else value

    def error(self, name: str, expected: str) -> PretrainedError:
        """What to raise for a field of another kind."""
        value = self._fields.get(name)
        found = "is missing" if value is None else f"is {value!r}"
        return PretrainedError(f"{self.path}: {name} {found}, expected {expected}")
