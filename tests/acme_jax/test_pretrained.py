"""Checkpoints that transformers wrote give the outputs that transformers computed from them.

The fixtures and their expected outputs come from `scripts/make_checkpoint_fixtures.py`.
"""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_copies import CHECKPOINTS, copy, expected, shard
from safetensors.numpy import load_file

from acme_jax import pretrained, supernet
from acme_jax.pretrained import PretrainedError
from acme_jax.vit_checkpoint import _SINCE_5

LOGITS, STATES = 1e-5, 5e-5  # ten times as strict as promised; networks this small allow it


def run(params, inputs, config):
    outputs = supernet.apply(params, jnp.asarray(inputs), config)
    return outputs.logits, np.concatenate([outputs.inputs, outputs.final[None]])


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_images_as_transformers(kind):
    wanted = expected(kind)
    config, params = pretrained.load_vit(CHECKPOINTS / kind)
    logits, states = run(params, wanted["images"], config)
    np.testing.assert_allclose(logits, wanted["logits"], rtol=0, atol=LOGITS)
    np.testing.assert_allclose(states, wanted["hidden_states"], rtol=0, atol=STATES)


def test_texts_as_transformers():
    wanted = expected("bert")
    ids = wanted["ids"]
    config, params = pretrained.load_bert(CHECKPOINTS / "bert", max_tokens=ids.shape[1])
    assert config.pooling == "cls"
    logits, states = run(params, ids, config)
    np.testing.assert_allclose(logits, wanted["logits"], rtol=0, atol=LOGITS)
    real = ids != config.pad_id
    assert not real.all()
    np.testing.assert_allclose(
        states[:, real], wanted["hidden_states"][:, real], rtol=0, atol=STATES
    )


def test_more_padding_changes_no_logits():
    wanted = expected("bert")
    config, params = pretrained.load_bert(CHECKPOINTS / "bert", max_tokens=16)
    ids = np.pad(wanted["ids"], ((0, 0), (0, 16 - wanted["ids"].shape[1])))
    np.testing.assert_allclose(run(params, ids, config)[0], wanted["logits"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("size", [(24, 32), (8, 12)])
@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_interpolated_positions_as_transformers(kind, size):
    wanted, name = expected(kind), f"{size[0]}x{size[1]}"
    config, params = pretrained.load_vit(CHECKPOINTS / kind, image_size=size)
    assert config.image_shape == (*size, 3)
    logits, _ = run(params, wanted[f"images_{name}"], config)
    np.testing.assert_allclose(logits, wanted[f"logits_{name}"], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("kind", ["vit", "deit", "bert"])
def test_the_tree_is_that_of_a_new_network(kind):
    # Where `supernet.init` makes no such leaf (pooler, second classifier) it is left out here.
    arguments = {"max_tokens": 9} if kind == "bert" else {}
    config, params = pretrained.load(CHECKPOINTS / kind, **arguments)
    made = jax.eval_shape(lambda key: supernet.init(key, config), jax.random.key(0))
    held = {name: part for name, part in params.items() if name in made}
    chex.assert_trees_all_equal_shapes_and_dtypes(held, made)
    assert set(params) - set(made) <= {"pooler", "distillation_classifier"}


def same(one, other):
    assert one[0] == other[0]
    chex.assert_trees_all_equal(one[1], other[1])


@pytest.mark.parametrize("kind", ["vit", "deit", "bert"])
def test_shards_are_read_like_one_file(tmp_path, kind):
    arguments = {"max_tokens": 9} if kind == "bert" else {}
    whole = pretrained.load(CHECKPOINTS / kind, **arguments)
    same(pretrained.load(shard(copy(kind, tmp_path), 3), **arguments), whole)


def since_5(tensors):
    renamed = {}
    for name, value in tensors.items():
        for new, old in _SINCE_5.items():
            if f".{old}." in name and not (old == "output.dense" and "attention" in name):
                name = name.replace(f".{old}.", f".{new}.")
        renamed[name.replace("encoder.layer.", "layers.")] = value
    return renamed


def test_names_of_transformers_5_are_read_too(tmp_path):
    path = copy("vit", tmp_path, tensors=since_5)
    names = load_file(path / "model.safetensors")
    assert "vit.layers.2.attention.o_proj.bias" in names and "vit.layers.0.mlp.fc2.bias" in names
    assert not any("dense" in name or "query" in name for name in names)
    same(pretrained.load_vit(path), pretrained.load_vit(CHECKPOINTS / "vit"))


def test_old_names_of_layer_norm_are_read_too(tmp_path):
    def old(tensors):
        return {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): value
            for name, value in tensors.items()
        }

    path = copy("bert", tmp_path, tensors=old)
    same(
        pretrained.load_bert(path, max_tokens=5),
        pretrained.load_bert(CHECKPOINTS / "bert", max_tokens=5),
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_become_float32(tmp_path, dtype):
    def narrow(tensors):
        return {name: value.astype(dtype) for name, value in tensors.items()}

    config, params = pretrained.load_vit(copy("vit", tmp_path, tensors=narrow))
    known, whole = pretrained.load_vit(CHECKPOINTS / "vit")
    assert config == known
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype(np.float32), whole)
    chex.assert_trees_all_equal(params, jax.tree.map(jnp.asarray, rounded))


# Classification layers


@pytest.mark.parametrize("kind", ["vit", "deit", "bert"])
def test_another_number_of_classes_gets_a_new_layer(kind):
    arguments = {"max_tokens": 9} if kind == "bert" else {}
    path, key = CHECKPOINTS / kind, jax.random.key(3)
    old, before = pretrained.load(path, **arguments)
    config, params = pretrained.load(path, num_classes=7, key=key, **arguments)
    _, other = pretrained.load(path, num_classes=7, key=jax.random.key(4), **arguments)
    assert (old.num_classes, config.num_classes) == (5, 7)
    layers = [name for name in params if "classifier" in name]
    assert len(layers) == (2 if kind == "deit" else 1)
    for name in layers:
        kernel = params[name]["kernel"]
        assert kernel.shape == (20, 7)
        assert 0.01 < kernel.std() < 0.03
        assert not params[name]["bias"].any()
        assert (kernel != other[name]["kernel"]).any()
        del params[name], before[name]
    chex.assert_trees_all_equal(params, before)


def test_the_checkpoints_number_of_classes_keeps_its_layer():
    same(
        pretrained.load_vit(CHECKPOINTS / "vit", num_classes=5, key=jax.random.key(9)),
        pretrained.load_vit(CHECKPOINTS / "vit"),
    )


def bare(prefix):
    """Tensors as the model without a head names them, with a pooler that nothing reads."""

    def change(tensors):
        held = {k.removeprefix(prefix): v for k, v in tensors.items() if "classifier" not in k}
        pooler = {"pooler.dense.weight": np.eye(20, dtype="f4"), "pooler.dense.bias": np.ones(20)}
        return {**held, **pooler}

    return change


@pytest.mark.parametrize(
    ("kind", "prefix", "name"),
    [("vit", "vit.", "ViTModel"), ("deit", "deit.", "DeiTModel"), ("bert", "bert.", "BertModel")],
)
def test_models_without_a_head(tmp_path, kind, prefix, name):
    path = copy(kind, tmp_path, config={"architectures": [name]}, tensors=bare(prefix))
    arguments = {"max_tokens": 9} if kind == "bert" else {}
    with pytest.raises(PretrainedError, match="no classification layer; give num_classes"):
        pretrained.load(path, **arguments)
    config, params = pretrained.load(path, num_classes=3, **arguments)
    whole = pretrained.load(CHECKPOINTS / kind, **arguments)[1]
    chex.assert_trees_all_equal(params["blocks"], whole["blocks"])
    assert params["classifier"]["kernel"].shape == (20, 3)
    assert "pooler" not in params and "distillation_classifier" not in params
    if kind == "bert":
        assert config.pooling == "mean"


def test_layers_of_pretraining_are_ignored(tmp_path):
    def masked(tensors):
        held = {k: v for k, v in tensors.items() if "classifier" not in k and "pooler" not in k}
        ids = np.arange(16)[None]
        bias = np.zeros(29, "f4")
        return {**held, "cls.predictions.bias": bias, "bert.embeddings.position_ids": ids}

    path = copy("bert", tmp_path, config={"architectures": ["BertForMaskedLM"]}, tensors=masked)
    config, _ = pretrained.load_bert(path, num_classes=2, max_tokens=9)
    assert config.pooling == "mean"


def test_the_tensors_tell_the_head_where_the_config_does_not(tmp_path):
    path = copy("deit", tmp_path, config={"architectures": None})
    same(pretrained.load_vit(path), pretrained.load_vit(CHECKPOINTS / "deit"))


# Settings


def test_null_fields_have_their_default(tmp_path):
    path = copy("bert", tmp_path, config={"pad_token_id": None})
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace("{", '{"pad_token_id": null, ', 1))
    assert pretrained.load_bert(path, max_tokens=9)[0].pad_id == 0


def test_no_bias_of_query_key_and_value_is_a_bias_of_zero(tmp_path):
    def zero(tensors):
        return {k: v * (0 if is_qkv_bias(k) else 1) for k, v in tensors.items()}

    def drop(tensors):
        return {k: v for k, v in tensors.items() if not is_qkv_bias(k)}

    def is_qkv_bias(name):
        return "attention.attention" in name and name.endswith("bias")

    (tmp_path / "a").mkdir()
    path = copy("vit", tmp_path, config={"qkv_bias": False}, tensors=drop)
    same(pretrained.load_vit(path), pretrained.load_vit(copy("vit", tmp_path / "a", tensors=zero)))


def test_pixels_are_normalised_as_the_preprocessor_says(tmp_path):
    config, _ = pretrained.load_vit(CHECKPOINTS / "vit")
    assert config.pixel_mean == (0.48, 0.45, 0.41)
    assert config.pixel_std == (0.23, 0.22, 0.26)
    path = copy("vit", tmp_path, drop=["preprocessor_config.json"])
    config, _ = pretrained.load_vit(path)
    assert config.pixel_mean == config.pixel_std == (0.5, 0.5, 0.5)
    (path / "preprocessor_config.json").write_text('{"do_normalize": false}')
    config, _ = pretrained.load_vit(path)
    assert config.pixel_mean == config.pixel_std == ()


def test_images_need_not_be_square(tmp_path):
    # 16 x 16 pixels are 4 x 4 patches; as many are in 32 x 8.
    path = copy("vit", tmp_path, config={"image_size": [32, 8]})
    config, params = pretrained.load_vit(path)
    assert config.image_shape == (32, 8, 3)
    square = pretrained.load_vit(CHECKPOINTS / "vit")[1]
    chex.assert_trees_all_equal(params["position"], square["position"])
    assert pretrained.load_vit(path, image_size=16)[1]["position"].shape == (17, 20)


def test_positions_beyond_max_tokens_are_cut_off():
    long = pretrained.load_bert(CHECKPOINTS / "bert", max_tokens=16)[1]
    short = pretrained.load_bert(CHECKPOINTS / "bert", max_tokens=4)[1]
    chex.assert_trees_all_equal(short["position"], long["position"][:4])


def test_load_refuses_arguments_of_the_other_kind():
    with pytest.raises(PretrainedError, match="vit encoder, which has no max_tokens"):
        pretrained.load(CHECKPOINTS / "vit", max_tokens=9)
    with pytest.raises(PretrainedError, match="bert encoder, which has no image_size"):
        pretrained.load(CHECKPOINTS / "bert", image_size=32)
