"""Edges streamed through one program: equal to the whole, to edges alone, to a plain loop."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from acme_jax import (
    device,
    device_store,
    feature_pool,
    fleet_refinement,
    fleet_simulation,
    header,
    layout,
    messages,
)
from acme_jax.config import ConfigError, RefineConfig
from acme_jax.device_store import EdgeSource, StoreConfig
from acme_jax.feature_pool import FeaturePool
from acme_jax.fleet_refinement import DeviceResults, EdgeData, FleetSetup, Shared
from acme_jax.fleet_simulation import SimulationConfig
from acme_jax.header_layout import HeaderDims
from acme_jax.progress import Reporter, StopFlag
from acme_jax.run_dir import RunError
from fed import similarity, stream
from fed.clients import ClientData, stack_clients
from fed.mapped import MappedTreeError
from fed.simulate import run_round
from nas.cells import OPS

DIMS = HeaderDims(2, 2, embed_dim=16, channels=4, num_classes=10, blocks=1, num_layers=1)
CELL = ((0, OPS.index("sep1x1"), 1, OPS.index("maxpool3")),)
CONFIG = RefineConfig(
    rounds=2, batch_size=4, learning_rate=0.05, prune_per_round=2, num_quantiles=4
)
SETUP = FleetSetup(CELL, DIMS, CONFIG)
EDGES, EACH = 5, 3
PARAMS = header.init(jax.random.key(3), CELL, DIMS)
SHARED = Shared(PARAMS, jax.random.key(9))
RNG = np.random.default_rng(0)


def make_client(size):
    labels = RNG.integers(0, 10, size).astype(np.int32)
    inputs = RNG.normal(size=(size, 4, 16)).astype(np.float16)
    inputs[:, :, 0] += labels[:, None].astype(np.float16)
    return inputs, labels


RAGGED = [[make_client(size) for size in RNG.integers(3, 8, EACH)] for _ in range(EDGES)]
HELD_OUT = [[make_client(size) for size in RNG.integers(2, 5, EACH)] for _ in range(EDGES)]


def stack(edges, length):
    """[E, n, length, ...], padded with something that would show."""
    rows = []
    for clients in edges:
        data = stack_clients(clients)
        more = length - data.labels.shape[1]
        rows.append(
            ClientData(
                np.pad(data.inputs, ((0, 0), (0, more), (0, 0), (0, 0)), constant_values=50.0),
                np.pad(data.labels, ((0, 0), (0, more))),
                np.asarray(data.size),
            )
        )
    return ClientData(*(np.stack(leaves) for leaves in zip(*rows, strict=True)))


DATA = EdgeData(stack(RAGGED, 7), stack(HELD_OUT, 4))


@functools.cache
def compiled(chunk_size):
    run = functools.partial(fleet_refinement.refine_edges, SETUP, chunk_size=chunk_size)
    return jax.jit(run)


def run(data=DATA, numbers=range(EDGES), chunk_size=EACH):
    numbers = jnp.asarray(list(numbers), jnp.int32)
    return jax.tree.map(np.asarray, compiled(chunk_size)(SHARED, data, numbers))


WHOLE = run()
STATIC = device.refinement(DIMS, CONFIG, cell=CELL)
# Eager operations would be compiled one by one.
PLAIN = STATIC._replace(
    client_init=jax.jit(STATIC.client_init),
    client_step=jax.jit(STATIC.client_step),
    server_update=jax.jit(STATIC.server_update),
)
mix = jax.jit(functools.partial(device.mixing_weights, config=CONFIG))
receive = jax.jit(functools.partial(device.receive, config=CONFIG))
predict = jax.jit(
    lambda params, mask, x: header.apply(params, CELL, DIMS, x, mask=mask).argmax(axis=1)
)


def refine_by_hand(number):
    """One edge by the functions of `acme_jax.device`, a device and a step at a time."""
    clients, tests = RAGGED[number], HELD_OUT[number]
    data = stack_clients([(x.astype(np.float32), y) for x, y in clients])
    sketches = [
        similarity.quantile_sketch(jnp.asarray(x.astype(np.float32).mean(axis=1)), 4)
        for x, _ in clients
    ]
    sketches = np.stack([np.asarray(s).astype(np.float16) for s in sketches]).astype(np.float32)
    sketch_key, train_key = jax.random.split(SHARED.key)
    mixing = mix(jnp.asarray(sketches), data.size, sketch_key)
    edge = STATIC.server_init(mixing.wasserstein)
    one = device.init_device(PARAMS, CELL, DIMS, 2, CONFIG, static=True)
    states = jax.tree.map(lambda leaf: jnp.asarray(np.stack([leaf] * EACH)), one)
    for index in range(CONFIG.rounds):
        edge, states, _ = run_round(
            PLAIN,
            edge,
            states,
            data,
            train_key,
            index,
            client_ids=jnp.arange(number * EACH, (number + 1) * EACH),
            batch_size=4,
            epochs=1,
            backend="loop",
        )
    accuracies, kept = [], []
    for row, (inputs, labels) in enumerate(tests):
        mine = jax.tree.map(lambda leaf, row=row: leaf[row], states)
        mine = receive(mine, edge.personalized[row])
        kept.append(int(np.sum(np.asarray(mine.mask) != 0)))
        hits = []
        for params, mask in ((PARAMS, jnp.ones(SETUP.num_gates)), (mine.params, mine.mask)):
            hits.append(np.mean(predict(params, mask, inputs.astype(np.float32)) == labels))
        accuracies.append(hits)
    return np.array(accuracies), kept


@pytest.mark.parametrize("number", [0, EDGES - 1])
def test_equals_the_plain_loop_on_unpadded_devices(number):
    accuracies, kept = refine_by_hand(number)
    np.testing.assert_allclose(WHOLE.accuracy_before[number], accuracies[:, 0], atol=1e-6)
    np.testing.assert_allclose(WHOLE.accuracy_after[number], accuracies[:, 1], atol=1e-6)
    np.testing.assert_array_equal(WHOLE.gates_kept[number], kept)
    assert kept == [SETUP.num_gates - 4] * EACH


def test_static_cell_equals_the_cell_that_is_data():
    data = ClientData(*(jnp.asarray(leaf[0]) for leaf in DATA.train))
    data = data._replace(inputs=data.inputs.astype(jnp.float32))
    found = []
    for algorithm, static in ((STATIC, True), (device.refinement(DIMS, CONFIG), False)):
        one = device.init_device(PARAMS, CELL, DIMS, 2, CONFIG, static=static)
        states = jax.tree.map(lambda leaf: jnp.asarray(np.stack([leaf] * EACH)), one)
        edge = algorithm.server_init(jnp.full((EACH, EACH), 1 / EACH))
        step = functools.partial(
            run_round, algorithm, client_ids=jnp.arange(EACH), batch_size=4, epochs=1
        )
        step = jax.jit(step)
        for index in range(2):
            edge, states, metrics = step(edge, states, data, jax.random.key(1), index)
        found.append((edge.personalized, states.mask, metrics.client))
    places = device.header_slots.gate_positions(DIMS, CELL)
    static, uniform = found
    np.testing.assert_allclose(static[0], uniform[0][:, places], rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(static[1], uniform[1][:, places])
    tiny.assert_trees_close(static[2], uniform[2], rtol=1e-4)


def test_an_edge_alone_gives_the_same_as_among_others():
    alone = run(jax.tree.map(lambda leaf: leaf[3:4], DATA), [3])
    tiny.assert_trees_equal(alone, jax.tree.map(lambda leaf: leaf[3:4], WHOLE))
    other = run(jax.tree.map(lambda leaf: leaf[3:4], DATA), [2])  # other ids, other batches
    np.testing.assert_array_equal(other.accuracy_before, alone.accuracy_before)


@pytest.mark.parametrize("chunk_size", [1, 2 * EACH])
def test_streamed_edges_equal_the_whole_cohort_in_any_chunks(chunk_size):
    mesh = layout.make_mesh()
    step = fleet_refinement.make_step(SETUP, mesh, chunk_size=chunk_size)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(layout.AXIS))
    results = jax.tree.map(np.zeros_like, WHOLE)
    done = stream.run_cohorts(
        step,
        SHARED,
        stream.ArraySource(DATA),
        2 * mesh.size,
        sink=stream.ArraySink(results),
        sharding=spread,
    )
    tiny.assert_trees_equal(results, WHOLE)
    tiny.assert_trees_equal(done.carry.params, PARAMS)


def test_no_array_couples_the_devices_of_different_edges():
    """Linear in devices: the largest array of the program grows as the number of edges does."""

    def largest(edges):
        data = jax.tree.map(lambda leaf: np.concatenate([leaf[:1]] * edges), DATA)
        jaxpr = jax.make_jaxpr(
            functools.partial(fleet_refinement.refine_edges, SETUP, chunk_size=EACH * edges)
        )(SHARED, data, jnp.arange(edges))
        return max(sizes(jaxpr.jaxpr))

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
                if hasattr(inner, "jaxpr"):
                    yield from sizes(inner.jaxpr)

    assert largest(12) == 2 * largest(6)


def test_bytes_are_those_of_the_encoded_messages():
    gates = np.zeros(SETUP.num_gates, np.float32)
    sketch = np.zeros((4, 16), np.float16)
    header_message = messages.HeaderMessage(CELL, jax.tree.map(np.asarray, PARAMS))
    up = [messages.FeatureSketch(sketch), *[messages.ImportanceSet(gates)] * 2]
    down = [header_message, *[messages.PersonalizedImportance(gates)] * 2]
    for found, sent in ((WHOLE.uplink_bytes, up), (WHOLE.downlink_bytes, down)):
        np.testing.assert_array_equal(found, sum(len(messages.encode(m)) for m in sent))


def test_pruning_everything_is_refused():
    with pytest.raises(ConfigError, match="would prune 40 gates, but the header has 16"):
        FleetSetup(CELL, DIMS, dataclasses.replace(CONFIG, prune_per_round=20))


# The store and the simulation.

POOL = FeaturePool(
    features=RNG.normal(size=(400, 4, 16)).astype(np.float16),
    labels=np.repeat(np.arange(10), 40).astype(np.uint8)[RNG.permutation(400)],
    num_train=300,
    header=jax.tree.map(
        np.asarray, header.init(jax.random.key(0), feature_pool.CELL, feature_pool.DIMS)
    ),
    facts={"backbone_accuracy": 0.5, "header_accuracy": 0.5, "backbone_bytes": 1},
)
STORE = StoreConfig(devices=24, samples=8, alpha=0.1)


def make_store(directory, config=STORE):
    return device_store.open_or_make(directory, config, POOL, lambda text: None)


def test_devices_draw_from_their_own_labels_and_never_train_on_what_is_held_out(tmp_path):
    config = dataclasses.replace(STORE, devices=5000)
    devices = make_store(tmp_path, config)
    assert devices["train"].shape == (5000, 6) and devices["test"].shape == (5000, 2)
    assert devices["train"].max() < 300 <= devices["test"].min() and devices["test"].max() < 400
    labels = POOL.labels[np.asarray(devices["train"])]
    few = np.mean([len(np.unique(row)) for row in labels])
    assert few < 3.0  # of 6 samples; about 4.7 were the labels uniform
    np.testing.assert_allclose(np.bincount(labels.ravel()) / labels.size, 0.1, atol=0.02)
    held_out = POOL.labels[np.asarray(devices["test"])]
    known = (held_out[:, :, None] == labels[:, None, :]).any(axis=2)
    assert known.mean() > 0.7  # the same labels; 0.47 were they others
    small = make_store(tmp_path / "small")
    np.testing.assert_array_equal(small["train"], devices["train"][:24])


def test_source_reads_whole_edges(tmp_path):
    devices = make_store(tmp_path)
    source = EdgeSource(POOL, devices, 4)
    data = source.read(np.array([5, 2]))
    assert len(source) == 6 and data.train.inputs.shape == (2, 4, 6, 4, 16)
    np.testing.assert_array_equal(data.train.inputs[0, 3], POOL.features[devices["train"][23]])
    np.testing.assert_array_equal(data.test.labels[1, 0], POOL.labels[devices["test"][8]])
    with pytest.raises(ConfigError, match="24 devices cannot be divided among edges of 5"):
        EdgeSource(POOL, devices, 5)


@pytest.fixture
def pooled(monkeypatch):
    monkeypatch.setattr(feature_pool, "open_or_make", lambda *args, **options: POOL)


SIMULATION = SimulationConfig(
    STORE,
    dataclasses.replace(CONFIG, prune_per_round=3),
    devices_per_edge=3,
    cohort_edges=2,
    chunk=3,
)


class StopAfter(StopFlag):
    """Asks to stop when it is asked for the n-th time."""

    def __init__(self, calls):
        self._left = calls

    @property
    def requested(self):
        self._left -= 1
        return self._left <= 0


def simulate(tmp_path, out, stop=None, config=SIMULATION):
    with Reporter("quiet") as reporter:
        return fleet_simulation.simulate(
            config, tmp_path / "data", tmp_path / out, reporter, stop or StopAfter(99)
        )


def results_of(path):
    tree = fleet_simulation.mapped.open_tree(path / "results").tree
    return {name: np.asarray(leaf) for name, leaf in tree.items()}


def test_stopped_simulation_continues_to_equal_results(tmp_path, pooled):
    whole = simulate(tmp_path, "whole")
    expected = results_of(tmp_path / "whole")
    assert whole["devices"] == 24 and whole["edges"] == 8
    for name in ("accuracy_before", "accuracy_after"):
        np.testing.assert_allclose(whole[name], expected[name].mean(), rtol=1e-6)
    assert set(expected) == set(DeviceResults._fields)
    assert np.all(expected["gates_kept"] == whole["gates"] - 6)
    assert simulate(tmp_path, "parts", StopAfter(1)) is None
    state = json.loads((tmp_path / "parts" / "state.json").read_text())
    assert state["cohorts"] == 2
    # Killed between a cohort's line and its count: the line is written again, not twice.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"cohort": 2}\n{"coh')
    simulate(tmp_path, "parts")
    tiny.assert_trees_equal(results_of(tmp_path / "parts"), expected)
    lines = [json.loads(x) for x in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["cohort"] for line in lines] == [0, 1, 2, 3]
    assert simulate(tmp_path, "parts")["accuracy_after"] == whole["accuracy_after"]


def test_other_settings_and_other_files_are_refused(tmp_path, pooled):
    simulate(tmp_path, "out", StopAfter(1))
    other = dataclasses.replace(SIMULATION, devices_per_edge=4)
    with pytest.raises(RunError, match="devices_per_edge is 3 there, 4 now; choose another --out"):
        simulate(tmp_path, "out", config=other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="holds files but no simulation"):
        simulate(tmp_path, "mine")


def test_damaged_store_says_which_file_and_what_to_do(tmp_path):
    make_store(tmp_path)
    path = tmp_path / "devices_24" / "train.npy"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(MappedTreeError, match=r"train.npy is truncated .*delete .*make it again"):
        make_store(tmp_path)
    path.unlink()
    with pytest.raises(MappedTreeError, match=r"train.npy is missing"):
        make_store(tmp_path)


def test_store_of_other_settings_is_refused(tmp_path):
    make_store(tmp_path)
    with pytest.raises(MappedTreeError, match=r"alpha is 0.1 there, 0.5 now; choose another"):
        make_store(tmp_path, dataclasses.replace(STORE, alpha=0.5))


@pytest.mark.parametrize("change", [{"devices": 0}, {"samples": 1}, {"alpha": 0.0}, {"seed": -1}])
def test_impossible_stores_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        StoreConfig(**{"devices": 10, **change})
