"""Clients of different programs: against one program for all, plain loops, and hand counts."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fed import buckets, clients, simulate
from fed.algorithms.fedavg import fedavg
from fed.participation import Participation

WIDTHS = (2, 4, 2, 3, 4, 4, 1)  # how many of the weights each client trains
NUM_CLIENTS = len(WIDTHS)
DIMS = 4
IDS = jnp.arange(NUM_CLIENTS) + 20
KEY = jax.random.key(3)
PARAMS = jnp.asarray([0.1, -0.2, 0.3, 0.4])
MASKS = jnp.asarray(np.arange(DIMS) < np.asarray(WIDTHS)[:, None], jnp.float32)
RNG = np.random.default_rng(0)
DATA = clients.stack_clients(
    [(RNG.normal(size=(n, DIMS)).astype(np.float32), np.ones(n, np.int32)) for n in range(3, 10)]
)
OPTIONS = {"client_ids": IDS, "batch_size": 4, "num_steps": 3}
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def loss_of(params, inputs, batch):
    error = batch.weight * (inputs @ params - batch.labels) ** 2
    loss = error.sum() / batch.weight.sum()
    return loss, {"loss": loss}


def sliced(width):
    """FedAvg of the first `width` weights: the message is cut, the update put back."""
    part = fedavg(lambda p, batch, key: loss_of(p, batch.inputs[:, :width], batch), OPTIMIZER)
    return part._replace(
        client_init=lambda message, state, key: part.client_init(message[:width], state, key),
        client_final=lambda message, state: ((), message.at[:width].set(state.params)),
    )


MASKED = fedavg(
    lambda p, batch, key: loss_of(p["w"] * p["mask"], batch.inputs, batch),
    optax.multi_transform(
        {"w": OPTIMIZER, "mask": optax.set_to_zero()}, {"w": "w", "mask": "mask"}
    ),
)._replace(
    server_message=lambda params, row: {"w": params, "mask": MASKS[row]},
    client_final=lambda message, state: ((), state.params["w"]),
)
BUCKETS = buckets.make_buckets(WIDTHS, sliced, cost=WIDTHS)
SERVER = fedavg(None, OPTIMIZER)


def run(algorithm=SERVER, **options):
    call = functools.partial(simulate.run_round, algorithm, **OPTIONS, **options)
    server, _, metrics = jax.jit(call)(PARAMS, (), DATA, KEY, 1)
    return server, metrics.client


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def mesh():
    return jax.sharding.Mesh(jax.devices()[:2], "clients")


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"chunk_size": 8}, {"mesh": mesh}])
def test_bucketed_equals_masked(options):
    options = {name: value() if callable(value) else value for name, value in options.items()}
    assert_close(run(buckets=BUCKETS, **options), run(MASKED))


def test_vmapped_buckets_over_a_mesh_equal_masked():
    assert_close(run(buckets=BUCKETS, mesh=mesh(), chunk_size=2), run(MASKED))


def test_bucketed_equals_the_plain_loop():
    server, _, metrics = simulate.run_round(
        SERVER, PARAMS, (), DATA, KEY, 1, buckets=BUCKETS, backend="loop", **OPTIONS
    )
    assert_close(run(buckets=BUCKETS), (server, metrics.client))


@pytest.mark.parametrize("backend", ["map", "loop"])
def test_messages_are_those_of_the_servers_algorithm(backend):
    """A bucket brings its client functions only."""
    halved = SERVER._replace(server_message=lambda params, row: params * 0.5)
    results = [
        simulate.run_round(
            algorithm, PARAMS * scale, (), DATA, KEY, 1, buckets=BUCKETS, backend=backend, **OPTIONS
        )[0]
        for algorithm, scale in ((halved, 1.0), (SERVER, 0.5))
    ]
    assert_close(*results)


def test_client_states_come_back_in_order_over_a_mesh():
    """Costs differ, so the clients were moved about."""

    def keeping(width):
        algorithm = sliced(width)

        def client_final(message, state):
            return {"width": jnp.float32(width), "old": state[1]}, algorithm.client_final(
                message, state[0]
            )[1]

        return algorithm._replace(
            client_init=lambda message, state, key: (
                algorithm.client_init(message, (), key),
                state["old"],
            ),
            client_step=lambda state, batch: (
                (algorithm.client_step(state[0], batch)[0], state[1]),
                {},
            ),
            client_final=client_final,
        )

    own = buckets.make_buckets(WIDTHS, keeping, cost=WIDTHS)
    states = {"width": jnp.zeros(NUM_CLIENTS), "old": jnp.arange(NUM_CLIENTS) * 1.0}
    call = functools.partial(simulate.run_round, SERVER, mesh=mesh(), buckets=own, **OPTIONS)
    _, states, _ = jax.jit(call)(PARAMS, states, DATA, KEY, 0)
    np.testing.assert_array_equal(states["width"], WIDTHS)
    np.testing.assert_array_equal(states["old"], np.arange(NUM_CLIENTS))


def test_sampled_clients_run_their_own_bucket():
    options = {"participation": Participation(num_sampled=4)}
    call = functools.partial(simulate.run_round, SERVER, **OPTIONS, **options, buckets=BUCKETS)
    server, _, metrics = jax.jit(call)(PARAMS, (), DATA, KEY, 1)
    masked, _, _ = simulate.run_round(MASKED, PARAMS, (), DATA, KEY, 1, **OPTIONS, **options)
    assert metrics.roles.rows.shape == (4,)
    assert_close(server, masked)
    with pytest.raises(ValueError, match="chunk_size=1"):
        call(PARAMS, (), DATA, KEY, 1, chunk_size=2)


def test_one_trace_of_each_bucket():
    """Four widths, seven clients: four programs, however often the round runs."""
    traced = []

    def counted(width):
        algorithm = sliced(width)

        def client_init(message, state, key):
            traced.append(width)
            return algorithm.client_init(message, state, key)

        return algorithm._replace(client_init=client_init)

    own = buckets.make_buckets(WIDTHS, counted)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def round_(params, index):
        return simulate.run_round(SERVER, params, (), DATA, KEY, index, buckets=own, **OPTIONS)[0]

    params = round_(PARAMS, 0)
    count = len(traced)
    round_(params, 1)
    assert set(traced) == {1, 2, 3, 4} and len(traced) == count


def test_rows_and_order():
    assert [list(BUCKETS.rows(b)) for b in range(4)] == [[0, 2], [1, 4, 5], [3], [6]]


@pytest.mark.parametrize("num_parts", [1, 2, 3, 9])
def test_balance_spreads_the_cost(num_parts):
    cost = RNG.uniform(1, 10, 40)
    parts = buckets.balance(cost, num_parts)
    assert sorted(np.concatenate(parts)) == list(range(40))
    sums = [cost[part].sum() for part in parts]
    # Graham's bound: nobody is more than one client above the mean.
    assert max(sums) <= cost.sum() / num_parts + cost.max()
    assert max(sums) - min(sums) <= cost.max()


def test_bad_buckets():
    with pytest.raises(ValueError, match="keys is empty"):
        buckets.make_buckets([], sliced)
    with pytest.raises(ValueError, match="cost must be 2 positive numbers"):
        buckets.make_buckets([1, 2], sliced, cost=[1.0, 0.0])
    with pytest.raises(ValueError, match="the cohort has 7"):
        run(buckets=buckets.make_buckets([1, 2], sliced))
