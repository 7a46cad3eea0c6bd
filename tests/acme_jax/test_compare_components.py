"""The comparison of the refinement's choices: its bytes, its configuration and its tables."""

import importlib
import zlib
from pathlib import Path

import numpy as np
import pytest

from acme_jax import messages, number_formats
from acme_jax.post import Post

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def stream(seed, num_rounds=4, num_gates=80):
    """What one device sends up: a sketch, then importances that keep their order of magnitude."""
    rng = np.random.default_rng(seed)
    sketch = np.sort(rng.normal(size=(8, 10)), axis=0).astype(np.float16)
    scale = np.exp(rng.normal(0, 3, num_gates))
    sets = (scale * rng.chisquare(4, (num_rounds, num_gates))).astype(np.float32)
    return [messages.FeatureSketch(sketch), *(messages.ImportanceSet(row) for row in sets)]


def test_bytes_are_those_that_a_run_would_count(scripts):
    compare = scripts("compare_components")
    streams = [stream(0), stream(1)]
    found = {
        (row["format"], row["message"], row["coding"]): (row["messages"], row["bytes"])
        for row in compare.coded_bytes(streams)
    }
    assert {form for form, _, _ in found} == set(compare.FORMATS)
    for form, (importance, sketch) in compare.FORMATS.items():
        plain, adaptive, compressed = Post(), Post("adaptive"), 0
        for sender, sent in enumerate(streams):
            for index, message in enumerate(sent):
                values = np.asarray(message[0], np.float32)
                formed = (
                    messages.ImportanceSet(number_formats.importance(values, importance))
                    if index
                    else messages.FeatureSketch(number_formats.sketch(values, sketch))
                )
                for post in (plain, adaptive):
                    post.send_up(formed, sender=sender, round=index)
                if index:
                    compressed += len(zlib.compress(messages.encode(formed), 9))
        for kind, count in (("feature_sketch", 2), ("importance_set", 8)):
            for coding, post in (("none", plain), ("adaptive", adaptive)):
                assert found[form, kind, coding] == (count, post.ledger.total(kind=kind))
        assert found[form, "importance_set", "zlib"] == (8, compressed)


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_every_data_set_has_one_edge(scripts, name, tmp_path):
    config = scripts("compare_components").configuration(name, tmp_path)
    assert (config.data.name, config.fleet.num_edges) == (name, 1)
    assert config.refine.similarity == "per_dimension"


def document(codings=("none", "zlib", "adaptive")):
    """Two seeds and devices: kde is a point ahead of per_dimension, flat a point or two behind."""
    rows = []
    for seed in (0, 1):
        for name, lead in (("per_dimension", 0.0), ("flat", -0.01 - 0.01 * seed), ("kde", 0.01),
                           ("avg", -0.03)):  # fmt: skip
            for device in (0, 1):
                row = {"kind": "accuracy", "seed": seed, "similarity": name, "device": device}
                row["test_accuracy"] = 0.8 + 0.1 * seed + lead + 0.05 * device
                if name != "avg":
                    row |= {"up_bytes": 800.0 if name == "kde" else 2000.0, "down_bytes": 0.0}
                rows.append(row)
        for kind, form in (("feature_sketch", "float"), ("importance_set", "float")):
            for coding in codings:
                size = {"none": 4000, "zlib": 3600, "zstd": 3500, "adaptive": 3000}[coding]
                rows.append({"kind": "bytes", "seed": seed, "format": form, "message": kind,
                             "coding": coding, "messages": 2, "bytes": size})  # fmt: skip
    return {"seeds": [0, 1], "rows": rows}


def test_tables(scripts):
    tables = scripts("results_components").TABLES
    lines = tables["components_accuracy"](document())
    assert lines[2].startswith("| Wasserstein, per dimension | 87.5 ±")
    assert "+1.0 ± 0.0 | 800 | 0 |" in next(line for line in lines if "kernel" in line)
    flat = next(line for line in lines if "flat" in line)
    assert "-1.5 ± 6.4" in flat  # Student's t with one degree of freedom: 12.7 * 0.5
    assert next(line for line in lines if "average" in line).endswith("| 0 | 0 |")
    lines = tables["components_coding"](document())
    assert lines[0] == "| message | format | none | zlib | adaptive | adaptive saves |"
    assert lines[2] == "| feature sketch, once | float | 2,000 | 1,800 | 1,500 | 25 % |"
    assert lines[-1].endswith("zstd was not installed.")
    lines = tables["components_coding"](document(("none", "zlib", "zstd", "adaptive")))
    assert "| zstd |" in lines[0] and not lines[-1].endswith("installed.")
