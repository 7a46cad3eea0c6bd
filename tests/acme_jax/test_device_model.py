"""A device's exported folder: what comes back computes what was saved, and needs nothing else."""

import dataclasses
import errno
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from small_models import (
    ARCH,
    ENCODERS,
    MAX,
    PLAIN,
    SEP3,
    WEIGHTED,
    make_dims,
    make_mask,
    make_model,
    make_parts,
)

from acme_jax import device_folder, device_model, encoders, header, slicing, supernet
from acme_jax.device_model import ModelError
from acme_jax.header_layout import num_params

CONFIG = tiny.CONFIG
FACTS = {"device": 4, "edge": 1, "labels": [0, 2], "test_accuracy": 0.5, "latency_s": 0.002,
         "energy_j": 0.03, "num_flops": 123456, "preset": "tiny", "seed": 0}  # fmt: skip
FILES = ("README.md", "config.json", "model.safetensors", "predict.py")


@functools.partial(jax.jit, static_argnums=(3, 4))
def in_memory(backbone, weights, mask, cell, encoder, inputs):
    """Logits of the parts, as the devices train them: masked."""
    tokens = slicing.features(backbone, inputs, encoder)
    return header.apply(weights, cell, make_dims(encoder, len(cell)), tokens, mask=mask)


@pytest.fixture
def folder(tmp_path):
    device_model.save(make_model(), tmp_path / "devices" / "000", FACTS)
    return tmp_path / "devices" / "000"


@pytest.mark.parametrize(
    ("name", "cell"), [(name, WEIGHTED) for name in ENCODERS] + [("vit", PLAIN)]
)
def test_loaded_model_is_the_saved_one_and_needs_only_its_folder(tmp_path, name, cell):
    encoder = ENCODERS[name]
    model = make_model(encoder, cell)
    inputs = encoders.random_inputs(model.encoder, 7)
    device_model.save(model, tmp_path / "run" / "000", {"device": 0})
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "run" / "000", tmp_path / "elsewhere" / "mine")
    shutil.rmtree(tmp_path / "run")

    loaded = device_model.load(str(tmp_path / "elsewhere" / "mine"))

    for field in ("encoder", "header_dims", "cell", "kept", "class_names"):
        assert getattr(loaded, field) == getattr(model, field)
    tiny.assert_trees_equal(loaded.backbone, model.backbone)
    tiny.assert_trees_equal(loaded.header, model.header)
    backbone, weights, mask = make_parts(encoder, cell)
    np.testing.assert_array_equal(loaded.mask, mask)
    expected = in_memory(backbone, weights, mask, cell, encoder, inputs)
    np.testing.assert_allclose(loaded.logits(inputs), expected, rtol=1e-5, atol=1e-5)
    classes = loaded.predict(inputs)
    assert isinstance(classes, np.ndarray)
    np.testing.assert_array_equal(classes, np.argmax(expected, axis=-1))


def test_the_file_holds_the_counted_parameters_and_no_more(folder):
    _, weights, mask = make_parts(CONFIG)
    model, dims = make_model(), make_dims(CONFIG)
    assert tiny.count(model.header) == num_params(dims, WEIGHTED, mask) < tiny.count(weights)
    numbers = model.num_params
    assert 4 * numbers < (folder / "model.safetensors").stat().st_size < 4 * numbers + 20_000


def test_a_wholly_pruned_header_survives_the_folder(tmp_path):
    model = make_model(kept=0.0)
    device_model.save(model, tmp_path / "000", {})
    images = encoders.random_inputs(model.encoder, 2)
    loaded = device_model.load(tmp_path / "000")
    np.testing.assert_array_equal(loaded.logits(images), model.logits(images))


def test_bytes_of_images_are_divided_by_255():
    model = make_model()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 2), np.uint8)
    np.testing.assert_allclose(
        model.logits(pixels), model.logits(pixels / np.float32(255)), rtol=1e-5, atol=1e-5
    )


def test_description_and_card(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    described = json.loads((folder / "config.json").read_text())
    assert described["facts"] == FACTS
    assert described["cell"] == [list(block) for block in WEIGHTED]
    assert described["class_names"] == ["cat", "dog", "owl"]
    assert described["blocks"][1] == {"heads": 1, "neurons": 2}
    card = (folder / "README.md").read_text()
    for text in ("# Device 4", "| edge | 1 |", "| labels on the device | 0, 2 |",
                 "test split | 0.500 |", "| latency, modelled, ms | 2 |", "cat, dog, owl",
                 f"{4 * described['num_params']:,}", "preset tiny", "predict.py"):  # fmt: skip
        assert text in card, text


def test_saving_again_gives_the_same_bytes(folder, tmp_path):
    device_model.save(make_model(), tmp_path / "again", FACTS)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_saving_replaces_the_folder(folder):
    (folder / "old").touch()
    device_model.save(make_model(cell=PLAIN), folder, FACTS)
    assert not (folder / "old").exists()
    assert device_model.load(folder).cell == PLAIN
    assert [path.name for path in folder.parent.iterdir()] == ["000"]


@pytest.mark.parametrize("exists", [False, True])
def test_full_disk_leaves_what_was_there(tmp_path, monkeypatch, exists):
    directory = tmp_path / "000"
    if exists:
        device_model.save(make_model(), directory, FACTS)
    write, count = device_folder.write_bytes, [0]

    def full(path, content):
        count[0] += 1
        if count[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(device_folder, "write_bytes", full)
    with pytest.raises(ModelError, match=r"cannot write .*000 \(No space left on device\)"):
        device_model.save(make_model(cell=PLAIN), directory, FACTS)
    assert [path.name for path in tmp_path.iterdir()] == (["000"] if exists else [])
    if exists:
        assert device_model.load(directory).cell == WEIGHTED


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_personalising_goes_on_from_a_loaded_folder(tmp_path, name):
    encoder, cell = ENCODERS[name], ((0, SEP3, 1, MAX),)
    dims = make_dims(encoder, blocks=1, channels=8)
    backbone = slicing.slice_params(supernet.init(jax.random.key(0), encoder), ARCH)
    fresh, mask = header.init(jax.random.key(1), cell, dims), make_mask(dims, cell, 0.8)
    model = device_model.from_masked(encoder, dims, cell, backbone, fresh, mask)
    device_model.save(model, tmp_path / "000", {})
    loaded = device_model.load(tmp_path / "000")
    labels, rng = np.arange(48) % 3, np.random.default_rng(1)
    if name == "bert":  # each class has words of its own
        inputs = 3 + 9 * labels[:, None] + rng.integers(0, 9, (48, 7))
    else:  # each class is bright elsewhere
        inputs = rng.random((48, 8, 12, 2), np.float32) / 2
        inputs[np.arange(48), :, 4 * labels] += 3

    made = loaded.personalise(inputs, labels, epochs=30, batch_size=16, learning_rate=3e-3)

    assert made.losses[-1] < 0.7 * made.losses[0]
    before, after = ((m.predict(inputs) == labels).mean() for m in (loaded, made.model))
    assert after > before + 0.2
    tiny.assert_trees_equal(made.model.backbone, loaded.backbone)
    again = loaded.personalise(inputs, labels, epochs=2, batch_size=16, learning_rate=3e-3)
    assert again.losses == made.losses[:2]
    device_model.save(made.model, tmp_path / "000", {})
    np.testing.assert_array_equal(
        device_model.load(tmp_path / "000").logits(inputs), made.model.logits(inputs)
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(3, int), r"4 samples, but labels of shape \(3,\)"),
        (np.full(4, 3), "labels must be whole numbers from 0 to 2"),
        (np.zeros(4), "labels must be whole numbers from 0 to 2"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    with pytest.raises(ModelError, match=message):
        make_model().personalise(np.zeros((4, 8, 12, 2), np.float32), labels)


@pytest.mark.parametrize("shape", [(8, 12, 2), (3, 8, 12, 1), (3, 12, 8, 2), (3, 8, 12)])
def test_images_of_another_shape(shape):
    with pytest.raises(ModelError, match=r"images have shape .*; this model takes \[B, 8, 12, 2\]"):
        make_model().logits(np.zeros(shape, np.float32))


def test_inputs_of_another_type():
    with pytest.raises(ModelError, match=r"images must be float in \[0, 1\] or uint8, got int64"):
        make_model().logits(np.zeros((1, 8, 12, 2), np.int64))
    text = make_model(ENCODERS["bert"])
    with pytest.raises(ModelError, match="token ids must be whole numbers, got float64"):
        text.logits(np.zeros((1, 7)))
    with pytest.raises(ModelError, match="from 0 to 30; the vocabulary of this model has 0 to 29"):
        text.logits(np.array([[0, 1, 2, 3, 4, 5, 30]]))


def test_missing_folder(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere holds no model \(config.json is missing\)"):
        device_model.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=rf"holds no model \({name} is missing\)"):
        device_model.load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_truncated_file(folder, name, kept):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ModelError, match=r"the model in .*000 is damaged: "):
        device_model.load(folder)


@pytest.mark.parametrize("part", ["encoder", "kept_channels", "class_names"])
def test_description_that_lacks_a_part(folder, part):
    described = json.loads((folder / "config.json").read_text())
    del described[part]
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match=r"the model in .*000 is damaged: "):
        device_model.load(folder)


@pytest.mark.parametrize("other", [{"cell": PLAIN}, {"kept": 0.5}, {"encoder": ENCODERS["bert"]}])
def test_weights_of_another_model(folder, tmp_path, other):
    device_model.save(make_model(**other), tmp_path / "other", {})
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    with pytest.raises(ModelError, match=r"the model in .*000 is damaged: "):
        device_model.load(folder)


def test_class_names_of_another_number():
    with pytest.raises(ModelError, match="2 class names for 3 classes"):
        dataclasses.replace(make_model(), class_names=("a", "b"))
