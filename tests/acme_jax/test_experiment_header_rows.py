"""Rows of the experiments `headers` and `header_cells`, with training left out."""

import collections
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acme_jax import header, slicing
from acme_jax.experiments import (
    backbone_states,
    cell_contest,
    header_backbones,
    header_cells,
    header_runs,
    headers,
    searched_header,
)
from acme_jax.experiments.fixed_headers import KINDS
from acme_jax.experiments.header_runs import Run
from acme_jax.experiments.settings import settings
from acme_jax.experiments.study import open_study
from acme_jax.progress import Reporter, StopFlag
from acme_jax.supernet_training import Stages, initial_params


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    config = settings("tiny")
    with open_study(config, tmp_path_factory.mktemp("study"), Reporter(), StopFlag()) as opened:
        params = initial_params(opened.context)
        vars(opened)["stages"] = Stages(*[params] * 4)
        yield opened


CELL = ((0, 5, 1, 3), (2, 2, 0, 5))


@pytest.fixture
def untrained(monkeypatch):
    """Training returns its starts, and the search a given cell."""

    def train(predict, key, start, choice, setting, data, batch_size, device):
        del predict, key, choice, batch_size, device
        assert len(data.train_tokens) == len(data.train_labels)
        return Run(start, jnp.float32(0.2 - setting.learning_rate))

    monkeypatch.setattr(header_runs, "train", train)
    monkeypatch.setattr(searched_header, "find_cell", lambda *_: CELL)


HEADERS = [*KINDS, "searched"]


def test_units_cover_the_grid_once():
    found = headers.units(settings("fashion_mnist"))
    assert len(found) == len(set(found)) == 2 * 8 + 1 + 2 + 2
    assert "plain-0.25-0.25" in found and found[0] == "dynavit-0.5-0.5"
    assert len(headers.units(settings("tiny"))) == 2 * 4 + 1 + 2 + 2
    assert len(header_cells.units(settings("tiny"))) == 9 + 2


def test_rows_of_headers(study, untrained):
    del untrained
    for unit, depth, width in (("plain-0.5-0.5", 0.5, 0.5), ("embedding-0-0", 0.0, 0.0)):
        rows = headers.run(study, unit)
        frozen = [row for row in rows if row["variant"] == "frozen"]
        assert [row["header"] for row in frozen] == HEADERS
        for row in frozen:
            assert (row["depth"], row["width"]) == (depth, width)
            assert 0.0 <= row["test_accuracy"] <= 1.0 and row["params"] > 0 and row["flops"] > 0
            assert row["epochs"] == 2 + 3
        # only the middle backbone has rates to try; the other takes over what was best there
        assert len(rows) - len(frozen) == (2 * len(HEADERS) if depth else 0)
    assert [row["learning_rate"] for row in frozen] == [0.01, *[0.003] * 4]
    assert frozen[0]["select_accuracy"] == pytest.approx(0.19)


def test_rows_of_remedies_and_classifiers(study, untrained):
    del untrained
    rows = headers.run(study, "remedies-plain")
    by_remedy = collections.Counter(row["variant"] for row in rows)
    assert by_remedy == {
        "all states": 2, "all public data": 2, "backbone trained": 2, "tokens for channels": 1,
    }  # fmt: skip
    assert all(row["header"] in ("mlp", "searched", "cnn") for row in rows)
    # untrained, header and backbone together are what they were apart
    frozen = {row["header"]: row for row in headers.run(study, "plain-0.5-0.5")[: len(HEADERS)]}
    for row in rows:
        if row["variant"] == "backbone trained":
            assert row["test_accuracy"] == pytest.approx(
                frozen[row["header"]]["test_accuracy"], abs=0.011
            )
    rows = headers.run(study, "classifiers-plain")
    assert [(row["depth"], row["width"]) for row in rows] == [
        (0.5, 0.5), (1.0, 1.0), (1.0, 0.5), (0.5, 1.0)
    ]  # fmt: skip
    assert len({row["backbone_params"] for row in rows}) == 4


def test_wide_tokens_are_the_states(study):
    """Against the forward pass of the sliced network, state by state."""
    context, place = study.context, header_backbones.smallest(study.config, "plain")
    arch = study.point(place.depth, place.width).arch
    backbone = slicing.slice_params(jax.device_get(study.stages.trained), arch)
    inputs = context.splits.select.inputs[:5]
    found = backbone_states.wide_tokens(backbone, inputs, context.encoder, 3)
    outputs = slicing.apply(backbone, jnp.asarray(inputs), context.encoder)
    size = context.encoder.embed_dim
    states = [outputs.inputs[0], outputs.inputs[len(outputs.inputs) // 2], outputs.final]
    for index, state in enumerate([*states, jnp.broadcast_to(states[2][:, :1], states[2].shape)]):
        state = np.asarray(state, np.float64)[:, 1:]
        unit = (state - state.mean(-1, keepdims=True)) / np.sqrt(
            state.var(-1, keepdims=True) + 1e-6
        )
        np.testing.assert_allclose(
            found[..., index * size : (index + 1) * size], unit, atol=1e-4, err_msg=str(index)
        )


def test_rows_of_cells(study, untrained, monkeypatch):
    del untrained
    cells_of = {"controller": CELL, "random": CELL, "evolution": CELL, "none": CELL}
    monkeypatch.setattr(cell_contest, "shared_weights", lambda *_: header.init_shared(
        jax.random.key(0), study.context.header_dims))  # fmt: skip
    monkeypatch.setattr(cell_contest, "search", lambda key, name, *_: cell_contest.Winner(
        name, cells_of[name], 10, 4, 0.5, 0.6))  # fmt: skip
    rows = header_cells.run(study, "search-smallest")
    assert collections.Counter(row["searcher"] for row in rows) == {
        "controller": 3, "random": 3, "evolution": 3, "none": 6,
    }  # fmt: skip
    assert len({row["test_accuracy"] for row in rows}) == 1  # one cell, one start
    asked = []

    def search_header(key, *data, progress=None):
        del key, progress
        dims, config = data[4:]
        asked.append((dims.blocks, dims.num_layers, config.blocks, config.repeats))
        cell = ((0, 5, 1, 3),) * dims.blocks
        params = header.init(jax.random.key(0), cell, dims)
        return SimpleNamespace(
            cell=cell, params=params, candidate_accuracies=np.asarray([0.4]), select_accuracy=0.5
        )

    monkeypatch.setattr(header_cells.edge, "search_header", search_header)
    rows = header_cells.run(study, "map-b3-u1")
    assert [(row["backbone"], row["blocks"], row["repeats"]) for row in rows] == [
        ("smallest", 3, 1), ("largest", 3, 1),
    ]  # fmt: skip
    assert asked == [(3, 3, 3, 1)] * 2
    assert all(0.0 <= row["test_accuracy"] <= 1.0 for row in rows)
