"""A part of every device's training samples set aside, to choose rates and strengths by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from acme_jax.experiments.final import Evaluate
from acme_jax.fleet import Device
from fed.clients import ClientData, stack_clients

STREAM = 6
"""Host random stream of the order of a device's samples (see DESIGN's randomness rule)."""
PART = 0.2
"""Of a device's training samples, set aside."""
ROWS = 64
"""Stacked devices are padded to a multiple, so that other fleets of about the same size share
their compiled programs."""

OptionT = TypeVar("OptionT")


class Parts(NamedTuple):
    """The training samples of some devices, in the order in which they are set aside."""

    everything: ClientData
    fit: ClientData
    """The same arrays without the last samples: for training while something is chosen."""
    check: ClientData
    """The last samples: for the choice. Never test data."""


def divide(inputs: Sequence[np.ndarray], fleet: Sequence[Device], seed: int) -> Parts:
    """Sets samples aside, at random.

    Args:
      inputs: of each device's train split [n, ...]: what is trained on, e.g. features.
      fleet: the devices, in the order of their rows.
      seed: of the study.
    """
    ordered, checks = [], []
    for rows, device in zip(inputs, fleet, strict=True):
        rng = np.random.default_rng((seed, STREAM, device.id))
        order = rng.permutation(len(rows))
        ordered.append((np.asarray(rows)[order], device.train.labels[order]))
        checks.append(max(1, round(PART * len(rows))))
    everything = pad_rows(stack_clients(ordered))
    sizes = everything.size - jnp.asarray(checks, jnp.int32)
    last = [(x[-n:], y[-n:]) for (x, y), n in zip(ordered, checks, strict=True)]
    return Parts(everything, everything._replace(size=sizes), pad_rows(stack_clients(last)))


def pad_rows(data: ClientData, multiple: int = ROWS) -> ClientData:
    """Devices padded with zeros to a multiple of samples, which changes nothing else."""
    extra = -data.labels.shape[1] % multiple
    rows = ((0, 0), (0, extra))
    inputs = np.asarray(data.inputs)
    inputs = np.pad(inputs, rows + ((0, 0),) * (inputs.ndim - 2))
    labels = np.pad(np.asarray(data.labels), rows)
    return ClientData(jnp.asarray(inputs), jnp.asarray(labels), data.size)


def padded(evaluate: Evaluate) -> Evaluate:
    """The same on `pad_rows`, so that test parts of about the same size share its program."""
    return lambda data: evaluate(pad_rows(data))


def best(options: Sequence[OptionT], accuracy: Callable[[OptionT], float]) -> OptionT:
    """The option of the highest accuracy, the first of equals."""
    return options[int(np.argmax([accuracy(option) for option in options]))]
