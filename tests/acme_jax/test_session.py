"""Phases that are interrupted anywhere end as if they had not been."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from acme_jax.checkpoint import CheckpointStore
from acme_jax.config import Config
from acme_jax.performance import RoundMeter
from acme_jax.progress import Reporter, StopFlag
from acme_jax.run_dir import RunDirectory
from acme_jax.session import Session, StoppedError
from acme_jax.training import NonFiniteLossError

TOTAL = 3


class Killed(BaseException):
    """Stands for SIGKILL: nothing below may catch it."""


class Bomb:
    """Kills at the given event of the run; events are counted from 1."""

    def __init__(self, at=0):
        self.count, self.at = 0, at

    def __call__(self):
        self.count += 1
        if self.count == self.at:
            raise Killed


def advance(name, state, index, count):
    """A unit whose result depends on everything before it."""
    rows = []
    for i in range(index, index + count):
        state = {"x": jnp.sin(state["x"] * 3.0 + i), "log": state["log"].at[i].set(state["x"][0])}
        rows.append({"unit": i + 1, "phase_name": name, "loss": float(state["x"].sum())})
    return state, rows


def run(path, *, bomb=None, stop=None, stop_at=0, calls=None, bad=None, resume=True):
    """Three phases, the second in strides and the third with extra values; returns the results.

    Args:
      path: of the run directory.
      bomb: called before and after each unit, and within each save.
      stop: a flag that the unit number `stop_at` sets.
      stop_at: counted over the run, from 1.
      calls: receives (phase, index) of each call.
      bad: (phase, index) whose loss is not finite.
      resume: continue what is there.
    """
    bomb, stop = bomb or Bomb(), stop or StopFlag()
    calls = [] if calls is None else calls
    directory = RunDirectory.create_or_open(path, Config(), resume=resume)
    said = []
    session = Session(directory, Reporter("quiet"), stop)
    session.reporter.say = said.append
    facts = {}

    def step(name, stride):
        def unit(state, index):
            bomb()
            calls.append((name, index))
            if len(calls) == stop_at:
                stop.requested = True
            state, rows = advance(name, state, index, min(stride, TOTAL - index))
            if (name, index) == bad:
                rows[-1] |= {"loss": float("nan"), "bad_step": 7}
            if name == "third":
                facts["cell"] = index
            bomb()
            return state, rows

        return unit

    def phase(name, start, stride=1, **options):
        return session.loop(
            name,
            total=TOTAL,
            every=2,
            stride=stride,
            initial=lambda: {"x": start, "log": jnp.zeros(TOTAL)},
            advance=step(name, stride),
            **options,
        )

    try:
        state = phase("first", jnp.arange(4.0))
        state = phase("second", state["x"], stride=2)
        shape = {"x": jnp.zeros(4), "log": jnp.zeros(TOTAL)}
        state = phase(
            "third",
            state["x"],
            template=lambda extra: shape if "cell" in extra else None,
            extra=lambda: dict(facts),
            restored=facts.update,
        )
        session.finish()
        directory.append_metrics("evaluation", accuracy=float(state["log"].sum()))
    finally:
        directory.close()
    return {"state": np.concatenate([state["x"], state["log"]]), "facts": facts, "said": said}


def performance(path):
    return [json.loads(line) for line in (path / "performance.jsonl").read_text().splitlines()]


def metrics(path):
    return (path / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: directory, results, and the number of its events."""
    path, bomb = tmp_path_factory.mktemp("whole") / "run", Bomb()
    return path, run(path, bomb=bomb), bomb.count


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the uninterrupted run, to be spoilt."""
    shutil.copytree(whole[0], tmp_path / "run")
    return tmp_path / "run"


def assert_equals_whole(whole, path, result):
    np.testing.assert_array_equal(result["state"], whole[1]["state"])
    assert result["facts"] == whole[1]["facts"]
    assert metrics(path) == metrics(whole[0])


def test_uninterrupted_run_writes_every_row_once(whole):
    rows = [json.loads(line) for line in metrics(whole[0]).splitlines()]
    units = [(row["phase"], row["unit"]) for row in rows[:-1]]
    assert units == [(name, i + 1) for name in ("first", "second", "third") for i in range(TOTAL)]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["phase"] == "evaluation"


def test_performance_has_a_row_for_every_call(whole, tmp_path):
    done = [(row["phase"], row["done"]) for row in performance(whole[0])]
    assert done == [
        *(("first", n) for n in (1, 2, 3)),
        *(("second", n) for n in (2, 3)),  # in strides of 2
        *(("third", n) for n in (1, 2, 3)),
    ]
    for row in performance(whole[0]):
        assert row["seconds"] >= row["compile_seconds"] >= 0.0
        assert row["host_memory_bytes"] > 2**26
    with pytest.raises(Killed):
        run(tmp_path / "run", bomb=Bomb(4))  # the second unit is done and not saved
    run(tmp_path / "run")
    again = [(row["phase"], row["done"]) for row in performance(tmp_path / "run")]
    assert again == [("first", 1), *done]  # done twice, since nothing had been saved
    assert metrics(tmp_path / "run") == metrics(whole[0])


def test_meter_is_made_only_for_work(tmp_path):
    made = []

    def meter():
        made.append(1)
        return RoundMeter(clients=6)

    for resume in (False, True):
        directory = RunDirectory.create_or_open(tmp_path, Config(), resume=resume)
        session = Session(directory, Reporter("quiet"), StopFlag())
        session.loop(
            "only", total=2, every=1, initial=lambda: jnp.zeros(2),
            advance=lambda state, index: (state + 1, []), meter=meter,
        )  # fmt: skip
        directory.close()
    assert made == [1]
    for row in performance(tmp_path):
        assert row["clients_per_second"] == pytest.approx(
            6 / (row["seconds"] - row["compile_seconds"])
        )


# Events: 2 for each of the 3 + 2 + 3 calls. Odd: before a unit; even: after it, unsaved.
@pytest.mark.parametrize("event", range(1, 17))
def test_killed_around_any_unit(whole, tmp_path, event):
    assert whole[2] == 16
    with pytest.raises(Killed):
        run(tmp_path / "run", bomb=Bomb(event))
    assert_equals_whole(whole, tmp_path / "run", run(tmp_path / "run"))


@pytest.mark.parametrize("save", range(1, 7))
@pytest.mark.parametrize("moment", ["before", "inside", "after"])
def test_killed_in_any_save(whole, tmp_path, monkeypatch, save, moment):
    """The rows are ahead of the checkpoint, and the save may be half done."""
    bomb, original = Bomb(save), CheckpointStore.save

    def saving(self, step, tree, meta=None):
        if moment == "before":
            bomb()
        path = original(self, step, tree, meta)
        if moment == "inside":
            try:
                bomb()
            except Killed:
                (path / "manifest.json").unlink()  # Written last.
                path.rename(path.with_name(f"tmp_{path.name}"))
                raise
        if moment == "after":
            bomb()
        return path

    monkeypatch.setattr(CheckpointStore, "save", saving)
    with pytest.raises(Killed):
        run(tmp_path / "run")
    monkeypatch.undo()
    assert_equals_whole(whole, tmp_path / "run", run(tmp_path / "run"))


def test_killed_again_and_again(whole, tmp_path):
    path, kills, result = tmp_path / "run", 0, None
    while result is None and kills < 100:
        try:
            # The fifth event of a start: every start gets past one checkpoint.
            result = run(path, bomb=Bomb(5))
        except Killed:
            kills += 1
    assert 3 <= kills < 100
    assert_equals_whole(whole, path, result)


def test_complete_phases_are_read_back(whole, copy):
    calls = []
    result = run(copy, calls=calls)
    assert calls == []
    assert result["said"] == [
        f"{name}: read from the checkpoint" for name in ("first", "second", "third")
    ]
    assert_equals_whole(whole, copy, result)


def test_continuing_says_where(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path / "run", bomb=Bomb(5))
    calls = []
    result = run(tmp_path / "run", calls=calls)
    assert calls[0] == ("first", 2)
    assert result["said"] == ["first: continues at 2 of 3"]
    assert "first: continues at 2 of 3" in (tmp_path / "run" / "run.log").read_text()


def damage(path, phase, step):
    """Truncates the largest array file of one checkpoint."""
    folder = path / "checkpoints" / phase / f"step_{step:08d}" / "arrays"
    file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(file.read_bytes()[:-9])


def test_corrupt_checkpoint_falls_back_and_says_so(whole, copy):
    damage(copy, "second", 3)
    calls = []
    result = run(copy, calls=calls)
    damaged = [line for line in result["said"] if "damaged" in line]
    assert len(damaged) == 1
    assert "checkpoint of step 3 is damaged" in damaged[0]
    assert "truncated or altered" in damaged[0]
    assert damaged[0].endswith("falling back to step 2")
    assert damaged[0] in (copy / "run.log").read_text()
    # Everything from there on is computed again, phases that were complete included.
    assert calls == [("second", 2), ("third", 0), ("third", 1), ("third", 2)]
    assert_equals_whole(whole, copy, result)


def test_no_checkpoint_of_a_phase_is_left(whole, copy):
    damage(copy, "first", 2)
    damage(copy, "first", 3)
    calls = []
    result = run(copy, calls=calls)
    assert "no older one is left" in "".join(result["said"])
    assert len(calls) == 8
    assert_equals_whole(whole, copy, result)


def test_what_lies_beyond_the_continued_phase_is_discarded(copy):
    damage(copy, "first", 3)
    with pytest.raises(Killed):
        run(copy, bomb=Bomb(1))
    assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["first"]
    assert len(metrics(copy).splitlines()) == 2


@pytest.mark.parametrize("unit", [1, 3, 4, 5, 7])
def test_stop_saves_and_says_so(whole, tmp_path, unit):
    path, calls = tmp_path / "run", []
    message = r"stopped in phase (first|second|third) after \d of 3; .* continue with --resume"
    with pytest.raises(StoppedError, match=message):
        run(path, stop_at=unit, calls=calls)
    assert len(calls) == unit
    again = []
    result = run(path, calls=again)
    # No unit is lost: the second start does exactly the others.
    assert len(again) == 8 - unit
    assert_equals_whole(whole, path, result)


def test_stop_that_came_between_phases_starts_no_unit(tmp_path):
    stop, calls = StopFlag(), []
    stop.requested = True
    with pytest.raises(StoppedError, match="stopped in phase first after 0 of 3"):
        run(tmp_path / "run", stop=stop, calls=calls)
    assert calls == []


@pytest.mark.parametrize(
    ("bad", "where", "newest"),
    [
        (("first", 0), "phase first, epoch or round 1, step 7", []),
        (("first", 2), "phase first, epoch or round 3, step 7", [("first", 2)]),
        (("second", 0), "phase second, epoch or round 2, step 7", [("first", 3)]),
        (("third", 1), "phase third, epoch or round 2, step 7", [("second", 3)]),
    ],
)
def test_non_finite_loss_names_its_place_and_keeps_the_last_good_checkpoint(
    tmp_path, bad, where, newest
):
    path = tmp_path / "run"
    with pytest.raises(NonFiniteLossError, match=f"the loss became nan in {where}; .*Lower the"):
        run(path, bad=bad)
    for phase, step in newest:
        store = CheckpointStore(path / "checkpoints" / phase)
        state = store.restore_latest()
        assert state.step == step
        assert all(np.isfinite(leaf).all() for leaf in state.tree.values())
    if not newest:
        assert CheckpointStore(path / "checkpoints" / bad[0]).steps() == []


def test_first_moments(whole, tmp_path):
    """Killed before the first checkpoint directory, and before the first row."""
    path = tmp_path / "run"
    RunDirectory.create_or_open(path, Config(), resume=False).close()
    assert_equals_whole(whole, path, run(path))
