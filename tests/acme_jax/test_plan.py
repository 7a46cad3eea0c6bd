"""The planned memory against XLA's own count for the real programs; what is chosen and refused."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acme_jax import (
    benchmark,
    cloud,
    distill,
    layout,
    plan,
    presets,
    step_memory,
    supernet,
    training,
    workload,
)
from acme_jax.bert import BertConfig
from acme_jax.config import ComputeConfig, Config, ConfigError, DistillConfig, TrainConfig
from acme_jax.vit import ViTConfig
from nas.arch import ArchSpace, sample

VIT = ViTConfig((32, 32, 3), 8, 128, 3, 4, 384, 10)
LONG = ViTConfig((32, 32, 3), 4, 64, 4, 2, 256, 10)  # 65 tokens: attention counts
BERT = BertConfig(2000, 32, 96, 3, 4, 384, 5)
CHOSEN = ViTConfig((224, 224, 3), 16, 768, 12, 12, 3072, 100)  # ViT-B/16
NUM = 64


def sizes_of(encoder):
    return encoder.num_layers, encoder.num_heads, encoder.num_neurons


def space_of(encoder):
    return ArchSpace.from_fractions(*sizes_of(encoder))


def sample_type(encoder):
    return jnp.int32 if isinstance(encoder, BertConfig) else jnp.uint8


def inputs_of(encoder, count):
    return (
        jax.ShapeDtypeStruct((count, *encoder.input_shape), sample_type(encoder)),
        jax.ShapeDtypeStruct((count,), jnp.int32),
    )


def allocated(program, *args, donated=()):
    stats = jax.jit(program, donate_argnums=donated).lower(*args).compile().memory_analysis()
    own = stats.output_size_in_bytes + stats.temp_size_in_bytes - stats.alias_size_in_bytes
    return own + stats.argument_size_in_bytes


def params_of(encoder):
    return jax.eval_shape(lambda key: supernet.init(key, encoder), jax.random.key(0))


def epoch_bytes(encoder, train, mesh, num_micro, *, distils):
    """What XLA allocates for the epoch as a run compiles it."""
    space = ArchSpace.from_fractions(*sizes_of(encoder), fractions=(0.5, 1.0))
    params = params_of(encoder)
    grad_fn = (
        distill.distillation_grad(encoder, space, 2) if distils else distill.reference_grad(encoder)
    )
    optimizer = training.make_optimizer(train)
    state = jax.eval_shape(lambda p: training.init_state(p, optimizer), params)
    lesson = jax.eval_shape(lambda p: distill.depth_lesson(space, p, train), params)
    schedule = jax.eval_shape(lambda: training.make_schedule(train, NUM))
    return allocated(
        training.make_epoch(grad_fn, train, mesh, num_micro),
        jax.random.key(0), state, lesson if distils else None, schedule, *inputs_of(encoder, NUM),
        donated=(1,),
    )  # fmt: skip


def planned_bytes(encoder, train, mesh, num_micro, *, distils):
    width = np.dtype(sample_type(encoder)).itemsize
    micro_batch = train.batch_size // train.shards // num_micro
    return step_memory.training_bytes(
        encoder, train, mesh, micro_batch, distils=distils
    ) + step_memory.data_bytes(NUM, width * math.prod(encoder.input_shape))


@pytest.mark.parametrize(
    ("encoder", "batch_size", "shards", "num_micro", "devices"),
    [
        (LONG, 32, 2, 2, 1),
        (BERT, 32, 1, 4, 1),
        (dataclasses.replace(VIT, remat=True), 64, 2, 1, 1),
        pytest.param(VIT, 32, 1, 1, 1, marks=pytest.mark.slow),
        pytest.param(VIT, 16, 2, 1, 2, marks=pytest.mark.slow),
        pytest.param(dataclasses.replace(BERT, remat=True), 64, 1, 2, 1, marks=pytest.mark.slow),
        pytest.param(
            dataclasses.replace(LONG, dtype="bfloat16"), 16, 1, 1, 1, marks=pytest.mark.slow
        ),
    ],
)
def test_reference_step_against_xla(encoder, batch_size, shards, num_micro, devices):
    train = TrainConfig(batch_size=batch_size, shards=shards, max_shift=0)
    mesh = layout.make_mesh(devices)
    xla = epoch_bytes(encoder, train, mesh, num_micro, distils=False)
    planned = planned_bytes(encoder, train, mesh, num_micro, distils=False)
    assert 0.85 * xla <= planned <= 1.3 * xla, planned / xla


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("num_micro", [1, 4])
@pytest.mark.parametrize("encoder", [VIT, LONG, BERT], ids=["vit", "long", "bert"])
def test_distillation_step_against_xla(encoder, num_micro, remat):
    encoder = dataclasses.replace(encoder, remat=remat)
    train = TrainConfig(batch_size=64, shards=2, max_shift=0)
    mesh = layout.make_mesh(1)
    xla = epoch_bytes(encoder, train, mesh, num_micro, distils=True)
    planned = planned_bytes(encoder, train, mesh, num_micro, distils=True)
    assert 0.85 * xla <= planned <= 1.3 * xla, planned / xla


def test_small_distillation_step_against_xla():
    encoder = dataclasses.replace(VIT, num_layers=2)
    train = TrainConfig(batch_size=32, shards=1, max_shift=0)
    xla = epoch_bytes(encoder, train, layout.make_mesh(1), 1, distils=True)
    planned = planned_bytes(encoder, train, layout.make_mesh(1), 1, distils=True)
    assert 0.85 * xla <= planned <= 1.3 * xla, planned / xla


@pytest.mark.parametrize("dense", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_evaluation_against_xla(dense, monkeypatch):
    monkeypatch.setattr(cloud, "_runs_dense", lambda mesh: dense)
    space, mesh, population, count = space_of(LONG), layout.make_mesh(1), 4, 64
    archs = jax.eval_shape(lambda key: sample(key, space, population), jax.random.key(0))
    xla = allocated(
        lambda params, inputs, labels, archs: cloud.accuracy(
            params, inputs, labels, LONG, space, archs, mesh
        ),
        params_of(LONG), *inputs_of(LONG, count), archs,
    )  # fmt: skip
    planned = step_memory.evaluation_bytes(LONG, space, mesh, count, population, dense=dense)
    planned += step_memory.data_bytes(count, math.prod(LONG.input_shape))
    assert 0.8 * xla <= planned <= 2.0 * xla, planned / xla


@pytest.mark.slow
def test_importance_against_xla():
    xla = allocated(
        lambda params, inputs, labels: cloud.reorder_by_importance(params, inputs, labels, LONG),
        params_of(LONG), *inputs_of(LONG, 16),
    )  # fmt: skip
    planned = step_memory.importance_bytes(LONG, layout.make_mesh(1))
    assert 0.85 * xla <= planned <= 1.6 * xla, planned / xla


@pytest.mark.parametrize(
    "encoder",
    [
        VIT,
        BERT,
        dataclasses.replace(BERT, pooling="cls"),
        dataclasses.replace(VIT, num_prefix_tokens=2),
    ],
)
def test_weights_are_counted_exactly(encoder):
    leaves = jax.tree.leaves(params_of(encoder))
    assert step_memory.count_weights(encoder).total == sum(leaf.size for leaf in leaves)


# Choices

TRAIN = TrainConfig(batch_size=64, shards=2, max_shift=0)
BIG = Config(reference=TRAIN, distill=DistillConfig(width=TRAIN, depth=TRAIN))


def make(encoder=CHOSEN, config=BIG, free_bytes=10**12, **kwargs):
    sizes = {"num_train": 2000, "num_select": 400, "sample_bytes": 150_528, **kwargs}
    mesh = layout.make_mesh(1)
    return plan.make_plan(encoder, space_of(encoder), config, mesh, free_bytes=free_bytes, **sizes)


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch):
    monkeypatch.setattr(workload, "_peak", lambda mesh, dtype: 1e12)


def computing(**kwargs):
    return dataclasses.replace(BIG, compute=ComputeConfig(**kwargs))


def test_less_memory_means_smaller_pieces_then_remat_then_smaller_pieces_still():
    plans = [make(free_bytes=int(free * 1e9)) for free in np.arange(30, 4.5, -0.25)]
    seen = list(dict.fromkeys((p.remat, p.micro_batch) for p in plans))
    assert seen[:3] == [(False, 32), (False, 16), (False, 8)]
    assert seen[3][0] and all(remat for remat, _ in seen[3:])
    sizes = [size for remat, size in seen if remat]
    assert sizes == sorted(sizes, reverse=True)
    for made in plans:
        assert made.bytes_needed <= 0.9 * made.bytes_available
        assert made.num_micro * made.micro_batch == 32
        assert made.micro_batches(TRAIN) == made.num_micro


def test_evaluation_is_divided_when_all_samples_do_not_fit():
    config = dataclasses.replace(BIG, compute=ComputeConfig(eval_batch=None))
    assert make(config=config, num_select=400).eval_batch is None
    few = make(free_bytes=12 * 10**9, num_select=6000)
    assert few.eval_batch == 256
    assert make(config=computing(eval_batch=7)).eval_batch == 7


def test_what_is_asked_for_is_kept_or_refused():
    assert make(config=computing(remat=True)).remat
    assert make(config=computing(micro_batch=4)).num_micro == 8
    assert make(config=computing(micro_batch=64)).num_micro == 1
    with pytest.raises(ConfigError, match=r"micro_batch is 5, which does not divide the 32 sam"):
        make(config=computing(micro_batch=5))
    with pytest.raises(ConfigError, match=r"micro_batch and compute\.remat left to the plan"):
        make(config=computing(remat=False, micro_batch=32), free_bytes=9 * 10**9)
    assert make(free_bytes=9 * 10**9).bytes_needed < 0.9 * 9e9


def test_refusal_names_bytes_and_remedies():
    with pytest.raises(ConfigError) as caught:
        make(free_bytes=3 * 10**9)
    text = str(caught.value)
    assert "training needs " in text and "(3,000,000,000 bytes)" in text
    assert "fewer shards than 2" in text and "a smaller model" in text
    with pytest.raises(ConfigError, match=r"data\.public_train"):
        make(free_bytes=3 * 10**9, num_train=50_000)
    features = dataclasses.replace(BIG, header=dataclasses.replace(BIG.header, proxy_fraction=1.0))
    with pytest.raises(ConfigError, match=r"refining headers needs .* header\.proxy_fraction"):
        make(config=features, free_bytes=20 * 10**9, num_train=50_000, sample_bytes=3072)


def test_phases_of_unequal_batches_share_a_micro_batch():
    config = dataclasses.replace(BIG, reference=dataclasses.replace(TRAIN, batch_size=24))
    made = make(config=config, free_bytes=10 * 10**9)
    assert made.micro_batches(config.distill.depth) == made.num_micro
    assert 12 % made.micro_batches(config.reference) == 0
    assert 12 // made.micro_batches(config.reference) <= max(made.micro_batch, 1)


@pytest.mark.parametrize("name", ["mnist5k", "digits", "fashion_mnist", "smoke"])
def test_small_presets_are_planned_whole_and_quickly(name):
    config = presets.get(name)
    model, side = config.model, 8 if config.data.name == "digits" else 28
    encoder = ViTConfig(
        (side, side, 1), model.patch_size, model.embed_dim, model.num_layers, model.num_heads,
        model.num_neurons, 10,
    )  # fmt: skip
    space = space_of(encoder)
    benchmark.reference_flops(encoder, space)  # compiles, as a run does anyway
    start = time.perf_counter()
    made = plan.make_plan(
        encoder, space, config, layout.make_mesh(2),
        num_train=config.data.public_train, num_select=config.data.public_select,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    assert (made.remat, made.num_micro, made.eval_batch) == (False, 1, None)
    assert made.bytes_needed < 500e6
    assert set(made.seconds.values()) == {None}
    assert len(made.lines) == 2
    assert seconds < 0.5  # a tenth of that on an idle machine


def test_work_is_that_of_the_benchmark_and_time_follows_from_it():
    made = make()
    steps = TRAIN.epochs * (2000 // 64)
    reference = benchmark.reference_flops(CHOSEN, space_of(CHOSEN)) * 64 * steps
    assert made.flops["reference model"] == pytest.approx(reference)
    assert made.seconds["reference model"] == pytest.approx(reference / (0.3 * 1e12))
    assert "reference model" in made.lines[2] and "30%" in made.lines[2]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (99.4, "99 s"), (99.6, "2 min"), (12_000, "3 h 20 min"), (190_800, "2 d 5 h")],
)
def test_duration(seconds, text):
    assert plan.duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "classes"), [("vit_b16_cifar100", 100), ("vit_b16_stanford_cars", 196)]
)
def test_presets_of_the_paper(name, classes):
    config = presets.get(name)
    encoder = dataclasses.replace(CHOSEN, num_classes=classes, dtype="bfloat16")
    assert config.model.num_neurons == encoder.num_neurons
    sizes = {"num_train": config.data.public_train, "num_select": config.data.public_select}
    made = make(encoder, config, 80 * 10**9, **sizes)
    assert not made.remat and made.num_micro == 1
    assert sum(made.flops.values()) > plan.WORTH_TIMING
    assert None not in made.seconds.values()
    width, depth = config.distill.width, config.distill.depth
    assert (width.learning_rate, width.hidden_loss, depth.hidden_loss) == (2e-5, 0.1, 1.0)
    assert config.reference.learning_rate == 5e-5 and config.reference.epochs == 10
    with pytest.raises(ConfigError, match=r"data\.public_train"):
        make(encoder, config, 5 * 10**9, num_train=50_000, num_select=3000)
