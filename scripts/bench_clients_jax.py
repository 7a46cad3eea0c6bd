"""Our contenders of `bench_clients.py`: federated training through `fed.simulate`.

`bucketed` trains the full network on every client. `mixed_bucketed` gives every client its own
sub-network and a program to each of the sixteen; `mixed_4_buckets` joins them to four programs;
`mixed_masked` has one at full size. The parent starts this file; see `client_work.py`.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import client_work
import jax
import jax.numpy as jnp
import numpy as np
import optax
from client_work import Flat, Work
from jax.sharding import Mesh

from acme_jax import concrete, layout, subnet_clients
from acme_jax.benchmark import matmul_peak
from acme_jax.config import ComputeConfig
from acme_jax.vit import ViTConfig
from fed import simulate
from fed.clients import ClientData
from nas.arch import Arch, ArchSpace, full

MAX_BUCKETS = {"bucketed": None, "mixed_bucketed": None, "mixed_4_buckets": 4}
FORMS = (*MAX_BUCKETS, "mixed_masked")


def clients_archs(work: Work, space: ArchSpace, form: str) -> Arch:
    """Every client's genome, leaves [C, ...] of NumPy."""
    if not form.startswith("mixed"):
        whole = full(space)
        count = work.settings.num_clients
        return jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * count), whole)
    own = work.settings.archs
    columns = ([a.depth for a in own], [a.heads for a in own], [a.neurons for a in own])
    return Arch(*(cast(Any, np.asarray(column, np.int32)) for column in columns))


def program(
    work: Work, form: str, config: ViTConfig, space: ArchSpace, mesh: Mesh, chunk: int | None
) -> tuple[Any, Any, int]:
    """The jitted round (server_state, data, key, round) -> (params, loss), its start, buckets."""
    settings = work.settings
    archs = clients_archs(work, space, form)
    optimizer = optax.sgd(settings.learning_rate, momentum=settings.momentum)
    algorithm = subnet_clients.masked(config, space, optimizer)
    buckets = None
    if form in MAX_BUCKETS:
        buckets = subnet_clients.buckets(config, space, optimizer, archs, MAX_BUCKETS[form])
    run_round = partial(
        simulate.run_round,
        algorithm,
        client_ids=jnp.arange(settings.num_clients),
        batch_size=settings.batch_size,
        num_steps=settings.num_steps,
        mesh=mesh,
        chunk_size=chunk,
        buckets=buckets,
    )

    def call(state: Any, data: ClientData, key: jax.Array, index: jax.Array) -> Any:
        state, _, metrics = run_round(state, (), data, key, index)
        return state.params, metrics.client["loss"].mean()

    params = jax.tree.map(jnp.asarray, client_work.unflatten(work.params))
    state = algorithm.server_init(params, jax.tree.map(jnp.asarray, archs))
    return jax.jit(call), state, len(buckets.algorithms) if buckets else 1


def main() -> None:
    """Prepares, says so, and runs rounds when told to."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", choices=FORMS, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--num-devices", type=int)
    arguments = parser.parse_args()
    layout.configure(ComputeConfig(num_devices=arguments.num_devices))
    work = client_work.read(arguments.work, arguments.clients)
    settings = work.settings
    config = ViTConfig(**{**settings.vit, "image_shape": tuple(settings.vit["image_shape"])})
    space = ArchSpace.from_fractions(
        config.num_layers, config.num_heads, config.num_neurons, per_layer=False
    )
    mesh = layout.make_mesh(arguments.num_devices)
    round_, state, num_buckets = program(work, arguments.form, config, space, mesh, arguments.chunk)
    sizes = jnp.full(settings.num_clients, settings.num_samples, jnp.int32)
    data = ClientData(jnp.asarray(work.images), jnp.asarray(work.labels), sizes)
    data, state = layout.replicate((data, state), mesh)
    del work
    key = layout.replicate(jax.random.key(settings.seed), mesh)

    def run_round(index: int) -> tuple[Flat, float]:
        params, loss = jax.block_until_ready(round_(state, data, key, np.int32(index)))
        return client_work.flatten(params), float(loss)

    platform = mesh.devices.flat[0].platform
    chunk = arguments.chunk or (1 if platform == "cpu" else -(-settings.num_clients // mesh.size))
    info = {
        "layout": f"{mesh.size} {platform} device(s), chunks of {chunk}, {num_buckets} bucket(s)",
        "jax_devices": mesh.size,
        "platform": platform,
        "chunk": chunk,
        "buckets": num_buckets,
        "matmul_peak_flops": matmul_peak(mesh),
        "full_forward_flops": float(concrete.num_flops(config.dims, full(space))),
    }
    client_work.serve(arguments.form, arguments.work, start, run_round, info)


if __name__ == "__main__":
    main()
