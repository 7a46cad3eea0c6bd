"""Distillation losses in NumPy float64, and the summed gradient against masked networks."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from acme_jax import distill, supernet
from acme_jax.config import TrainConfig
from nas.arch import to_mask

CONFIG, SPACE = tiny.CONFIG, tiny.SPACE
PARAMS, TEACHER = tiny.make_params(seed=0), tiny.make_params(seed=1)
IMAGES, LABELS = tiny.make_images(4)
TRAIN = TrainConfig(logit_loss=0.7, hidden_loss=0.3)
KEY = jax.random.key(0)


def close(actual, expected, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def test_soft_cross_entropy_equals_numpy():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(scale=4, size=(2, 6, 5)).astype(np.float32)
    probabilities = np.exp(tiny.log_softmax(teacher))
    expected = -(probabilities * tiny.log_softmax(student)).sum(axis=1).mean()
    close(distill.soft_cross_entropy(student, teacher), expected)


def test_soft_cross_entropy_is_least_where_the_distributions_agree():
    rng = np.random.default_rng(1)
    teacher = rng.normal(size=(6, 5)).astype(np.float32)
    grad = jax.grad(distill.soft_cross_entropy)(jnp.asarray(teacher), teacher)
    close(grad, 0.0, atol=1e-7)
    shifted = teacher + rng.normal(size=(6, 1)).astype(np.float32)
    least = distill.soft_cross_entropy(teacher, teacher)
    close(distill.soft_cross_entropy(shifted, teacher), least)
    other = rng.normal(size=(6, 5)).astype(np.float32)
    assert distill.soft_cross_entropy(other, teacher) > least + 0.1


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_hidden_state_loss_compares_equal_indices_and_the_final_states(depth):
    rng = np.random.default_rng(2)
    inputs = rng.normal(size=(2, 4, 3, 5, 8)).astype(np.float32)
    final = rng.normal(size=(2, 3, 5, 8)).astype(np.float32)
    logits = np.zeros((3, 3), np.float32)
    student, teacher = (supernet.Outputs(logits, inputs[i], final[i]) for i in range(2))
    kept = tiny.kept(4, depth)
    expected = ((final[0].astype(np.float64) - final[1]) ** 2).mean()
    for layer in kept:
        expected += ((inputs[0, layer].astype(np.float64) - inputs[1, layer]) ** 2).mean()
    keep = jnp.asarray([layer in kept for layer in range(4)])
    close(distill.hidden_state_loss(student, teacher, keep), expected)


def test_reference_gradient_is_the_smoothed_cross_entropys():
    metrics, grads = jax.jit(distill.reference_grad(CONFIG))(KEY, PARAMS, None, IMAGES, LABELS)
    params64 = tiny.to_float64(PARAMS)
    targets = 0.9 * np.eye(3)[np.asarray(LABELS)] + 0.1 / 3

    def loss(params):
        logits = tiny.numpy_vit(params, IMAGES, CONFIG)[0]
        return -(targets * tiny.log_softmax(logits)).sum(axis=1).mean()

    close(metrics["loss"], loss(params64))
    logits = tiny.numpy_vit(params64, IMAGES, CONFIG)[0]
    close(metrics["accuracy"], (logits.argmax(-1) == np.asarray(LABELS)).mean())
    for path in (("embed", "bias"), ("cls",), ("blocks", "mlp", "up_bias")):
        leaf, grad = params64, grads
        for name in path:
            leaf, grad = leaf[name], grad[name]
        index = tuple(size // 2 for size in leaf.shape)
        kept = leaf[index]
        values = []
        for step in (1e-5, -1e-5):
            leaf[index] = kept + step
            values.append(loss(params64))
        leaf[index] = kept
        close(grad[index], (values[0] - values[1]) / 2e-5, rtol=1e-4, atol=1e-6)


@jax.jit
def masked_gradient(mask, teacher_mask):
    """Loss and gradient of one sub-network, all at full size with masks."""

    def loss_fn(params):
        student = supernet.apply(params, IMAGES, CONFIG, mask)
        teacher = supernet.apply(TEACHER, IMAGES, CONFIG, teacher_mask)
        log_probs = jax.nn.log_softmax(student.logits)
        soft = -(jax.nn.softmax(teacher.logits) * log_probs).sum(-1).mean()
        hidden = ((student.final - teacher.final) ** 2).mean()
        for layer in range(CONFIG.num_layers):
            distance = ((student.inputs[layer] - teacher.inputs[layer]) ** 2).mean()
            hidden += mask.block[layer] * distance
        return TRAIN.logit_loss * soft + TRAIN.hidden_loss * hidden

    return jax.value_and_grad(loss_fn)(PARAMS)


def sub_mask(heads, neurons, depth):
    return to_mask(tiny.SPACE, tiny.genome(depth, [heads] * 4, [neurons] * 4))


@functools.cache
def single(width, depth, same_width=True):
    """Loss and gradient at a width (heads, neurons) and a depth."""
    teacher = sub_mask(*width, 4) if same_width else sub_mask(4, 8, 4)
    loss, grads = masked_gradient(sub_mask(*width, depth), teacher)
    return float(loss), jax.tree.map(np.asarray, grads)


def total(pairs, same_width=True):
    """Mean loss and summed gradient of (width, depth) pairs."""
    results = [single(width, depth, same_width) for width, depth in pairs]
    losses, grads = zip(*results, strict=True)
    return np.mean(losses), jax.tree.map(lambda *leaves: sum(leaves), *grads)


WIDTH = distill.width_lesson(SPACE, TEACHER, TRAIN)
DEPTH = distill.depth_lesson(SPACE, TEACHER, TRAIN)


@functools.cache
def make(depths_per_step):
    """Jitted; one program for both lessons."""
    grad_fn = distill.distillation_grad(CONFIG, SPACE, depths_per_step)
    return jax.jit(chex.assert_max_traces(grad_fn, n=1))


def assert_gradients_close(actual, expected):
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    tiny.assert_trees_close(actual, expected, rtol=1e-4, atol=1e-5 * scale)


def test_width_phase_sums_all_widths_at_full_depth_under_the_full_teacher():
    metrics, grads = make(1)(KEY, PARAMS, WIDTH, IMAGES, LABELS)
    loss, expected = total([(width, 4) for width in SPACE.widths], same_width=False)
    close(metrics["loss"], loss)
    assert_gradients_close(grads, expected)


def test_depth_phase_sums_all_sub_networks_under_the_teacher_of_their_width():
    metrics, grads = make(4)(KEY, PARAMS, DEPTH, IMAGES, LABELS)
    loss, expected = total(itertools.product(SPACE.widths, SPACE.depth_choices))
    close(metrics["loss"], loss)
    assert_gradients_close(grads, expected)


def test_both_lessons_run_the_same_program():
    """`make` allows one trace."""
    losses = [make(1)(KEY, PARAMS, lesson, IMAGES, LABELS)[0]["loss"] for lesson in (WIDTH, DEPTH)]
    assert losses[0] != losses[1]


def test_fewer_depths_draw_latin_assignments_that_are_fair_in_the_long_run():
    """Every step trains each width once, all depths take part, and all pairs equally often.

    The expected gradient is then that of all sub-networks, divided by the number of depths.
    """
    num = 200
    results = [
        make(1)(key, PARAMS, DEPTH, IMAGES, LABELS)
        for key in jax.random.split(jax.random.key(5), num)
    ]
    losses = [metrics["loss"] for metrics, _ in results]
    grads = np.stack([tree["position"] for _, tree in results])

    assignments = list(itertools.product(SPACE.depth_choices, repeat=4))
    pairs = [list(zip(SPACE.widths, depths, strict=True)) for depths in assignments]
    sums = np.stack([sum(single(*pair)[1]["position"] for pair in four) for four in pairs])
    distance = np.abs(grads[:, None] - sums[None]).max(axis=(2, 3))  # [num, assignments]
    found = distance.argmin(axis=1)
    assert distance.min(axis=1).max() < 1e-4 * np.abs(sums).max()
    assert np.sort(distance, axis=1)[:, 1].min() > 1e-3 * np.abs(sums).max()  # no confusion
    count = dict.fromkeys(itertools.product(SPACE.widths, SPACE.depth_choices), 0)
    for index, loss in zip(found, losses, strict=True):
        assert sorted(assignments[index]) == [1, 2, 3, 4]
        close(loss, total(pairs[index])[0], rtol=1e-4)
        for pair in pairs[index]:
            count[pair] += 1
    # 50 each are expected, with a standard deviation of about 6.
    assert all(abs(value - num / 4) < 30 for value in count.values())


def test_a_student_equal_to_its_teacher_stays_where_it_is():
    space = dataclasses.replace(SPACE, depth_choices=(4,), head_choices=(4,), neuron_choices=(8,))
    grad_fn = jax.jit(distill.distillation_grad(CONFIG, space, 1))
    lesson = distill.depth_lesson(space, PARAMS, TRAIN)
    _, grads = grad_fn(KEY, PARAMS, lesson, IMAGES, LABELS)
    for leaf in jax.tree.leaves(grads):
        close(leaf, 0.0, atol=1e-6)
