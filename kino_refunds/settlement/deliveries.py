"""An event together with how it came to us."""

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
"""A charge that has not come a day after its job ended is not late, it is missing: a person looks."""
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
    element_index: int | None = None
    """The event's place in a message that holds several; `raw` is that whole message."""

    @property
    def identity(self) -> tuple[str, str]:
        """(source, event id): what makes two deliveries the same event (P2)."""
        return self.event.identity

    def exhausted(self, now: datetime) -> bool:
        """Say whether this event has been tried for as long as we try."""
        return self.pending_since is not None and now - self.pending_since >= GIVE_UP_AFTER


def read_delivery(raw: bytes, queue: str) -> Delivery:
    """Parse a message of one event; raises MalformedMessage, also for an event under our own name.

    Whoever publishes one could take the place of a verdict of the reconciler's, which would then be a conflict.
    """
    return _delivery(raw, raw, queue=queue, index=None, read=parse, ours=False)


def read_message(raw: bytes, queue: str) -> tuple[list[Delivery], list[DeadLetter]]:
    """Parse a message of one event or of several; what cannot be understood is a dead letter, each by itself."""
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
    """Parse a message that a dead letter has kept, or its element; raises MalformedMessage.

    Its ids are read by the rule for what is stored: the charge that it is about may be from before today's rule.
    `ours` says that we wrote it.
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
    # Also with white space at its ends, which a stored id may have.
    if not ours and event.source.strip() == RECONCILER:
        raise MalformedMessage(
            MalformedReason.INVALID_EVENT, f"source {RECONCILER!r} is this system's own", cause="source"
        )
    return Delivery(event, fingerprint(event), raw, queue, element_index=index)


def delivery_of(event: Event, *, pending_since: datetime | None = None, attempts: int = 0) -> Delivery:
    """Wrap an event that did not come by a queue: one that we wrote ourselves, or kept while it waited."""
    return Delivery(
        event=event,
        fingerprint=fingerprint(event),
        raw=to_json(event),
        queue=queue_of(event).value,
        pending_since=pending_since,
        attempts=attempts,
    )
