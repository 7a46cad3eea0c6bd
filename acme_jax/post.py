"""The post office between the tiers: encodes, counts and delivers every message.

Receivers work with what was decoded from the wire, and the ledger is filled by the code
that moves the bytes, never by a formula.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

from acme_jax import messages
from fed.traffic import Direction, Ledger

MessageT = TypeVar("MessageT", bound=messages.Message)


class Post:
    """Delivers messages and keeps the ledger."""

    def __init__(self) -> None:
        self.ledger = Ledger()

    def send(
        self, message: MessageT, *, tier: str, direction: Direction, round: int, copies: int = 1
    ) -> MessageT:
        """Sends a message to `copies` receivers and returns it as they read it.

        Args:
          message: any record of `acme_jax.messages`.
          tier: the link, "cloud-edge" or "edge-device".
          direction: "up" or "down".
          round: 0 for what travels once, else the round from 1.
          copies: receivers of the same bytes; each copy is counted.
        """
        payload = messages.encode(message)
        for _ in range(copies):
            self.ledger.record(
                messages.kind(message), payload, tier=tier, direction=direction, round=round
            )
        return cast(MessageT, messages.decode(payload))

    def to_records(self) -> list[dict[str, Any]]:
        """The ledger's rows, JSON-ready."""
        return self.ledger.to_records()

    def from_records(self, rows: list[dict[str, Any]]) -> None:
        """Takes the ledger back to stored rows."""
        self.ledger = Ledger.from_records(rows)
