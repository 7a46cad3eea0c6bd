"""Tiny Hugging Face checkpoints with the outputs that transformers computes from them.

    pip install 'transformers==5.24.0' torch
    python scripts/make_checkpoint_fixtures.py [--out tests/acme_jax/fixtures/checkpoints]

They are committed; run this again only to add one. Weights are random, with biases and norms that
are far from 0 and 1, so that a layer left out or swapped shows. Beside each checkpoint lies
expected.npz: inputs, logits, every hidden state (before the final LayerNorm of a ViT), and of
images also the logits at other sizes with interpolated positions.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import tyro

MEAN, STD = (0.48, 0.45, 0.41), (0.23, 0.22, 0.26)
SIZES = ((24, 32), (8, 12))  # of other images: more patches, and fewer
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "##a", "##b", "##ing",
         "the", "cat", "sat", "on", "mat", "dog", "run", "!", ",", ".", "over"]  # fmt: skip


def randomise(model: Any, seed: int) -> Any:
    """Every weight is drawn anew, at a scale at which each of them matters.

    Args:
      model: a transformers model.
      seed: of torch's generator.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            is_norm = "norm" in name.lower() and name.endswith("weight")
            weight.copy_(1 + 0.3 * noise if is_norm else 0.25 * noise)
    return model.eval()


def pixels(images: np.ndarray) -> torch.Tensor:
    """Bytes [B, h, w, 3] -> what transformers' image processor makes of them.

    Args:
      images: uint8.
    """
    scaled = (images / 255.0 - np.array(MEAN)) / np.array(STD)
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2).astype(np.float32))


def image_outputs(model: Any, rng: np.random.Generator, size: int) -> dict[str, np.ndarray]:
    """Inputs and expected outputs of an image classifier.

    Args:
      model: ViT or DeiT.
      rng: draws the images.
      size: of the checkpoint's own images.
    """
    arrays = {"images": rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)}
    with torch.no_grad():
        own = model(pixels(arrays["images"]), output_hidden_states=True)
        for height, width in SIZES:
            images = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
            other = model(pixels(images), interpolate_pos_encoding=True)
            arrays[f"images_{height}x{width}"] = images
            arrays[f"logits_{height}x{width}"] = other.logits.numpy()
    states = torch.stack(own.hidden_states).numpy()
    return arrays | {"logits": own.logits.numpy(), "hidden_states": states}


def text_outputs(model: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Inputs and expected outputs of a text classifier; the second text is padded.

    Args:
      model: BERT.
      rng: draws the token ids.
    """
    drawn = rng.integers(4, len(WORDS), (3, 11))
    drawn[:, 0], drawn[1, 6:] = 2, 0
    ids = torch.from_numpy(drawn)
    with torch.no_grad():
        out = model(ids, attention_mask=(ids != 0).long(), output_hidden_states=True)
    states = torch.stack(out.hidden_states).numpy()
    return {
        "ids": ids.numpy().astype(np.int32),
        "hidden_states": states,
        **({"logits": out.logits.numpy()} if "logits" in out else {}),
    }


def save(model: Any, arrays: dict[str, np.ndarray], directory: Path) -> None:
    """Writes a checkpoint with its preprocessor or vocabulary, and expected.npz.

    Args:
      model: a transformers model.
      arrays: of expected.npz.
      directory: replaced if it is there.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as made:
        target = Path(made) / "new"
        model.save_pretrained(target)
        if "images" in arrays:
            plain = {"do_normalize": True, "image_mean": MEAN, "image_std": STD}
            (target / "preprocessor_config.json").write_text(json.dumps(plain, indent=2) + "\n")
        else:
            (target / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        named: dict[str, Any] = dict(arrays)
        np.savez_compressed(target / "expected.npz", **named)
        shutil.rmtree(directory, ignore_errors=True)
        target.rename(directory)


def main(out: Path = Path("tests/acme_jax/fixtures/checkpoints")) -> None:
    """Writes all fixtures.

    Args:
      out: where; one directory for each checkpoint.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 28,
    }
    labels: dict[str, Any] = {"id2label": {i: f"class {i}" for i in range(5)}}
    image = {**sizes, **labels, "patch_size": 4}
    vit = transformers.ViTConfig(**image, image_size=16)
    deit = transformers.DeiTConfig(**image, image_size=12)
    bert = transformers.BertConfig(
        **sizes, **labels, vocab_size=len(WORDS), max_position_embeddings=16
    )
    models = {
        "vit": transformers.ViTForImageClassification(vit),
        "deit": transformers.DeiTForImageClassificationWithTeacher(deit),
        "bert": transformers.BertForSequenceClassification(bert),
    }
    for seed, (name, model) in enumerate(models.items()):
        randomise(model, seed)
        rng = np.random.default_rng(seed)
        given = model.config
        arrays = (
            text_outputs(model, rng)
            if name == "bert"
            else image_outputs(model, rng, given.image_size)
        )
        save(model, arrays, out / name)
        print(f"{out / name}: {sum(p.stat().st_size for p in (out / name).iterdir())} bytes")


if __name__ == "__main__":
    tyro.cli(main)
