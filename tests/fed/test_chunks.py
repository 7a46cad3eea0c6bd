"""Chunks planned by memory: real compilations of a small round, and arithmetic with fakes."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from fed import chunks, clients
from fed.algorithms.fedavg import fedavg
from fed.chunks import USABLE, plan_chunk
from fed.simulate import run_round

NUM_CLIENTS, SAMPLES, DIMS = 12, 8, 48


def loss_fn(params, batch, key):
    del key
    errors = (jnp.tanh(batch.inputs @ params["a"]) @ params["b"])[:, 0] - batch.labels
    loss = (batch.weight * errors**2).sum() / batch.weight.sum()
    return loss, {"loss": loss}


def make_arguments():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(SAMPLES, DIMS)).astype(np.float32), rng.integers(0, 2, SAMPLES))
             for _ in range(NUM_CLIENTS)]  # fmt: skip
    params = {"a": jnp.full((DIMS, DIMS), 0.01), "b": jnp.full((DIMS, 1), 0.1)}
    data = clients.stack_clients(pairs)
    return params, (), data, jax.random.key(0), jnp.int32(0)


ALGORITHM = fedavg(loss_fn, optax.sgd(0.1))
ARGUMENTS = make_arguments()


@cache
def compile_for(chunk, mesh=None):
    step = partial(run_round, ALGORITHM, client_ids=jnp.arange(NUM_CLIENTS), batch_size=4,
                   epochs=1, chunk_size=chunk, mesh=mesh)  # fmt: skip
    return jax.jit(step).lower(*ARGUMENTS).compile()


def needed(chunk):
    """Bytes, summed independently of the planner's; this round donates nothing."""
    stats = compile_for(chunk).memory_analysis()
    assert stats.alias_size_in_bytes == 0
    parts = ("argument", "output", "temp")
    return sum(getattr(stats, f"{part}_size_in_bytes") for part in parts)


def test_memory_grows_with_the_chunk():
    sizes = [needed(chunk) for chunk in (1, 2, 4, 12)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("target", [2, 4])
def test_chosen_chunk_fits_and_is_large(target):
    """Memory for exactly `target` clients."""
    memory = int(needed(target) / USABLE) + 1
    plan = plan_chunk(compile_for, NUM_CLIENTS, memory_bytes=memory, platform="gpu")
    assert plan.bytes_needed == needed(plan.chunk_size) <= USABLE * memory
    assert plan.bytes_available == memory
    assert target / 2 < plan.chunk_size <= target
    passes = -(-NUM_CLIENTS // plan.chunk_size)
    assert plan.text.startswith(
        f"{plan.chunk_size} clients in a chunk, {passes} chunk(s) on each device: "
    )


def test_planned_program_runs_and_equals_single_clients():
    plan = plan_chunk(compile_for, NUM_CLIENTS, memory_bytes=10**9, platform="gpu")
    assert plan.chunk_size == NUM_CLIENTS and plan.compiled is compile_for(NUM_CLIENTS)
    server, _, _ = plan.compiled(*ARGUMENTS)
    expected, _, _ = compile_for(1)(*ARGUMENTS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), server, expected)


def test_cpu_takes_single_clients_and_compiles_once():
    made = []
    plan = plan_chunk(lambda chunk: (made.append(chunk), compile_for(chunk))[1], NUM_CLIENTS)
    assert made == [1] and plan.chunk_size == 1  # with platform and memory of this machine
    assert plan.bytes_needed == needed(1) < plan.bytes_available
    assert plan.text.startswith("1 client in a chunk, 12 chunk(s) on each device: ")


def test_mesh_counts_one_device():
    mesh = Mesh(np.array(jax.devices()[:2]), ("clients",))
    options = {"memory_bytes": 10**9, "mesh": mesh, "requested": NUM_CLIENTS}
    plan = plan_chunk(partial(compile_for, mesh=mesh), NUM_CLIENTS, **options)
    assert plan.chunk_size == NUM_CLIENTS // 2
    assert plan.bytes_needed < needed(NUM_CLIENTS)
    assert chunks.free_bytes(mesh) == pytest.approx(chunks.free_bytes() / 2, rel=0.1)


class Fakes:
    """Programs whose memory is a given function of the chunk."""

    def __init__(self, temporaries, arguments=0, outputs=0, alias=0):
        self.temporaries, self.rest, self.made = temporaries, (arguments, outputs, alias), []

    def __call__(self, chunk):
        self.made.append(chunk)
        size = self.temporaries(chunk)
        if size is None:
            return SimpleNamespace(memory_analysis=lambda: None)
        if size == "oom":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: ran out of memory in hbm")
        names = ("argument", "output", "alias")
        stats = {f"{n}_size_in_bytes": v for n, v in zip(names, self.rest, strict=True)}
        return SimpleNamespace(
            memory_analysis=lambda: SimpleNamespace(temp_size_in_bytes=size, **stats)
        )

    def plan(self, num_clients, **options):
        return plan_chunk(self, num_clients, **({"platform": "gpu"} | options))


def test_a_chunk_without_room_is_refused_also_where_free_memory_is_unknown(monkeypatch):
    monkeypatch.setattr(chunks, "free_bytes", lambda mesh=None: None)
    with pytest.raises(ValueError, match="a chunk of 2 would fit"):
        Fakes(lambda chunk: "oom" if chunk > 2 else 10).plan(8, requested=4)
    with pytest.raises(ValueError, match="even with one client at a time"):
        Fakes(lambda chunk: "oom").plan(8, requested=4)


def test_linear_memory_needs_three_compilations():
    fakes = Fakes(lambda chunk: 100 + 10 * chunk)
    plan = fakes.plan(1000, memory_bytes=1000)  # (900 - 100) / 10 = 80; 13 passes of 77
    assert fakes.made == [1, 2, 77]
    assert plan[:3] == (77, 870, 1000)


def test_donated_and_placed_arguments():
    fakes = Fakes(lambda chunk: 10 * chunk, arguments=500, outputs=60, alias=40)
    assert fakes.plan(4, memory_bytes=10**6).bytes_needed == 500 + 60 - 40 + 40
    plan = fakes.plan(4, memory_bytes=10**6, arguments_on_device=True)
    assert plan.bytes_needed == 60 - 40 + 40


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("memory", [150, 1_000, 30_000])
def test_chosen_chunk_fits_however_memory_grows(power, memory):
    fakes = Fakes(lambda chunk: round(50 + 10 * chunk**power))
    plan = fakes.plan(64, memory_bytes=memory)
    assert plan.bytes_needed <= USABLE * memory
    fitting = [chunk for chunk in range(1, 65) if fakes.temporaries(chunk) <= USABLE * memory]
    assert plan.chunk_size >= max(fitting) / 2
    assert len(fakes.made) == len(set(fakes.made)) <= 6


def test_compiler_that_runs_out_of_memory():
    fakes = Fakes(lambda chunk: 10 * chunk if chunk <= 5 else "oom")
    plan = fakes.plan(16, memory_bytes=1000)
    assert plan.chunk_size in (4, 5)
    with pytest.raises(ValueError, match="16 clients in one chunk need more than the compiler"):
        fakes.plan(16, memory_bytes=1000, requested=16)


def test_other_compiler_errors_pass():
    def broken(chunk):
        raise jax.errors.JaxRuntimeError("INTERNAL: no")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        plan_chunk(broken, 3, platform="gpu", memory_bytes=10)


def test_requested_chunk_is_kept_or_refused_with_what_would_fit():
    fakes = Fakes(lambda chunk: 100_000 + 10_000 * chunk)
    assert fakes.plan(64, memory_bytes=500_000, requested=20).chunk_size == 20
    assert fakes.made == [20]
    message = (
        r"^64 clients in one chunk need 740 kB on each device, but 450 kB may be used \(90% of "
        r"the 500 kB that are free\); a chunk of 32 would fit$"  # 35 fit; two passes of 32
    )
    with pytest.raises(ValueError, match=message):
        fakes.plan(64, memory_bytes=500_000, requested=64)
    # More than there are: all of them.
    assert fakes.plan(8, memory_bytes=500_000, requested=64).chunk_size == 8


@pytest.mark.parametrize("options", [{}, {"requested": 4}, {"platform": "cpu"}])
def test_not_even_one_client_fits(options):
    message = "a round needs 2.3 GB on each device even with one client at a time.*fewer clients"
    with pytest.raises(ValueError, match=message):
        Fakes(lambda chunk: 2_300_000_000 * chunk).plan(8, memory_bytes=2_000_000_000, **options)


def test_unknown_memory_falls_back_and_says_so(monkeypatch):
    plan = Fakes(lambda chunk: None).plan(8, memory_bytes=1000)
    assert plan[:3] == (8, None, 1000)
    assert plan.text.endswith("unchecked: the backend does not say what a program needs")
    monkeypatch.setattr(chunks, "free_bytes", lambda mesh: None)
    plan = Fakes(lambda chunk: 50).plan(8)
    assert plan[:3] == (8, 50, None)
    assert plan.text.endswith(": 50 B are needed; the backend does not say what is free")


def test_free_bytes_of_accelerators(monkeypatch):
    def device(**stats):
        return SimpleNamespace(platform="gpu", memory_stats=lambda: stats or None)

    full = device(bytes_limit=1000, bytes_in_use=700)
    empty = device(bytes_limit=1000, bytes_in_use=0)
    assert chunks.free_bytes(SimpleNamespace(local_devices=[empty, full])) == 300
    assert chunks.free_bytes(SimpleNamespace(local_devices=[empty, device()])) is None


@pytest.mark.parametrize(("count", "requested"), [(0, None), (3, 0)])
def test_bad_numbers(count, requested):
    with pytest.raises(ValueError, match="at least 1"):
        Fakes(lambda chunk: 1).plan(count, requested=requested, memory_bytes=10)
