"""Every registered method on ragged toy clients of four capacities: what all of them owe."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acme_jax import layout
from acme_jax.config import RefineConfig
from acme_jax.importance_rounds import receive
from acme_jax.methods import running
from acme_jax.methods.method import MethodError
from acme_jax.methods.mlp_header import MlpHeader, prefix_masks
from acme_jax.methods.problem import Problem, Public, Schedule
from acme_jax.methods.registry import METHODS, method
from fed.clients import ClientData, stack_clients
from fed.simulate import run_rounds

HEADER = MlpHeader(num_features=6, num_hidden=16, num_classes=4)
CAPACITIES = np.asarray([1.0, 0.75, 0.5, 0.5, 1.0])
SIZES = (24, 9, 16, 30, 13)


def _samples(rng, count, labels):
    """Classes far apart in feature space, some noise."""
    centres = 2.0 * np.eye(4, 6)
    drawn = rng.choice(labels, count)
    return centres[drawn] + 0.5 * rng.normal(size=(count, 6)), drawn


def _clients(seed, scale=1):
    rng = np.random.default_rng(seed)
    groups = ([0, 1], [0, 1], [2, 3], [1, 2], [0, 3])
    rows = [_samples(rng, scale * n, g) for n, g in zip(SIZES, groups, strict=True)]
    return stack_clients([(x.astype(np.float32), y) for x, y in rows])


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(9)
    features, labels = _samples(rng, 40, [0, 1, 2, 3])
    public = Public(jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.int32))
    return Problem(
        key=jax.random.key(0),
        header=HEADER,
        start=HEADER.init(jax.random.key(1)),
        data=_clients(0),
        capacities=CAPACITIES,
        public=public,
        schedule=Schedule(rounds=8, epochs=2, batch_size=8, learning_rate=0.05),
        mesh=layout.make_mesh(1),
    )


@pytest.fixture(scope="module")
def outcomes(problem):
    made = {}

    def outcome(name):
        if name not in made:
            made[name] = running.run(method(name), problem)
        return made[name]

    return outcome


@pytest.mark.parametrize("name", METHODS)
def test_it_learns(name, problem, outcomes):
    fresh, test = outcomes(name), _clients(1, scale=4)
    built = fresh.built
    start = fresh._replace(server=built.server, clients=built.clients)
    before, after = (np.asarray(running.evaluator(o)(test)) for o in (start, fresh))
    assert after.shape == (5,)
    assert after.mean() > before.mean() + 0.15


@pytest.mark.parametrize("name", METHODS)
def test_one_trace_and_resumed_rounds_are_the_same(name, problem, outcomes):
    chex.clear_trace_counter()
    built = METHODS[name].build(problem)
    whole = outcomes(name)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def rounds(server, clients, first):
        return run_rounds(
            built.algorithm,
            server,
            clients,
            problem.data,
            problem.key,
            num_rounds=4,
            first_round=first,
            client_ids=jnp.arange(5),
            epochs=2,
            batch_size=8,
            mesh=problem.mesh,
        )[:2]

    state = built.server, built.clients
    for first in (0, 4):
        state = rounds(*layout.replicate(state, problem.mesh), jnp.int32(first))
    chex.assert_trees_all_equal_structs(state, (built.server, built.clients))
    chex.assert_trees_all_close(state, (whole.server, whole.clients), atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_what_travels_is_what_the_algorithm_sends(name, problem, outcomes):
    found = outcomes(name)
    assert found.up_bytes.shape == found.down_bytes.shape == (5,)
    assert np.all(found.flops > 0)
    message = found.built.algorithm.server_message(found.built.server, jnp.int32(0))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(message))
    sent = sum(array.nbytes for array in found.built.down(message, 0))
    assert sent <= whole  # masks and counters may stay out; nothing may come in


def test_bytes_are_those_of_the_dense_sub_headers(problem, outcomes):
    rounds = problem.schedule.rounds
    each = np.asarray([4 * HEADER.num_params(c) for c in CAPACITIES])
    assert np.array_equal(outcomes("heterofl").up_bytes, rounds * each)
    assert np.array_equal(outcomes("heterofl").down_bytes, rounds * each)
    assert np.array_equal(outcomes("fedrolex").up_bytes, rounds * each)
    assert np.array_equal(outcomes("fedavg").up_bytes, np.full(5, rounds * each[0]))
    assert np.array_equal(outcomes("smallest").up_bytes, np.full(5, rounds * each[3]))
    assert not outcomes("local").up_bytes.any()
    gates, sketch = 4 * 32, 2 * 32 * 6
    assert np.array_equal(outcomes("acme").up_bytes, np.full(5, rounds * gates + sketch))
    assert np.array_equal(outcomes("acme").down_bytes, np.full(5, rounds * gates))


def test_clients_end_within_their_capacity(outcomes):
    units = [HEADER.units(c) for c in CAPACITIES]
    acme = outcomes("acme")
    before = np.asarray(acme.clients.mask).sum(axis=1)
    assert np.all(before >= 2 * np.asarray(units))
    # The last set is applied when a client predicts.
    last = jax.vmap(lambda *args: receive(*args, RefineConfig()))(
        acme.clients, acme.server.personalized
    )
    assert np.array_equal(np.asarray(last.mask).sum(axis=1), 2 * np.asarray(units))
    masks = prefix_masks(HEADER, CAPACITIES)
    assert np.array_equal(np.asarray(masks["first"]["bias"]).sum(axis=1), units)


def test_equal_padding_changes_nothing(problem):
    data = problem.data
    wide = ClientData(
        jnp.pad(data.inputs, ((0, 0), (0, 5), (0, 0)), constant_values=7.0),
        jnp.pad(data.labels, ((0, 0), (0, 5))),
        data.size,
    )
    for name in ("acme", "heterofl"):
        short, long = (running.run(method(name), problem._replace(data=d)) for d in (data, wide))
        found = [np.asarray(running.evaluator(o)(_clients(1))) for o in (short, long)]
        assert np.array_equal(*found)


def test_the_example_of_the_docs_is_a_method(problem):
    page = (Path(__file__).parents[2] / "docs" / "METHODS.md").read_text()
    (code,) = re.findall(r"<!-- example:method -->\n```python\n(.*?)```", page, flags=re.S)
    names: dict = {}
    exec(code, names)
    assert code.count("\n") <= 50
    found = running.run(names["METHOD"], problem)
    test = _clients(1, scale=4)
    start = found._replace(server=found.built.server)
    before, after = (np.asarray(running.evaluator(o)(test)) for o in (start, found))
    assert after.mean() > before.mean() + 0.15


def test_an_unknown_method_is_named():
    with pytest.raises(MethodError, match="unknown method 'x'; expected one of local, fedavg"):
        method("x")
