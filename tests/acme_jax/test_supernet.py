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
from nas.arch import ArchMask, keep_mask, to_mask

CONFIG, SPACE = tiny.CONFIG, tiny.SPACE
PARAMS = tiny.make_params()
PARAMS64 = tiny.to_float64(PARAMS)
IMAGES, LABELS = tiny.make_images()
INDICES = range(len(tiny.GENOMES))

full = jax.jit(lambda: supernet.apply(PARAMS, IMAGES, CONFIG))
masked = jax.jit(lambda mask: supernet.apply(PARAMS, IMAGES, CONFIG, mask))
by_arch = jax.jit(lambda arch: supernet.apply_arch(PARAMS, IMAGES, CONFIG, SPACE, arch))
by_width = jax.jit(
    lambda heads, neurons, keep: supernet.apply_width(
        PARAMS, IMAGES, CONFIG, heads, neurons, keep
    ),
    static_argnums=(0, 1),
)


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
def test_dense_switched_network_equals_numpy(index):
    close(by_arch(tiny.GENOMES[index]), reference(index)[1][0])


def test_the_compared_genomes_really_differ():
    logits = [reference(i)[1][0] for i in INDICES]
    for i in INDICES:
        for j in range(i):
            assert np.abs(logits[i] - logits[j]).max() > 1e-2


def test_dense_switched_network_equals_masked_for_random_genomes():
    for arch in tiny.random_genomes(12, seed=3):
        close(by_arch(arch), masked(to_mask(SPACE, arch)).logits)


def test_repeated_choices_are_no_obstacle():
    """Small networks round several fractions to the same number."""
    space = dataclasses.replace(SPACE, head_choices=(1, 1, 2, 4), neuron_choices=(2, 2, 2, 8))
    arch = tiny.genome(3, [1, 2, 4, 4], [2, 8, 2, 8])
    logits = jax.jit(lambda a: supernet.apply_arch(PARAMS, IMAGES, CONFIG, space, a))(arch)
    close(logits, masked(to_mask(space, arch)).logits)


@pytest.mark.parametrize(("heads", "neurons"), tiny.WIDTHS)
@pytest.mark.parametrize("depth", [4, 3, 1])
def test_training_form_equals_masked(heads, neurons, depth):
    mask = to_mask(SPACE, tiny.genome(depth, [heads] * 4, [neurons] * 4))
    expected = masked(mask)
    actual = by_width(heads, neurons, mask.block > 0)
    jax.tree.map(close, actual, expected)


def test_a_dropped_block_hands_its_input_on_unchanged():
    mask = to_mask(SPACE, tiny.GENOMES[3])
    dropped = np.flatnonzero(mask.block == 0)
    assert list(dropped) == [1, 3]
    for outputs in (masked(mask), by_width(4, 8, mask.block > 0)):
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


@jax.jit
def gradients(mask):
    def loss(params):
        outputs = supernet.apply(params, IMAGES, CONFIG, mask)
        return jnp.sum(jnp.sin(outputs.logits)) + jnp.sum(jnp.cos(outputs.final))

    return jax.grad(loss)(PARAMS)


@pytest.mark.parametrize("index", INDICES)
def test_gradients_outside_the_mask_are_exactly_zero_and_inside_are_not(index):
    arch = tiny.GENOMES[index]
    check_gradients(gradients(to_mask(SPACE, arch))["blocks"], arch)


def test_gradients_of_the_training_form_stay_inside_its_sub_network():
    arch = tiny.genome(2, [3] * 4, [6] * 4)
    keep = keep_mask(4, arch.depth) > 0

    def loss(params):
        outputs = supernet.apply_width(params, IMAGES, CONFIG, 3, 6, keep)
        return jnp.sum(jnp.sin(outputs.logits)) + jnp.sum(jnp.cos(outputs.final))

    grads = jax.jit(jax.grad(loss))(PARAMS)["blocks"]
    check_gradients(grads, arch)
    tiny.assert_trees_close(
        grads, gradients(to_mask(SPACE, arch))["blocks"], atol=1e-4, rtol=1e-4
    )


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
        jax.tree.map(
            lambda a, b, i=index: close(a[i], b), together, alone
        )


def test_one_trace_serves_all_genomes():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def both(arch):
        dense = supernet.apply_arch(PARAMS, IMAGES, CONFIG, SPACE, arch)
        mask = to_mask(SPACE, arch)
        return dense, supernet.apply(PARAMS, IMAGES, CONFIG, mask).logits

    for arch in tiny.GENOMES:
        dense, wide = both(arch)
        close(dense, wide)


def test_one_trace_of_the_training_form_serves_all_depths():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(keep):
        return supernet.apply_width(PARAMS, IMAGES, CONFIG, 2, 4, keep).logits

    results = [np.asarray(run(keep_mask(4, jnp.int32(d)) > 0)) for d in (1, 2, 3, 4)]
    assert len({r.tobytes() for r in results}) == 4


def num_equations(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        total += 1
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            total += num_equations(inner) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("form", ["full", "masked", "arch", "width", "gradient"])
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
            "width": lambda p: supernet.apply_width(p, IMAGES, config, 2, 4, mask.block > 0),
            "gradient": jax.grad(lambda p: supernet.apply(p, IMAGES, config, mask).logits.sum()),
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
