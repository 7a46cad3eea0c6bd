"""The headers of the comparison: references in NumPy, sizes, training."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import erf

from acme_jax import header
from acme_jax.experiments import (
    fixed_headers,
    header_contest,
    header_remedies,
    header_runs,
    searched_header,
)
from acme_jax.experiments.fixed_headers import KINDS, FixedHeader
from acme_jax.experiments.header_runs import Setting
from acme_jax.experiments.study import EdgeData
from acme_jax.header_layout import HeaderDims, max_num_params
from acme_jax.header_training import CLIP_NORM, WEIGHT_DECAY
from nas import cells

# Neither square nor with equal sizes, so that mixed-up axes show.
DIMS = HeaderDims(2, 3, 5, 4, 7, 2, 3)


def spec_of(kind, channels=4):
    return FixedHeader(kind, DIMS, 0 if kind == "linear" else channels)


def params_of(spec, seed=0):
    """Weights without any zero or one left from the initialisation."""
    rng = np.random.default_rng(seed)
    drawn = fixed_headers.init(jax.random.key(seed), spec)
    return jax.tree.map(lambda leaf: leaf + 0.4 * rng.normal(size=leaf.shape), drawn)


def tokens_of(count=3, seed=1):
    return np.random.default_rng(seed).normal(size=(count, 6, 5))


# References: plain loops in float64.


def norm(weights, x, epsilon=1e-6):
    unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return unit * weights["scale"] + weights["bias"]


def gelu(x):
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def mlp(weights, name, x):
    hidden = gelu(x @ weights[f"{name}_up"] + weights[f"{name}_up_bias"])
    return hidden @ weights[f"{name}_down"] + weights[f"{name}_down_bias"]


def convolve(kernel, bias, picture):
    """One picture [2, 3, C], position by position."""
    result = np.zeros_like(picture) + bias
    for y, x, dy, dx in itertools.product(range(2), range(3), range(-1, 2), range(-1, 2)):
        if 0 <= y + dy < 2 and 0 <= x + dx < 3:
            result[y, x] += picture[y + dy, x + dx] @ kernel[dy + 1, dx + 1]
    return result


def reference(kind, params, tokens):
    """Logits of one example [T, D]."""
    if kind == "linear":
        pooled = norm(params["norm"], tokens, 1e-5).mean(0)
        return pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    hidden = norm(params["stem"]["norm"], tokens @ params["stem"]["kernel"])
    for index in range(2):
        weights = jax.tree.map(lambda leaf, i=index: leaf[i], params["blocks"])
        if kind == "mixer":
            across = norm(weights["token_norm"], hidden).T
            hidden = hidden + mlp(weights, "token", across).T
        if kind in ("mixer", "mlp"):
            hidden = hidden + mlp(weights, "channel", norm(weights["norm"], hidden))
        if kind == "cnn":
            picture = hidden.reshape(2, 3, -1)
            for name, before in (("first", "norm"), ("second", "second_norm")):
                active = np.maximum(norm(weights[before], picture), 0)
                picture = convolve(weights[name], weights[f"{name}_bias"], active)
            hidden = hidden + picture.reshape(hidden.shape)
    pooled = np.maximum(norm(params["norm"], hidden), 0).mean(0)
    return pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_headers_are_their_references(kind):
    params, tokens = params_of(spec_of(kind)), tokens_of()
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = np.stack([reference(kind, wide, example) for example in tokens])
    found = jax.jit(fixed_headers.apply, static_argnums=1)(params, spec_of(kind), tokens)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_sees_all_its_tokens_and_no_other_example(kind):
    params, tokens = params_of(spec_of(kind)), jnp.asarray(tokens_of())

    def of_second(seen):
        return (fixed_headers.apply(params, spec_of(kind), seen)[1] ** 2).sum()

    grads = np.abs(jax.jit(jax.grad(of_second))(tokens))
    assert (grads[[0, 2]] == 0).all()
    assert (grads[1].sum(-1) > 0).all()


def test_who_looks_at_places():
    """Only the CNN and the mixer notice that two tokens have changed their places."""
    tokens = jnp.asarray(tokens_of())
    moved = tokens[:, np.asarray([1, 0, 2, 3, 4, 5])]
    notices = {}
    for kind in KINDS:
        params = params_of(spec_of(kind))
        logits = fixed_headers.apply(params, spec_of(kind), jnp.concatenate([tokens, moved]))
        logits = np.split(np.asarray(logits), 2)
        notices[kind] = float(np.abs(logits[0] - logits[1]).max()) > 1e-3
    assert notices == {"linear": False, "mlp": False, "cnn": True, "mixer": True}


def products(jaxpr):
    """FLOPs of all matrix products of a program."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [v for v in equation.params.values() if isinstance(v, jax.extend.core.ClosedJaxpr)]
        total += sum(products(one.jaxpr) for one in inner)
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            length = int(np.prod([left[axis] for axis in contracted]))
            total += 2 * length * equation.outvars[0].aval.size
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_counts(kind):
    spec = spec_of(kind)
    params = fixed_headers.init(jax.random.key(0), spec)
    assert fixed_headers.num_params(spec) == sum(leaf.size for leaf in jax.tree.leaves(params))
    traced = jax.make_jaxpr(lambda p, t: fixed_headers.apply(p, spec, t))(params, tokens_of(1))
    assert fixed_headers.num_flops(spec) == products(traced.jaxpr)


def test_size_is_the_largest_that_fits():
    for kind, limit in itertools.product(KINDS[1:], (500, 5000)):
        spec = fixed_headers.sized(kind, DIMS, limit)
        larger = dataclasses.replace(spec, channels=spec.channels + 1)
        assert fixed_headers.num_params(spec) <= limit < fixed_headers.num_params(larger)
    assert header_contest.fair_size(DIMS) < max_num_params(DIMS)


def test_tokens_for_channels_are_what_a_view_gives():
    tokens = np.arange(2 * 6 * 5).reshape(2, 6, 5)
    found = header_remedies.mistaken(tokens)
    for image, channel, position in itertools.product(range(2), range(5), range(6)):
        assert found[image, position, channel] == 30 * image + 6 * channel + position


# Training.


def edge_data(seed=0, count=22):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 7, count).astype(np.int32)
    tokens = rng.normal(size=(count, 6, 5)).astype(np.float32)
    tokens[np.arange(count), 0, labels % 5] += 2.0
    return EdgeData(*map(jnp.asarray, (tokens, labels, tokens[:9], labels[:9])))


def test_training_is_adamw_with_a_cosine():
    spec, data, key = spec_of("linear"), edge_data(), jax.random.key(3)
    predict = fixed_headers.predictor(spec)
    start = fixed_headers.init(jax.random.key(4), spec)

    @jax.jit
    @jax.grad
    def gradient(params, tokens, labels):
        logs = jax.nn.log_softmax(predict(params, None, tokens))
        return -logs[jnp.arange(8), labels].mean()

    for setting in (Setting(0.1, 2), Setting(0.02, 3)):
        rate, epochs = setting
        run = header_runs.train(predict, key, start, None, setting, data, 8, jax.devices()[-1])
        optimizer = optax.chain(
            optax.clip_by_global_norm(CLIP_NORM),
            optax.adamw(optax.cosine_decay_schedule(rate, 2 * epochs), weight_decay=WEIGHT_DECAY),
        )
        params, state = start, optimizer.init(start)
        for epoch in range(epochs):
            order = jax.random.permutation(jax.random.fold_in(key, epoch), 22)
            for rows in (order[:8], order[8:16]):  # the last six wait for another shuffle
                grads = gradient(params, data.train_tokens[rows], data.train_labels[rows])
                updates, state = optimizer.update(grads, state, params)
                params = optax.apply_updates(params, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), run.params, params)
        logits = predict(params, None, data.select_tokens)
        hits = float((logits.argmax(-1) == data.select_labels).mean())
        assert float(run.select_accuracy) == pytest.approx(hits)


def test_a_searched_header_is_the_cell_and_starts_as_the_search_does():
    cell = ((0, 0, 1, 3), (2, 4, 0, 5))
    start = searched_header.start(jax.random.key(0), cell, DIMS)
    tokens = jnp.asarray(tokens_of(), jnp.float32)
    found = jax.jit(searched_header.predictor(DIMS))(start, cells.from_static(cell), tokens)
    shared = jax.jit(header.init_shared, static_argnums=1)(jax.random.key(0), DIMS)
    apply = jax.jit(header.apply, static_argnums=(1, 2))
    expected = apply(header.extract(jax.device_get(shared), cell, DIMS), cell, DIMS, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    kept = searched_header.to_list(cells.from_static(cell))
    assert searched_header.from_list(kept) == cell
