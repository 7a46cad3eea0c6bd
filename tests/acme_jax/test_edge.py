"""Header search on real digits: learns, ranks, repeats exactly, compiles once."""

import functools

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from acme_jax import edge, header, header_training
from acme_jax.config import HeaderConfig
from acme_jax.header import HeaderDims

DIMS = HeaderDims(
    grid_height=2, grid_width=2, embed_dim=16, channels=8, num_classes=10, blocks=1, num_layers=2
)
CONFIG = HeaderConfig(
    channels=8,
    blocks=1,
    search_epochs=4,
    controller_steps=4,
    num_candidates=5,
    final_epochs=8,
    batch_size=32,
    learning_rate=1e-2,
)


@functools.cache
def digits():
    """8 x 8 digits as 2 x 2 patches of 16 pixels: train, select and unseen."""
    images, labels = load_digits(return_X_y=True)
    tokens = images.reshape(-1, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 16) / 16
    rows = np.random.default_rng(0).permutation(len(labels))
    tokens, labels = tokens[rows].astype(np.float32), labels[rows]
    return tuple((tokens[part], labels[part]) for part in np.split(np.arange(1300), [600, 800]))


def run(key, progress=None, config=CONFIG):
    (train, train_labels), (select, select_labels), _ = digits()
    return edge.search_header(
        key, train, train_labels, select, select_labels, DIMS, config, progress
    )


@functools.cache
def searched():
    events = []
    return run(jax.random.key(0), lambda numbers: events.append(dict(numbers))), events


def test_search_finds_a_header_that_generalises():
    result, events = searched()
    unseen, labels = digits()[2]
    logits = header.apply(result.params, result.cell, DIMS, unseen)
    assert (np.asarray(logits).argmax(-1) == labels).mean() > 0.6
    assert result.select_accuracy > 0.6
    assert result.gate_layout == header.gate_layout(DIMS, result.cell)
    history = result.history
    assert history.search_loss.shape == history.reward.shape == history.entropy.shape == (4,)
    assert history.final_loss.shape == (8,)
    assert history.final_loss[-1] < history.search_loss[-1] < history.search_loss[0]
    assert [event["phase"] for event in events] == ["header_search"] * 4 + ["header_final"] * 8
    np.testing.assert_array_equal([e["loss"] for e in events[:4]], history.search_loss)


def test_candidates_are_distinct_ranked_and_the_best_wins():
    result, _ = searched()
    assert len(set(result.candidate_cells)) == len(result.candidate_cells) == 5
    assert (np.diff(result.candidate_accuracies) <= 0).all()
    assert result.cell == result.candidate_cells[0]


def test_reported_accuracy_is_that_of_the_extracted_header():
    result, _ = searched()
    select, labels = digits()[1]
    logits = header.apply(result.params, result.cell, DIMS, select)
    found = (np.asarray(logits).argmax(-1) == labels).mean()
    np.testing.assert_allclose(result.select_accuracy, found, atol=1e-6)


def test_same_key_same_result_other_key_other_result_nothing_recompiled():
    result, _ = searched()
    programs = header_training.header_programs(DIMS, CONFIG, linear=False)
    traces = programs.epoch._cache_size(), programs.accuracy._cache_size()
    again, other = run(jax.random.key(0)), run(jax.random.key(1))
    assert (programs.epoch._cache_size(), programs.accuracy._cache_size()) == traces == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, result, again)
    assert not np.array_equal(result.history.final_loss, other.history.final_loss)


def test_linear_header_learns_under_the_same_schedule():
    (train, train_labels), (select, select_labels), _ = digits()
    result = edge.train_linear_header(
        jax.random.key(0), train, train_labels, select, select_labels, DIMS, CONFIG
    )
    assert result.loss.shape == (8,) and result.loss[-1] < result.loss[0]
    logits = header.apply_linear(result.params, select)
    np.testing.assert_allclose(
        result.select_accuracy, (np.asarray(logits).argmax(-1) == select_labels).mean(), atol=1e-6
    )


def test_divergence_shows_in_the_loss_history():
    (train, train_labels), (select, select_labels), _ = digits()
    result = edge.train_linear_header(
        jax.random.key(0), train * np.nan, train_labels, select, select_labels, DIMS, CONFIG
    )
    assert not np.isfinite(result.loss).any()


@pytest.mark.parametrize(("kept", "labels"), [(0, 0), (5, 4)])
def test_bad_splits_are_refused(kept, labels):
    (train, train_labels), (select, select_labels), _ = digits()
    with pytest.raises(ValueError, match=f"{kept} features and {labels} labels"):
        edge.search_header(
            jax.random.key(0),
            train[:kept],
            train_labels[:labels],
            select,
            select_labels,
            DIMS,
            CONFIG,
        )
