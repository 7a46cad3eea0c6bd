"""pFedHR on the comparison's headers: its bytes are those of the real candidates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from acme_jax import layout
from acme_jax.methods import running
from acme_jax.methods.method import MethodError
from acme_jax.methods.mlp_header import MlpHeader, prefix_masks
from acme_jax.methods.problem import Problem, Public, Schedule
from acme_jax.methods.registry import method
from fed.clients import stack_clients
from fed.simulate import run_rounds

HEADER = MlpHeader(num_features=5, num_hidden=8, num_classes=3)
CAPACITIES = np.asarray([1.0, 0.5, 0.75])
ROUNDS = 3


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    sets = [(rng.normal(size=(n, 5)).astype(np.float32), rng.integers(3, size=n)) for n in (7, 12)]
    public = Public(jnp.asarray(rng.normal(size=(30, 5)), jnp.float32), jnp.arange(30) % 3)
    return Problem(
        key=jax.random.key(0),
        header=HEADER,
        start=HEADER.init(jax.random.key(1)),
        data=stack_clients([*sets, sets[0]]),
        capacities=CAPACITIES,
        public=public,
        schedule=Schedule(rounds=ROUNDS, epochs=1, batch_size=4, learning_rate=0.05),
        mesh=layout.make_mesh(1),
    )


def test_bytes_are_those_of_the_candidates_of_every_round(problem):
    outcome = running.run(method("pfedhr"), problem)
    built = outcome.built

    @jax.jit
    def one(server, clients, first):
        return run_rounds(
            built.algorithm,
            server,
            clients,
            problem.data,
            problem.key,
            num_rounds=1,
            first_round=first,
            client_ids=jnp.arange(3),
            epochs=1,
            batch_size=4,
            mesh=problem.mesh,
        )[:2]

    masks = jax.tree.map(np.asarray, prefix_masks(HEADER, CAPACITIES))
    own = [sum(int(leaf[row].sum()) for leaf in jax.tree.leaves(masks)) for row in range(3)]
    state, down = (built.server, built.clients), np.zeros(3, int)
    sizes = set()
    for index in range(ROUNDS):
        for row in range(3):
            message = jax.device_get(built.algorithm.server_message(state[0], row))
            arrays = built.down(message, row)
            # Nothing of what travels is padding, and nothing real stays behind.
            real = [leaf for leaf in jax.tree.leaves(message.candidate[:2]) if message.found]
            assert sum(np.count_nonzero(a) for a in arrays) == sum(map(np.count_nonzero, real))
            down[row] += sum(array.nbytes for array in arrays)
            sizes.add(sum(array.size for array in arrays))
        state = one(*layout.replicate(state, problem.mesh), jnp.int32(index))
    assert np.array_equal(outcome.down_bytes, down) and 0 in sizes and len(sizes) > 1
    assert np.array_equal(outcome.up_bytes, 4 * ROUNDS * np.asarray(own))
    # Clients stay within their capacity, also after training.
    for layer, name in zip(outcome.clients, ("first", "second", "last"), strict=True):
        for leaf, mask in zip(jax.tree.leaves(layer), jax.tree.leaves(masks[name]), strict=True):
            assert not np.any(np.asarray(leaf)[mask == 0])


def test_without_public_samples_it_says_which_methods_need_none(problem):
    with pytest.raises(MethodError, match="pfedhr compares and stitches layers on public samples"):
        method("pfedhr").build(problem._replace(public=None))
