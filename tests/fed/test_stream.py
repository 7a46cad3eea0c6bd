"""Cohorts that stream: equal to the whole at once, restart, errors, threads, memory maps."""

import functools
import json
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fed import clients, mapped, simulate, stream
from fed.algorithms.fedavg import fedavg

COUNT, SIZE = 23, 5  # the last cohort holds 3 clients
RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(COUNT, 4)).astype(np.float32), "n": np.arange(COUNT, dtype=np.int32)}
SOURCE = stream.ArraySource(DATA)


@jax.jit
def step(carry, rows, cohort):
    """Counts, sums over clients, and one result for each client that depends on the order."""
    seen = carry["seen"] + cohort.valid.sum()
    total = carry["total"] + jnp.where(cohort.valid[:, None], rows["x"], 0.0).sum(axis=0)
    results = {
        "twice": 2 * rows["x"],
        "client": cohort.rows,
        "cohort": rows["n"] * 0 + cohort.number,
    }
    return {"seen": seen, "total": total}, results


def start():
    return {"seen": 0, "total": jnp.zeros(4)}


def blank():
    return {
        "twice": np.zeros((COUNT, 4), np.float32),
        "client": np.full(COUNT, -1, np.int32),
        "cohort": np.full(COUNT, -1, np.int32),
    }


def run(size=SIZE, source=SOURCE, **options):
    results = blank()
    sink = stream.ArraySink(results)
    done = stream.run_cohorts(step, start(), source, size, sink=sink, **options)
    return done, results


def no_thread_left():
    return not [t for t in threading.enumerate() if t.name.startswith("cohort-reader")]


@pytest.mark.parametrize("prefetch", [1, 2, 9])
@pytest.mark.parametrize("size", [1, SIZE, COUNT, 40])
def test_equals_numpy_on_all_clients(size, prefetch):
    done, results = run(size, prefetch=prefetch)
    assert int(done.carry["seen"]) == COUNT and done.cohorts == -(-COUNT // size)
    expected = DATA["x"].astype(np.float64).sum(axis=0)
    np.testing.assert_allclose(done.carry["total"], expected, atol=1e-6)
    np.testing.assert_array_equal(results["twice"], 2 * DATA["x"])
    np.testing.assert_array_equal(results["client"], np.arange(COUNT))
    np.testing.assert_array_equal(results["cohort"], np.arange(COUNT) // size)


def test_fillers_repeat_clients_of_the_cohort():
    seen = []

    class Watched(stream.ArraySource):
        def read(self, rows):
            seen.append(list(rows))
            return super().read(rows)

    run(source=Watched(DATA))
    assert seen[-1] == [20, 21, 22, 20, 21] and {len(rows) for rows in seen} == {SIZE}


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_sharded_cohorts_give_the_same_results():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("devices",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    plain, sharded = run(4), run(4, sharding=spread)
    chex.assert_trees_all_equal(plain[1], sharded[1])
    chex.assert_trees_all_close(plain[0].carry, sharded[0].carry, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of the 2 devices"):
        run(SIZE, sharding=spread)


def test_compiles_once_and_leaves_the_callers_carry_alone():
    @chex.assert_max_traces(n=1)
    def traced(carry, rows, cohort):
        return carry + rows["x"].sum(), ()

    carry = jnp.float32(3.0)
    for _ in range(2):
        stream.run_cohorts(traced, carry, SOURCE, SIZE)
    assert float(carry) == 3.0  # donating it would have deleted it
    stream.run_cohorts(traced, 3.0, SOURCE, SIZE)


def test_restart_continues_bitwise_and_callback_sees_every_cohort_in_order():
    kept = []
    whole, expected = run(on_cohort=kept.append)
    assert [done.number for done in kept] == [0, 1, 2, 3, 4]
    assert [len(done.rows) for done in kept] == [5, 5, 5, 5, 3]
    middle = kept[1]
    np.testing.assert_array_equal(middle.results["client"], middle.rows)
    results = {name: leaf.copy() for name, leaf in expected.items()}
    for leaf in results.values():
        leaf[middle.rows[-1] + 1 :] = -1
    carry = jax.tree.map(np.asarray, middle.carry)
    later = stream.run_cohorts(
        step, carry, SOURCE, SIZE, sink=stream.ArraySink(results), first=middle.number + 1
    )
    chex.assert_trees_all_equal(later.carry, whole.carry)
    chex.assert_trees_all_equal(results, expected)


def test_callback_stops_after_the_cohort_that_is_being_computed():
    kept = []

    def stop_at_first(done):
        kept.append(done.number)
        return True

    done, results = run(on_cohort=stop_at_first)
    assert kept == [0, 1] and done.cohorts == 2 and int(done.carry["seen"]) == 10
    assert list(np.flatnonzero(results["client"] < 0)) == list(range(10, COUNT))
    finished = stream.run_cohorts(step, done.carry, SOURCE, SIZE, first=done.cohorts)
    assert int(finished.carry["seen"]) == COUNT


def test_nothing_left_to_do_returns_the_carry():
    done, results = run(first=5)
    assert done.cohorts == 5 and int(done.carry["seen"]) == 0 and np.all(results["client"] == -1)


class Failing(stream.ArraySource):
    def read(self, rows):
        if 12 in rows:
            raise OSError("disk on fire")
        return super().read(rows)


def test_reader_error_names_the_clients_and_ends_the_thread():
    kept = []
    with pytest.raises(stream.StreamError, match=r"reading clients 10 to 14 \(cohort 2\).*on fire"):
        run(source=Failing(DATA), on_cohort=kept.append)
    assert no_thread_left() and len(kept) < 3


def test_reader_error_surfaces_before_its_turn():
    """With the whole stream read ahead, the first cohort is not even written."""
    kept = []

    @jax.jit
    def slow(carry, rows, cohort):
        return carry, ()

    def wait(done):
        kept.append(done.number)
        time.sleep(0.2)

    with pytest.raises(stream.StreamError, match="cohort 2"):
        stream.run_cohorts(slow, 0.0, Failing(DATA), SIZE, prefetch=9, on_cohort=wait)
    assert len(kept) <= 1 and no_thread_left()


def test_writer_error_names_the_clients_and_ends_the_thread():
    class Full(stream.ArraySink):
        def write(self, rows, results):
            if 7 in rows:
                raise OSError("no space left")
            super().write(rows, results)

    with pytest.raises(stream.StreamError, match=r"writing.*clients 5 to 9.*no space left"):
        stream.run_cohorts(step, start(), SOURCE, SIZE, sink=Full(blank()))
    assert no_thread_left()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("mine")])
def test_interruption_leaves_no_thread(error):
    def interrupt(done):
        raise error

    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        run(on_cohort=interrupt)
    assert no_thread_left()


def test_input_ahead_is_bounded():
    """A reader that is faster than the device does not run away."""
    read, written, ahead = [], [], []

    class Counting(stream.ArraySource):
        def read(self, rows):
            read.append(rows[0])
            return super().read(rows)

    def note(done):
        written.append(done.number)
        time.sleep(0.02)
        ahead.append(len(read) - len(written))

    run(1, source=Counting(DATA), on_cohort=note, prefetch=3)
    assert max(ahead) <= 3 + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cohort_size": 0}, "cohort_size must be at least 1"),
        ({"prefetch": 0}, "prefetch must be at least 1"),
        ({"first": 6}, "23 clients in cohorts of 5 are 5 cohorts"),
        ({"first": -1}, "first is -1"),
        ({"step": lambda carry, rows, cohort: (rows["x"], ())}, "keep the shapes and dtypes"),
    ],
)
def test_refusals(change, message):
    options = {"step": step, "carry": start(), "source": SOURCE, "cohort_size": SIZE, **change}
    with pytest.raises(ValueError, match=message):
        stream.run_cohorts(**options)


def test_refused_sources_and_sinks():
    with pytest.raises(ValueError, match=r"common leading axis, got lengths \[2, 3\]"):
        stream.ArraySource({"a": np.zeros(2), "b": np.zeros(3)})
    with pytest.raises(ValueError, match="common leading axis"):
        stream.ArraySink({})
    wrong = {**blank(), "twice": np.zeros((COUNT, 3))}
    with pytest.raises(stream.StreamError, match=r"\[k, 4\], the sink \[C, 3\]"):
        stream.run_cohorts(step, start(), SOURCE, SIZE, sink=stream.ArraySink(wrong))

    class Short(stream.ArraySource):
        def read(self, rows):
            return super().read(rows[:-1])

    with pytest.raises(stream.StreamError, match="asked for 5 rows, but the source read 4"):
        run(source=Short(DATA))


# A round of FedAvg larger than memory: running sums of weight * update in the carry.

FED = clients.stack_clients(
    [
        (RNG.normal(size=(size, 4)).astype(np.float32), RNG.integers(0, 2, size))
        for size in (7, 12, 3, 9, 5, 8, 4)
    ]
)
PARAMS = {"w": jnp.asarray([0.1, -0.2, 0.3, 0.0]), "b": jnp.float32(0.05)}
KEY = jax.random.key(7)


def squared_loss(params, batch, key):
    noise = 0.01 * jax.random.normal(key, batch.inputs.shape)
    errors = (batch.inputs + noise) @ params["w"] + params["b"] - batch.labels
    loss = (batch.weight * errors**2).sum() / batch.weight.sum()
    return loss, {"loss": loss}


FEDAVG = fedavg(squared_loss, optax.sgd(0.1, momentum=0.9))


def fedavg_step(carry, data, cohort):
    """Weighs fillers by zero; the means are divided at the end of the round."""
    params, sums, total = carry
    messages = clients.replicate(params, cohort.valid.shape[0])
    _, updates, metrics = simulate.run_clients(
        FEDAVG, messages, (), data, KEY, 2, client_ids=cohort.rows, batch_size=4, epochs=2
    )
    weights = jnp.where(cohort.valid, data.size, 0).astype(jnp.float32)
    sums = jax.tree.map(lambda s, leaf: s + jnp.tensordot(weights, leaf, 1), sums, updates)
    return (params, sums, total + weights.sum()), metrics


@pytest.mark.parametrize("size", [1, 3, 7])
def test_streamed_fedavg_round_equals_the_whole_cohort_at_once(size):
    source = stream.ArraySource(jax.tree.map(np.asarray, FED))
    losses = {"loss": np.zeros(7, np.float32)}
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    done = stream.run_cohorts(
        fedavg_step, (PARAMS, zeros, 0.0), source, size, sink=stream.ArraySink(losses)
    )
    _, sums, total = done.carry
    whole = functools.partial(
        simulate.run_round, FEDAVG, client_ids=jnp.arange(7), batch_size=4, epochs=2
    )
    expected, _, metrics = jax.jit(whole)(PARAMS, (), FED, KEY, 2)
    chex.assert_trees_all_close(jax.tree.map(lambda s: s / total, sums), expected, atol=1e-6)
    np.testing.assert_allclose(losses["loss"], metrics.client["loss"], atol=1e-6)


# Memory-mapped trees.

TEMPLATE = {
    "x": mapped.ArraySpec((COUNT, 4), np.float16),
    "deep": {"n": mapped.ArraySpec((COUNT,), np.int32)},
}


@pytest.fixture
def stored(tmp_path):
    with mapped.building(tmp_path / "store", TEMPLATE, {"seed": 3}) as tree:
        tree["x"][:] = DATA["x"]
        tree["deep"]["n"][:] = DATA["n"]
    return tmp_path / "store"


def test_mapped_tree_round_trip_streams_like_arrays(stored):
    tree, meta = mapped.open_tree(stored, TEMPLATE)
    assert meta == {"seed": 3} and isinstance(tree["x"], np.memmap)
    source = stream.ArraySource({"x": tree["x"], "n": tree["deep"]["n"]})
    sink = mapped.create(stored.parent / "results", blank())
    done = stream.run_cohorts(step, start(), source, SIZE, sink=stream.ArraySink(sink))
    again = mapped.open_tree(stored.parent / "results", mode="r+").tree
    np.testing.assert_array_equal(again["twice"], 2 * DATA["x"].astype(np.float16))
    np.testing.assert_array_equal(again["client"], np.arange(COUNT))
    assert int(done.carry["seen"]) == COUNT


def test_fresh_maps_see_each_others_writes_and_views_stay_what_they_are(stored):
    leaf = mapped.open_tree(stored, mode="r+").tree["deep"]["n"]
    again = mapped.fresh(leaf)
    assert again is not leaf
    again[2] = 77
    assert leaf[2] == 77 and mapped.fresh(leaf[3:5]) is not leaf
    np.testing.assert_array_equal(mapped.fresh(leaf[3:5]), [3, 4])
    array = np.arange(3)
    assert mapped.fresh(array) is array


def test_unfinished_tree_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), mapped.building(tmp_path / "store", TEMPLATE):
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def truncate(directory):
    path = directory / "x.npy"
    path.write_bytes(path.read_bytes()[:-9])


def other_shape(directory):
    np.save(directory / "x.npy", np.zeros((COUNT, 3), np.float16))


def other_index(directory):
    path = directory / "tree.json"
    index = json.loads(path.read_text())
    index["leaves"]["x"] = "nonsense"
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "x.npy").unlink(), "x.npy is missing; delete .* and make it again"),
        (lambda d: (d / "tree.json").unlink(), "holds no arrays: tree.json is missing"),
        (lambda d: (d / "tree.json").write_text("{"), "tree.json is damaged"),
        (lambda d: (d / "x.npy").write_bytes(b"no array"), "x.npy is truncated or damaged"),
        (truncate, "x.npy is truncated or damaged"),
        (other_shape, r"float16 \[23, 3\], but tree.json beside it says float16 \[23, 4\]"),
        (other_index, "tree.json is damaged"),
    ],
)
def test_damaged_tree_is_refused_with_one_clear_message(stored, damage, message):
    damage(stored)
    with pytest.raises(mapped.MappedTreeError, match=message):
        mapped.open_tree(stored)


def test_other_contents_than_expected_are_refused(stored):
    wrong = {**TEMPLATE, "x": mapped.ArraySpec((COUNT, 5), np.float16)}
    with pytest.raises(mapped.MappedTreeError, match=r"\[23, 4\], expected float16 \[23, 5\]"):
        mapped.open_tree(stored, wrong)
    with pytest.raises(mapped.MappedTreeError, match="leaf more is missing"):
        mapped.open_tree(stored, {**TEMPLATE, "more": TEMPLATE["x"]})
    with pytest.raises(mapped.MappedTreeError, match="is not empty"):
        mapped.create(stored, TEMPLATE)
    with (
        pytest.raises(mapped.MappedTreeError, match="exists already"),
        mapped.building(stored, TEMPLATE),
    ):
        pass
    with pytest.raises(mapped.MappedTreeError, match="no elements"):
        mapped.create(stored / "new", {"x": mapped.ArraySpec((0, 2), np.float32)})
    with pytest.raises(mapped.MappedTreeError, match="cannot name a file"):
        mapped.create(stored / "new", {"../x": TEMPLATE["x"]})
