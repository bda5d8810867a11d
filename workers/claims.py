"""Read a claim: each message becomes events or a dead letter, and events become batches of one transaction each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kino_refunds.db.faults import Fault, classify
from kino_refunds.events.queues import POISON_CRASHES, Claim
from kino_refunds.settlement.dead_letters import DeadLetter, poison_letter, unread_letter
from kino_refunds.settlement.deliveries import Delivery, read_message

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def read_claim(claim: Claim) -> tuple[list[Delivery], list[DeadLetter]]:
    """Parse a batch; return its events, and a dead letter for each message that cannot be understood (P7, P8).

    A message that was alone in flight when a worker died, for the third time, is not parsed: that may end this worker.
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
    """Parse one message; if our own parser fails on it, return a dead letter, so that no other message is affected."""
    try:
        return read_message(raw, queue)
    except Exception as error:
        if classify(error) is Fault.KEEP:
            raise
        return [], [unread_letter(raw, queue, error)]


def sub_batches(deliveries: Sequence[Delivery], size: int) -> Iterator[list[Delivery]]:
    """Yield batches of at most `size` events, in their order; a job's events stay together, whatever their number.

    In two transactions the later ending of a job could be settled first, and the first settlement stands.
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
