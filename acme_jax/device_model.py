"""A device's final model: a folder written at the end of a run, loaded by one line.

    model = acme_jax.device_model.load("runs/mnist5k/devices/000")
    model.predict(images)
    model = model.personalise(images, labels).model  # goes on training the header

`acme_jax.device_folder` says what is in the folder and writes it; `acme_jax.export` adds StableHLO
and ONNX.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from jax import Array

from acme_jax import dense_header, slicing
from acme_jax.bert import BertConfig
from acme_jax.blocks import Params
from acme_jax.dense_header import Kept
from acme_jax.encoders import EncoderConfig
from acme_jax.header_layout import HeaderDims
from nas.cells import StaticCell


class ModelError(ValueError):
    """A folder that holds no usable model, or inputs that do not fit; the message says what."""


class Personalised(NamedTuple):
    """What `DeviceModel.personalise` returns."""

    model: DeviceModel
    losses: list[float]
    """Mean loss of every epoch."""


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceModel:
    """A personal model: sliced backbone and dense header (see `from_masked`)."""

    encoder: EncoderConfig
    """Of the full network; the sizes of the sliced one are those of its weights."""
    header_dims: HeaderDims
    """Of the header before pruning."""
    cell: StaticCell
    kept: Kept
    """The header's channels that are left, by gate point."""
    backbone: Params
    header: Params
    """As `dense_header.prune` gives it."""
    class_names: tuple[str, ...] = ()
    """One for each class; empty: their numbers."""

    def __post_init__(self) -> None:
        if self.class_names and len(self.class_names) != self.header_dims.num_classes:
            raise ModelError(
                f"{len(self.class_names)} class names for {self.header_dims.num_classes} classes"
            )

    @property
    def mask(self) -> np.ndarray:
        """The gate mask that the header was pruned by: float32 [G], 0 where pruned."""
        return dense_header.to_mask(self.header_dims, self.kept)

    @property
    def num_params(self) -> int:
        """Numbers stored, of backbone and header."""
        return sum(int(np.size(leaf)) for leaf in jax.tree.leaves((self.backbone, self.header)))

    def forward(self, backbone: Params, header: Params, inputs: Array) -> Array:
        """Logits [B, C] as a pure function of the weights: to jit, differentiate or export."""
        return self.head(header, slicing.features(backbone, inputs, self.encoder))

    def head(self, header: Params, tokens: Array) -> Array:
        """Logits [B, C] of the header's weights on `features`: to train with any optimiser."""
        return _head(header, self._static, tokens)

    def features(self, inputs: npt.ArrayLike | Array) -> Array:
        """What the header reads [B, T', D]; inputs as `logits`."""
        return _features(self.backbone, self.check(inputs), self.encoder)

    def logits(self, inputs: npt.ArrayLike | Array) -> Array:
        """Logits [B, C].

        Args:
          inputs: images [B, *encoder.input_shape], uint8 or float in [0, 1], or token ids [B, T].

        Raises:
          ModelError: inputs of another shape or type, or token ids outside of the vocabulary.
        """
        return _logits(self.backbone, self.header, self.check(inputs), self.encoder, self._static)

    def predict(self, inputs: npt.ArrayLike | Array) -> np.ndarray:
        """Classes, int [B]; inputs as `logits`."""
        return np.asarray(jnp.argmax(self.logits(inputs), axis=-1))

    def personalise(
        self,
        inputs: npt.ArrayLike | Array,
        labels: npt.ArrayLike,
        *,
        epochs: int = 10,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        seed: int = 0,
    ) -> Personalised:
        """Trains the dense header further on a device's own data (Adam); the backbone stays.

        Features are computed once. What was pruned stays pruned.

        Args:
          inputs: [N, ...] as `logits`.
          labels: [N], classes from 0.
          epochs: passes over the data; samples of an incomplete batch wait for another shuffle.
          batch_size: samples of a step, at most N.
          learning_rate: Adam's.
          seed: of the shuffles.

        Raises:
          ModelError: inputs or labels that do not fit.
        """
        classes, checked = self.header_dims.num_classes, self.check(inputs)
        targets = np.asarray(labels)
        if targets.shape != checked.shape[:1] or targets.size == 0:
            raise ModelError(f"{checked.shape[0]} samples, but labels of shape {targets.shape}")
        if targets.dtype.kind not in "iu" or not 0 <= targets.min() <= targets.max() < classes:
            raise ModelError(f"labels must be whole numbers from 0 to {classes - 1}")
        if epochs < 1 or batch_size < 1 or not learning_rate > 0:
            raise ModelError("epochs, batch_size and learning_rate must be positive")
        tokens = jnp.concatenate(
            [self.features(checked[i : i + 256]) for i in range(0, len(checked), 256)]
        )
        header, state, losses = self.header, optax.scale_by_adam().init(self.header), []
        rows = (tokens, jnp.asarray(targets, jnp.int32))
        size = min(batch_size, len(targets))
        for number in range(epochs):
            key = jax.random.fold_in(jax.random.key(seed), number)
            header, state, loss = _epoch(
                key, header, state, jnp.float32(learning_rate), rows, size, self._static
            )
            losses.append(float(loss))
        return Personalised(dataclasses.replace(self, header=header), losses)

    def check(self, inputs: npt.ArrayLike | Array) -> Array:
        """The inputs as the model reads them.

        Raises:
          ModelError: as `logits`.
        """
        array = inputs if isinstance(inputs, Array) else np.asarray(inputs)
        shape, text = self.encoder.input_shape, isinstance(self.encoder, BertConfig)
        name, expected = ("token ids", "") if text else ("images", " in [0, 1], or uint8")
        if array.ndim != len(shape) + 1 or array.shape[1:] != shape:
            raise ModelError(
                f"{name} have shape {array.shape}; this model takes [B, "
                f"{', '.join(str(n) for n in shape)}]{expected}"
            )
        if isinstance(self.encoder, BertConfig):
            if array.dtype.kind not in "iu":
                raise ModelError(f"token ids must be whole numbers, got {array.dtype}")
            size = self.encoder.vocab_size
            if array.size and not 0 <= array.min() <= array.max() < size:
                raise ModelError(
                    f"token ids run from {array.min()} to {array.max()}; the vocabulary of this "
                    f"model has 0 to {size - 1}"
                )
            return jnp.asarray(array, jnp.int32)
        if array.dtype == np.uint8:
            return jnp.asarray(array)
        if array.dtype.kind != "f":
            raise ModelError(f"images must be float in [0, 1] or uint8, got {array.dtype}")
        return jnp.asarray(array, jnp.float32)

    @property
    def _static(self) -> tuple[HeaderDims, StaticCell, Kept]:
        return self.header_dims, self.cell, self.kept


def from_masked(
    encoder: EncoderConfig,
    header_dims: HeaderDims,
    cell: StaticCell,
    backbone: Params,
    header: Params,
    mask: npt.ArrayLike,
    class_names: tuple[str, ...] = (),
) -> DeviceModel:
    """The model of a header as refinement leaves it: what the mask prunes is removed.

    Args:
      encoder: sizes of the full network.
      header_dims: sizes of the header.
      cell: the chosen cell.
      backbone: of `slicing.slice_params`; tensors that headers do not read may be missing.
      header: compact weights (`header.extract`, `header_slots.from_slots`).
      mask: [G] 0/1.
      class_names: one for each class; empty: their numbers.

    Raises:
      ValueError: a mask or cell that does not fit.
    """
    kept = dense_header.kept_channels(header_dims, cell, mask)
    dense = dense_header.prune(header, cell, header_dims, kept)
    return DeviceModel(encoder, header_dims, cell, kept, backbone, dense, class_names)


def save(model: DeviceModel, directory: str | Path, facts: dict[str, Any]) -> None:
    """Writes the model's folder; see `acme_jax.device_folder.write`."""
    from acme_jax import device_folder  # it reads and writes this module's record

    device_folder.write(model, Path(directory), facts)


def load(directory: str | Path) -> DeviceModel:
    """Reads a folder written by `save`.

    Raises:
      ModelError: a missing or damaged file.
    """
    from acme_jax import device_folder

    return device_folder.read(Path(directory))[0]


_Static = tuple[HeaderDims, StaticCell, Kept]


def _head(header: Params, static: _Static, tokens: Array) -> Array:
    dims, cell, kept = static
    return dense_header.apply(header, cell, dims, kept, tokens)


@functools.partial(jax.jit, static_argnums=2)
def _features(backbone: Params, inputs: Array, encoder: EncoderConfig) -> Array:
    return slicing.features(backbone, inputs, encoder)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _logits(
    backbone: Params, header: Params, inputs: Array, encoder: EncoderConfig, static: _Static
) -> Array:
    return _head(header, static, slicing.features(backbone, inputs, encoder))


@functools.partial(jax.jit, static_argnums=(5, 6))
def _epoch(
    key: Array, header: Params, state: Any, rate: Array, data: tuple[Array, Array], size: int,
    static: _Static,
) -> Any:  # fmt: skip
    """One pass over tokens and labels in batches of `size`: header, Adam's state, mean loss."""
    tokens, labels = data
    steps, optimizer = len(labels) // size, optax.scale_by_adam()
    rows = jax.random.permutation(key, len(labels))[: steps * size].reshape(steps, size)

    def loss_of(header: Params, rows: Array) -> Array:
        logits = _head(header, static, tokens[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def step(carry: Any, rows: Array) -> Any:
        header, state = carry
        loss, grads = jax.value_and_grad(loss_of)(header, rows)
        updates, state = optimizer.update(grads, state, header)
        header = jax.tree.map(lambda leaf, change: leaf - rate * change, header, updates)
        return (header, state), loss

    (header, state), losses = jax.lax.scan(step, (header, state), rows)
    return header, state, losses.mean()
