"""The pictures: complete, readable sizes, nothing overlapping, nothing global left behind."""

import copy

import fake_results
import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from acme_jax import plot_cloud, plot_fleet, plots

RESULTS = fake_results.make_results()


def test_all_pictures_are_written_and_not_blank(tmp_path):
    before = dict(matplotlib.rcParams)
    files = plots.write_plots(RESULTS, tmp_path / "plots")
    assert dict(matplotlib.rcParams) == before
    assert list(files) == list(plots.FIGURES)
    for name, path in files.items():
        pixels = imread(path)
        assert path.name == f"{name}.png"
        assert 500 <= pixels.shape[1] <= 1000
        assert pixels[..., :3].std() > 0.02


def test_equal_results_give_equal_files(tmp_path):
    only = {"search": RESULTS["search"]}
    first = plots.write_plots(only, tmp_path / "a")
    second = plots.write_plots(only, tmp_path / "b")
    assert {k: v.read_bytes() for k, v in first.items()} == {
        k: v.read_bytes() for k, v in second.items()
    }


def test_nothing_to_draw(tmp_path):
    assert plots.write_plots({}, tmp_path) == {}


@pytest.mark.parametrize(("edges", "per_edge"), [(1, 1), (2, 3), (5, 12)])
def test_other_fleets(edges, per_edge):
    results = fake_results.make_results(edges, per_edge)
    assert all(draw(results) is not None for draw in plots.FIGURES.values())


def test_missing_methods_and_weights():
    results = copy.deepcopy(RESULTS)
    for device in results["devices"]:
        del device["accuracy"]["linear"]
    del results["devices"][0]["accuracy"]["js"]
    for entry in results["similarity"]:
        del entry["js_weights"]
    left, right = plot_fleet.figure_accuracy(results).axes
    assert [text.get_text() for text in right.get_xticklabels()] == [
        "unpers.", "no pr.", "alone", "avg", "js", "ACME",
    ]  # fmt: skip
    counts = {line.get_label(): len(line.get_xdata()) for line in left.get_lines()}
    assert counts["ACME"] == 15 and counts["Jensen-Shannon"] == 14
    shown = [axis for axis in plot_fleet.figure_similarity(results).axes if axis.get_images()]
    assert len(shown) == 3


def test_front_shows_every_point_and_the_choices():
    figure = plot_cloud.figure_pareto_front(RESULTS)
    archive = np.asarray(RESULTS["search"]["archive"])
    for axis, column, scale in zip(figure.axes, (1, 2), (1e3, 1e-3), strict=True):
        (dots,) = (x for x in axis.get_lines() if str(x.get_label()).startswith("Pareto archive"))
        np.testing.assert_allclose(dots.get_xdata(), archive[:, column] / scale)
        np.testing.assert_allclose(dots.get_ydata(), 100 * archive[:, 0])
        assert {text.get_text() for text in axis.texts} == {"0", "1", "2"}
    entries = [t.get_text() for legend in figure.legends for t in legend.get_texts()]
    assert "edge 0: 3 blocks, 343 kB (dashed: budget 362 kB)" in entries


def test_edges_with_the_same_choice_share_a_disc():
    results = copy.deepcopy(RESULTS)
    results["search"]["choices"][1]["index"] = results["search"]["choices"][0]["index"]
    axis = plot_cloud.figure_pareto_front(results).axes[0]
    assert {text.get_text() for text in axis.texts} == {"0,1", "2"}


@pytest.mark.parametrize("name", ["pareto_front", "accuracy", "similarity", "pruned", "traffic"])
def test_axes_and_legends_do_not_overlap(name):
    with matplotlib.rc_context(plots.RC):
        figure = plots.FIGURES[name](RESULTS)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        parts = [a for a in figure.axes if a.get_visible()] + figure.legends
        boxes = [part.get_tightbbox(renderer) for part in parts]
    for i, first in enumerate(boxes):
        for second in boxes[:i]:
            width = min(first.x1, second.x1) - max(first.x0, second.x0)
            height = min(first.y1, second.y1) - max(first.y0, second.y0)
            assert min(width, height) < 3, f"{name}: parts overlap by {width} x {height} pixels"
