"""An event together with how it came to us."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kino_refunds.events.envelope import parse
from kino_refunds.events.schema import Event, fingerprint, queue_of, to_json

if TYPE_CHECKING:
    from datetime import datetime


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event, its fingerprint, and the exact bytes that it came in."""

    event: Event
    fingerprint: str
    raw: bytes
    queue: str
    pending_since: datetime | None = None
    """Set by the retry sweep: when the event was first seen, and that this is another attempt at it."""
    attempts: int = 0
    """How often it was tried again, this attempt included."""

    @property
    def identity(self) -> tuple[str, str]:
        """(source, event id): what makes two deliveries the same event (P2)."""
        return self.event.identity


def read_delivery(raw: bytes, queue: str) -> Delivery:
    """Parse a message; raises MalformedMessage."""
    event = parse(raw)
    return Delivery(event, fingerprint(event), raw, queue)


def delivery_of(event: Event, *, pending_since: datetime | None = None, attempts: int = 0) -> Delivery:
    """Wrap an event that did not come by a queue: one that we wrote ourselves, or kept while it waited."""
    return Delivery(event, fingerprint(event), to_json(event), queue_of(event).value, pending_since, attempts)
