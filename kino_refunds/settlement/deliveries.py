"""Deliveries: an event together with the bytes and the queue that it came by."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from kino_refunds.errors import MalformedMessage
from kino_refunds.events.envelope import MalformedReason, parse, parse_stored, split
from kino_refunds.events.schema import Event, fingerprint, queue_of, to_json
from kino_refunds.settlement.dead_letters import DeadLetter, malformed_letter

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime


GIVE_UP_AFTER = timedelta(hours=24)
"""How long an event is retried. A charge that is not there a day after its job ended is not late but missing: the event
becomes a dead letter, and a person looks at it."""
RECONCILER = "kino-reconciler"
"""The source of the events that this system writes itself, for jobs whose own event never came."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event, its fingerprint, and the exact bytes that it came in (`raw`)."""

    event: Event
    fingerprint: str
    raw: bytes
    queue: str
    pending_since: datetime | None = None
    """When the event was first seen, if it has a pending row; None for an event that came by a queue just now."""
    attempts: int = 0
    """How often the event was retried, this attempt included."""
    element_index: int | None = None
    """The event's place in a message that holds several; `raw` is that whole message."""

    @property
    def identity(self) -> tuple[str, str]:
        """(source, event id): what makes two deliveries the same event (P2)."""
        return self.event.identity

    def exhausted(self, now: datetime) -> bool:
        """Tell whether the event has been retried for GIVE_UP_AFTER; `now` is the ledger's clock."""
        return self.pending_since is not None and now - self.pending_since >= GIVE_UP_AFTER


def read_delivery(raw: bytes, queue: str) -> Delivery:
    """Parse a message of one event; raises MalformedMessage, also for an event whose source is RECONCILER.

    A published event under that source could take the id of an event that the reconciler writes. The reconciler's event
    would then be a conflicting duplicate, never be applied, and the charge would stay open.
    """
    return _delivery(raw, raw, queue=queue, index=None, read=parse, ours=False)


def read_message(raw: bytes, queue: str) -> tuple[list[Delivery], list[DeadLetter]]:
    """Parse a message of one event or several; return its events, and a dead letter for each that does not parse."""
    try:
        return [read_delivery(raw, queue)], []
    except MalformedMessage as error:
        malformed = error
    elements = split(raw)
    if elements is None:
        return [], [malformed_letter(raw, queue, malformed)]
    deliveries, dead = [], []
    for element in elements:
        try:
            deliveries.append(_delivery(element.content, raw, queue=queue, index=element.index, read=parse, ours=False))
        except MalformedMessage as error:
            dead.append(malformed_letter(raw, queue, error, element=element))
    return deliveries, dead


def read_kept(raw: bytes, queue: str, element_index: int | None, *, ours: bool = False) -> Delivery:
    """Parse the message that a dead letter keeps, or its element at `element_index`; raises MalformedMessage.

    Its ids are read by the rule for stored ids: the charge that it is about may be older than today's rule. `ours` says
    that this system wrote the event.
    """
    content = raw
    if element_index is not None:
        elements = split(raw) or []
        if element_index >= len(elements):
            found = f"the message has no event at index {element_index} that this build can read"
            raise MalformedMessage(MalformedReason.INVALID_EVENT, found, cause="array")
        content = elements[element_index].content
    return _delivery(content, raw, queue=queue, index=element_index, read=parse_stored, ours=ours)


def _delivery(
    content: bytes, raw: bytes, queue: str, index: int | None, read: Callable[[bytes], Event], *, ours: bool
) -> Delivery:
    event = read(content)
    # Stripped, because a stored id may have white space at its ends and would pass for another source.
    if not ours and event.source.strip() == RECONCILER:
        raise MalformedMessage(
            MalformedReason.INVALID_EVENT, f"source {RECONCILER!r} is this system's own", cause="source"
        )
    return Delivery(event, fingerprint(event), raw, queue, element_index=index)


def delivery_of(event: Event, *, pending_since: datetime | None = None, attempts: int = 0) -> Delivery:
    """Return the delivery of an event that did not come by a queue: this system wrote it, or kept it as pending."""
    return Delivery(
        event=event,
        fingerprint=fingerprint(event),
        raw=to_json(event),
        queue=queue_of(event).value,
        pending_since=pending_since,
        attempts=attempts,
    )
