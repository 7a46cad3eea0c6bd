"""The supernet's three forms against a plain NumPy Transformer and against each other."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from acme_jax import supernet
from acme_jax.vit import ViTConfig
from nas.arch import ArchMask, to_mask

CONFIG, SPACE = tiny.CONFIG, tiny.SPACE
PARAMS = tiny.make_params()
PARAMS64 = tiny.to_float64(PARAMS)
IMAGES, LABELS = tiny.make_images()
INDICES = range(len(tiny.GENOMES))

full = jax.jit(lambda: supernet.apply(PARAMS, IMAGES, CONFIG))
masked = jax.jit(lambda mask: supernet.apply(PARAMS, IMAGES, CONFIG, mask))
by_arch = jax.jit(lambda arch: supernet.apply_arch(PARAMS, IMAGES, CONFIG, SPACE, arch))


@functools.cache
def reference(index):
    arch = tiny.GENOMES[index]
    layers = tiny.kept(CONFIG.num_layers, int(arch.depth))
    heads, neurons = np.asarray(arch.heads), np.asarray(arch.neurons)
    return layers, tiny.numpy_vit(PARAMS64, IMAGES, CONFIG, layers, heads, neurons)


def close(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol)


def test_full_network_equals_numpy():
    outputs = full()
    logits, inputs, final = tiny.numpy_vit(PARAMS64, IMAGES, CONFIG)
    assert np.abs(logits).max() > 0.1  # something to compare
    for actual, expected in zip(outputs, (logits, inputs, final), strict=True):
        assert actual.shape == expected.shape
        close(actual, expected)


@pytest.mark.parametrize("index", INDICES)
def test_masked_network_and_its_hidden_states_equal_numpy(index):
    layers, (logits, inputs, final) = reference(index)
    outputs = masked(to_mask(SPACE, tiny.GENOMES[index]))
    close(outputs.logits, logits)
    close(outputs.inputs[np.asarray(layers)], inputs)
    close(outputs.final, final)


@pytest.mark.parametrize("index", INDICES)
def test_dense_network_and_its_hidden_states_equal_numpy(index):
    layers, (logits, inputs, final) = reference(index)
    outputs = by_arch(tiny.GENOMES[index])
    close(outputs.logits, logits)
    close(outputs.inputs[np.asarray(layers)], inputs)
    close(outputs.final, final)


def test_the_compared_genomes_really_differ():
    logits = [reference(i)[1][0] for i in INDICES]
    for i in INDICES:
        for j in range(i):
            assert np.abs(logits[i] - logits[j]).max() > 1e-2


def test_dense_network_equals_masked_for_random_genomes():
    for arch in tiny.random_genomes(12, seed=3):
        jax.tree.map(close, by_arch(arch), masked(to_mask(SPACE, arch)))


@pytest.mark.parametrize(
    ("head_choices", "neuron_choices"),
    [((1, 1, 2, 4), (2, 2, 2, 8)), ((2, 4), (8,)), ((4,), (3, 8)), ((2, 3), (4, 6))],
)
def test_any_choices_will_do(head_choices, neuron_choices):
    """Repeated ones, single ones, ones without a common divisor or without the full size."""
    space = dataclasses.replace(SPACE, head_choices=head_choices, neuron_choices=neuron_choices)
    rng = np.random.default_rng(0)
    run = jax.jit(lambda a: supernet.apply_arch(PARAMS, IMAGES, CONFIG, space, a))
    for depth in (3, 4):
        arch = tiny.genome(depth, rng.choice(head_choices, 4), rng.choice(neuron_choices, 4))
        jax.tree.map(close, run(arch), masked(to_mask(space, arch)))


def test_a_dropped_block_hands_its_input_on_unchanged():
    mask = to_mask(SPACE, tiny.GENOMES[3])
    dropped = np.flatnonzero(mask.block == 0)
    assert list(dropped) == [1, 3]
    for outputs in (masked(mask), by_arch(tiny.GENOMES[3])):
        after = jnp.concatenate([outputs.inputs, outputs.final[None]])[1:]
        np.testing.assert_array_equal(after[dropped], outputs.inputs[dropped])


def test_full_mask_equals_no_mask():
    outputs = masked(to_mask(SPACE, tiny.GENOMES[0]))
    jax.tree.map(close, outputs, full())


def test_relaxed_head_mask_scales_the_heads():
    rng = np.random.default_rng(4)
    scale = rng.random((4, 4)).astype(np.float32)
    mask = ArchMask(jnp.ones(4), jnp.asarray(scale), jnp.ones((4, 8)))
    logits, _, _ = tiny.numpy_vit(PARAMS64, IMAGES, CONFIG, scale=scale.astype(np.float64))
    close(masked(mask).logits, logits)


def test_relaxed_block_and_neuron_masks_scale():
    rng = np.random.default_rng(5)
    neuron = rng.random((4, 8))
    mlp = PARAMS64["blocks"]["mlp"]
    scaled = {**mlp, "down_kernel": mlp["down_kernel"] * neuron[:, :, None]}
    params = {**PARAMS64, "blocks": {**PARAMS64["blocks"], "mlp": scaled}}
    expected = tiny.numpy_vit(params, IMAGES, CONFIG)[0]
    ones = jnp.ones((4, 4))
    close(masked(ArchMask(jnp.ones(4), ones, jnp.asarray(neuron, jnp.float32))).logits, expected)

    # A half-open last block goes half of the way.
    block = jnp.asarray([1.0, 1.0, 1.0, 0.5])
    half = masked(ArchMask(block, ones, jnp.ones((4, 8))))
    close(half.final, 0.5 * (full().inputs[3] + full().final))


def gradients(forward):
    def loss(params):
        outputs = forward(params)
        return jnp.sum(jnp.sin(outputs.logits)) + jnp.sum(jnp.cos(outputs.final))

    return jax.grad(loss)(PARAMS)["blocks"]


@jax.jit
def masked_gradients(mask):
    return gradients(lambda params: supernet.apply(params, IMAGES, CONFIG, mask))


@jax.jit
def dense_gradients(arch):
    return gradients(lambda params: supernet.apply_arch(params, IMAGES, CONFIG, SPACE, arch))


@pytest.mark.parametrize("index", INDICES)
def test_gradients_outside_the_mask_are_exactly_zero_and_inside_are_not(index):
    arch = tiny.GENOMES[index]
    grads = masked_gradients(to_mask(SPACE, arch))
    check_gradients(grads, arch)
    dense = dense_gradients(arch)
    check_gradients(dense, arch)
    tiny.assert_trees_close(dense, grads, atol=1e-4, rtol=1e-4)


def check_gradients(blocks, arch):
    layers = tiny.kept(CONFIG.num_layers, int(arch.depth))
    for layer in range(CONFIG.num_layers):
        attention, mlp = (
            jax.tree.map(lambda leaf: np.asarray(leaf[layer]), blocks[name])  # noqa: B023
            for name in ("attention", "mlp")
        )
        if layer not in layers:
            for leaf in jax.tree.leaves((attention, mlp)):
                np.testing.assert_array_equal(leaf, 0.0)
            continue
        heads, neurons = int(arch.heads[layer]), int(arch.neurons[layer])
        by_part = [
            (attention["qkv_kernel"].transpose(2, 0, 1, 3), heads),
            (attention["qkv_bias"].transpose(1, 0, 2), heads),
            (attention["out_kernel"], heads),
            (mlp["up_kernel"].T, neurons),
            (mlp["up_bias"], neurons),
            (mlp["down_kernel"], neurons),
        ]
        for leaf, size in by_part:
            np.testing.assert_array_equal(leaf[size:], 0.0)
            inside = leaf[:size].reshape(size, -1)
            assert np.all(np.abs(inside).max(axis=1) > 0)
        for leaf in (attention["out_bias"], mlp["down_bias"], mlp["norm"]["scale"]):
            assert np.all(leaf != 0)


def test_vmapped_masks_equal_a_loop():
    masks = jax.vmap(functools.partial(to_mask, SPACE))(tiny.stack(tiny.GENOMES))
    together = jax.jit(jax.vmap(lambda m: supernet.apply(PARAMS, IMAGES, CONFIG, m)))(masks)
    for index in INDICES:
        alone = masked(jax.tree.map(lambda leaf, i=index: leaf[i], masks))
        jax.tree.map(lambda a, b, i=index: close(a[i], b), together, alone)


def test_one_trace_serves_all_genomes():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def both(arch):
        dense = supernet.apply_arch(PARAMS, IMAGES, CONFIG, SPACE, arch).logits
        mask = to_mask(SPACE, arch)
        return dense, supernet.apply(PARAMS, IMAGES, CONFIG, mask).logits

    for arch in tiny.GENOMES:
        dense, wide = both(arch)
        close(dense, wide)


def num_equations(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"),
        ):
            inner = getattr(value, "jaxpr", value)
            total += num_equations(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("form", ["full", "masked", "arch", "gradient"])
def test_the_program_does_not_grow_with_depth(form):
    def size(num_layers):
        config = dataclasses.replace(CONFIG, num_layers=num_layers)
        space = dataclasses.replace(SPACE, num_layers=num_layers)
        params = jax.eval_shape(lambda: supernet.init(jax.random.key(0), config))
        arch = tiny.genome(2, [2] * num_layers, [4] * num_layers)
        mask = to_mask(space, arch)
        forms = {
            "full": lambda p: supernet.apply(p, IMAGES, config),
            "masked": lambda p: supernet.apply(p, IMAGES, config, mask),
            "arch": lambda p: supernet.apply_arch(p, IMAGES, config, space, arch),
            "gradient": jax.grad(
                lambda p: supernet.apply_arch(p, IMAGES, config, space, arch).logits.sum()
            ),
        }
        return num_equations(jax.make_jaxpr(forms[form])(params).jaxpr)

    small = size(4)
    assert small > 30  # the count looks into the scan
    assert size(12) == small


def test_init_draws_every_layer_anew_and_is_deterministic():
    params = supernet.init(jax.random.key(0), CONFIG)
    tiny.assert_trees_equal(params, supernet.init(jax.random.key(0), CONFIG))
    kernel = np.asarray(params["blocks"]["attention"]["qkv_kernel"])
    assert kernel.shape == (4, 8, 3, 4, 2)
    assert not np.array_equal(kernel[0], kernel[1])
    other = supernet.init(jax.random.key(1), CONFIG)
    assert not np.array_equal(kernel, other["blocks"]["attention"]["qkv_kernel"])
    for leaf in jax.tree.leaves(params):
        assert leaf.dtype == jnp.float32


def test_initial_matrices_keep_the_scale_of_their_inputs():
    """Variance 1 / fan-in, where the fan-in of the output projection is H x K."""
    config = ViTConfig((8, 8, 1), 4, 64, num_layers=3, num_heads=4, num_neurons=96, num_classes=3)
    blocks = supernet.init(jax.random.key(2), config)["blocks"]
    for leaf, fan_in in (
        (blocks["attention"]["qkv_kernel"], 64),
        (blocks["attention"]["out_kernel"], 64),
        (blocks["mlp"]["up_kernel"], 64),
        (blocks["mlp"]["down_kernel"], 96),
    ):
        np.testing.assert_allclose(np.std(leaf) * np.sqrt(fan_in), 1.0, rtol=0.05)


def test_examples_do_not_influence_each_other():
    alone = jax.jit(lambda images: supernet.apply(PARAMS, images, CONFIG))(IMAGES[1:2])
    together = full()
    close(alone.logits[0], together.logits[1])
    close(alone.final[0], together.final[1])
