"""The names of the queues, and how much a claim may take. It loads no Redis library, so that settings load fast."""

from __future__ import annotations

from typing import Final

from kino_refunds.events.schema import Queue

# A claim serves the queues in this order: a customer waits for a refund, and no customer waits for a capture.
SERVED: Final = (Queue.JOB_FAILED, Queue.TIMEOUT, Queue.SAFETY_REJECTION, Queue.JOB_COMPLETED)
# kombu has one list for each priority; the list of priority 0, with the plain name, is served first.
PRIORITY_SUFFIXES: Final = ("", "\x06\x163", "\x06\x166", "\x06\x169")
QUEUE_KEYS: Final = tuple(queue + suffix for queue in SERVED for suffix in PRIORITY_SUFFIXES)

# A claim of 1,000 messages takes Redis some 4 ms (measured); while a script runs, Redis serves no other client.
CLAIM_LIMIT_MAX: Final = 1000
