"""A device's exported folder: what comes back computes what was saved, and needs nothing else."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import tiny

from acme_jax import device_model, header, slicing
from acme_jax.device_model import DeviceModel, ModelError
from acme_jax.header_layout import HeaderDims, num_gates
from nas.cells import OPS

CONFIG = tiny.CONFIG
ROWS, COLUMNS = CONFIG.grid
DIMS = HeaderDims(
    grid_height=ROWS,
    grid_width=COLUMNS,
    embed_dim=CONFIG.embed_dim,
    channels=4,
    num_classes=CONFIG.num_classes,
    blocks=1,
    num_layers=3,
)
WEIGHTED = ((0, OPS.index("sep3x3"), 1, OPS.index("maxpool3")),)
PLAIN = ((0, OPS.index("identity"), 1, OPS.index("avgpool3")),)
"""No operation of this cell has weights."""


@functools.partial(jax.jit, static_argnums=2)
def in_memory(backbone, weights, cell, mask, images):
    """Logits of the parts, as the devices train them."""
    tokens = slicing.features(backbone, images, CONFIG)
    return header.apply(weights, cell, DIMS, tokens, mask=mask)


def make_model(cell=WEIGHTED):
    rng = np.random.default_rng(5)
    backbone = slicing.slice_params(tiny.make_params(), tiny.GENOMES[2])
    del backbone["classifier"]
    weights = jax.tree.map(
        lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32),
        header.init(jax.random.key(3), cell, DIMS),
    )
    mask = (rng.random(num_gates(DIMS, cell)) > 0.3).astype(np.float32)
    assert 0 < mask.sum() < mask.size
    return DeviceModel(CONFIG, DIMS, cell, backbone, weights, mask)


@pytest.fixture
def folder(tmp_path):
    device_model.save(make_model(), tmp_path / "devices" / "000", {"test_accuracy": 0.5})
    return tmp_path / "devices" / "000"


@pytest.mark.parametrize("cell", [WEIGHTED, PLAIN])
def test_loaded_model_is_the_saved_one_and_needs_only_its_folder(tmp_path, cell):
    model, images = make_model(cell), tiny.make_images(7)[0]
    device_model.save(model, tmp_path / "run" / "000", {"device": 0})
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "run" / "000", tmp_path / "elsewhere" / "mine")
    shutil.rmtree(tmp_path / "run")

    loaded = device_model.load(str(tmp_path / "elsewhere" / "mine"))

    assert (loaded.vit, loaded.header_dims, loaded.cell) == (CONFIG, DIMS, cell)
    tiny.assert_trees_equal(loaded.backbone, model.backbone)
    tiny.assert_trees_equal(loaded.header, model.header)
    np.testing.assert_array_equal(loaded.mask, model.mask)
    expected = in_memory(model.backbone, model.header, cell, model.mask, images)
    np.testing.assert_allclose(loaded.logits(images), expected, rtol=1e-5, atol=1e-6)
    classes = loaded.predict(np.asarray(images))
    assert isinstance(classes, np.ndarray)
    assert classes.shape == (7,)
    np.testing.assert_array_equal(classes, np.argmax(expected, axis=-1))


def test_the_mask_counts():
    model, images = make_model(), tiny.make_images(7)[0]
    logits = [
        in_memory(model.backbone, model.header, WEIGHTED, mask, images)
        for mask in (model.mask, np.ones_like(model.mask))
    ]
    np.testing.assert_allclose(model.logits(images), logits[0], rtol=1e-5, atol=1e-6)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def test_facts_are_readable(folder):
    described = json.loads((folder / "model.json").read_text())
    assert described["facts"] == {"test_accuracy": 0.5}
    assert described["cell"] == [list(block) for block in WEIGHTED]


def test_saving_again_gives_the_same_bytes(folder, tmp_path):
    device_model.save(make_model(), tmp_path / "again", {"test_accuracy": 0.5})
    for name in ("model.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("shape", [(8, 12, 2), (3, 8, 12, 1), (3, 12, 8, 2), (3, 8, 12)])
def test_images_of_another_shape(shape):
    with pytest.raises(ModelError, match=r"images have shape .*; this model takes \[B, 8, 12, 2\]"):
        make_model().logits(np.zeros(shape, np.float32))


def test_missing_folder(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere holds no model \(model.json is missing\)"):
        device_model.load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(ModelError, match=rf"holds no model \(.*{name}.* is missing\)"):
        device_model.load(folder)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_truncated_file(folder, name, kept):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ModelError, match=r"the model in .*000 is damaged: "):
        device_model.load(folder)


def test_description_that_lacks_a_part(folder):
    described = json.loads((folder / "model.json").read_text())
    del described["vit"]
    (folder / "model.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match=r"the model in .*000 is damaged: .*vit"):
        device_model.load(folder)


def test_weights_of_another_cell(folder, tmp_path):
    device_model.save(make_model(PLAIN), tmp_path / "other", {})
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    with pytest.raises(ModelError, match=r"the model in .*000 is damaged: "):
        device_model.load(folder)
