"""What a claim holds: its messages read into events, and its events in batches of one transaction each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kino_refunds.db.faults import Fault, classify
from kino_refunds.events.queues import POISON_CRASHES, Claim
from kino_refunds.settlement.dead_letters import DeadLetter, poison_letter, unread_letter
from kino_refunds.settlement.deliveries import Delivery, read_message

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def read_claim(claim: Claim) -> tuple[list[Delivery], list[DeadLetter]]:
    """Parse a batch; what cannot be understood becomes a dead letter and stops nobody (P7, P8).

    A message that was alone in flight when a worker died, for the third time, is not even parsed.
    """
    if claim.crashes >= POISON_CRASHES:
        (message,) = claim.messages
        return [], [poison_letter(message.raw, message.queue.value, claim.crashes)]
    deliveries, dead = list[Delivery](), list[DeadLetter]()
    for message in claim.messages:
        events, letters = _read(message.raw, message.queue.value)
        deliveries += events
        dead += letters
    return deliveries, dead


def _read(raw: bytes, queue: str) -> tuple[list[Delivery], list[DeadLetter]]:
    """Read one message; whatever our own reading fails on is this message's affair and no other's."""
    try:
        return read_message(raw, queue)
    except Exception as error:
        if classify(error) is Fault.KEEP:
            raise
        return [], [unread_letter(raw, queue, error)]


def sub_batches(deliveries: Sequence[Delivery], size: int) -> Iterator[list[Delivery]]:
    """Split into batches of at most `size`, in their order; a job's events stay together, whatever their number.

    In two transactions the later ending of a job could be settled first, and then it would stand.
    """
    if len(deliveries) <= size:
        yield list(deliveries)
        return
    jobs: dict[str, list[Delivery]] = {}
    for delivery in deliveries:
        jobs.setdefault(delivery.event.job_id, []).append(delivery)
    batch: list[Delivery] = []
    for events in jobs.values():
        if batch and len(batch) + len(events) > size:
            yield batch
            batch = []
        batch += events
    yield batch
