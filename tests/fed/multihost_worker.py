"""One process of a job, started by test_multihost.py: `python multihost_worker.py JSON`.

The job is rounds of `fedavg` and of `local` on made-up data, of which each process makes only its
own clients'.
"""

import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fed import multihost
from fed.algorithms.fedavg import fedavg
from fed.algorithms.local import local
from fed.clients import ClientData
from fed.simulate import run_round

SAMPLES, DIMS = 7, 5


def client(row):
    """The samples of one client, padded: inputs [N, D], labels [N], size."""
    rng = np.random.default_rng(row)
    size = 2 + row % (SAMPLES - 1)
    inputs = np.zeros((SAMPLES, DIMS), np.float32)
    inputs[:size] = rng.normal(size=(size, DIMS))
    labels = (inputs[:, 0] > 0).astype(np.int32)
    return inputs, labels, np.int32(size)


def loss_fn(params, batch, key):
    """Squared error with a little noise on the inputs, so that the keys matter."""
    inputs = batch.inputs + 0.01 * jax.random.normal(key, batch.inputs.shape)
    errors = inputs @ params["w"] + params["b"] - batch.labels
    loss = (batch.weight * errors**2).sum() / batch.weight.sum()
    return loss, {"loss": loss}


ALGORITHMS = {"fedavg": fedavg, "local": local}
PARAMS = {"w": np.linspace(-0.2, 0.3, DIMS, dtype=np.float32), "b": np.float32(-0.0)}


def prepare(name, mesh, num_clients, load=client):
    """(jitted round, server state, client states, data) over the mesh."""
    algorithm = ALGORITHMS[name](loss_fn, optax.sgd(0.1, momentum=0.9))
    mine = multihost.my_rows(num_clients, mesh)
    inputs, labels, sizes = (np.stack(part) for part in zip(*map(load, mine), strict=True))
    data = multihost.from_local(mesh, ClientData(inputs, labels, sizes), num_clients)
    server, states = multihost.replicate(mesh, PARAMS), ()
    if name == "local":
        copies = jax.tree.map(lambda leaf: np.stack([leaf] * mine.size), PARAMS)
        server, states = (), multihost.from_local(mesh, copies, num_clients)

    @jax.jit
    def one_round(server, states, data, index):
        ids = jnp.arange(data.size.shape[0], dtype=jnp.int32)
        return run_round(
            algorithm,
            server,
            states,
            data,
            jax.random.key(3),
            index,
            client_ids=ids,
            batch_size=2,
            epochs=2,
            mesh=mesh,
        )[:2]

    return one_round, server, states, data


def results(mesh, num_clients, num_rounds, load=client):
    """What both algorithms end with, on the host: name -> array; clients without the fillers."""
    flat = {}
    for name in ALGORITHMS:
        one_round, server, states, data = prepare(name, mesh, num_clients, load)
        for index in range(num_rounds):
            server, states = one_round(server, states, data, np.int32(index))
        states = jax.tree.map(lambda leaf: leaf[:num_clients], multihost.to_host(states))
        for kind, tree in (("server", multihost.to_host(server)), ("clients", states)):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                flat[f"{name} {kind}{jax.tree_util.keystr(path)}"] = leaf
    return flat


def whole(options, job):
    """Both algorithms to the end; the main process saves results and who loaded what."""
    loaded = []

    def load(row):
        loaded.append(row)
        return client(row)

    mesh = multihost.client_mesh()
    flat = results(mesh, options["clients"], options["rounds"], load)
    owned = np.zeros(options["clients"], np.int32)
    owned[loaded] = 1
    sent = multihost.from_main({"zero": np.float32(-0.0) if job.process_id == 0 else np.float32(1)})
    flat["loaded"] = multihost.from_all(owned)
    flat["negative zero"] = np.signbit(multihost.from_all(sent["zero"]))
    if multihost.is_main():
        np.savez(options["out"], **flat)


def meshes(options, job):
    """The same on the first 1, 2, 4 and 8 devices of one process."""
    for count in (1, 2, 4, 8):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("clients",))
        np.savez(f"{options['out']}{count}", **results(mesh, options["clients"], options["rounds"]))
    try:
        multihost.initialize("127.0.0.1:1", 1, 0)
    except multihost.MultihostError as error:
        Path(f"{options['out']}.late").write_text(str(error))


def endless(options, job):
    """Rounds until something happens; each counted in a file of this process."""
    one_round, server, states, data = prepare("fedavg", multihost.client_mesh(), options["clients"])
    for index in range(1_000_000):
        server, states = one_round(server, states, data, np.int32(index))
        jax.block_until_ready(server)
        Path(f"{options['out']}.{job.process_id}").write_text(str(index))
        if options.get("fails") == job.process_id and index == 3:
            raise ValueError("this one has a fault")
        if options.get("dawdles") == job.process_id and index == 3:
            time.sleep(600)  # busy with something else than waiting for the others


def main():
    """Joins the job if there is one, and does as told."""
    options = json.loads(sys.argv[1])
    job = multihost.Job()
    if "coordinator" in options:
        job = multihost.initialize(
            options["coordinator"],
            options["processes"],
            options["id"],
            heartbeat_timeout_s=options.get("heartbeat_timeout_s", 20.0),
        )
    try:
        with job.watch(lambda: "start again with --resume"):
            globals()[options["do"]](options, job)
    except ValueError:
        return job.leave(2)
    return job.leave()


if __name__ == "__main__":
    sys.exit(main())
