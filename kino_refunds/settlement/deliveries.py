"""An event together with how it came to us."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kino_refunds.errors import MalformedMessage
from kino_refunds.events.envelope import MalformedReason, parse
from kino_refunds.events.schema import Event, fingerprint, queue_of, to_json

if TYPE_CHECKING:
    from datetime import datetime


RECONCILER = "kino-reconciler"
"""The source of the events that we write ourselves, where nobody else says how a job ended."""


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


def read_delivery(raw: bytes, queue: str, *, ours: bool = False) -> Delivery:
    """Parse a message; raises MalformedMessage, also for an event under our own name that is not `ours`.

    Whoever publishes one could take the place of a verdict of the reconciler's, which would then be a conflict.
    """
    event = parse(raw)
    if event.source == RECONCILER and not ours:
        raise MalformedMessage(MalformedReason.INVALID_EVENT, f"source {RECONCILER!r} is this system's own")
    return Delivery(event, fingerprint(event), raw, queue)


def delivery_of(event: Event, *, pending_since: datetime | None = None, attempts: int = 0) -> Delivery:
    """Wrap an event that did not come by a queue: one that we wrote ourselves, or kept while it waited."""
    return Delivery(event, fingerprint(event), to_json(event), queue_of(event).value, pending_since, attempts)
