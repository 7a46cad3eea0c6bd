"""Labelled samples, checked when built: what every reader returns.

Shape letters: N samples, T tokens; height, width and channels are written out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from acme_jax.idx import DataError


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, or texts as token ids.

    Images in bytes may be an `np.memmap`, larger than the memory: they are neither scanned nor
    copied here, and become floats only on the accelerator.

    Raises:
      DataError: no samples, a wrong shape or dtype, as many labels as samples missing, labels
        outside [0, num_classes), NaN, infinite or negative pixels or some above 1 (of float
        images), negative token ids, or class names that do not fit the classes.
    """

    name: str
    inputs: np.ndarray
    """[N, height, width, channels] float32 in [0, 1] or uint8, or [N, T] int32 token ids."""
    labels: np.ndarray  # [N] int32
    num_classes: int
    official_test: np.ndarray | None = None  # [N] bool; True: may become test data only
    class_names: tuple[str, ...] | None = None  # by label
    text_bytes: float | None = None
    """Texts only: mean UTF-8 bytes of a text."""

    def __post_init__(self) -> None:
        inputs, where = self.inputs, f"dataset {self.name}"
        is_text = inputs.ndim == 2 and inputs.dtype == np.int32
        if not is_text and (inputs.ndim != 4 or inputs.dtype not in (np.float32, np.uint8)):
            raise DataError(
                f"{where}: inputs must be images, float32 or uint8 [N, height, width, channels], "
                f"or token ids, int32 [N, T]; got {inputs.dtype} {list(inputs.shape)}"
            )
        if is_text != (self.text_bytes is not None):
            raise DataError(f"{where}: text_bytes must be given for texts, and for them alone")
        _check_labels(
            where,
            self.labels,
            self.num_classes,
            num_samples=len(inputs),
            noun="texts" if is_text else "images",
            official_test=self.official_test,
            class_names=self.class_names,
        )
        if 0 in inputs.shape:
            raise DataError(f"{where}: inputs are empty, {list(inputs.shape)}")
        if is_text and inputs.min() < 0:
            raise DataError(f"{where}: token ids must not be negative, got {inputs.min()}")
        if inputs.dtype == np.float32:
            _check_pixels(where, inputs)

    @property
    def kind(self) -> Literal["images", "text"]:
        """What the inputs are."""
        return "text" if self.inputs.ndim == 2 else "images"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample: (height, width, channels) or (T,)."""
        return self.inputs.shape[1:]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels).

        Raises:
          DataError: the samples are texts.
        """
        if self.kind == "text":
            raise DataError(f"dataset {self.name} holds texts, which have no image shape")
        _, height, width, channels = self.inputs.shape
        return height, width, channels

    @property
    def sample_bytes(self) -> float:
        """Bytes of one raw sample, as a client would upload it to a central server.

        One byte a pixel and channel of an image; the mean UTF-8 bytes of a text.
        """
        return float(math.prod(self.input_shape)) if self.text_bytes is None else self.text_bytes

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class RawText:
    """Labelled texts before they are token ids: the tokeniser belongs to the encoder.

    Raises:
      DataError: as of `Dataset`, or a text is empty.
    """

    name: str
    texts: Sequence[str]  # N of them
    labels: np.ndarray  # [N] int32
    num_classes: int
    class_names: tuple[str, ...] | None = None  # by label
    official_test: np.ndarray | None = None  # [N] bool; True: may become test data only

    def __post_init__(self) -> None:
        where = f"dataset {self.name}"
        _check_labels(
            where,
            self.labels,
            self.num_classes,
            num_samples=len(self.texts),
            noun="texts",
            official_test=self.official_test,
            class_names=self.class_names,
        )
        empty = [i for i, text in enumerate(self.texts) if not text.strip()]
        if empty:
            raise DataError(
                f"{where}: {len(empty)} texts are empty, first text {empty[0]}; remove those rows"
            )

    @property
    def sample_bytes(self) -> float:
        """Mean UTF-8 bytes of a text."""
        return sum(len(text.encode()) for text in self.texts) / len(self.texts)

    def __len__(self) -> int:
        return len(self.labels)


def tokenise(raw: RawText, encode: Callable[[list[str]], np.ndarray]) -> Dataset:
    """Turns texts into token ids.

    Args:
      raw: the texts.
      encode: texts -> [N, T] token ids of any integer dtype, padded.

    Raises:
      DataError: `encode` gave something else.
    """
    ids = np.asarray(encode(list(raw.texts)))
    if ids.ndim != 2 or len(ids) != len(raw) or ids.dtype.kind not in "iu":
        raise DataError(
            f"dataset {raw.name}: the tokeniser gave {ids.dtype} {list(ids.shape)} for "
            f"{len(raw)} texts; expected whole numbers [{len(raw)}, T]"
        )
    return Dataset(
        raw.name,
        ids.astype(np.int32),
        raw.labels,
        raw.num_classes,
        raw.official_test,
        raw.class_names,
        text_bytes=raw.sample_bytes,
    )


def _check_labels(
    where: str,
    labels: np.ndarray,
    num_classes: int,
    *,
    num_samples: int,
    noun: str,
    official_test: np.ndarray | None,
    class_names: tuple[str, ...] | None,
) -> None:
    if labels.ndim != 1 or labels.dtype != np.int32:
        raise DataError(
            f"{where}: labels must be int32 [N], got {labels.dtype} {list(labels.shape)}"
        )
    if num_classes < 2:
        raise DataError(f"{where}: needs at least 2 classes, got {num_classes}")
    if num_samples != len(labels):
        raise DataError(
            f"{where}: {num_samples} {noun} but {len(labels)} labels; the two do not belong "
            "together"
        )
    if num_samples == 0:
        raise DataError(f"{where}: has no {noun}")
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        raise DataError(
            f"{where}: {outside.size} labels out of range, first labels[{outside[0]}] = "
            f"{labels[outside[0]]}; expected 0 to {num_classes - 1}"
        )
    if official_test is not None and (
        official_test.shape != labels.shape or official_test.dtype != np.bool_
    ):
        raise DataError(
            f"{where}: official_test must be bool [{num_samples}], got {official_test.dtype} "
            f"{list(official_test.shape)}"
        )
    if class_names is not None and len(set(class_names)) != num_classes:
        raise DataError(
            f"{where}: {len(set(class_names))} different class names for {num_classes} classes"
        )


def _check_pixels(where: str, images: np.ndarray) -> None:
    # The extremes are NaN or infinite exactly when some pixel is: no [N, ...] temporaries.
    low, high = float(images.min()), float(images.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
        raise DataError(
            f"{where}: {bad.size} images hold NaN or infinite pixels, first image {bad[0]}; "
            "repair or remove them"
        )
    if low < 0.0 or high > 1.0:
        raise DataError(f"{where}: pixels lie in [{low:g}, {high:g}]; scale them to [0, 1] first")
