"""Data and network belong together: sizes, kinds, channels, classes, tokenisers."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from acme_jax import device_model, supernet, system
from acme_jax.bert import BertConfig
from acme_jax.config import Config, ConfigError, DataConfig, ModelConfig
from acme_jax.presets import get
from acme_jax.pretrained import PretrainedError
from acme_jax.starting_point import make_starting_point

CHECKPOINTS = Path(__file__).parent / "fixtures" / "checkpoints"
WORDS = ("the cat sat on mat", "dog run over the mat !", "a b c", "d e f g ,")


def images(tmp_path, shape=(8, 6, 1), dtype=np.uint8):
    rng = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    np.savez(path, images=rng.integers(0, 255, (40, *shape)).astype(dtype),
             labels=np.arange(40) % 4)  # fmt: skip
    return DataConfig(name="arrays", path=str(path))


def texts(tmp_path, rows=40):
    """Each class of sentences begins with a word of its own."""
    path, rng = tmp_path / "texts.tsv", np.random.default_rng(1)
    lines = ["text\tlabel"]
    for i in range(rows):
        words = " ".join(rng.permutation([*WORDS[i % 4].split(), "a", "b"])[:4])
        lines.append(f"{('cat', 'dog', 'run', 'sat')[i % 4]} {words}\t{'wxyz'[i % 4]}")
    path.write_text("\n".join(lines) + "\n")
    return DataConfig(name="text", path=str(path))


def start(data, **model):
    return make_starting_point(Config(data=data, model=ModelConfig(**model)))


def test_a_new_network_has_the_sizes_of_the_configuration(tmp_path):
    found = start(images(tmp_path), patch_size=2)
    assert found.params is None and found.encoder.image_shape == (8, 6, 1)
    assert found.encoder.source_shape is None and found.encoder.num_classes == 4
    resized = start(images(tmp_path), patch_size=4, image_size=12, dtype="bfloat16").encoder
    assert (resized.image_shape, resized.input_shape) == ((12, 12, 1), (8, 6, 1))
    assert resized.dtype == "bfloat16"
    with pytest.raises(ConfigError, match="image size 12 x 12 is not divisible"):
        start(images(tmp_path), patch_size=5, image_size=12)


def test_a_pretrained_vit_takes_grey_images_of_another_size(tmp_path):
    found = start(images(tmp_path), pretrained=str(CHECKPOINTS / "vit"))
    assert found.encoder.image_shape == (16, 16, 3) and found.encoder.input_shape == (8, 6, 1)
    assert found.params["classifier"]["kernel"].shape == (20, 4)
    logits = supernet.apply(found.params, found.dataset.inputs[:3], found.encoder).logits
    assert logits.shape == (3, 4) and np.isfinite(logits).all()
    larger = start(images(tmp_path), pretrained=str(CHECKPOINTS / "vit"), image_size=24)
    assert larger.params["position"].shape == (37, 20)


def test_texts_become_the_ids_of_the_checkpoints_tokeniser(tmp_path):
    pytest.importorskip("tokenizers")
    found = start(texts(tmp_path), pretrained=str(CHECKPOINTS / "bert"), max_tokens=8)
    assert isinstance(found.encoder, BertConfig) and found.encoder.max_tokens == 8
    assert found.dataset.inputs.shape == (40, 8) and (found.dataset.inputs[:, 0] == 2).all()
    assert found.dataset.class_names == ("w", "x", "y", "z")
    settings = json.loads(found.tokenizer)
    assert settings["truncation"]["max_length"] == settings["padding"]["strategy"]["Fixed"] == 8
    assert 5 < found.dataset.sample_bytes < 30


@pytest.mark.parametrize(
    ("make", "model", "error", "message"),
    [
        (texts, {}, ConfigError, "holds texts, which need a text encoder .* --model.pretrained"),
        (
            images,
            {"pretrained": "bert"},
            ConfigError,
            "is a text encoder, but dataset arrays",
        ),
        (
            texts,
            {"pretrained": "vit"},
            ConfigError,
            "is an image encoder, but dataset text",
        ),
        (images, {"pretrained": "nowhere/at-all"}, PretrainedError, "nowhere/at-all"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, monkeypatch, make, model, error, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if (CHECKPOINTS / model.get("pretrained", "none")).is_dir():
        model = {"pretrained": str(CHECKPOINTS / model["pretrained"])}
    with pytest.raises(error, match=message):
        start(make(tmp_path), **model)


def copy_of_bert(tmp_path, change):
    folder = tmp_path / "copy"
    shutil.copytree(CHECKPOINTS / "bert", folder)
    change(folder)
    return str(folder)


def more_pieces(folder):
    with (folder / "vocab.txt").open("a") as file:
        file.write("extra\nmore\n")


def other_padding(folder):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"pad_token_id": 5}))


@pytest.mark.parametrize(
    ("change", "message"),
    [(more_pieces, "has 31 pieces .* encoder has 29"), (other_padding, "pads with 5; take the")],
)
def test_a_tokeniser_of_another_model_is_refused(tmp_path, change, message):
    pytest.importorskip("tokenizers")
    with pytest.raises(PretrainedError, match=message):
        start(texts(tmp_path), pretrained=copy_of_bert(tmp_path, change), max_tokens=8)


def test_an_image_size_for_texts_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.image_size is 24, but the data are texts"):
        start(texts(tmp_path), pretrained=str(CHECKPOINTS / "bert"), image_size=24)


def test_images_of_two_channels_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"have 2 channels, but .* takes 3; convert them"):
        start(images(tmp_path, (8, 6, 2)), pretrained=str(CHECKPOINTS / "vit"))


@pytest.mark.slow
def test_the_whole_loop_on_texts(tmp_path):
    pytest.importorskip("tokenizers")
    smoke = get("smoke")
    config = dataclasses.replace(
        smoke,
        data=dataclasses.replace(
            texts(tmp_path, 700), public_train=200, public_select=50, public_test=50
        ),
        model=ModelConfig(pretrained=str(CHECKPOINTS / "bert"), max_tokens=8),
        reference=dataclasses.replace(smoke.reference, learning_rate=5e-3, epochs=12),
        fleet=dataclasses.replace(
            smoke.fleet, distribution="dirichlet", budgets=(0.9, 1.0), dirichlet_alpha=9.0
        ),
    )
    results = system.run(config, tmp_path / "run")
    assert results["reference"]["test_accuracy"] > 0.9
    folder = tmp_path / "run" / results["devices"][0]["model"]
    model = device_model.load(folder)
    assert model.class_names == ("w", "x", "y", "z")
    assert (folder / "tokenizer.json").is_file()
    assert results["summary"]["wasserstein"]["mean"] > 0.5
