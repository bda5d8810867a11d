"""A kombu consumer with micro-batches: up to 500 messages fetched, settled in one transaction, then acknowledged.

    python -m tests.benchmarks.kombu_rival

The same `settle_batch` as the worker's; what differs is how messages are had and let go: one BRPOP, one write
of `unacked` and one acknowledgement each. A kill between the first two loses the message (shared with every
consumer of kombu's on Redis).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import kombu
import redis

from kino_refunds.db.engine import create_engine
from kino_refunds.events.publisher import EventPublisher
from kino_refunds.events.schema import Event, Queue
from kino_refunds.settings import load_settings
from kino_refunds.settlement.batch import settle_batch
from kino_refunds.settlement.deliveries import read_delivery
from kino_refunds.settlement.rules import rules_of
from tests.benchmarks.rivals import Left, Rival

BATCH = 500
LULL_S = 0.02
"""A batch that has waited this long for its next message is settled as it is."""


def publish(redis_url: str, events: Sequence[Event]) -> None:
    """Publish as the pipeline does."""
    with EventPublisher(redis_url) as publisher:
        publisher.publish_many(events)


def left(client: redis.Redis) -> Left:
    """Count messages on the queue, and those not acknowledged."""
    with client.pipeline() as pipeline:
        pipeline.llen(Queue.JOB_FAILED.value)
        pipeline.hlen("unacked")
        queued, unacked = pipeline.execute()
    return Left(queued, queued + unacked)


def consume() -> None:
    """Settle batches until we are ended."""
    settings = load_settings()
    engine = create_engine(settings.require_database_url(), limits=settings.session_limits)
    rules = rules_of(settings)
    batch: list[Any] = []
    queue = kombu.Queue(Queue.JOB_FAILED.value)
    with (
        kombu.Connection(settings.require_redis_url()) as connection,
        kombu.Consumer(connection, [queue], on_message=batch.append, prefetch_count=BATCH),
    ):
        while True:
            with contextlib.suppress(TimeoutError):
                while len(batch) < BATCH:
                    connection.drain_events(timeout=LULL_S)
            deliveries = [read_delivery(bytes(message.body), Queue.JOB_FAILED) for message in batch]
            settle_batch(engine, deliveries, rules)
            for message in batch:
                message.ack()
            batch.clear()


KOMBU = Rival("kombu, micro-batches of 500", ("tests.benchmarks.kombu_rival",), publish, left)

if __name__ == "__main__":
    consume()
