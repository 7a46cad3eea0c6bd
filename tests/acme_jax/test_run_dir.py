import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acme_jax import run_dir
from acme_jax.config import ComputeConfig, Config, DataConfig, from_dict
from acme_jax.run_dir import RunDirectory, RunError, write_json

CONFIG = Config(seed=3)


def create(path, config=CONFIG, resume=False):
    return RunDirectory.create_or_open(path, config, resume=resume)


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def events(path):
    """{tag: [(step, value)]} of all event files, as TensorBoard's record format stores them."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in sorted((path / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_new_run_writes_config_and_versions(tmp_path):
    path = tmp_path / "runs" / "one"
    run = create(path)
    assert from_dict(json.loads((path / "config.json").read_text())) == CONFIG
    versions = json.loads((path / "versions.json").read_text())
    assert versions["packages"]["jax"] == jax.__version__
    assert versions["hardware"]["devices"] == ["cpu", "cpu"]
    assert versions["hardware"]["memory_bytes"] > 2**28
    assert not run.finished


def test_second_start_needs_resume(tmp_path):
    create(tmp_path)
    with pytest.raises(RunError, match="holds this run already, started; add --resume"):
        create(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(RunError, match="holds this run already, finished; add --resume"):
        create(tmp_path)
    assert create(tmp_path, resume=True).finished


@pytest.mark.parametrize("resume", [False, True])
def test_another_run_names_the_keys_that_differ(tmp_path, resume):
    create(tmp_path)
    other = dataclasses.replace(CONFIG, seed=4, data=DataConfig(public_test=99))
    expected = r"another run.*: data\.public_test is 500 there, 99 now; seed is 3 there, 4 now$"
    with pytest.raises(RunError, match=expected):
        create(tmp_path, other, resume)


def test_another_compute_layout_is_the_same_run(tmp_path):
    create(tmp_path)
    create(tmp_path, dataclasses.replace(CONFIG, compute=ComputeConfig(num_devices=1)), resume=True)


def test_directory_with_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"holds files but no run \(thesis.tex\)"):
        create(tmp_path, resume=True)
    with pytest.raises(RunError, match="is not a directory"):
        create(tmp_path / "thesis.tex")


def test_unreadable_config(tmp_path):
    (tmp_path / "config.json").write_text('{"speed": 1}')
    with pytest.raises(RunError, match="unknown configuration key speed"):
        create(tmp_path, resume=True)
    (tmp_path / "config.json").write_text('{"se')
    with pytest.raises(RunError, match="is not the configuration of a run"):
        create(tmp_path, resume=True)


def test_killed_in_its_first_moment(tmp_path):
    (tmp_path / ".config.json.tmp").write_text('{"se')
    create(tmp_path)
    (tmp_path / "versions.json").unlink()
    create(tmp_path, resume=True)
    assert (tmp_path / "versions.json").exists()


def test_other_versions_are_noted(tmp_path):
    run = create(tmp_path)
    versions = json.loads((tmp_path / "versions.json").read_text())
    versions["packages"]["jax"] = "0.0.1"
    write_json(tmp_path / "versions.json", versions)
    create(tmp_path, resume=True)
    log = (tmp_path / "run.log").read_text()
    assert f"packages.jax is '0.0.1' there, '{jax.__version__}' now" in log
    run.log("second")
    assert (tmp_path / "run.log").read_text().endswith(" second\n")


def test_metrics_rows(tmp_path):
    run = create(tmp_path)
    run.append_metrics("reference", epoch=0, loss=jnp.float32(0.1), rates=np.array([0.5, 1.0]))
    run.append_metrics("width", loss=float("nan"), counts=(1, 2), note="x")
    # Readable at once, without closing: a killed run keeps its rows.
    assert rows(tmp_path) == [
        {"step": 1, "phase": "reference", "epoch": 0, "loss": float(np.float32(0.1)),
         "rates": [0.5, 1.0]},
        {"step": 2, "phase": "width", "loss": None, "counts": [1, 2], "note": "x"},
    ]  # fmt: skip
    run.close()
    assert run.step == 2
    found = events(tmp_path)
    assert found["reference/loss"] == [(1, pytest.approx(0.1))]
    assert "width/loss" not in found


def performance(path):
    return [json.loads(line) for line in (path / "performance.jsonl").read_text().splitlines()]


def test_performance_rows_are_kept_on_resume_and_do_not_touch_the_metrics(tmp_path):
    run = create(tmp_path)
    for done in (1, 2):
        run.append_metrics("train", loss=1.0 / done)
        run.append_performance("train", done=done, seconds=0.5 * done, clients_per_second=4.0)
    run.close()
    with (tmp_path / "performance.jsonl").open("a") as file:
        file.write('{"phase": "tr')  # Torn by a kill.
    run = create(tmp_path, resume=True)
    run.truncate_to(1)
    run.append_metrics("train", loss=0.5)
    run.append_performance("train", done=2, seconds=7.0)
    run.close()
    assert performance(tmp_path) == [
        {"phase": "train", "done": 1, "seconds": 0.5, "clients_per_second": 4.0},
        {"phase": "train", "done": 2, "seconds": 1.0, "clients_per_second": 4.0},
        {"phase": "train", "done": 2, "seconds": 7.0},
    ]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    found = events(tmp_path)
    assert found["performance/train/seconds"] == [(1, 0.5), (2, 1.0), (2, 7.0)]
    assert [step for step, _ in found["train/loss"]] == [1, 2]


def test_resume_drops_later_rows_and_equals_an_uninterrupted_run(tmp_path):
    def log(run, start, stop):
        for i in range(start, stop):
            run.append_metrics("train", loss=1 / (i + 1))

    whole = create(tmp_path / "whole")
    log(whole, 0, 10)
    whole.close()

    first = create(tmp_path / "killed")
    log(first, 0, 7)
    first.close()
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "ph')  # Torn by the kill.
    second = create(tmp_path / "killed", resume=True)
    second.truncate_to(5)
    log(second, 5, 10)
    second.close()
    expected = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == expected
    assert events(tmp_path / "killed") == events(tmp_path / "whole")


def test_truncate_while_open_and_to_nothing(tmp_path):
    run = create(tmp_path)
    run.truncate_to(0)
    for i in range(3):
        run.append_metrics("a", x=i)
    run.truncate_to(1)
    run.append_metrics("a", x=9)
    assert [(r["step"], r["x"]) for r in rows(tmp_path)] == [(1, 0), (2, 9)]
    run.close()


def test_torn_line_after_opening_without_truncation(tmp_path):
    run = create(tmp_path)
    run.append_metrics("a", x=0)
    run.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    run = create(tmp_path, resume=True)
    assert run.step == 1
    run.append_metrics("a", x=1)
    run.close()
    assert [r["step"] for r in rows(tmp_path)] == [1, 2]


def test_fewer_rows_than_the_checkpoint_knows(tmp_path):
    run = create(tmp_path)
    run.append_metrics("a", x=0)
    with pytest.raises(RunError, match=r"has 1 rows, but the checkpoint was written after 2"):
        run.truncate_to(2)


def test_write_json_replaces_whole_files(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_commit_only_of_the_own_repository(tmp_path, monkeypatch):
    package = tmp_path / "lib" / "acme_jax"
    package.mkdir(parents=True)
    monkeypatch.setattr(run_dir, "__file__", str(package / "run_dir.py"))
    assert run_dir.versions()["commit"] is None
    (Path(tmp_path) / "lib" / ".git").mkdir()  # Not a repository: git fails, the run does not.
    assert run_dir.versions()["commit"] is None
