"""StableHLO and ONNX files of a device give the model's own logits, also far from this package."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from small_models import AVG, ENCODERS, IDENTITY, MAX, PLAIN, SEP1, SEP3, SEP5, WEIGHTED, make_model

from acme_jax import device_folder, device_model, encoders, export, tokens
from acme_jax.export import ExportError

onnxruntime = pytest.importorskip("onnxruntime")
EVERYTHING = ((0, SEP1, 1, SEP3), (1, SEP5, 2, MAX), (0, AVG, 2, IDENTITY))

BLOCKED = """
import sys
sys.modules["acme_jax"] = sys.modules["nas"] = None  # importing them raises
import numpy as np
from jax import export
for number in sys.argv[1:]:
    program = export.deserialize(bytearray(open(number + "/model.stablehlo", "rb").read()))
    for size in (1, 5):
        inputs = np.load(number + "/inputs.npy")[:size]
        np.save(f"{number}/logits{size}.npy", program.call(inputs))
"""


def run_onnx(content, inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {session.get_inputs()[0].name: inputs})[0]


def run_python(*arguments, cwd):
    """A fresh process in another directory."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("name", "cell", "kept"),
    [
        *((name, EVERYTHING, 0.6) for name in ENCODERS),
        *(("vit", cell, kept) for cell in (WEIGHTED, PLAIN) for kept in (1.0, 0.5)),
        *(("vit", EVERYTHING, kept) for kept in (0.15, 0.0)),
        ("bert", WEIGHTED, 0.0),
    ],
)
def test_onnx_equals_the_model(name, cell, kept):
    model = make_model(ENCODERS[name], cell, kept)
    content = export.to_onnx(model)
    for size in (1, 5):
        inputs = encoders.random_inputs(model.encoder, size, seed=size)
        np.testing.assert_allclose(
            run_onnx(content, inputs), model.logits(inputs), rtol=1e-4, atol=1e-4
        )


def test_onnx_grid_with_large_kernels():
    """A grid of which the interior is larger than a kernel, so that padding is not everything."""
    encoder = tiny.ViTConfig((28, 32, 1), 4, 8, 4, 4, 8, 3)
    model = make_model(encoder, EVERYTHING, 0.8)
    inputs = encoders.random_inputs(model.encoder, 3)
    np.testing.assert_allclose(
        run_onnx(export.to_onnx(model), inputs), model.logits(inputs), rtol=1e-4, atol=1e-4
    )


def test_uint8_images():
    model = make_model(ENCODERS["deit, resized"])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 11, 9, 1), np.uint8)
    made = export.programs(model, ("onnx",), "uint8")
    np.testing.assert_allclose(
        run_onnx(made["model.onnx"], pixels), model.logits(pixels), rtol=1e-4, atol=1e-4
    )


def test_exporting_again_gives_the_same_bytes():
    first, second = (export.programs(make_model(), export.FORMATS) for _ in range(2))
    assert first == second


def test_stablehlo_in_a_fresh_process_without_the_package(tmp_path):
    models = {
        "image": make_model(ENCODERS["deit, resized"], EVERYTHING, 0.5),
        "text": make_model(ENCODERS["bert"], WEIGHTED, 0.0),
    }
    for number, model in models.items():
        (tmp_path / number).mkdir()
        made = export.programs(model, ("stablehlo",))
        (tmp_path / number / "model.stablehlo").write_bytes(made["model.stablehlo"])
        np.save(tmp_path / number / "inputs.npy", encoders.random_inputs(model.encoder, 5))
    (tmp_path / "blocked.py").write_text(BLOCKED)
    done = run_python("-I", "blocked.py", *models, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for number, model in models.items():
        inputs = np.load(tmp_path / number / "inputs.npy")
        for size in (1, 5):
            np.testing.assert_allclose(
                np.load(tmp_path / number / f"logits{size}.npy"), model.logits(inputs[:size]),
                rtol=1e-5, atol=1e-5,
            )  # fmt: skip


@pytest.mark.parametrize(("name", "format"), [("vit", "onnx"), ("bert", "onnx"),
                                             ("deit, resized", "stablehlo")])  # fmt: skip
def test_predict_script_alone(tmp_path, name, format):
    model = make_model(ENCODERS[name])
    folder = tmp_path / "mine"
    device_model.save(model, folder, {})
    export.export_folder(folder, [format])
    inputs = encoders.random_inputs(model.encoder, 4)
    np.save(tmp_path / "inputs.npy", inputs)
    done = run_python("-I", folder / "predict.py", "inputs.npy", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    np.testing.assert_allclose(
        [row["logits"] for row in rows], model.logits(inputs), rtol=1e-4, atol=1e-4
    )
    assert [row["class"] for row in rows] == [("cat", "dog", "owl")[i] for i in
                                              model.predict(inputs)]  # fmt: skip


def test_predict_script_reads_image_files(tmp_path):
    model = make_model(ENCODERS["deit, resized"])
    device_model.save(model, tmp_path / "mine", {})
    export.export_folder(tmp_path / "mine", ["onnx"], "uint8")
    pixels = np.random.default_rng(0).integers(0, 256, (11, 9), np.uint8)
    wide = np.pad(pixels, ((0, 0), (6, 6)))  # the central part is what counts
    Image.fromarray(wide).save(tmp_path / "image.png")
    done = run_python(tmp_path / "mine" / "predict.py", "image.png", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = model.logits(pixels[None, :, :, None])[0]
    np.testing.assert_allclose(json.loads(done.stdout)["logits"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 8, 12, 1), np.float32), r"it has shape \(2, 8, 12, 1\); expected \[B, 8, 12"),
        (np.zeros((2, 8, 12, 2), np.int64), "images must be uint8 or float"),
        (None, "cannot use .*No such file"),
    ],
)
def test_predict_script_refuses_other_inputs(tmp_path, array, message):
    device_model.save(make_model(), tmp_path / "mine", {})
    export.export_folder(tmp_path / "mine", ["onnx"])
    if array is not None:
        np.save(tmp_path / "x.npy", array)
    done = run_python(tmp_path / "mine" / "predict.py", "x.npy", cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr


def test_predict_script_without_a_program(tmp_path):
    device_model.save(make_model(), tmp_path / "mine", {})
    done = run_python(tmp_path / "mine" / "predict.py", "x.npy", cwd=tmp_path)
    assert done.returncode == 1
    assert "neither model.onnx nor model.stablehlo" in done.stderr


def test_added_files_are_in_the_card(tmp_path):
    device_model.save(make_model(), tmp_path / "mine", {"device": 3})
    assert "model.onnx |" not in (tmp_path / "mine" / "README.md").read_text()
    sizes = export.export_folder(tmp_path / "mine", ["onnx"])
    card = (tmp_path / "mine" / "README.md").read_text()
    assert f"| model.onnx | {sizes['model.onnx']:,} |" in card
    assert device_folder.read(tmp_path / "mine")[1] == {"device": 3}


def test_unknown_formats_and_types(tmp_path):
    device_model.save(make_model(), tmp_path / "mine", {})
    with pytest.raises(
        ExportError, match="unknown format 'tflite'; expected one of stablehlo, onn"
    ):
        export.export_folder(tmp_path / "mine", ["tflite"])
    with pytest.raises(ExportError, match="unknown type of images 'int8'"):
        export.export_folder(tmp_path / "mine", ["onnx"], "int8")
    with pytest.raises(device_model.ModelError, match="holds no model"):
        export.export_folder(tmp_path / "nothing", ["onnx"])


def test_missing_onnx_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r"pip install onnx onnxruntime"):
        export.programs(make_model(), ("onnx",))


def test_full_disk_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    device_model.save(make_model(), tmp_path / "mine", {})
    before = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(device_folder, "write_bytes", full)
    with pytest.raises(device_model.ModelError, match=r"cannot write into .*No space left"):
        export.export_folder(tmp_path / "mine", ["onnx"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(device_folder.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        device_folder.write_bytes(tmp_path / "x", b"content")
    assert not list(tmp_path.iterdir())


def test_predict_script_reads_texts(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    checkpoint = Path(__file__).parent / "fixtures" / "checkpoints" / "bert"
    model = make_model(ENCODERS["bert"])
    tokenizer = tokens.load(checkpoint, max_tokens=model.encoder.max_tokens)
    assert tokenizer.vocab_size <= model.encoder.vocab_size and tokenizers
    programs = {"tokenizer.json": tokenizer.to_json(), **export.programs(model, ["onnx"])}
    device_folder.write(model, tmp_path / "mine", {}, programs)
    lines = ["the cat sat", "dog run over the mat"]
    (tmp_path / "lines.txt").write_text("\n".join([*lines, ""]))
    done = run_python("-I", tmp_path / "mine" / "predict.py", "lines.txt", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)["logits"] for line in done.stdout.splitlines()]
    np.testing.assert_allclose(found, model.logits(tokenizer(lines)), rtol=1e-4, atol=1e-4)
