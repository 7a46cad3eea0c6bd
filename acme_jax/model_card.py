"""The model card of a device's folder: what the model is, how good, how large, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nas import cells

_FILES = {
    "model.safetensors": "weights: sliced backbone and dense header, float32",
    "config.json": "sizes, cell, kept channels, class names, inputs, facts of the run",
    "predict.py": "predicts from the command line; needs none of the code that made it",
    "tokenizer.json": "texts to token ids, cut and padded to the model's length",
    "model.stablehlo": "the whole model for JAX (`jax.export.deserialize`), any batch size",
    "model.onnx": "the whole model for onnxruntime, any batch size",
}
_BYTES_PER_PARAM = 4


def render(description: Mapping[str, Any], sizes: Mapping[str, int]) -> bytes:
    """The card as Markdown.

    Args:
      description: the content of `config.json`. Of its facts these are printed where they are:
        device, edge, labels, num_train, num_test, test_accuracy, budget_bytes, num_flops,
        latency_s, energy_j, arch, preset, seed, commit, fingerprint.
      sizes: bytes of the folder's files.
    """
    facts, inputs = description["facts"], description["inputs"]
    encoder, names = description["encoder"], description["class_names"]
    title = f"Device {facts['device']}" if "device" in facts else "Device model"
    rows = _rows(description, facts)
    shape = ", ".join(str(n) for n in inputs["shape"])
    taken = (
        f"token ids, int [B, {shape}], padded with {inputs['pad_id']}"
        if inputs["kind"] == "token ids"
        else f"images [B, {shape}], {inputs['range']}"
    )
    blocks = "; ".join(f"{b['heads']} heads, {b['neurons']} neurons" for b in description["blocks"])
    cell = cells.describe(tuple(tuple(block) for block in description["cell"]))
    pruned = sum(description["header"]["channels"] - len(k) for k in description["kept_channels"])
    total = description["header"]["channels"] * len(description["kept_channels"])
    lines = [
        f"# {title}",
        "",
        "A small Transformer made for one device by ACME (ICDCS 2025) with acme-jax: a backbone "
        "sliced out of a weight-sharing supernet for the device's edge, and a header searched for "
        "the edge, refined and pruned on the device's data.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "## Use",
        "",
        f"Inputs: {taken}. Output: logits of {len(names)} classes: {_shorten(names)}.",
        "",
        "```",
        "python predict.py FILE...        # with model.onnx or model.stablehlo in this folder",
        "```",
        "",
        "```python",
        "from acme_jax import device_model",
        "",
        "model = device_model.load(FOLDER)",
        "classes = model.predict(inputs)",
        "model = model.personalise(inputs, labels).model  # goes on training the header",
        "```",
        "",
        "## How it was made",
        "",
        f"- Encoder: {encoder['kind']}, embedding {encoder['embed_dim']}, "
        f"{len(description['blocks'])} of {encoder['num_layers']} blocks ({blocks}).",
        f"- Header: {description['header']['num_layers']} stacked cells `{cell}`; {pruned} of "
        f"{total} gated channels pruned and removed.",
        *_provenance(facts),
        "",
        "## Files",
        "",
        "| file | bytes | what |",
        "|---|---|---|",
        *(
            f"| {name} | {size:,} | {_FILES.get(name, '')} |"
            for name, size in sorted(sizes.items())
        ),
    ]
    return ("\n".join(lines) + "\n").encode()


def _rows(description: Mapping[str, Any], facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of every figure that is known."""
    params = description["num_params"]
    shown: list[tuple[str, str, Any]] = [
        ("edge", "edge", str),
        ("labels on the device", "labels", lambda labels: ", ".join(str(x) for x in labels)),
        ("training samples", "num_train", str),
        ("accuracy on the device's test split", "test_accuracy", "{:.3f}".format),
        ("test samples", "num_test", str),
        ("size limit, bytes", "budget_bytes", "{:,.0f}".format),
        ("FLOPs of one sample", "num_flops", "{:,.0f}".format),
        ("latency, modelled, ms", "latency_s", lambda value: f"{1e3 * value:.3g}"),
        ("energy, modelled, mJ", "energy_j", lambda value: f"{1e3 * value:.3g}"),
    ]
    return [
        *((name, show(facts[key])) for name, key, show in shown if facts.get(key) is not None),
        ("parameters", f"{params:,}"),
        ("weights, bytes", f"{_BYTES_PER_PARAM * params:,}"),
    ]


def _provenance(facts: Mapping[str, Any]) -> list[str]:
    known = [(name, facts[name]) for name in ("preset", "seed", "commit", "fingerprint")
             if facts.get(name) is not None]  # fmt: skip
    if not known:
        return []
    return ["- Run: " + ", ".join(f"{name} {value}" for name, value in known) + "."]


def _shorten(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 20 else f"{', '.join(names[:20])}, ..."
