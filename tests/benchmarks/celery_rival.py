"""One Celery task per event: prefork 2, acknowledged late, one task fetched ahead for each process."""

from __future__ import annotations

import os
from collections.abc import Sequence

import redis
from celery import Celery

from kino_refunds.events.schema import Event, to_json
from tests.benchmarks.one_event import settle_one
from tests.benchmarks.rivals import Left, Rival

QUEUE = "bench"
TASK = "settle_one"


def make_app(broker: str) -> Celery:
    """Make the app, as a worker and as the publisher have it."""
    app = Celery("bench", broker=broker)
    app.conf.update(
        worker_pool="prefork",
        worker_concurrency=2,
        # As a careful shop has it: nothing is acknowledged before its commit, nothing waits behind a slow task.
        worker_prefetch_multiplier=1,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        task_default_queue=QUEUE,
        broker_connection_retry_on_startup=True,
        worker_enable_remote_control=False,
    )
    return app


# The worker's; the publisher makes its own, or importing this would be enough to reach somebody's Redis.
app = make_app(os.environ.get("KINO_REDIS_URL", "memory://"))
app.task(settle_one, name=TASK)


def publish(redis_url: str, events: Sequence[Event]) -> None:
    """Send a task for each event."""
    with make_app(redis_url) as sender, sender.producer_pool.acquire(block=True) as producer:
        for event in events:
            sender.send_task(TASK, args=(to_json(event).decode(),), producer=producer)


def left(client: redis.Redis) -> Left:
    """Count tasks on the queue, and those not acknowledged."""
    with client.pipeline() as pipeline:
        pipeline.llen(QUEUE)
        pipeline.hlen("unacked")
        queued, unacked = pipeline.execute()
    return Left(queued, queued + unacked)


CELERY = Rival(
    "celery, a task per event",
    ("celery", "--quiet", "-A", "tests.benchmarks.celery_rival", "worker", "--loglevel", "warning"),
    publish,
    left,
)
