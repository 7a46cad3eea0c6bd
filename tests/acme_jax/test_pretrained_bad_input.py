"""Each kind of damaged or unsupported checkpoint gives one clear message."""

import json

import numpy as np
import pytest
from checkpoint_copies import CHECKPOINTS, copy, shard
from safetensors.numpy import save_file

from acme_jax import pretrained
from acme_jax.pretrained import PretrainedError, load_bert, load_vit

QUERY = "vit.encoder.layer.1.attention.attention.query.weight"


def refused(load, path, *parts, **arguments):
    with pytest.raises(PretrainedError) as caught:
        load(path, **arguments)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# config.json


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "swin"}, "'swin'"),
        ({"model_type": None}, "None"),
        ({"architectures": ["ViTForMaskedImageModeling"]}, "'ViTForMaskedImageModeling'"),
    ],
)
def test_another_architecture_says_which_are_supported(tmp_path, config, named):
    path = copy("vit", tmp_path, config=config)
    supported = ("ViTForImageClassification", "DeiTForImageClassificationWithTeacher")
    refused(load_vit, path, named, *supported)
    refused(pretrained.load, path, named, *supported, "BertForSequenceClassification")


def test_a_text_encoder_is_no_vit_nor_the_other_way_round():
    refused(load_vit, CHECKPOINTS / "bert", "'bert'", "supported are: vit")
    refused(load_bert, CHECKPOINTS / "vit", "'vit'", "supported are: bert")


def test_missing_config(tmp_path):
    refused(load_vit, copy("vit", tmp_path, drop=["config.json"]), "config.json is missing")
    (tmp_path / "empty").mkdir()
    refused(pretrained.load, tmp_path / "empty", "config.json is missing")


@pytest.mark.parametrize("text", ["{", "", "\xff", "[" * 100_000, "[1]"])
def test_invalid_json(tmp_path, text):
    path = copy("vit", tmp_path)
    (path / "config.json").write_text(text, encoding="latin-1")
    refused(load_vit, path, "config.json", "JSON", "get it again")


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"hidden_act": "gelu_new"}, ("hidden_act is 'gelu_new'", "'gelu'")),
        ({"hidden_size": None}, ("hidden_size is missing", "positive whole number")),
        ({"hidden_size": "20"}, ("hidden_size is '20'", "positive whole number")),
        ({"num_hidden_layers": True}, ("num_hidden_layers is True",)),
        ({"num_attention_heads": 3}, ("hidden_size 20 is no multiple of num_attention_heads 3",)),
        ({"head_dim": 8}, ("head_dim is 8", "5")),
        ({"patch_size": [4, 2]}, ("patch_size", "square")),
        ({"image_size": [16]}, ("image_size is [16]", "two of them")),
        ({"image_size": 18}, ("18 x 18", "multiples of 4")),
        ({"layer_norm_eps": "small"}, ("layer_norm_eps is 'small'",)),
        ({"qkv_bias": 1}, ("qkv_bias is 1", "true or false")),
        ({"architectures": "ViTModel"}, ("architectures", "list")),
        ({"id2label": {"0": "a", "1": "b"}}, ("names 2 classes", "classifier.weight", "5")),
    ],
)
def test_vit_settings(tmp_path, config, parts):
    refused(load_vit, copy("vit", tmp_path, config=config), "config.json", *parts)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"hidden_act": "relu"}, ("hidden_act is 'relu'",)),
        ({"position_embedding_type": "relative_key"}, ("position_embedding_type", "'absolute'")),
        ({"is_decoder": True}, ("is_decoder is True",)),
        ({"pad_token_id": 29}, ("pad_token_id is 29", "0 to 28")),
        ({"embedding_size": 8}, ("embedding_size is 8",)),
    ],
)
def test_bert_settings(tmp_path, config, parts):
    refused(load_bert, copy("bert", tmp_path, config=config), *parts, max_tokens=9)


@pytest.mark.parametrize("max_tokens", [0, 1, 17])
def test_more_tokens_than_positions(max_tokens):
    parts = (f"max_tokens is {max_tokens}", "at most 16")
    refused(load_bert, CHECKPOINTS / "bert", *parts, max_tokens=max_tokens)


def test_arguments_that_do_not_fit():
    path = CHECKPOINTS / "vit"
    refused(load_vit, path, "18 x 16", "multiples of 4", image_size=(18, 16))
    refused(load_vit, path, "0 x 0", image_size=0)
    refused(load_vit, path, "num_classes is 0", num_classes=0)


@pytest.mark.parametrize(
    "fields", [{"image_mean": [0.5]}, {"image_std": [0.5, 0, 0.5]}, {"image_mean": "grey"}]
)
def test_damaged_preprocessor(tmp_path, fields):
    path = copy("vit", tmp_path)
    (path / "preprocessor_config.json").write_text(json.dumps(fields))
    refused(load_vit, path, "preprocessor_config.json", next(iter(fields)), "3 numbers")


# Tensors


def test_missing_tensors_are_named(tmp_path):
    def change(tensors):
        return {name: value for name, value in tensors.items() if name != QUERY}

    refused(
        load_vit, copy("vit", tmp_path, tensors=change), QUERY.removeprefix("vit."), "no tensor"
    )


def test_a_missing_classifier_is_no_model_without_a_head(tmp_path):
    def change(tensors):
        return {name: value for name, value in tensors.items() if "classifier" not in name}

    path = copy("bert", tmp_path, tensors=change)
    refused(load_bert, path, "no tensor classifier.weight", num_classes=2, max_tokens=9)


def test_extra_tensors_are_named(tmp_path):
    def change(tensors):
        return {**tensors, "vit.encoder.layer.0.lora_A": np.ones(3, "f4")}

    refused(load_vit, copy("vit", tmp_path, tensors=change), "vit.encoder.layer.0.lora_A")
    # A layer fewer in config.json leaves the last layer's 16 tensors over.
    (tmp_path / "b").mkdir()
    path = copy("vit", tmp_path / "b", config={"num_hidden_layers": 2})
    refused(load_vit, path, "vit.encoder.layer.2.", "and 10 more")


def test_one_tensor_under_two_names(tmp_path):
    def change(tensors):
        return {**tensors, "layernorm.weight": tensors["vit.layernorm.weight"]}

    path = copy("vit", tmp_path, tensors=change)
    refused(load_vit, path, "twice", " vit.layernorm.weight", " layernorm.weight")


@pytest.mark.parametrize("shape", [(20, 21), (400,), ()])
def test_wrong_shapes(tmp_path, shape):
    def change(tensors):
        return {**tensors, QUERY: np.ones(shape, "f4")}

    path = copy("vit", tmp_path, tensors=change)
    refused(load_vit, path, f"{QUERY} has shape {list(shape)}, expected [20, 20]")


def test_classifier_without_axes(tmp_path):
    def change(tensors):
        return {**tensors, "classifier.weight": np.ones((), "f4")}

    path = copy("vit", tmp_path, tensors=change, config={"id2label": None})
    refused(load_vit, path, "classifier.weight has shape []")


def test_huge_sizes_in_the_config_allocate_nothing(tmp_path):
    path = copy("vit", tmp_path, config={"intermediate_size": 10**7})
    refused(load_vit, path, "expected [10000000, 20]")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers(tmp_path, value):
    def change(tensors):
        tensors[QUERY].flat[[3, 7]] = value
        return tensors

    refused(load_vit, copy("vit", tmp_path, tensors=change), f"2 of 400 values of {QUERY}", "NaN")


def test_quantised_weights(tmp_path):
    def change(tensors):
        return {**tensors, QUERY: np.ones((20, 20), "i1")}

    refused(load_vit, copy("vit", tmp_path, tensors=change), QUERY, "I8", "F32")


# Files


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_safetensors(tmp_path, kept):
    path = copy("vit", tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(load_vit, path, "model.safetensors is truncated or damaged", "get it again")


def test_safetensors_of_something_else(tmp_path):
    path = copy("vit", tmp_path)
    (path / "model.safetensors").write_bytes(b"<html>not found</html>" * 50)
    refused(load_vit, path, "truncated or damaged")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", None])
def test_pickled_weights_are_refused_with_a_hint(tmp_path, name):
    path = copy("vit", tmp_path, drop=["model.safetensors"])
    if name:
        (path / name).write_bytes(b"never read")
    found = f"has only {name}" if name else "has no weights"
    refused(load_vit, path, found, "save_pretrained(dir, safe_serialization=True)")


def test_missing_shard(tmp_path):
    path = shard(copy("vit", tmp_path), 3)
    (path / "model-00002-of-00003.safetensors").unlink()
    refused(load_vit, path, "lacks model-00002-of-00003.safetensors", "3 files")


def test_shard_without_a_promised_tensor(tmp_path):
    path = shard(copy("vit", tmp_path))
    save_file({"other": np.ones(2, "f4")}, path / "model-00002-of-00002.safetensors")
    refused(load_vit, path, "00002.safetensors lacks classifier.weight", "index.json")


@pytest.mark.parametrize("weight_map", [None, {}, {"a": "../model.safetensors"}, {"a": 3}])
def test_damaged_index(tmp_path, weight_map):
    path = shard(copy("vit", tmp_path))
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(load_vit, path, "model.safetensors.index.json", "expected" if weight_map else "no wei")


def test_a_file_instead_of_its_directory():
    refused(load_vit, CHECKPOINTS / "vit" / "model.safetensors", "is a file", "directory")
