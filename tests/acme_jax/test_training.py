"""Epochs against a plain NumPy optimiser, on one and two devices; augmentation; errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from acme_jax import augmentation, distill, layout, training
from acme_jax.config import ConfigError, TrainConfig

CONFIG = TrainConfig(
    epochs=3,
    batch_size=6,
    learning_rate=0.02,
    weight_decay=0.1,
    clip_norm=0.5,
    warmup_fraction=0.0,
    max_shift=0,
    shards=2,
)
NUM = 24
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(NUM, 2, 2, 1)), jnp.float32)
SEEN = jnp.arange(NUM, dtype=jnp.int32)  # as labels: which samples a batch holds
KEY = jax.random.key(3)
AS_RELEASED = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else None
"""How a run compiles. The tests' own quick way rounds by the number of devices."""


def linear_grad(key, params, lesson, images, labels):
    """Mean square error of a linear model; reports which samples were seen."""
    del key, lesson

    def loss_fn(params):
        outputs = images.reshape(images.shape[0], -1) @ params["w"]
        return jnp.mean((outputs - targets(labels)) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    return {"loss": loss, "seen": jnp.bincount(labels, length=NUM)}, grads


def targets(labels):
    return labels.astype(jnp.float32) / NUM


START = {"w": jnp.asarray([0.5, -1.0, 2.0, 0.3])}


@functools.cache  # compiling an epoch takes seconds
def make(config=CONFIG, grad_fn=linear_grad, num_devices=1):
    return jax.jit(
        training.make_epoch(grad_fn, config, layout.make_mesh(num_devices)),
        compiler_options=AS_RELEASED,
    )


def start_state(config, start, num_devices=1):
    state = training.init_state(start, training.make_optimizer(config))
    return layout.replicate(state, layout.make_mesh(num_devices))


def run(config=CONFIG, grad_fn=linear_grad, num_devices=1, epochs=1, start=START, data=None):
    """The states after every epoch, and the metrics of each."""
    images, labels = (IMAGES, SEEN) if data is None else data
    epoch = make(config, grad_fn, num_devices)
    schedule = training.make_schedule(config, images.shape[0])
    state, states, history = start_state(config, start, num_devices), [], []
    for _ in range(epochs):
        state, metrics = epoch(KEY, state, None, schedule, images, labels)
        states.append(jax.tree.map(np.asarray, state))
        history.append(jax.tree.map(np.asarray, metrics))
    return states, history


def test_full_batch_steps_equal_adamw_in_numpy():
    """Clipping by global norm, decoupled decay, bias correction and the linear schedule."""
    config = dataclasses.replace(CONFIG, batch_size=NUM, epochs=5, warmup_fraction=0.4)
    states, history = run(config, epochs=5)
    x = np.asarray(IMAGES, np.float64).reshape(NUM, -1)
    y = np.arange(NUM) / NUM
    w, first, second, losses = np.asarray(START["w"], np.float64), 0.0, 0.0, []
    for step, rate in enumerate(0.02 * np.array([0, 1 / 2, 1, 2 / 3, 1 / 3])):
        error = x @ w - y
        losses.append((error**2).mean())
        grad = 2 * x.T @ error / NUM
        grad *= min(1.0, config.clip_norm / np.linalg.norm(grad))
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        update = first / (1 - 0.9 ** (step + 1))
        update /= np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
        w = w - rate * (update + config.weight_decay * w)
    np.testing.assert_allclose(states[-1].params["w"], w, rtol=1e-5)
    np.testing.assert_allclose([h["loss"][0] for h in history], losses, rtol=1e-5)
    assert int(states[-1].epoch) == 5


@pytest.mark.parametrize("batch_size", [6, 10])
def test_an_epoch_visits_every_sample_once_in_a_new_order(batch_size):
    config = dataclasses.replace(CONFIG, batch_size=batch_size)
    _, history = run(config, epochs=3)
    steps = NUM // batch_size
    orders = []
    for metrics in history:
        seen = metrics["seen"] * config.shards  # the metric is a mean over the parts
        assert seen.shape == (steps, NUM)
        np.testing.assert_array_equal(seen.sum(axis=1), batch_size)
        assert seen.sum(axis=0).max() == 1  # never twice; a remainder is left out
        orders.append(seen.tobytes())
    assert len(set(orders)) == 3


def test_the_epoch_number_and_not_the_call_decides_the_order():
    """So a resumed run goes on as the uninterrupted one did."""
    states, history = run(epochs=2)
    saved = layout.replicate(states[0], layout.make_mesh(1))
    schedule = training.make_schedule(CONFIG, NUM)
    state, metrics = make()(KEY, saved, None, schedule, IMAGES, SEEN)
    tiny.assert_trees_equal(jax.tree.map(np.asarray, state), states[1])
    tiny.assert_trees_equal(jax.tree.map(np.asarray, metrics), history[1])


def test_learning_rate_reaches_zero_at_the_end():
    states, _ = run(epochs=4)  # one more than planned
    before, last, further = (state.params["w"] for state in states[1:])
    assert not np.array_equal(before, last)
    np.testing.assert_array_equal(further, last)


def test_phases_share_a_program_and_differ_by_their_schedules():
    """The schedule is an argument: none of its numbers is compiled in."""
    states, _ = run(epochs=2)
    other = dataclasses.replace(
        CONFIG, learning_rate=0.05, weight_decay=0.7, epochs=9, warmup_fraction=0.3
    )
    expected, _ = run(other, epochs=2)
    state, schedule = start_state(CONFIG, START), training.make_schedule(other, NUM)
    for _ in range(2):
        state, _ = make()(KEY, state, None, schedule, IMAGES, SEEN)
    tiny.assert_trees_equal(jax.tree.map(np.asarray, state), expected[-1])
    assert not np.allclose(expected[-1].params["w"], states[-1].params["w"], rtol=1e-2)


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.25])
def test_learning_rate_rises_falls_and_stays_at_zero(warmup_fraction):
    config = dataclasses.replace(CONFIG, epochs=5, warmup_fraction=warmup_fraction)
    schedule = training.make_schedule(config, NUM)
    total = 5 * NUM // config.batch_size
    warmup = int(warmup_fraction * total)
    rates = np.asarray(training.learning_rate(schedule, jnp.arange(total + 3)))
    np.testing.assert_allclose(
        rates,
        np.interp(np.arange(total + 3), [0, warmup, total], [0, 0.02, 0])
        if warmup
        else np.interp(np.arange(total + 3), [0, total], [0.02, 0]),
        rtol=1e-5,
        atol=1e-9,
    )


VIT_CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=2)
VIT_TRAIN = TrainConfig(
    epochs=20,
    batch_size=8,
    learning_rate=1e-2,
    weight_decay=0.01,
    warmup_fraction=0.1,
    max_shift=1,
    shards=2,
)


@functools.cache
def vit_data():
    """Each class has one bright patch."""
    labels = np.arange(32) % 3
    images = 0.3 * np.random.default_rng(0).random((32, *VIT_CONFIG.image_shape))
    for image, label in zip(images, labels, strict=True):
        image[1:3, 4 * label + 1 : 4 * label + 3] += 2.0
    return jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)


@functools.cache
def vit_run(num_devices):
    return run(
        VIT_TRAIN,
        distill.reference_grad(VIT_CONFIG),
        num_devices,
        epochs=VIT_TRAIN.epochs,
        start=tiny.make_params(VIT_CONFIG, scale=0.05),
        data=vit_data(),
    )


def test_a_transformer_learns():
    _, history = vit_run(1)
    losses = [h["loss"].mean() for h in history]
    accuracies = [h["accuracy"].mean() for h in history]
    assert losses[-1] < 0.8 * losses[0]  # smoothed labels keep it well above zero
    assert accuracies[0] < 0.7 < 0.9 < accuracies[-1]


def test_result_does_not_depend_on_the_number_of_devices():
    tiny.assert_trees_equal(vit_run(1), vit_run(2))


def test_number_of_shards_changes_rounding_only():
    """Means over parts of equal size are the mean over the batch."""
    expected = run(epochs=3)[0][-1].params["w"]
    config = dataclasses.replace(CONFIG, shards=3)
    actual = run(config, epochs=3, num_devices=2)[0][-1].params["w"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_all_parts_of_a_batch_get_the_same_key_and_every_step_another():
    def grad_fn(key, params, lesson, images, labels):
        del lesson, images, labels
        draw = jax.random.uniform(key)
        return {"draw": draw, "square": draw**2}, jax.tree.map(jnp.zeros_like, params)

    _, history = run(grad_fn=grad_fn, epochs=2)
    draws = np.concatenate([h["draw"] for h in history])
    squares = np.concatenate([h["square"] for h in history])
    np.testing.assert_allclose(squares, draws**2, rtol=1e-6)  # no variance between parts
    assert len(np.unique(draws)) == 2 * NUM // CONFIG.batch_size


def test_too_few_images_for_a_batch_are_refused():
    with pytest.raises(ConfigError, match="batch_size is 6, but there are only 5 training"):
        training.steps_per_epoch(5, CONFIG)
    assert training.steps_per_epoch(6, CONFIG) == 1
    assert training.steps_per_epoch(17, CONFIG) == 2


def test_a_batch_that_the_shards_do_not_divide_is_refused():
    config = dataclasses.replace(CONFIG, batch_size=7)
    with pytest.raises(ConfigError, match=r"batch_size \(7\) must be a multiple of shards \(2\)"):
        training.make_schedule(config, NUM)


shift = jax.jit(augmentation.random_shift, static_argnums=2)


def test_no_shift_is_the_identity():
    images, _ = tiny.make_images(4)
    np.testing.assert_array_equal(shift(KEY, images, 0), images)


def test_a_shift_moves_whole_images_and_fills_with_zeros():
    images, _ = tiny.make_images(60)
    moved = np.asarray(shift(KEY, images, 2))
    offsets = set()
    for before, after in zip(np.asarray(images), moved, strict=True):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)))
        matches = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if np.array_equal(after, padded[row : row + 8, column : column + 12])
        ]
        assert len(matches) == 1
        offsets.update(matches)
    rows, columns = zip(*offsets, strict=True)
    assert set(rows) == set(columns) == set(range(5))
    assert len(offsets) > 15  # of 25: rows and columns move independently


def test_content_away_from_the_border_is_moved_but_never_lost():
    images = np.zeros((20, 8, 12, 2), np.float32)
    images[:, 1:-1, 1:-1] = np.random.default_rng(0).random((20, 6, 10, 2))
    moved = np.asarray(shift(KEY, jnp.asarray(images), 1))
    for before, after in zip(images, moved, strict=True):
        np.testing.assert_array_equal(np.sort(before.ravel()), np.sort(after.ravel()))
    assert not np.array_equal(images, moved)


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_come_back_in_order_whether_or_not_the_devices_divide_them(num_devices, count):
    def fn(index, table):
        return {"row": table[index], "index": index}

    mesh, table = layout.make_mesh(num_devices), jnp.arange(20.0).reshape(5, 4)
    parts = jax.jit(lambda table: layout.map_parts(fn, count, mesh, table))(table)
    np.testing.assert_array_equal(parts["row"], table[:count])
    np.testing.assert_array_equal(parts["index"], np.arange(count))


def test_a_replicated_state_compiles_an_epoch_once():
    """Its layout is that of the state that comes out."""
    start = start_state(CONFIG, START)
    schedule = training.make_schedule(CONFIG, NUM)
    state, _ = make()(KEY, start, None, schedule, IMAGES, SEEN)
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(state), strict=True):
        assert before.sharding == after.sharding
        assert before.committed and after.committed
    again = layout.replicate(state, layout.make_mesh(1))
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        assert before.unsafe_buffer_pointer() == after.unsafe_buffer_pointer()


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"compute\.num_devices is 1000, but JAX sees"):
        layout.make_mesh(1000)


@pytest.mark.parametrize("num_micro", [2, 3])
def test_micro_batches_give_the_gradient_of_the_whole_batch(num_micro):
    params, (images, labels) = tiny.make_params(), tiny.make_images(6)
    grad_fn = distill.reference_grad(tiny.CONFIG)
    whole, expected = grad_fn(KEY, params, None, images, labels)
    metrics, grads = training.accumulated(grad_fn, num_micro)(KEY, params, None, images, labels)
    tiny.assert_trees_close(grads, expected, atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], whole["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], whole["accuracy"], rtol=1e-6)


def test_one_micro_batch_is_the_gradient_itself():
    grad_fn = distill.reference_grad(tiny.CONFIG)
    assert training.accumulated(grad_fn, 1) is grad_fn
