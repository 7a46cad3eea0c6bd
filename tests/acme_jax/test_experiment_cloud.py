"""The experiments `backbone_grid` and `ablations` on a small study."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from acme_jax import benchmark, phases, slicing
from acme_jax.config import FleetConfig
from acme_jax.experiments import (
    ablation_cloud,
    ablation_edge,
    ablations,
    alone,
    backbone_grid,
    final,
    grid_accuracy,
)
from acme_jax.experiments.settings import settings
from acme_jax.experiments.study import open_study
from acme_jax.progress import Reporter, StopFlag
from nas.cells import OPS


def make_config():
    base = settings("tiny")
    short = {"epochs": 1}
    return dataclasses.replace(
        base,
        reference=dataclasses.replace(base.reference, epochs=4),
        distill=dataclasses.replace(
            base.distill,
            width=dataclasses.replace(base.distill.width, **short),
            depth=dataclasses.replace(base.distill.depth, **short),
        ),
        fleet=FleetConfig(num_edges=1, devices_per_edge=2, budgets=(1.0,), samples_per_device=80),
        header=dataclasses.replace(base.header, channels=4, search_epochs=4, final_epochs=4),
        refine=dataclasses.replace(base.refine, rounds=2, prune_per_round=1),
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study whose distillations share one compiled program, however often they are done."""
    compiled, programs = phases.compiled_epoch, {}

    def shared(context, grad_fn, config):
        kind = grad_fn.__qualname__
        return programs.setdefault(kind, compiled(context, grad_fn, config))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "compiled_epoch", shared)
        directory = tmp_path_factory.mktemp("study")
        with (
            Reporter("quiet") as reporter,
            open_study(make_config(), directory, reporter, StopFlag()) as opened,
        ):
            yield opened


def test_the_full_network_alone_is_the_reference_model(study):
    full = study.point(1.0, 1.0)
    trained = alone.train(study, full, study.config.reference.epochs)
    tiny.assert_trees_equal(jax.device_get(trained.params), jax.device_get(study.stages.trained))


def test_a_network_alone_begins_as_a_part_of_the_full_one_at_its_own_fan_in(study):
    point = study.point(0.5, 0.5)
    whole = jax.device_get(alone.initial_params(study.context))
    begin = alone.starting_params(study.context, point.arch)
    kept = tiny.kept(study.context.encoder.num_layers, int(point.arch.depth))
    heads, neurons = alone.width(point.arch)
    attention, mlp = begin["blocks"]["attention"], begin["blocks"]["mlp"]
    full_attention, full_mlp = whole["blocks"]["attention"], whole["blocks"]["mlp"]
    np.testing.assert_array_equal(
        attention["qkv_kernel"], full_attention["qkv_kernel"][kept][:, :, :, :heads]
    )
    # half of the heads and neurons: a variance of twice as much
    np.testing.assert_allclose(
        attention["out_kernel"], np.sqrt(2) * full_attention["out_kernel"][kept][:, :heads], 1e-6
    )
    np.testing.assert_allclose(
        mlp["down_kernel"], np.sqrt(2) * full_mlp["down_kernel"][kept][:, :neurons], 1e-6
    )
    np.testing.assert_array_equal(begin["embed"]["kernel"], whole["embed"]["kernel"])


def test_a_network_alone_is_dense_and_computes_what_its_size_says(study):
    point, encoder = study.point(0.5, 0.5), study.context.encoder
    trained = alone.train(study, point, 1)
    heads, neurons = alone.width(point.arch)
    depth = int(point.arch.depth)
    assert trained.params["blocks"]["mlp"]["up_bias"].shape == (depth, neurons)
    images = study.context.public.select_inputs[:3]
    logits, _, _ = tiny.numpy_vit(
        tiny.to_float64(trained.params), images, encoder, layers=range(depth),
        heads=[heads] * depth, neurons=[neurons] * depth,
    )  # fmt: skip
    classify = alone.classifier(study, trained.params, point.arch)
    np.testing.assert_allclose(classify(images), logits, atol=1e-4)
    test = study.context.splits.test
    expected = np.mean(np.asarray(classify(test.inputs)).argmax(axis=-1) == test.labels)
    assert final.network(study, classify) == pytest.approx(expected)
    select = study.context.splits.select
    expected = np.mean(np.asarray(classify(select.inputs)).argmax(axis=-1) == select.labels)
    assert alone.select_accuracy(study, classify) == pytest.approx(expected)


def test_networks_alone_get_the_supernets_budget(study):
    context = study.context
    archs = [point.arch for point in study.grid]
    epochs = alone.epochs_of(study, "same_compute")
    budget = alone.supernet_flops(context)
    assert alone.alone_flops(context, archs, epochs) <= budget
    assert budget < alone.alone_flops(context, archs, epochs + 1)
    assert alone.epochs_of(study, "same_epochs") == 4 + 1 + 1
    # By hand: 14 batches of 50; teacher once, students forward and back, one depth in two.
    cost = {
        (depth, width): benchmark.forward_flops(context.encoder, context.space, depth, *width)
        for depth in (2, 4)
        for width in ((2, 32), (4, 64))
    }
    full = cost[4, (4, 64)]
    width = full + 3 * (full + cost[4, (2, 32)])
    depth = full + cost[4, (2, 32)] + 3 * sum(cost.values()) / 2
    assert budget == pytest.approx(14 * 50 * (4 * 3 * full + width + depth))


def test_the_same_distillation_again_gives_the_same_supernet(study):
    again = ablation_cloud.retrain(study, "same", study.config)
    tiny.assert_trees_equal(jax.device_get(again), jax.device_get(study.stages))
    directory = ablation_cloud.directory(study, "same")
    assert ablation_cloud.distillation_seconds(directory) > 0
    assert ablation_cloud.phase_seconds(directory, "reference model") == 0
    assert ablation_cloud.phase_seconds(study.directory, "reference model") > 0


def test_ablated_supernets_differ_where_they_should(study):
    stages = jax.device_get(study.stages)
    plain = jax.device_get(
        ablation_cloud.retrain(study, "no_reordering", study.config, reorder=False)
    )
    tiny.assert_trees_equal(plain.reordered, stages.trained)
    changed = ablation_cloud.without_hidden_loss(study.config)
    logits = jax.device_get(ablation_cloud.retrain(study, "no_hidden_loss", changed))
    tiny.assert_trees_equal(logits.reordered, stages.reordered)
    for other in (plain, logits):
        with pytest.raises(AssertionError):
            tiny.assert_trees_equal(other.elastic, stages.elastic)
    same = dataclasses.replace(changed, distill=study.config.distill)
    assert same == study.config


def test_stages_of_the_grid(study):
    rows = backbone_grid.run(study, "stages")
    assert [row["budget"] for row in rows[:3]] == ["supernet", "same_compute", "same_epochs"]
    found = {(row["stage"], row["depth"], row["width"]): row for row in rows[3:]}
    assert len(found) == len(rows) - 3 == 4 * 4
    for row in found.values():
        assert 0 <= row["select_accuracy"] <= 1
        assert 0 <= row["test_accuracy"] <= 1
    # Reordering changes nothing of the network at full width.
    for depth in (0.5, 1.0):
        same = [found[stage, depth, 1.0]["test_accuracy"] for stage in ("trained", "reordered")]
        assert same[0] == same[1]
    # Against the sliced network, which is another forward pass.
    point, select = study.point(0.5, 0.5), study.context.splits.select
    sliced = slicing.slice_params(jax.device_get(study.stages.elastic), point.arch)
    logits = slicing.apply(sliced, select.inputs, study.context.encoder).logits
    expected = np.mean(np.asarray(logits).argmax(axis=-1) == select.labels)
    assert found["elastic", 0.5, 0.5]["select_accuracy"] == pytest.approx(expected)


def test_units_of_the_grid_are_the_sub_networks():
    names = backbone_grid.units(settings("fashion_mnist"))
    assert len(names) == len(set(names)) == 17
    assert names[:3] == ["stages", "alone_0.25_0.25", "alone_0.25_0.5"]


def test_variants_differ_from_the_full_pipeline_in_one_thing(study, monkeypatch):
    calls, unit = {}, ""

    def make_header(study, key, data, kind):
        calls[unit].append(("header", jax.random.key_data(key).tolist(), data, kind))
        return ablation_edge.Header(((0, 5, 1, 5),) * 2, {"x": np.ones(2)}, 0.5, 1.0)

    def refine_header(study, key, backbone, model, fleet, weights, config):
        call = ("refine", jax.random.key_data(key).tolist(), backbone, weights, config)
        calls[unit].append((*call, [device.id for device in fleet]))
        return ablation_edge.Refined(np.array([0.25, 0.75]), 0.1, 2.0)

    def measure(study, params):
        return [
            {"depth": p.depth, "width": p.width, "select_accuracy": 0.1, "test_accuracy": 0.2}
            for p in study.grid
        ]

    monkeypatch.setattr(ablations, "make_header", make_header)
    monkeypatch.setattr(ablations, "refine_header", refine_header)
    monkeypatch.setattr(grid_accuracy, "measure", measure)
    rows = {}
    for unit in ablations.units(study.config):
        calls[unit] = []
        rows[unit] = ablations.run(study, unit)
    full = calls["full"]
    backbones = [call[2] for call in full if call[0] == "refine"]
    assert len(backbones) == 2  # of this small grid; (0.25, 0.25) is (0.5, 0.5)
    for unit, found in calls.items():
        headers, refined = ([c for c in found if c[0] == kind] for kind in ("header", "refine"))
        assert len(headers) == (0 if unit in ("average", "no_smoothing") else 2)  # else shared
        kinds = {"fixed_cell": "fixed", "linear_header": "linear"}
        assert {call[3] for call in headers} <= {kinds.get(unit, "searched")}
        for call, first in zip(headers, full[::2], strict=False):
            assert call[1] == first[1]
        for call, first, backbone in zip(refined, full[1::2], backbones, strict=True):
            assert call[1] == first[1]
            assert call[5] == first[5]
            assert call[3] == ("avg" if unit == "average" else "wasserstein")
            assert call[4].smoothing == (0.0 if unit == "no_smoothing" else 0.9)
            assert dataclasses.replace(call[4], smoothing=0.9) == study.config.refine
            if ablations.VARIANTS[unit].cloud:
                with pytest.raises(AssertionError):
                    tiny.assert_trees_equal(call[2], backbone)
            else:
                tiny.assert_trees_equal(call[2], backbone)
    for unit, found in rows.items():
        of_backbones = [row for row in found if "depth" in row]
        assert [row["test_accuracy"] for row in of_backbones] == [0.5, 0.5]
        cloud = unit == "full" or ablations.VARIANTS[unit].cloud
        assert len(found) == 2 + cloud
        if cloud:
            assert found[0]["grid_test_accuracy"] == pytest.approx(0.2)
            assert all(row["network_test_accuracy"] == 0.2 for row in of_backbones)
    assert rows["full"][0]["depth_seconds"] > 0
    assert rows["no_depth_distillation"][0]["depth_seconds"] == 0


def test_headers_that_are_not_searched(study):
    backbone = study.backbone(study.point(1.0, 1.0).arch, study.stages.trained)
    data = study.edge_data(backbone)
    cell = ablation_edge.fixed_cell(2)
    assert [(x, OPS[op_x], y, OPS[op_y]) for x, op_x, y, op_y in cell] == [
        (1, "sep5x5", 1, "maxpool3"), (2, "sep5x5", 2, "maxpool3"),
    ]  # fmt: skip
    key, models = study.key("test"), {}
    for kind in ("fixed", "linear"):
        model = models[kind] = ablation_edge.make_header(study, key, data, kind)
        assert model.cell == (cell if kind == "fixed" else None)
        assert model.select_accuracy > 0.2
        assert ablation_edge.num_params(study, model) == sum(
            leaf.size for leaf in jax.tree.leaves(model.params)
        )
    # Linear headers are trained alone: nothing that another device has can matter.
    fleet, found = study.fleet(), []
    for weights in ("avg", "wasserstein"):
        refined = ablation_edge.refine_header(
            study, key, backbone, models["linear"], fleet, weights, study.config.refine
        )
        assert refined.test_accuracies.shape == (2,)
        found.append(refined.test_accuracies)
    np.testing.assert_array_equal(*found)
