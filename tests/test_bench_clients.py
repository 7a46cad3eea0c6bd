"""The parent of the benchmark of many clients: its work, its counting and its protocol."""

import json
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_clients  # noqa: E402
import client_summary  # noqa: E402
import client_tables  # noqa: E402
import client_work  # noqa: E402
import client_workers  # noqa: E402

from fed.algorithm import FedAlgorithm  # noqa: E402
from fed.clients import ClientData  # noqa: E402
from fed.cohort import run_clients  # noqa: E402
from nas.arch import full  # noqa: E402

FAKE = textwrap.dedent(
    """
    import json, sys, time
    sys.path.insert(0, {scripts!r})
    from pathlib import Path
    import client_work
    directory, form, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    def run(index):
        if mode == "dies" and index == 1:
            raise RuntimeError("out of luck")
        return {{"a/b": [1.0 + (mode == "wrong params")]}}, index + (mode == "wrong loss")
    if mode == "nonsense":
        print("hello")
        sys.stdin.read()
    else:
        client_work.serve(form, directory, time.perf_counter(), run, {{"mode": mode}})
    """
).format(scripts=str(ROOT / "scripts"))


def start(directory, form="fake", mode="good"):
    command = [sys.executable, "-c", FAKE, str(directory), form, mode]
    return client_workers.Worker(form, command, directory / f"{form}.log")


def hand_count(tokens, width, layers, heads, size, neurons, patch, classes):
    """Forward multiply-adds of every matrix product, written out, without the patches."""
    per_block = (
        tokens * width * 3 * heads * size  # query, key, value
        + heads * tokens * tokens * size  # scores
        + heads * tokens * tokens * size  # context
        + tokens * heads * size * width  # output
        + tokens * width * neurons
        + tokens * neurons * width
    )
    patches = (tokens - 1) * patch * width
    return layers * per_block + width * classes, patches


def test_flops_of_a_step_equal_a_hand_count_and_the_published_one():
    counted = bench_clients.step_flops(full(bench_clients.SPACE))
    rest, patches = hand_count(17, 64, 6, 4, 16, 256, 49, 10)
    # 2 FLOPs a multiply-add; forward, both gradients; none with respect to the images.
    assert counted == 32 * 2 * (3 * rest + 2 * patches)
    assert counted == pytest.approx(1.0118e9, rel=1e-4)


@pytest.mark.parametrize("client, depth, heads, neurons", [(0, 2, 1, 64), (6, 3, 3, 192)])
def test_flops_of_a_sub_network_are_dense(client, depth, heads, neurons):
    rest, patches = hand_count(17, 64, depth, heads, 16, neurons, 49, 10)
    assert bench_clients.step_flops(bench_clients.genome(client)) == 64 * (3 * rest + 2 * patches)


def test_clients_train_the_grid_in_turn():
    archs = [bench_clients.sub_network(client) for client in range(17)]
    assert [(a.depth, a.heads[0], a.neurons[0]) for a in archs[:16]] == [
        (depth, heads, 64 * heads) for depth in (2, 3, 5, 6) for heads in (1, 2, 3, 4)
    ]
    assert archs[16] == archs[0]
    assert archs[0].blocks == [0, 3]


def test_batches_are_those_that_fed_draws():
    """An algorithm whose update is the list of the samples it was given."""
    num_clients, size = 3, bench_clients.NUM_SAMPLES
    steps, batch = bench_clients.NUM_STEPS, bench_clients.BATCH_SIZE

    def client_step(state, given):
        step, seen = state
        return (step + 1, seen.at[step].set(given.labels)), {}

    recorder = FedAlgorithm(
        server_init=lambda params: params,
        server_message=lambda params, row: params,
        client_init=lambda message, state, key: (0, jnp.zeros((steps, batch), jnp.int32)),
        client_step=client_step,
        client_final=lambda message, state: ((), state[1]),
        server_update=lambda params, updates, weights: (params, {}),
    )
    labels = jnp.tile(jnp.arange(size, dtype=jnp.int32)[None], (num_clients, 1))
    data = ClientData(labels[..., None], labels, jnp.full(num_clients, size, jnp.int32))
    key = jax.random.key(bench_clients.SEED)
    ids = jnp.arange(num_clients)

    @jax.jit
    def drawn(round_index):
        return run_clients(
            recorder, jnp.zeros(num_clients), (), data, key, round_index,
            client_ids=ids, batch_size=batch, num_steps=steps,
        )[1]  # fmt: skip

    found = bench_clients.draw_batches(key, 2, num_clients)
    np.testing.assert_array_equal(found, np.stack([drawn(0), drawn(1)]))


def test_work_survives_its_files(tmp_path):
    arch = client_work.SubNetwork(1, [2, 2], [3, 4], [0])
    settings = client_work.Settings({"patch_size": 7}, 0.05, 0.9, 0, 1, 2, 3, 4, 5, [arch])
    tree = {"a": {"b": np.ones((2, 1)), "c": np.zeros(3)}, "d": np.full(1, 2.0)}
    arrays = (np.ones((1, 2, 3), np.float32), np.ones((1, 2), int), np.ones((5, 1, 3, 4), int))
    work = client_work.Work(settings, client_work.flatten(tree), *arrays)
    client_work.write(tmp_path, work)
    found = client_work.read(tmp_path, 1)
    assert found.settings == settings
    assert client_work.unflatten(found.params).keys() == tree.keys()
    np.testing.assert_array_equal(client_work.unflatten(found.params)["a"]["c"], np.zeros(3))
    np.testing.assert_array_equal(found.batches, arrays[2])
    with pytest.raises(SystemExit, match="holds the work of 1 clients"):
        client_work.read(tmp_path, 2)


def test_workers_take_turns(tmp_path):
    workers = [start(tmp_path, form) for form in ("first", "second")]
    try:
        assert workers[0].ready == {"loss": 0, "info": {"mode": "good"}}
        answers = client_workers.run_passes(workers, passes=3, rounds=2)
    finally:
        for worker in workers:
            worker.close()
    assert [a["loss"] for a in answers["second"]] == [1, 2, 1]
    assert all(a["seconds"] >= 0 and a["rss_bytes"] > 1e6 for a in answers["first"])
    saved = client_work.load_params(tmp_path / "first.npz")
    np.testing.assert_array_equal(saved["a/b"], [1.0])


def test_peak_memory_is_not_that_of_the_process_before(tmp_path):
    ballast = np.ones(30_000_000)  # 240 MB, which `ru_maxrss` of a child would inherit
    worker = start(tmp_path)
    try:
        assert worker.round(1)["rss_bytes"] < ballast.nbytes
    finally:
        worker.close()


@pytest.mark.parametrize(
    "mode, message", [("dies", "(?s)fake ended.*out of luck"), ("nonsense", "answered 'hello'")]
)
def test_a_broken_worker_is_reported(tmp_path, mode, message):
    with pytest.raises(client_workers.WorkerError, match=message):
        worker = start(tmp_path, mode=mode)
        try:
            worker.round(1)
        finally:
            worker.close()


@pytest.mark.parametrize("bad", [1.1e-5, float("nan")])
def test_contenders_must_agree(bad):
    client_workers.check_losses("loop", {"loop": [1.0, 2.0], "ours": [1.0, 2.0 + 9e-6]})
    with pytest.raises(client_workers.WorkerError, match="ours does other work than loop"):
        client_workers.check_losses("loop", {"loop": [1.0, 2.0], "ours": [1.0, 2.0 + bad]})
    good = {"a": np.ones(2), "b": np.zeros(3)}
    near = {"a": np.ones(2), "b": np.array([0.0, 5e-6, 0.0])}
    found = client_workers.check_params("loop", {"loop": good, "ours": near})
    assert found == {"loop": 0.0, "ours": 5e-6}
    far = {"a": np.ones(2), "b": np.array([0.0, bad, 0.0])}
    with pytest.raises(client_workers.WorkerError, match="b differs"):
        client_workers.check_params("loop", {"loop": good, "ours": far})
    with pytest.raises(client_workers.WorkerError, match="expected the paths and shapes"):
        client_workers.check_params("loop", {"loop": good, "ours": {"a": np.ones(2)}})


def measurement(form, seconds, **info):
    return {
        "form": form, "seconds": seconds, "peak_rss_bytes": 10**9, "start_s": 3.0,
        "warm_up_loss": 2.0, "difference": 0.0, "info": info,
    }  # fmt: skip


def test_summary_counts_ratios_pass_by_pass():
    rows = [
        measurement("bucketed", [1.0, 2.0, 4.0], matmul_peak_flops=2e11),
        measurement("plain_loop", [2.0, 8.0, 12.0]),
        measurement("mixed_bucketed", [1.0, 2.0, 4.0], matmul_peak_flops=1e11),
    ]
    dense = 5e8
    section = client_summary.summarise(rows, 16, 10, {False: 1e9, True: dense})
    ours, loop, mixed = section["contenders"]
    assert ours["steps_per_s"] == {"median": 80.0, "best": 160.0, "all": [160.0, 80.0, 40.0]}
    assert loop["ours_is_times"] == 3.0  # median of 2, 4 and 3, not a ratio of medians
    assert ours["fraction_of_peak"] == pytest.approx(80 * 1e9 / 2e11)
    assert mixed["fraction_of_peak"] == pytest.approx(80 * dense / 2e11)
    goals = {target["name"]: (target["value"], target["met"]) for target in section["targets"]}
    assert goals["bucketed, times plain_loop"] == (3.0, True)
    share = goals["mixed_bucketed, FLOP/s times those of bucketed"]
    assert share == (0.5, False)
    text = client_tables.as_text(json.loads(json.dumps(section)))
    assert "PyTorch, loop" in text and ">= 2.3" in text


def test_tables_of_a_report(tmp_path):
    section = client_summary.summarise(
        [measurement("loop", [2.0, 4.0])], 16, 10, {False: 1e9}
    )  # ours is not there
    report = {
        "command": "python scripts/bench_clients.py", "date": "2025-01-01", "commit": "0" * 40,
        "packages": {"jax": "0.10.2"}, "hardware": {"cpu_cores": 2, "cpu": "a CPU"},
        "sections": [section],
    }  # fmt: skip
    path = tmp_path / "bench_clients.json"
    path.write_text(json.dumps(report))
    lines = client_tables.clients_table(path).splitlines()
    columns = len(client_tables.HEADS)
    assert [line.count("|") for line in lines[:3]] == [columns + 1] * 3
    assert "| 60.0 | 80.0 |  |  | 3.0 | 1.00 |" in lines[2]
    assert "2 cores of a CPU" in lines[-1]


def test_missing_torch_is_said_at_once(monkeypatch):
    monkeypatch.setattr(bench_clients.importlib.util, "find_spec", lambda name: None)
    bench_clients.check_torch(["bucketed", "mixed_masked"])
    with pytest.raises(SystemExit, match=r"func need it: pip install -e '\.\[torch\]'"):
        bench_clients.check_torch(["bucketed", "func"])


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"clients": (0,)}, "--clients must be at least 1"),
        ({"passes": 0}, "--passes must be at least 1"),
        ({"contenders": ("loop", "flower")}, "unknown contender flower"),
    ],
)
def test_bad_arguments_are_refused(bad, message):
    with pytest.raises(SystemExit, match=message):
        bench_clients.Arguments(**bad)
