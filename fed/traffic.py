"""The ledger of messages: true bytes by tier, direction, round and kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, get_args

Direction = Literal["up", "down"]
_Key = tuple[str, str, int, str]  # tier, direction, round, kind
_FIELDS = ("tier", "direction", "round", "kind")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A run's bytes beside those of centralised learning; fractions are run / centralised."""

    uplink_bytes: int
    downlink_bytes: int
    centralized_uplink_bytes: int
    centralized_downlink_bytes: int
    uplink_fraction: float
    downlink_fraction: float
    total_fraction: float


class Ledger:
    """Counts messages as they are moved; keeps sums, not payloads.

    It is filled with the encoded payloads themselves, never with a computed size, and knows
    nothing about what they contain.
    """

    def __init__(self) -> None:
        """An empty ledger."""
        self._rows: dict[_Key, list[int]] = {}  # -> [messages, bytes]

    def record(
        self,
        kind: str,
        payload: bytes,
        *,
        tier: str,
        direction: Direction,
        round: int,
        sender: str | int | None = None,
        receiver: str | int | None = None,
    ) -> int:
        """Counts one message.

        Args:
          kind: what it is, for example `"importance"`.
          payload: the bytes as they would be sent.
          tier: the link, for example `"edge-device"`.
          direction: `"up"` towards the cloud or `"down"` from it.
          round: the round; set-up messages use 0 by convention.
          sender: named in errors only.
          receiver: named in errors only.

        Returns:
          The bytes counted.

        Raises:
          TypeError: the payload is not bytes.
          ValueError: another direction, or a negative round.
        """
        where = f"message {kind!r} from {sender} to {receiver}"
        if not isinstance(payload, bytes | bytearray | memoryview):
            raise TypeError(
                f"{where}: the payload must be bytes, got {type(payload).__name__}; encode it "
                "first, so that the true size is counted"
            )
        _check_key(direction, round, where)
        size = memoryview(payload).nbytes
        self._add((tier, direction, round, kind), 1, size)
        return size

    def total(
        self,
        *,
        tier: str | None = None,
        direction: Direction | None = None,
        round: int | None = None,
        kind: str | None = None,
    ) -> int:
        """Bytes of all messages that match every given field."""
        wanted = (tier, direction, round, kind)
        return sum(
            size
            for key, (_, size) in self._rows.items()
            if all(want is None or want == have for want, have in zip(wanted, key, strict=True))
        )

    def totals_by(self, *fields: str) -> dict[tuple[Any, ...], int]:
        """Bytes by the values of some of `tier`, `direction`, `round`, `kind`, in order.

        Raises:
          ValueError: another field.
        """
        unknown = set(fields) - set(_FIELDS)
        if unknown:
            raise ValueError(f"unknown field {min(unknown)!r}; expected some of {_FIELDS}")
        positions = [_FIELDS.index(field) for field in fields]
        sums: dict[tuple[Any, ...], int] = {}
        for key, (_, size) in sorted(self._rows.items()):
            group = tuple(key[position] for position in positions)
            sums[group] = sums.get(group, 0) + size
        return dict(sorted(sums.items()))

    def to_records(self) -> list[dict[str, Any]]:
        """One JSON-ready row per tier, direction, round and kind, sorted.

        Fields: `tier`, `direction`, `round`, `kind`, `messages`, `bytes`.
        """
        return [
            {**dict(zip(_FIELDS, key, strict=True)), "messages": messages, "bytes": size}
            for key, (messages, size) in sorted(self._rows.items())
        ]

    @classmethod
    def from_records(cls, records: Iterable[dict[str, Any]]) -> Ledger:
        """Inverse of `to_records`; rows with equal keys add up."""
        ledger = cls()
        for row in records:
            _check_key(row["direction"], row["round"], f"record {row}")
            key = (row["tier"], row["direction"], row["round"], row["kind"])
            ledger._add(key, row["messages"], row["bytes"])
        return ledger

    def compare(self, centralized_up: int, centralized_down: int) -> Comparison:
        """Sets the ledger beside the bytes that centralised learning would move.

        Raises:
          ValueError: a centralised total that is not positive.
        """
        if centralized_up <= 0 or centralized_down <= 0:
            raise ValueError(
                "the centralised totals must be positive, got "
                f"{centralized_up} up and {centralized_down} down"
            )
        up, down = self.total(direction="up"), self.total(direction="down")
        return Comparison(
            uplink_bytes=up,
            downlink_bytes=down,
            centralized_uplink_bytes=centralized_up,
            centralized_downlink_bytes=centralized_down,
            uplink_fraction=up / centralized_up,
            downlink_fraction=down / centralized_down,
            total_fraction=(up + down) / (centralized_up + centralized_down),
        )

    def _add(self, key: _Key, messages: int, size: int) -> None:
        row = self._rows.setdefault(key, [0, 0])
        row[0] += messages
        row[1] += size


def _check_key(direction: str, round: int, where: str) -> None:
    if direction not in get_args(Direction):
        raise ValueError(f"{where}: direction must be 'up' or 'down', got {direction!r}")
    if round < 0:
        raise ValueError(f"{where}: round must not be negative, got {round}")
