"""The post office between the tiers: encodes, counts and delivers every message.

Receivers work with what was decoded from the wire, and the ledger is filled by the code
that moves the bytes, never by a formula.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

from acme_jax import message_coding, messages
from acme_jax.config import Coding
from acme_jax.message_coding import Memory
from fed.traffic import Direction, Ledger

MessageT = TypeVar("MessageT", bound=messages.Message)


class Post:
    """Delivers messages and keeps the ledger."""

    def __init__(self, coding: Coding = "none") -> None:
        """An empty ledger.

        Args:
          coding: of what devices send up, `RefineConfig.coding`.
        """
        self.ledger = Ledger()
        self._coding = coding
        self._memories: dict[tuple[int, str], Memory] = {}
        """What both ends know of one device's messages of one kind."""

    def send(
        self,
        message: MessageT,
        *,
        tier: str,
        direction: Direction,
        round: int,
        copies: int = 1,
        sender: int | None = None,
    ) -> MessageT:
        """Sends a message to `copies` receivers and returns it as they read it.

        Args:
          message: any record of `acme_jax.messages`.
          tier: the link, "cloud-edge" or "edge-device".
          direction: "up" or "down".
          round: 0 for what travels once, else the round from 1.
          copies: receivers of the same bytes; each copy is counted.
          sender: number of the device that sends it up. With coding, messages of the kinds in
            `message_coding.CODED` are coded on its link, and read as its edge reads them.
        """
        kind, payload = messages.kind(message), messages.encode(message)
        read = payload
        if self._coding == "adaptive" and sender is not None and kind in message_coding.CODED:
            # Both ends have this memory; what the sender's becomes, the checksum compares.
            before = self._memories.get((sender, kind))
            _, payload = message_coding.encode(before, payload)
            self._memories[sender, kind], read = message_coding.decode(before, payload)
        for _ in range(copies):
            self.ledger.record(
                kind, payload, tier=tier, direction=direction, round=round, sender=sender
            )
        return cast(MessageT, messages.decode(read))

    def send_up(self, message: MessageT, *, sender: int, round: int) -> MessageT:
        """Sends a device's message to its edge; see `send`."""
        return self.send(message, tier="edge-device", direction="up", round=round, sender=sender)

    def to_records(self) -> list[dict[str, Any]]:
        """The ledger's rows, JSON-ready."""
        return self.ledger.to_records()

    def from_records(self, rows: list[dict[str, Any]]) -> None:
        """Takes the ledger back to stored rows."""
        self.ledger = Ledger.from_records(rows)

    def memories_to_records(self) -> list[dict[str, Any]]:
        """What the ends of coded links know, JSON-ready: nothing without coding."""
        return [
            {"sender": sender, "kind": kind, **message_coding.to_record(memory)}
            for (sender, kind), memory in sorted(self._memories.items())
        ]

    def memories_from_records(self, rows: list[dict[str, Any]]) -> None:
        """Takes the ends of coded links back to stored rows."""
        self._memories = {
            (row["sender"], row["kind"]): message_coding.from_record(row) for row in rows
        }
