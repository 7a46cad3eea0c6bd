"""A device's model as a program that runs without this package: StableHLO or ONNX.

    programs = export.programs(model, ("stablehlo", "onnx"))   # file name -> content
    device_folder.add_programs(folder, programs)

Both take raw inputs, images (resized and normalised inside) or int32 token ids, at any batch size,
hold the weights, and return logits [B, C].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from jax import export as jax_export

from acme_jax import device_folder
from acme_jax.bert import BertConfig
from acme_jax.device_model import DeviceModel
from acme_jax.export_onnx import to_onnx
from acme_jax.onnx_graph import ExportError

__all__ = ["FORMATS", "IMAGE_DTYPES", "ExportError", "export_folder", "programs", "to_onnx",
           "to_stablehlo"]  # fmt: skip

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""What one StableHLO file runs on."""

IMAGE_DTYPES = ("float32", "uint8")


def to_stablehlo(model: DeviceModel, input_dtype: str = "float32") -> bytes:
    """Serialised `jax.export` program; `jax.export.deserialize(content).call(inputs)` runs it.

    Args:
      model: what to export.
      input_dtype: of images, one of `IMAGE_DTYPES`. Token ids are int32.
    """
    if isinstance(model.encoder, BertConfig):
        input_dtype = "int32"
    sizes = ", ".join(str(n) for n in model.encoder.input_shape)
    shape = jax_export.symbolic_shape(f"batch, {sizes}")

    # NumPy leaves cannot be indexed by traced token ids.
    backbone, header = jax.tree.map(jnp.asarray, (model.backbone, model.header))

    def program(inputs: Array) -> Array:
        return model.forward(backbone, header, inputs)

    made = jax_export.export(jax.jit(program), platforms=PLATFORMS)
    exported = made(jax.ShapeDtypeStruct(shape, jnp.dtype(input_dtype)))
    return bytes(exported.serialize())


FORMATS: dict[str, tuple[str, Callable[[DeviceModel, str], bytes]]] = {
    "stablehlo": ("model.stablehlo", to_stablehlo),
    "onnx": ("model.onnx", to_onnx),
}
"""Name of a format -> its file and what makes it."""


def programs(
    model: DeviceModel, formats: Sequence[str], input_dtype: str = "float32"
) -> dict[str, bytes]:
    """Files of a model: name -> content.

    Raises:
      ExportError: an unknown format or type, or the package that a format needs is missing.
    """
    check(formats, input_dtype)
    return {name: make(model, input_dtype) for name, make in (FORMATS[each] for each in formats)}


def check(formats: Sequence[str], input_dtype: str = "float32") -> None:
    """Refuses what cannot be exported, before any work.

    Raises:
      ExportError: as `programs`.
    """
    for name in formats:
        if name not in FORMATS:
            raise ExportError(f"unknown format {name!r}; expected one of {', '.join(FORMATS)}")
    if input_dtype not in IMAGE_DTYPES:
        raise ExportError(
            f"unknown type of images {input_dtype!r}; expected one of {', '.join(IMAGE_DTYPES)}"
        )
    if "onnx" in formats:
        from acme_jax.onnx_graph import Graph

        Graph()


def export_folder(
    directory: str | Path, formats: Sequence[str], input_dtype: str = "float32"
) -> dict[str, int]:
    """Adds formats to a device's folder; returns the new files' bytes.

    Raises:
      ExportError: as `programs`.
      ModelError: no such folder, a damaged one, or one that cannot be written.
    """
    check(formats, input_dtype)
    model, _ = device_folder.read(Path(directory))
    made = programs(model, formats, input_dtype)
    device_folder.add_programs(Path(directory), made)
    return {name: len(content) for name, content in made.items()}
