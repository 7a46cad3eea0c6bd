"""The choice of backbones: the paper's numbers, rules against plain loops, the search."""

import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from acme_jax.experiments import final, paper_candidates, selection, selection_search
from acme_jax.experiments.paper_candidates import Candidates
from acme_jax.experiments.selection_rules import (
    PAPER_BOX,
    RULES,
    own_box,
    shares,
    trade_off,
    worth_of,
)
from acme_jax.experiments.selection_search import Evaluation
from nas.arch import ArchSpace

PAPER = paper_candidates.candidates()
SPACE = ArchSpace.from_fractions(4, 4, 8)
SEARCHERS = ("nsga2_grid", "nsga2", "random", "random_grid")


def chosen(rule, limit=0.8, candidates=PAPER, box=PAPER_BOX):
    share = shares(candidates, rule, limit, box)
    return tuple(candidates.units[share.argmax()]), worth_of(candidates, share)


@pytest.mark.parametrize(
    ("rule", "units", "a_s_e", "printed"),
    [
        ("grid_filter", (11, 8), (0.8959773, 0.6667294, 0.5685462), (1.344, 1.576, 0.278)),
        ("filter_grid", (11, 9), (0.9154639, 0.7500418, 0.6490205), (1.221, 1.411, 0.216)),
        ("lowest_error", (11, 9), (0.9154639, 0.7500418, 0.6490205), (1.221, 1.411, 0.216)),
        ("largest", (12, 9), (0.9133655, 0.7500627, 0.7164179), (1.218, 1.275, 0.180)),
    ],
)
def test_the_papers_numbers(rule, units, a_s_e, printed):
    found, worth = chosen(rule)
    assert found == units
    found = [worth[name] for name in ("accuracy", "size", "energy")]
    np.testing.assert_allclose(found, a_s_e, atol=5.1e-8)
    found = [worth[name] for name in ("mer", "eer", "trade_off")]
    np.testing.assert_allclose(found, printed, atol=5.1e-4)


def test_the_papers_gain_comes_from_the_order_and_ours_from_the_score():
    highest = chosen("lowest_error")[1]["trade_off"]
    gains = {rule: chosen(rule)[1]["trade_off"] / highest - 1 for rule in RULES}
    np.testing.assert_allclose(gains["grid_filter"], 0.289, atol=5e-4)
    assert gains["filter_grid"] == 0.0
    assert gains["trade_off"] >= 0.75
    assert chosen("trade_off")[0] == (8, 6) and chosen("nearest_ideal")[0] == (3, 9)


@pytest.mark.parametrize("limit", selection.LIMITS)
def test_rules_against_plain_loops(limit):
    rng = np.random.default_rng(int(100 * limit))
    columns = rng.random((4, 60))
    invented = Candidates(rng.integers(1, 9, (60, 2)), *columns)
    for candidates, box in ((PAPER, PAPER_BOX), (invented, own_box(invented))):
        a, s, e = candidates.accuracy, candidates.size, candidates.energy
        fits = [i for i in range(len(a)) if s[i] <= limit]

        def distance(i, c=candidates, box=box):
            point = (1 - c.accuracy[i], c.latency[i], c.energy[i])
            return sum(
                ((x - low) / (high - low)) ** 2 for x, low, high in zip(point, *box, strict=True)
            )

        def cell(i, c=candidates, box=box):
            point = (1 - c.accuracy[i], c.latency[i], c.energy[i])
            return tuple(
                int(np.ceil(((x - low) / (high - low) + 1e-6) * 10 / (1 + 2e-6)))
                for x, low, high in zip(point, *box, strict=True)
            )

        def representatives(rows, cell=cell, distance=distance):
            occupied = {}
            for i in rows:
                occupied.setdefault(cell(i), []).append(i)
            return [min(rows, key=distance) for rows in occupied.values()]

        score = trade_off(candidates)
        everything = representatives(range(len(a)))
        expected = {
            "grid_filter": max((i for i in everything if s[i] <= limit), key=a.__getitem__),
            "filter_grid": max(representatives(fits), key=a.__getitem__),
            "filter_grid_trade_off": max(representatives(fits), key=score.__getitem__),
            "trade_off": max(fits, key=lambda i: a[i] - 0.5 * (s[i] + e[i])),
            "nearest_ideal": min(fits, key=distance),
            "lowest_error": max(fits, key=a.__getitem__),
            "largest": max(fits, key=lambda i: (s[i], e[i])),
        }
        for rule, row in expected.items():
            share = shares(candidates, rule, limit, box)
            assert share.sum() == 1 and share[row] == 1, rule
        optimum = shares(candidates, "optimum", limit, box)
        assert score[optimum.argmax()] == score[fits].max()
        random = worth_of(candidates, shares(candidates, "random", limit, box))
        np.testing.assert_allclose(random["accuracy"], a[fits].mean())
        np.testing.assert_allclose(random["trade_off"], score[fits].mean())


def test_nothing_that_fits_and_unknown_rules():
    for rule in RULES:
        assert shares(PAPER, rule, -0.1, PAPER_BOX).sum() == 0, rule
    # The only one that fits shares its cell with a nearer one that does not.
    two = np.array([0.5, 0.5])
    candidates = Candidates(
        np.ones((2, 2), int), two, np.array([0.9, 0.1]), two, np.array([0.41, 0.45])
    )
    assert shares(candidates, "grid_filter", 0.5, PAPER_BOX).sum() == 0
    assert shares(candidates, "filter_grid", 0.5, PAPER_BOX).tolist() == [0, 1]
    with pytest.raises(ValueError, match="unknown rule 'best'; expected one of grid_filter"):
        shares(PAPER, "best", 0.8, PAPER_BOX)


def invented_objectives(archs):
    """Errors that fall with every layer's size, and costs that rise with it."""
    heads, neurons = np.asarray(archs.heads, float), np.asarray(archs.neurons, float)
    kept = np.arange(SPACE.num_layers) < np.asarray(archs.depth)[:, None]
    gain = np.array([1.0, 0.2, 0.6, 0.1])
    size = (kept * (heads / 4 + neurons / 8)).sum(1)
    error = np.exp(-0.4 * (kept * (heads / 4 + neurons / 8) * gain).sum(1))
    return np.stack([error, size, size + kept.sum(1), size * 2.0], axis=1)


@pytest.fixture(scope="module")
def study():
    def key(name, index=0):
        return jax.random.fold_in(jax.random.key(sum(name.encode())), index)

    grid = jax.tree.map(np.asarray, selection_search.concrete.grid(SPACE))
    points = [
        SimpleNamespace(
            depth=float(grid.depth[i]) / 4,
            width=float(grid.heads[i, 0]) / 4,
            arch=jax.tree.map(lambda leaf, i=i: leaf[i], grid),
        )
        for i in range(16)
    ]
    session = SimpleNamespace(say=lambda text: None)
    return SimpleNamespace(
        context=SimpleNamespace(space=SPACE, session=session),
        config=SimpleNamespace(search=SimpleNamespace(population_size=32)),
        stages=SimpleNamespace(elastic=None),
        grid=points,
        key=key,
    )


@pytest.fixture(scope="module")
def judged():
    grid = jax.tree.map(np.asarray, selection_search.concrete.grid(SPACE))
    return Evaluation(invented_objectives, invented_objectives(grid))


@pytest.fixture(scope="module")
def rows(study, judged):
    """Of the units "archive" and "search" on an invented supernet."""
    patch = pytest.MonkeyPatch()
    patch.setattr(selection_search, "evaluation", lambda study: judged)
    patch.setattr(
        final,
        "subnetworks",
        lambda study, params, archs: 1 - invented_objectives(selection._stack(archs))[:, 0],
    )
    patch.setattr(selection_search, "EVALUATIONS", 128)
    found = {unit: selection.run(study, unit) for unit in ("archive", "search")}
    patch.undo()
    return found


def test_volume_is_inclusion_and_exclusion():
    rng = np.random.default_rng(0)
    points, reference = rng.random((5, 4)), np.array([1.0, 2.0, 0.5, 1.5])
    scaled = np.minimum(points / reference, 1)
    expected = 0.0
    for count in range(1, 6):
        for part in itertools.combinations(scaled, count):
            expected -= (-1) ** count * np.prod(1 - np.max(part, axis=0))
    np.testing.assert_allclose(selection_search.volume(points, reference), expected, rtol=1e-5)


def test_searches_against_exhaustive_evaluation(rows):
    def share(kind, searcher):
        return [
            r["share"] for r in rows["search"] if (r["kind"], r.get("searcher")) == (kind, searcher)
        ]

    for searcher in ("nsga2", "random"):
        found = share("uniform", searcher)
        assert all(np.diff(found) >= 0) and 0 < found[0] < found[-1] <= 1 + 1e-6
    assert share("uniform", "nsga2")[-1] >= 0.99
    for searcher in SEARCHERS:
        assert all(np.diff(share("per_layer", searcher)) >= -1e-9), searcher
    # What begins with the grid never falls below it, and what is shown twice is as good again.
    assert min(share("per_layer", "nsga2_grid") + share("per_layer", "random_grid")) >= 1 - 1e-6
    assert share("per_layer", "nsga2_grid")[-1] > 1
    # The invented test data are the select split again.
    last = [r for r in rows["search"] if "test_share" in r]
    assert [r["searcher"] for r in last] == [*SEARCHERS, "uniform"]
    for row in last:
        np.testing.assert_allclose(row["test_share"], row["share"], rtol=1e-6)
    assert last[-1]["share"] == pytest.approx(1) and last[-1]["evaluations"] == 16
    grid_random = [r["evaluations"] for r in rows["search"] if r.get("searcher") == "random_grid"]
    assert grid_random == [32 * n + 16 for n in range(1, 5)]


def test_single_layers_are_never_worse_within_a_limit(rows):
    finds = [r for r in rows["search"] if r["kind"] == "find" and r["rule"] == "lowest_error"]
    by_source = {(r["source"], r["limit"]): r["select_accuracy"] for r in finds}
    for limit in selection.LIMITS:
        assert by_source["per_layer", limit] >= by_source["uniform", limit] - 1e-6
    assert all(abs(r["select_accuracy"] - r["test_accuracy"]) < 1e-6 for r in finds)


def test_archive_rows(rows, judged):
    candidates = [r for r in rows["archive"] if r["kind"] == "candidate"]
    np.testing.assert_allclose([r["size_bytes"] for r in candidates], judged.grid[:, 1])
    assert min(r["size"] for r in candidates) == 0 and max(r["size"] for r in candidates) == 1
    best = max((r for r in candidates if r["size"] <= 0.8), key=lambda r: r["select_accuracy"])
    row = next(
        r for r in rows["archive"]
        if r["kind"] == "choice" and (r["rule"], r["limit"]) == ("lowest_error", 0.8)
    )  # fmt: skip
    assert (row["heads"], row["blocks"]) == (best["heads"], best["blocks"])
    np.testing.assert_allclose(row["test_accuracy"], best["test_accuracy"], rtol=1e-6)
