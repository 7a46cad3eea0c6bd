"""What a method gives back: an algorithm, where it starts, and how its clients predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from acme_jax.methods.problem import Problem
from fed.algorithm import FedAlgorithm


class MethodError(ValueError):
    """A method on clients that it cannot serve; names methods that can."""


Payload = Sequence[np.ndarray]
"""The arrays that really travel, in their wire types."""


def everything(message: Any, row: int) -> Payload:
    """The payload of a message whose every entry travels."""
    del row
    return [np.asarray(leaf) for leaf in jax.tree.leaves(message)]


class Built(NamedTuple):
    """A method for one problem."""

    algorithm: FedAlgorithm
    server: Any
    """The server's first state."""
    clients: Any
    """The clients' first states, leaves [C, ...], or `()`."""
    logits: Callable[[Any, Any, Array, Array], Array]
    """(server state, one client's state, row [], features [B, F]) -> [B, num_classes]: how the
    client in that row predicts after the last round."""
    flops: np.ndarray
    """[C] FLOPs of training on one sample: forward and both gradients, dense."""
    down: Callable[[Any, int], Payload] = everything
    """(message to a client, its row) -> what of it travels, each round."""
    up: Callable[[Any, int], Payload] = everything
    """(update of a client, its row) -> what of it travels, each round."""
    setup_down: Callable[[int], Payload] = lambda row: ()
    """(row) -> what travels once, before the first round."""
    setup_up: Callable[[int], Payload] = lambda row: ()
    down_bytes: Callable[[Any], np.ndarray] | None = None
    """(the server's metrics, leaves [R, ...]) -> [C] bytes that went down in all rounds, for
    messages whose size changes from round to round; None: `down` of the first, R times."""


class Method(NamedTuple):
    """One entry of the registry."""

    name: str
    title: str
    idea: str
    """In one sentence."""
    build: Callable[[Problem], Built]
    """Raises `MethodError` for clients that it cannot serve, before any training."""
    serves_capacities: bool = True
    """Whether clients may hold less than the full header; if not, all hold all of it."""
    needs_public: bool = False
