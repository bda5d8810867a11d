"""The pipeline's side: put events on their queues, in the form that every kombu consumer reads."""

import json
import threading
from collections.abc import Iterable, Mapping
from itertools import islice
from types import TracebackType
from typing import Any, Final, Self

from kombu import Connection, Exchange, Producer
from kombu import Queue as KombuQueue
from kombu.exceptions import KombuError
from pydantic import BaseModel
from redis.exceptions import RedisError

from kino_refunds.errors import DependencyAway, MalformedMessage
from kino_refunds.events.connection import kombu_connection, read_url
from kino_refunds.events.envelope import MESSAGE_BYTES_MAX, MalformedReason, parse
from kino_refunds.events.schema import Event, Queue, queue_of

# What kombu wraps around a body takes about 330 bytes.
_ENVELOPE_BYTES_MAX: Final = 512
# Larger pipelines are no faster, and keep Redis from its other clients for longer (500 take it about 1 ms).
_PIPELINE_LENGTH: Final = 500


class EventPublisher:
    """Publish the ends of jobs; what is published without an error is on its queue.

    `DependencyAway` means that Redis did not confirm: it is away, slow, full (`maxmemory`), no primary any more,
    or refuses the user. The next call connects anew, so also to the new primary after a failover. The event
    may or may not be on its queue. **Publish it again, unchanged and with the same id, until this succeeds**:
    the same event twice refunds once. Keep it durably until then, for nobody else has it (if it is lost, the
    job is found overdue after its deadline). No event is sent twice in here, so that no caller waits longer
    than it knows.

    `MalformedMessage` means that no worker would understand the event, with the reason under which a worker
    would have made it a dead letter. Publishing it again cannot help; correct the caller.

    Threads may share a publisher, they take turns. Processes may not: open one after the fork.
    """

    def __init__(self, redis_url: str) -> None:
        """Take a redis:// or rediss:// URL and connect at the first event; raises BadSettings."""
        read_url(redis_url, name="the Redis URL")
        self._redis_url = redis_url
        self._connection: Connection | None = None
        self._producer: Producer | None = None
        self._lock = threading.Lock()

    def publish(self, event: Event | Mapping[str, Any]) -> None:
        """Publish one event; unknown fields and `message` travel along."""
        self.publish_many([event])

    def publish_many(self, events: Iterable[Event | Mapping[str, Any]]) -> int:
        """Publish events in order and say how many; they travel 500 at a time.

        If this raises, any part of them may be on the queues: publish all of them again, with the same ids.
        """
        iterator, count = iter(events), 0
        while bodies := [to_wire(event) for event in islice(iterator, _PIPELINE_LENGTH)]:
            with self._lock:
                self._push(bodies)
            count += len(bodies)
        return count

    def close(self) -> None:
        """Give the connection back; publishing afterwards opens a new one."""
        with self._lock:
            self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _push(self, bodies: list[tuple[str, Queue]]) -> None:
        try:
            producer = self._producer = self._producer or self._open()
            with producer.batch(max_size=_PIPELINE_LENGTH):  # one pipeline, sent and confirmed as it closes
                for body, queue in bodies:
                    producer.publish(
                        body,
                        routing_key=queue.value,
                        content_type="application/json",
                        content_encoding="utf-8",
                        delivery_mode="persistent",
                    )
        except (RedisError, KombuError) as error:
            self._forget()
            raise DependencyAway(f"Redis did not confirm the events: {error.__cause__ or error}") from error

    def _open(self) -> Producer:
        self._connection = kombu_connection(self._redis_url)
        # Asking for a channel connects too, but tries again after 2 s first.
        self._connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
        channel = self._connection.channel()
        _declare(channel)
        return Producer(channel)

    def _forget(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            connection.release()


def _declare(channel: Any) -> None:
    # Not needed to deliver through the anonymous exchange, but without its binding a stock SimpleQueue beside
    # us would drop what it is given.
    for queue in Queue:
        KombuQueue(queue.value, Exchange(queue.value, "direct"), queue.value, channel=channel).declare()


def to_wire(event: Event | Mapping[str, Any]) -> tuple[str, Queue]:
    """Write the body, and read it as a worker would before it goes anywhere."""
    if isinstance(event, BaseModel):
        body = event.model_dump_json(exclude_none=True)
    else:
        try:
            body = json.dumps(dict(event), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise MalformedMessage(MalformedReason.BAD_JSON, f"not JSON: {error}") from error
    encoded = body.encode()
    size = (len(encoded) + 2) // 3 * 4 + _ENVELOPE_BYTES_MAX
    if size > MESSAGE_BYTES_MAX:
        raise MalformedMessage(
            MalformedReason.TOO_LARGE,
            f"about {size:,} bytes with its envelope are more than the {MESSAGE_BYTES_MAX:,} allowed",
        )
    return body, queue_of(parse(encoded))
