"""One dramatiq message per event: two processes of one thread, everything else as it comes."""

from __future__ import annotations

import os
from collections.abc import Sequence

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker

from kino_refunds.events.schema import Event, to_json
from tests.benchmarks.one_event import settle_one
from tests.benchmarks.rivals import Left, Rival

QUEUE = "default"
ACTOR = "settle_one"


def make_broker(redis_url: str) -> dramatiq.Broker:
    """Make the broker, as the workers and the publisher have it."""
    broker: dramatiq.Broker = RedisBroker(url=redis_url)  # type: ignore[no-untyped-call]
    return broker


# The workers'; the publisher makes its own, or importing this would be enough to reach somebody's Redis.
if "KINO_REDIS_URL" in os.environ:
    dramatiq.set_broker(make_broker(os.environ["KINO_REDIS_URL"]))
    dramatiq.actor(actor_name=ACTOR, queue_name=QUEUE)(settle_one)


def publish(redis_url: str, events: Sequence[Event]) -> None:
    """Enqueue a message for each event."""
    broker = make_broker(redis_url)
    for event in events:
        broker.enqueue(
            dramatiq.Message(QUEUE, ACTOR, args=(to_json(event).decode(),), kwargs={}, options={}),
        )
    broker.close()


def left(client: redis.Redis) -> Left:
    """Count messages on the queue, and those not acknowledged: their bodies stay until then."""
    with client.pipeline() as pipeline:
        pipeline.llen(f"dramatiq:{QUEUE}")
        pipeline.hlen(f"dramatiq:{QUEUE}.msgs")
        queued, bodies = pipeline.execute()
    return Left(queued, bodies)


DRAMATIQ = Rival(
    "dramatiq, a message per event",
    ("dramatiq", "tests.benchmarks.dramatiq_rival", "--processes", "2", "--threads", "1"),
    publish,
    left,
)
