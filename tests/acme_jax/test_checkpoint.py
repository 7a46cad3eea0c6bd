import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from acme_jax.checkpoint import CheckpointError, CheckpointStore


class State(NamedTuple):
    params: dict
    optimizer: object
    key: jax.Array
    count: jax.Array


def make_state(seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "dense": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=5), jnp.bfloat16),
        "with/odd ['name']": jnp.arange(3) > 1,
    }
    return State(
        params=params,
        optimizer=optax.adamw(1e-3).init(params),
        key=jax.random.split(jax.random.key(seed), 3),
        count=jnp.int32(seed),
    )


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            assert jax.random.key_impl(x) == jax.random.key_impl(y)
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.tobytes() == y.tobytes()


@pytest.fixture
def lines():
    return []


@pytest.fixture
def store(tmp_path, lines):
    return CheckpointStore(tmp_path / "checkpoints", log=lines.append)


def files_of(store, step):
    return sorted(p for p in store._path(step).rglob("*") if p.is_file())


def biggest_array_file(store, step):
    return max(files_of(store, step), key=lambda p: p.stat().st_size)


def test_round_trip_is_exact(store):
    state = make_state(7)
    store.save(12, state, {"phase": "width", "rows": [1, 2]})
    restored = store.restore_latest(make_state(8))
    assert restored.step == 12
    assert restored.meta == {"phase": "width", "rows": [1, 2]}
    assert_identical(restored.tree, state)


def test_special_values_keep_their_bits(store):
    tree = {
        "floats": np.array([np.nan, -np.nan, -0.0, np.inf, 1e-45], np.float32),
        "double": np.array([np.pi, np.nextafter(1.0, 2.0)]),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float64(0.1),
        "rank_0": np.array(3, np.int64),
        "impl": jax.random.key(1, impl="rbg"),
        "no_keys": jax.random.split(jax.random.key(0), 2)[:0],
        "none": None,
        "nothing": (),
        "python": (3, 0.1, True),
    }
    store.save(0, tree)
    restored = store.restore(0, tree).tree
    assert restored["python"] == (3, 0.1, True)
    assert isinstance(restored["python"][2], bool)
    assert_identical(restored, tree)


def test_empty_tree(store):
    store.save(0, {}, {"only": "meta"})
    assert store.restore_latest({}).meta == {"only": "meta"}


def test_without_template_gives_paths(store):
    store.save(1, {"a": (jnp.ones(2), {"b": jnp.int32(3)})})
    tree = store.restore(1).tree
    assert set(tree) == {"['a'][0]", "['a'][1]['b']"}
    np.testing.assert_array_equal(tree["['a'][1]['b']"], 3)


def test_abstract_template(store):
    state = make_state(1)
    store.save(1, state)
    assert_identical(store.restore(1, jax.eval_shape(lambda: make_state(1))).tree, state)


def test_sharded_arrays_come_back_sharded(store):
    mesh = jax.make_mesh((2,), ("clients",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("clients"))
    value = jax.device_put(jnp.arange(8.0), sharding)
    store.save(1, {"x": value})
    restored = store.restore(1, {"x": value}).tree["x"]
    assert restored.sharding == sharding
    np.testing.assert_array_equal(restored, np.arange(8.0))


def test_nothing_saved(store, lines):
    assert store.newest() is None
    assert store.restore_latest({}) is None
    assert lines == []
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; there are: \[\]"):
        store.restore(4)


def test_only_the_newest_and_milestones_are_kept(store):
    for step in range(6):
        store.save(step, {"x": jnp.full(2, step)}, milestone=step == 1)
    assert store.steps() == [1, 3, 4, 5]
    np.testing.assert_array_equal(store.restore(1, {"x": jnp.zeros(2, jnp.int32)}).tree["x"], 1)


def test_same_step_is_replaced(store):
    store.save(3, {"x": jnp.zeros(2)})
    store.save(3, {"x": jnp.ones(2)}, {"second": True})
    restored = store.restore_latest({"x": jnp.zeros(2)})
    assert restored.meta == {"second": True}
    np.testing.assert_array_equal(restored.tree["x"], np.ones(2))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"x": jnp.zeros((2, 3)), "y": jnp.zeros(1)}, r"it lacks 1 arrays, first \['y'\]"),
        ({}, r"it has 1 more arrays, first \['x'\]"),
        ({"x": jnp.zeros((3, 2))}, r"\['x'\] is float32 \[2, 3\], expected float32 \[3, 2\]"),
        ({"x": jnp.zeros((2, 3), jnp.int32)}, r"is float32 \[2, 3\], expected int32 \[2, 3\]"),
        ({"x": jax.random.key(0)}, r"is float32 \[2, 3\], expected key<fry> \[\]"),
    ],
)
def test_template_that_does_not_fit(store, template, message):
    store.save(5, {"x": jnp.zeros((2, 3))})
    with pytest.raises(CheckpointError, match=f"step 5 does not fit .*{message}"):
        store.restore_latest(template)
    assert store.steps() == [5]  # A wrong template is no damage.


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda s: truncate(biggest_array_file(s, 2)), "is truncated or altered"),
        (lambda s: flip(biggest_array_file(s, 2)), "is truncated or altered"),
        (lambda s: biggest_array_file(s, 2).unlink(), "is missing"),
        (lambda s: (s._path(2) / "manifest.json").unlink(), "manifest is missing or unreadable"),
        (lambda s: truncate(s._path(2) / "meta.json"), "meta.json is truncated or altered"),
        (lambda s: (s._path(2) / "manifest.json").write_text("{"), "manifest is missing or unre"),
        (lambda s: (s._path(2) / "manifest.json").write_text("5"), "manifest is missing or unre"),
        (lambda s: (s._path(2) / "stray").write_text("x"), "file stray does not belong to it"),
    ],
)
def test_damaged_newest_falls_back_and_says_so(store, lines, harm, reason):
    states = [make_state(seed) for seed in range(3)]
    for step, state in enumerate(states):
        store.save(step, state, {"seed": step})
    harm(store)
    restored = store.restore_latest(make_state())
    assert (restored.step, restored.meta) == (1, {"seed": 1})
    assert_identical(restored.tree, states[1])
    (line,) = lines
    assert line.startswith("checkpoint of step 2 is damaged (") and reason in line
    assert line.endswith("; falling back to step 1")
    # The damaged one is out of the way, also for the next start and for the same step again.
    assert store.steps() == [0, 1]
    store.save(2, states[2])
    assert store.restore_latest(make_state()).step == 2
    assert len(lines) == 1


def test_all_damaged(store, lines):
    for step in (1, 2):
        store.save(step, {"x": jnp.zeros(2)})
        (store._path(step) / "manifest.json").unlink()
    assert store.restore_latest({"x": jnp.zeros(2)}) is None
    assert lines[0].endswith("falling back to step 1")
    assert lines[1].endswith("no older one is left")


def test_restoring_a_damaged_step_directly(store):
    store.save(1, {"x": jnp.zeros(2)})
    biggest_array_file(store, 1).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        store.restore(1, {"x": jnp.zeros(2)})


def test_interrupted_save_is_ignored_and_cleaned(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    store.save(1, {"x": jnp.zeros(2)})

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("acme_jax.checkpoint_files.digests", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.save(2, {"x": jnp.ones(2)})
    assert store.steps() == [1]
    assert len(list(tmp_path.iterdir())) == 2
    assert CheckpointStore(tmp_path).restore_latest({"x": jnp.zeros(2)}).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


# What tensorstore says, and what the system says to the JSON files.
TENSORSTORE_FULL = ValueError(
    'RESOURCE_EXHAUSTED: Error writing "00000/0" in OCDBT database: Failed to write 6742016 bytes '
    "to file 11: No space left on device [os_error_code='28']"
)
SYSTEM_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failure", [TENSORSTORE_FULL, SYSTEM_FULL])
def test_full_disk_is_one_line_and_costs_no_older_checkpoint(tmp_path, monkeypatch, failure):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"x": jnp.zeros(2)})

    def fail(*_):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr("acme_jax.checkpoint_files.digests", fail)
        with pytest.raises(CheckpointError) as caught:
            store.save(2, {"x": jnp.ones(250_000)})
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(tmp_path), "step 2", "disk is full", "1.0 MB needed", "MB free", "step 1;"):
        assert part in message
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    assert store.restore_latest({"x": jnp.zeros(2)}).step == 1


def test_too_little_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=999)
    monkeypatch.setattr("acme_jax.checkpoint_files.shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr("acme_jax.checkpoint_files._orbax_alone", None)
    with pytest.raises(CheckpointError, match=r"the disk is full .*; there is no older one"):
        store.save(1, {"x": jnp.zeros(250)})
    assert not list(tmp_path.iterdir())


def test_other_failures_of_a_save_are_not_dressed_up(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("a bug")

    monkeypatch.setattr("acme_jax.checkpoint_files.digests", fail)
    with pytest.raises(ValueError, match="a bug") as caught:
        CheckpointStore(tmp_path).save(1, {"x": jnp.zeros(2)})
    assert not isinstance(caught.value, CheckpointError)


WRITER = """
import sys
import numpy as np
from acme_jax.checkpoint import CheckpointStore
store = CheckpointStore(sys.argv[1])
for step in range(int(sys.argv[2]), 10_000):
    store.save(step, {f"x{i}": np.full((200, 50), step + i) for i in range(8)}, {"step": step})
    print(step, flush=True)
"""


def test_killed_writer_leaves_a_whole_checkpoint(tmp_path):
    """SIGKILL at arbitrary moments: what is found is whole, and not older than announced."""
    template = {f"x{i}": np.zeros((200, 50), int) for i in range(8)}
    start = 0
    for pause in (0.0, 0.04):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            announced = [int(process.stdout.readline()) for _ in range(2)]
            time.sleep(pause)
            os.kill(process.pid, signal.SIGKILL)
            announced += [int(line) for line in process.stdout.read().split()]
        restored = CheckpointStore(tmp_path, log=pytest.fail).restore_latest(template)
        assert restored.step in (announced[-1], announced[-1] + 1)
        assert restored.meta == {"step": restored.step}
        for i in range(8):
            np.testing.assert_array_equal(restored.tree[f"x{i}"], restored.step + i)
        start = restored.step + 1


def test_meta_must_be_json(store):
    with pytest.raises(TypeError, match="JSON"):
        store.save(1, {}, {"array": np.zeros(2)})
    assert store.steps() == []


def test_manifest_covers_every_file(store):
    path = store.save(1, make_state())
    names = {p.relative_to(path).as_posix() for p in files_of(store, 1)}
    assert set(json.loads((path / "manifest.json").read_text())) == names - {"manifest.json"}
