"""The machinery of the experiments: statistics, resuming, and who may read test data."""

import ast
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import acme_jax
from acme_jax import layout
from acme_jax.config import ConfigError
from acme_jax.experiments import registry, running
from acme_jax.experiments.experiment import Experiment
from acme_jax.experiments.settings import SETTINGS, settings
from acme_jax.experiments.statistics import estimate, paired
from acme_jax.experiments.study import open_study
from acme_jax.progress import Reporter, StopFlag
from acme_jax.session import StoppedError

PACKAGE = Path(acme_jax.__file__).parent


def test_interval_is_scipys():
    values = [0.71, 0.74, 0.69, 0.75, 0.73]
    found = estimate(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert math.isclose(found.mean - found.half_width, low)
    assert math.isclose(found.mean + found.half_width, high)
    assert found.num == 5


def test_pairs_remove_what_seeds_share():
    rng = np.random.default_rng(0)
    seeds = rng.normal(0.7, 0.1, 5)
    ours, theirs = seeds + 0.02 + rng.normal(0, 0.001, 5), seeds
    assert paired(ours, theirs).sign == 1
    assert paired(theirs, ours).sign == -1
    unpaired = estimate(ours).half_width
    assert paired(ours, theirs).half_width < unpaired / 10


@pytest.mark.parametrize(("values", "sign"), [([0.1], 0), ([0.1, -0.1], 0), ([0.1, 0.11, 0.1], 1)])
def test_sign_needs_an_interval_beside_zero(values, sign):
    assert estimate(values).sign == sign


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError, match="pairs, got 2 and 3"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])


def _reads_test_data(path):
    """Names of test data in a module: an attribute `test`, or the type of a test split."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in ("test", "TestSplit"):
            yield node.lineno
        if isinstance(node, ast.Name) and node.id == "TestSplit":
            yield node.lineno


def test_only_the_final_evaluation_reads_test_data():
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(_reads_test_data(path))
    }
    assert "experiments/final.py" in readers  # the search finds what there is
    allowed = {
        "experiments/final.py",
        "results.py",  # the final evaluation of a run
        "splits.py", "fleet.py",  # make test splits and hand them on
        "system.py",  # how long the longest is, for padding
        "cifar.py",  # another `test`: the archives' test files
        "fleet_refinement.py",  # the final evaluation of a simulated fleet
    }  # fmt: skip
    assert readers <= allowed


def test_an_experiment_is_found_by_name():
    with pytest.raises(ConfigError, match="unknown experiment 'x'; expected one of backbone_grid"):
        registry.experiment("x")
    for name in registry.EXPERIMENTS:
        assert registry.experiment(name).name == name
    with pytest.raises(ConfigError, match="expected one of fashion_mnist, cifar100"):
        settings("x")
    assert {SETTINGS[name]().data.name for name in SETTINGS} >= {"cifar100", "fashion_mnist"}


@pytest.fixture
def config():
    return dataclasses.replace(settings("tiny"), seed=3)


def _counting(calls, stop=None):
    def run(study, unit):
        calls.append((study.config.seed, unit))
        if stop is not None:
            stop.requested = True
        return [{"sub_networks": len(study.grid), "accuracy": np.float32(0.5)}]

    return Experiment("counting", "counts", lambda config: ["a", "b"], run)


def test_a_stopped_experiment_goes_on_where_it_was(config, tmp_path):
    layout.configure(config.compute)
    calls, stop = [], StopFlag()
    experiment = _counting(calls, stop)
    reporter = Reporter("quiet")
    with pytest.raises(StoppedError, match="counting a, seed 3; the same command goes on"):
        running.run_seed([experiment], config, tmp_path, reporter, stop)
    stop.requested = False
    running.run_seed([experiment], config, tmp_path, reporter, stop)
    running.run_seed([experiment], config, tmp_path, reporter, stop)  # nothing is left to do
    assert calls == [(3, "a"), (3, "b")]
    cached = dataclasses.replace(config.compute, compilation_cache=str(tmp_path / "compiled"))
    placed = dataclasses.replace(config, compute=cached)
    found = running.document(experiment, placed, [3], tmp_path, "command")
    assert str(tmp_path) not in json.dumps(found["config"])  # no place on this machine
    assert found["rows"] == [
        {"seed": 3, "unit": unit, "sub_networks": 4, "accuracy": 0.5} for unit in ("a", "b")
    ]
    json.dumps(found, allow_nan=False)
    running.forget([experiment], [3], tmp_path)
    stop.requested = False
    with pytest.raises(StoppedError):
        running.run_seed([experiment], config, tmp_path, reporter, stop)
    assert calls[2:] == [(3, "a")]


def test_a_study_keeps_what_it_made(config, tmp_path):
    made = []

    def make():
        made.append(1)
        return {"weights": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}}, {
            "cell": [1]
        }

    for _ in range(2):
        with open_study(config, tmp_path, Reporter("quiet"), StopFlag()) as study:
            tree, facts = study.cached("thing", make)
            assert np.array_equal(tree["weights"]["kernel"], np.arange(6.0).reshape(2, 3))
            assert facts == {"cell": [1]}
            assert study.point(0.5, 1.0).arch.depth == 2
    assert len(made) == 1
