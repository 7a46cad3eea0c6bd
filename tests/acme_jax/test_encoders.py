"""Text encoders, DeiT's prefix tokens and prepared images in every form of the supernet."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import erf

from acme_jax import cloud, encoders, slicing, supernet
from acme_jax.bert import BertConfig
from acme_jax.vit import ViTConfig, prepare
from nas import cost
from nas.arch import to_mask

BERT = BertConfig(
    vocab_size=19, max_tokens=7, embed_dim=8, num_layers=4, num_heads=4, num_neurons=8,
    num_classes=3,
)  # fmt: skip
POOLED = dataclasses.replace(BERT, pooling="cls")
DEIT = dataclasses.replace(tiny.CONFIG, num_prefix_tokens=2, norm_epsilon=1e-12)
SPACE = tiny.SPACE
IDS = np.array([[2, 5, 18, 3, 0, 0, 0], [2, 7, 7, 9, 4, 11, 3], [2, 3, 0, 0, 0, 0, 0]], np.int32)


def params_of(config):
    return tiny.make_params(config)


def inputs_of(config):
    return jnp.asarray(IDS) if isinstance(config, BertConfig) else tiny.make_images(3)[0]


def numpy_bert(params, ids, config, layers, heads, neurons):
    """Post-LN forward pass by plain loops in float64, one text at a time without its padding."""

    def norm(x, weights):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_epsilon)
        return centred / deviation * weights["scale"] + weights["bias"]

    logits, finals = [], []
    for row in ids:
        words = [t for t in row if t != config.pad_id]
        x = params["embed"]["word"][words] + params["position"][: len(words)]
        x = norm(x, params["embed"]["norm"])
        for layer in layers:
            attention, mlp = (
                jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"][half])
                for half in ("attention", "mlp")
            )
            total = x + attention["out_bias"]
            for head in range(heads[layer]):
                query, key, value = (
                    x @ attention["qkv_kernel"][:, i, head] + attention["qkv_bias"][i, head]
                    for i in range(3)
                )
                scores = query @ key.T / np.sqrt(config.embed_dim / config.num_heads)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                total = total + weights @ value @ attention["out_kernel"][head]
            x = norm(total, attention["norm"])
            width = neurons[layer]
            hidden = x @ mlp["up_kernel"][:, :width] + mlp["up_bias"][:width]
            hidden = 0.5 * hidden * (1 + erf(hidden / np.sqrt(2)))
            x = norm(x + hidden @ mlp["down_kernel"][:width] + mlp["down_bias"], mlp["norm"])
        pooled = x.mean(0)
        if config.pooling == "cls":
            pooled = np.tanh(x[0] @ params["pooler"]["kernel"] + params["pooler"]["bias"])
        logits.append(pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"])
        finals.append(x)
    return np.stack(logits), finals


@pytest.mark.parametrize("config", [BERT, POOLED], ids=["mean", "cls"])
@pytest.mark.parametrize("index", range(len(tiny.GENOMES)))
def test_a_text_encoder_equals_numpy_masked_dense_and_sliced(config, index):
    params, arch = params_of(config), tiny.GENOMES[index]
    layers = tiny.kept(4, int(arch.depth))
    heads, neurons = np.asarray(arch.heads), np.asarray(arch.neurons)
    expected, finals = numpy_bert(tiny.to_float64(params), IDS, config, layers, heads, neurons)
    sliced = slicing.slice_params(params, arch)
    for outputs in (
        supernet.apply(params, jnp.asarray(IDS), config, to_mask(SPACE, arch)),
        supernet.apply_arch(params, jnp.asarray(IDS), config, SPACE, arch),
        slicing.apply(sliced, jnp.asarray(IDS), config),
    ):
        np.testing.assert_allclose(outputs.logits, expected, atol=2e-5, rtol=1e-5)
        for row, final in enumerate(finals):
            np.testing.assert_allclose(outputs.final[row, : len(final)], final, atol=2e-5)


@pytest.mark.parametrize("config", [BERT, DEIT], ids=["bert", "deit"])
@pytest.mark.parametrize("width", [(1, 2), (3, 6)])
def test_the_training_form_equals_the_masked_one(config, width):
    params, inputs = params_of(config), inputs_of(config)
    heads, neurons = width
    keep = np.array([True, False, True, False])
    arch = tiny.genome(2, [heads] * 4, [neurons] * 4)
    trained = supernet.apply_width(params, inputs, config, heads, neurons, jnp.asarray(keep))
    masked = supernet.apply(params, inputs, config, to_mask(SPACE, arch))
    np.testing.assert_allclose(trained.logits, masked.logits, atol=1e-5)
    again = supernet.apply_width(
        params, inputs, dataclasses.replace(config, remat=True), heads, neurons, jnp.asarray(keep)
    )
    np.testing.assert_array_equal(trained.logits, again.logits)


@pytest.mark.parametrize("config", [BERT, DEIT], ids=["bert", "deit"])
def test_gradients_outside_of_the_mask_are_zero_and_rematerialising_keeps_them(config):
    params, inputs, arch = params_of(config), inputs_of(config), tiny.GENOMES[3]

    def grads(config):
        def loss(params):
            logits = supernet.apply(params, inputs, config, to_mask(SPACE, arch)).logits
            return jnp.square(logits).sum()

        return jax.grad(loss)(params)

    plain, again = grads(config), grads(dataclasses.replace(config, remat=True))
    tiny.assert_trees_close(plain, again, atol=1e-5, rtol=1e-4)
    blocks = plain["blocks"]
    assert np.all(np.asarray(blocks["attention"]["out_kernel"])[1] == 0)  # a dropped block
    assert np.all(np.asarray(blocks["mlp"]["up_kernel"])[0, :, 6:] == 0)  # dropped neurons
    assert np.any(np.asarray(blocks["mlp"]["up_kernel"])[0, :, :6] != 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(plain))


def test_what_stands_in_the_padding_changes_nothing():
    """But for the pad id itself: what it embeds as may be anything."""
    params = params_of(BERT)
    other = dict(params)
    word = np.array(params["embed"]["word"])
    word[BERT.pad_id] = 9.0
    other["embed"] = {**params["embed"], "word": jnp.asarray(word)}
    before, after = (supernet.apply(p, jnp.asarray(IDS), BERT) for p in (params, other))
    np.testing.assert_allclose(before.logits, after.logits, atol=1e-6)
    tokens, same = (
        encoders.header_tokens(o.final, jnp.asarray(IDS), BERT) for o in (before, after)
    )
    np.testing.assert_allclose(tokens, same, atol=1e-6)
    assert np.all(np.asarray(tokens)[2, 1:] == 0) and np.any(np.asarray(tokens)[2, 0] != 0)
    longer = dataclasses.replace(BERT, max_tokens=9)
    padded = np.pad(IDS, ((0, 0), (0, 2)))
    wide = {**params, "position": jnp.pad(params["position"], ((0, 2), (0, 0)))}
    np.testing.assert_allclose(
        supernet.apply(wide, jnp.asarray(padded), longer).logits, before.logits, atol=1e-5
    )


@pytest.mark.parametrize("config", [BERT, DEIT], ids=["bert", "deit"])
def test_reordering_leaves_the_logits_and_sorts_by_importance(config):
    params = params_of(config)
    inputs = jnp.concatenate([inputs_of(config)] * 4)
    labels = jnp.arange(12) % 3
    order = cloud.measure_importance(params, inputs, labels, config, batch_size=4)
    assert not np.array_equal(order.heads, np.tile(np.arange(4), (4, 1)))
    reordered = cloud.reorder(params, order)
    before, after = (supernet.apply(p, inputs, config).logits for p in (params, reordered))
    np.testing.assert_allclose(before, after, atol=1e-5)
    again = cloud.measure_importance(reordered, inputs, labels, config, batch_size=4)
    np.testing.assert_array_equal(again.heads, np.tile(np.arange(4), (4, 1)))


@pytest.mark.parametrize("config", [BERT, DEIT, tiny.CONFIG], ids=["bert", "deit", "vit"])
@pytest.mark.parametrize("index", range(len(tiny.GENOMES)))
def test_costs_count_what_is_sliced(config, index):
    params, arch = params_of(config), tiny.GENOMES[index]
    sliced = slicing.slice_params(params, arch)
    assert int(cost.num_params(config.dims, arch)) == tiny.count(sliced)
    jaxpr = jax.make_jaxpr(lambda p, x: slicing.final_state(p, x, config))(
        sliced, inputs_of(config)[:1]
    )
    flops = _dot_flops(jaxpr.jaxpr)
    prefix = 0 if isinstance(config, BertConfig) else config.num_prefix_tokens
    empty = 2.0 * prefix * config.dims.patch_dim * config.embed_dim  # patches of prefix tokens
    dims = dataclasses.replace(config.dims, num_classes=0)
    assert float(cost.num_flops(dims, arch)) == flops - empty


def _dot_flops(jaxpr):
    """FLOPs of every matrix product, those in inner programs included."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = np.prod([left[axis] for axis in contracted])
            total += 2.0 * size * np.prod(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += _dot_flops(inner)
    return total


def test_bytes_resized_grey_and_normalised_images_equal_numpy():
    config = ViTConfig(
        (8, 12, 3), 4, 8, 1, 2, 8, 3, source_shape=(4, 6, 1), pixel_mean=(0.5, 0.4, 0.3),
        pixel_std=(0.2, 0.3, 0.4),
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 1), np.uint8)
    made = np.asarray(prepare(jnp.asarray(pixels), config))
    assert made.shape == (2, 8, 12, 3) and config.input_shape == (4, 6, 1)

    def matrix(source, target):  # half-pixel centres, as in PyTorch's align_corners=False
        places = (np.arange(target) + 0.5) * source / target - 0.5
        weights = np.maximum(1 - np.abs(places[:, None] - np.arange(source)[None]), 0)
        return weights / weights.sum(1, keepdims=True)

    plain = pixels[..., 0].astype(np.float64) / 255
    resized = np.einsum("yi,bij,xj->byx", matrix(4, 8), plain, matrix(6, 12))
    expected = (resized[..., None] - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    np.testing.assert_allclose(made, expected, atol=1e-5)
    floats = prepare(jnp.asarray(pixels, jnp.float32) / 255, config)
    np.testing.assert_allclose(made, floats, atol=1e-6)


@pytest.mark.parametrize("config", [BERT, tiny.CONFIG], ids=["bert", "vit"])
def test_bfloat16_stays_near_and_gives_float32_logits_and_gradients(config):
    params, inputs = params_of(config), inputs_of(config)
    half = dataclasses.replace(config, dtype="bfloat16")
    mask = to_mask(SPACE, tiny.GENOMES[1])
    exact, rough = (supernet.apply(params, inputs, c, mask) for c in (config, half))
    assert rough.logits.dtype == jnp.float32 and rough.final.dtype == jnp.bfloat16
    np.testing.assert_allclose(exact.logits, rough.logits, atol=0.15)
    grads = jax.grad(lambda p: supernet.apply(p, inputs, half, mask).logits.sum())(params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("config", [BERT, POOLED, DEIT])
def test_a_description_survives_json(config):
    assert encoders.from_dict(json.loads(json.dumps(encoders.to_dict(config)))) == config


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"kind": "gpt"}, "unknown encoder kind 'gpt'; expected one of vit, bert"),
        ({"kind": "bert", "depth": 3}, "not the description of a bert encoder"),
    ],
)
def test_a_description_of_something_else_is_refused(plain, message):
    with pytest.raises(ValueError, match=message):
        encoders.from_dict(plain)
