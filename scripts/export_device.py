r"""Writes the models of a finished run's devices as StableHLO and ONNX, beside their weights.

    python scripts/export_device.py RUN_DIR [--devices 0 3] [--formats stablehlo onnx] \
        [--image-dtype uint8]

Without `--devices` every device of the run. ONNX needs `pip install -e '.[onnx]'`. Each file
takes raw inputs at any batch size; `predict.py` in each folder runs it (docs/EXPORT.md).
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from acme_jax import export
from acme_jax.device_model import ModelError
from acme_jax.export import ExportError


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to export."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """Directory of a finished run, or the folder of one device."""
    devices: tuple[int, ...] = ()
    """Numbers of devices; none: all."""
    formats: tuple[Literal["stablehlo", "onnx"], ...] = ("stablehlo", "onnx")
    image_dtype: Literal["float32", "uint8"] = "float32"
    """What the programs take: float32 in [0, 1], or uint8."""


def find_folders(run_dir: Path, devices: tuple[int, ...]) -> list[Path]:
    """The folders of the wanted devices.

    Raises:
      ModelError: no devices there, or not the wanted ones.
    """
    if (run_dir / "config.json").exists() and (run_dir / "model.safetensors").exists():
        return [run_dir]
    found = {
        int(path.name): path for path in (run_dir / "devices").glob("*") if path.name.isdigit()
    }
    if not found:
        raise ModelError(
            f"{run_dir} holds no devices; expected the directory of a finished run, or the folder "
            "of a device"
        )
    absent = [number for number in devices if number not in found]
    if absent:
        raise ModelError(
            f"{run_dir} has no device {absent[0]}; it has {min(found)} to {max(found)}"
        )
    return [found[number] for number in devices or sorted(found)]


def main() -> None:
    """Exports and prints the files with their sizes."""
    arguments = tyro.cli(Arguments)
    try:
        export.check(arguments.formats, arguments.image_dtype)
        for folder in find_folders(arguments.run_dir, arguments.devices):
            made = export.export_folder(folder, arguments.formats, arguments.image_dtype)
            print(
                f"{folder}: " + ", ".join(f"{name} {size:,} bytes" for name, size in made.items())
            )
    except (ModelError, ExportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
