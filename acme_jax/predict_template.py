"""Predicts with the model in this folder; stand-alone, without the package that made it.

    python predict.py image.png more.jpg images.npy
    python predict.py lines.txt ids.npy              # for text models

Images are files (with Pillow) or .npy arrays [B, height, width, channels], uint8 or float in
[0, 1]; texts are the lines of a .txt file (with tokenizers) or .npy arrays of token ids
[B, tokens]. Runs `model.onnx` with onnxruntime if both
are there, otherwise `model.stablehlo` with JAX.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent


def load_runtime() -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """The function from inputs to logits, and the type of its inputs."""
    reasons = []
    if (FOLDER / "model.onnx").exists():
        try:
            import onnxruntime
        except ImportError:
            reasons.append("model.onnx needs: pip install onnxruntime")
        else:
            session = onnxruntime.InferenceSession(
                str(FOLDER / "model.onnx"), providers=["CPUExecutionProvider"]
            )
            first = session.get_inputs()[0]
            dtype = {"tensor(uint8)": "uint8", "tensor(int32)": "int32"}.get(first.type, "float32")
            return (lambda inputs: session.run(None, {first.name: inputs})[0]), dtype
    if (FOLDER / "model.stablehlo").exists():
        try:
            from jax import export
        except ImportError:
            reasons.append("model.stablehlo needs: pip install jax")
        else:
            program = export.deserialize(bytearray((FOLDER / "model.stablehlo").read_bytes()))
            dtype = np.dtype(program.in_avals[0].dtype).name
            return (lambda inputs: np.asarray(program.call(inputs))), dtype
    sys.exit(
        "; ".join(reasons)
        or "this folder has neither model.onnx nor model.stablehlo; make them with acme-jax's "
        "scripts/export_device.py"
    )


def read_inputs(path: Path, description: dict[str, Any]) -> np.ndarray:
    """The samples of one file [B, ...]."""
    shape = tuple(description["shape"])
    if path.suffix == ".npy":
        values = np.load(path, allow_pickle=False)
        if values.shape == shape:
            values = values[None]
    elif description["kind"] == "image":
        values = read_image(path, shape)[None]
    elif path.suffix == ".txt":
        values = read_texts(path)
    else:
        raise ValueError("expected a .txt file of texts, one a line, or a .npy file of token ids")
    if values.shape[1:] != shape:
        raise ValueError(f"it has shape {values.shape}; expected [B, {', '.join(map(str, shape))}]")
    if description["kind"] == "image":
        if values.dtype != np.uint8 and values.dtype.kind != "f":
            raise ValueError(f"images must be uint8 or float in [0, 1], not {values.dtype}")
    else:
        if values.dtype.kind not in "iu":
            raise ValueError(f"token ids must be whole numbers, not {values.dtype}")
        size = description["vocab_size"]
        if values.size and not 0 <= values.min() <= values.max() < size:
            raise ValueError(f"token ids must be from 0 to {size - 1}")
    return values


def read_texts(path: Path) -> np.ndarray:
    """Token ids [B, tokens] of a file's lines; empty ones are left out."""
    tokenizer = FOLDER / "tokenizer.json"
    if not tokenizer.exists():
        raise ValueError("this folder has no tokenizer.json; give token ids as a .npy array")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        sys.exit("texts need: pip install tokenizers (or give token ids as a .npy array)")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError("it has no line of text")
    # The file says to how many tokens texts are cut and padded.
    encoded = Tokenizer.from_file(str(tokenizer)).encode_batch(lines)
    return np.asarray([each.ids for each in encoded], np.int64)


def read_image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An image file as uint8 [height, width, channels], prepared as in training.

    Upright (EXIF), the central part of the right proportions, resized; 16 bits become 8.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        sys.exit("image files need: pip install pillow (or give a .npy array)")
    height, width, channels = shape
    try:
        with Image.open(path) as file:
            upright: Image.Image = ImageOps.exif_transpose(file)
            if upright.mode.startswith("I"):
                upright = Image.fromarray(
                    (np.asarray(upright).astype(np.int64) >> 8).astype(np.uint8)
                )
            image = upright.convert({1: "L", 4: "RGBA"}.get(channels, "RGB"))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    if image.size != (width, height):
        scale = min(image.width / width, image.height / height)
        part = (width * scale, height * scale)
        left, top = ((whole - n) / 2 for whole, n in zip(image.size, part, strict=True))
        box = (left, top, left + part[0], top + part[1])
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image, np.uint8).reshape(height, width, -1)


def to_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """Pixels as the program takes them: uint8 stands for 0 to 255, float for [0, 1]."""
    if dtype == "int32":
        return values.astype(np.int32)
    if values.dtype == np.uint8:
        return values if dtype == "uint8" else values.astype(np.float32) / np.float32(255)
    if dtype == "uint8":
        return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
    return values.astype(np.float32)


def main() -> None:
    """Prints one line for each sample: file, class, probability."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="images, texts (.txt), or .npy arrays")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with logits")
    arguments = parser.parse_args()
    description = json.loads((FOLDER / "config.json").read_text())
    run, dtype = load_runtime()
    for path in arguments.files:
        try:
            inputs = to_dtype(read_inputs(path, description["inputs"]), dtype)
        except (OSError, ValueError, EOFError, SyntaxError) as error:  # Pillow's are of all kinds
            sys.exit(f"cannot use {path}: {error}")
        logits = np.concatenate([run(inputs[i : i + 32]) for i in range(0, len(inputs), 32)])
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        probabilities = weights / weights.sum(axis=-1, keepdims=True)
        for index, row in enumerate(probabilities):
            best = int(row.argmax())
            name = description["class_names"][best]
            where = f"{path}[{index}]" if len(inputs) > 1 else str(path)
            if arguments.json:
                print(json.dumps({"file": str(path), "index": index, "class": name,
                                  "logits": logits[index].tolist()}))  # fmt: skip
            else:
                print(f"{where}: {name} ({row[best]:.3f})")


if __name__ == "__main__":
    main()
