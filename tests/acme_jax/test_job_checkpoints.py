"""Checkpoints of a job: on other devices, of another job, and what to do without them."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from acme_jax.checkpoint import CheckpointError
from acme_jax.job_checkpoints import JobCheckpoints, State
from fed import multihost

JOB = {"clients": 3, "rate": 0.1, "sizes": (4, 2)}
INITIAL = State({"w": np.zeros(4, np.float32)}, {"m": np.zeros((3, 2), np.float32)})
LATER = State(
    {"w": np.arange(4, dtype=np.float32)}, {"m": np.arange(6.0, dtype=np.float32).reshape(3, 2)}
)


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]), ("clients",))


def open_in(directory, count=2, resume=True, job=JOB):
    return JobCheckpoints(directory, mesh_of(count), job, 3, resume=resume)


def placed(state, count):
    mesh = mesh_of(count)
    return State(
        multihost.replicate(mesh, state.server), multihost.from_local(mesh, state.clients, 3)
    )


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_restored_on_other_devices(tmp_path, before, after):
    checkpoints = open_in(tmp_path, before, resume=False)
    _, done = checkpoints.restore(INITIAL)
    assert done == 0 and checkpoints.advice() == "there is no checkpoint; start again"
    checkpoints.save(placed(LATER, before), 7)
    assert "newest checkpoint is round 7; start again with --resume" in checkpoints.advice()

    checkpoints = open_in(tmp_path, after)
    state, done = checkpoints.restore(INITIAL)
    assert done == 7 and "round 7" in checkpoints.advice()
    # Three clients on two devices: one filler, which was not stored.
    assert state.clients["m"].shape == (4 if after == 2 else 3, 2)
    assert len(state.clients["m"].sharding.device_set) == after
    host = multihost.to_host(state)
    np.testing.assert_array_equal(host.server["w"], LATER.server["w"])
    np.testing.assert_array_equal(host.clients["m"][:3], LATER.clients["m"])
    assert not host.clients["m"][3:].any()


def test_nothing_is_overwritten_or_mixed(tmp_path):
    checkpoints = open_in(tmp_path, resume=False)
    checkpoints.save(placed(LATER, 2), 1)
    with pytest.raises(CheckpointError, match="earlier start; add --resume"):
        open_in(tmp_path, resume=False)
    with pytest.raises(CheckpointError, match=r"another job: rate is 0.1 there, 0.2 now"):
        open_in(tmp_path, job=JOB | {"rate": 0.2}).restore(INITIAL)


def test_without_a_directory_nothing_is_saved(tmp_path):
    checkpoints = open_in(None)
    state, done = checkpoints.restore(LATER)
    checkpoints.save(state, 1)
    assert done == 0 and checkpoints.advice() == "there is no checkpoint; start again"
    np.testing.assert_array_equal(multihost.to_host(state).server["w"], LATER.server["w"])
