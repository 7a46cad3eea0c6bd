"""Who takes part in a round, who drops out of it, and who answers too late.

Each client's fate comes from a random stream of its own, made of the experiment's key, the
round and the client's id. It does not depend on chunks, devices, the order of the cohort or, but
for the places among the sampled, on who else exists.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

Late = Literal["drop", "next_round"]

# Beyond every int32, so that no round's own stream (`fold_in(key, round)`) can be this one.
_STREAM = np.uint32(0xFED00001)


@dataclasses.dataclass(frozen=True)
class Participation:
    """How clients take part; static and hashable. The default: everyone, always, in time.

    Attributes:
      num_sampled: K clients are drawn each round, uniformly and without replacement; None: all.
      dropout: probability in [0, 1) that a sampled client does nothing in this round: it takes
        no step, its state stays as it was and it sends no update.
      deadline_s: a client whose round takes longer is late. It does its work and keeps its new
        state. None: the server waits for everyone.
      late: a late update is lost (`"drop"`), or counts in the next round (`"next_round"`).
      jitter: standard deviation of the natural logarithm of a factor on every client's time,
        log-normal with median 1, drawn anew each round.

    Raises:
      ValueError: values outside these, or options about lateness without a deadline.
    """

    num_sampled: int | None = None
    dropout: float = 0.0
    deadline_s: float | None = None
    late: Late = "drop"
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.num_sampled is not None and self.num_sampled < 1:
            raise ValueError(
                f"num_sampled must be at least 1, got {self.num_sampled}; None samples everyone"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"dropout must be in [0, 1), got {self.dropout}; at 1 nobody would take part"
            )
        if self.deadline_s is not None and not self.deadline_s > 0.0:
            raise ValueError(
                f"deadline_s must be positive, got {self.deadline_s}; None waits for everyone"
            )
        if self.late not in get_args(Late):
            raise ValueError(f"late must be one of {get_args(Late)}, got {self.late!r}")
        if not (self.jitter >= 0.0 and math.isfinite(self.jitter)):
            raise ValueError(f"jitter must be finite and not negative, got {self.jitter}")
        if self.deadline_s is None and (self.late != "drop" or self.jitter > 0.0):
            raise ValueError(
                "without deadline_s nobody is late, so late='next_round' and jitter have no "
                "effect; give deadline_s or leave them out"
            )


class Roles(NamedTuple):
    """The sampled clients of a round, K of C; who is neither dropped nor late answers in time."""

    rows: jax.Array  # [K] int32 rows of the cohort, ascending
    dropped: jax.Array  # [K] bool
    late: jax.Array  # [K] bool; never together with dropped


def everyone(num_clients: int) -> Roles:
    """All clients of the cohort, in time."""
    nobody = jnp.zeros(num_clients, bool)
    return Roles(jnp.arange(num_clients, dtype=jnp.int32), nobody, nobody)


def draw(
    key: jax.Array,
    round_index: jax.Array | int,
    client_ids: jax.Array,
    seconds: jax.Array | None,
    participation: Participation,
) -> Roles:
    """The clients' roles in one round; pure and jittable.

    Args:
      key: of the experiment; the same in every round.
      round_index: int [], may be traced.
      client_ids: int [C], distinct.
      seconds: [C] each client's time for the round (`round_seconds`), NaN is late; given if and
        only if there is a deadline.
      participation: static.

    Raises:
      ValueError: more clients to sample than there are, or `seconds` that do not fit.
    """
    client_ids = jnp.asarray(client_ids)
    num_clients = client_ids.shape[0]
    seconds = _check_seconds(seconds, num_clients, participation)
    num_sampled = num_clients if participation.num_sampled is None else participation.num_sampled
    if num_sampled > num_clients:
        raise ValueError(
            f"num_sampled is {num_sampled}, but there are {num_clients} clients; sample at most "
            "these, or use None for all of them"
        )
    round_key = jax.random.fold_in(jax.random.fold_in(key, _STREAM), round_index)

    def draw_one(client_id: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        place_key, dropout_key, time_key = jax.random.split(
            jax.random.fold_in(round_key, client_id), 3
        )
        return (
            jax.random.bits(place_key, dtype=jnp.uint32),
            jax.random.uniform(dropout_key, dtype=jnp.float32) < participation.dropout,
            jnp.exp(participation.jitter * jax.random.normal(time_key, dtype=jnp.float32)),
        )

    places, dropped, factors = jax.vmap(draw_one)(client_ids)
    rows = jnp.arange(num_clients, dtype=jnp.int32)
    if num_sampled < num_clients:
        first = jnp.lexsort((client_ids, places))[:num_sampled]  # ties go by id
        rows = jnp.sort(first).astype(jnp.int32)
    dropped = dropped[rows]
    late = jnp.zeros_like(dropped)
    if seconds is not None and participation.deadline_s is not None:
        late = ~dropped & ~(seconds * factors <= participation.deadline_s)[rows]
    return Roles(rows, dropped, late)


def round_seconds(
    num_samples: jax.Array,
    *,
    flops_per_sample: jax.Array | float,
    flops_per_s: jax.Array,
    down_bytes: jax.Array | float,
    up_bytes: jax.Array | float,
    down_bytes_per_s: jax.Array,
    up_bytes_per_s: jax.Array,
) -> jax.Array:
    """Time [C] for a round: the message down, the training, the update up, one after another.

    Args:
      num_samples: [C] that pass through training in a round: epochs * samples.
      flops_per_sample: floating-point operations, forward and backward; [] or [C].
      flops_per_s: [C] the devices' sustained speed.
      down_bytes: of the message to a client; [] or [C].
      up_bytes: of its update; [] or [C].
      down_bytes_per_s: [C] the links' speed.
      up_bytes_per_s: [C] the links' speed.
    """
    return (
        down_bytes / down_bytes_per_s
        + num_samples * flops_per_sample / flops_per_s
        + up_bytes / up_bytes_per_s
    )


def check_reachable(participation: Participation | None, seconds: jax.Array | None) -> None:
    """Refuses rounds in which nobody could ever arrive: all are late, and late updates are lost.

    Raises:
      ValueError: every client's time is beyond the deadline; known values only, without jitter.
    """
    if participation is None or participation.deadline_s is None or seconds is None:
        return
    if isinstance(seconds, jax.core.Tracer) or participation.late != "drop" or participation.jitter:
        return
    values = np.asarray(seconds)
    if values.size and not np.any(values <= participation.deadline_s):
        raise ValueError(
            f"deadline_s is {participation.deadline_s}, but the fastest client needs "
            f"{values.min()} s, so no update would ever arrive; raise the deadline or use "
            "late='next_round'"
        )


def _check_seconds(
    seconds: jax.Array | None, num_clients: int, participation: Participation
) -> jax.Array | None:
    if (seconds is None) != (participation.deadline_s is None):
        raise ValueError(
            "a deadline and the clients' times go together, but deadline_s is "
            f"{participation.deadline_s} and seconds are {'not ' if seconds is None else ''}"
            "given; fed.participation.round_seconds makes seconds of device profiles"
        )
    if seconds is None:
        return None
    if jnp.shape(seconds) != (num_clients,):
        raise ValueError(f"seconds has shape {jnp.shape(seconds)}; expected ({num_clients},)")
    return jnp.asarray(seconds)
