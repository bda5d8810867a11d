"""The publisher, for the pipeline: puts events on their queues, in the form that every kombu consumer reads."""

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
from kino_refunds.events.broker import kombu_connection
from kino_refunds.events.envelope import MESSAGE_BYTES_MAX, MalformedReason, parse
from kino_refunds.events.redis_url import read_url
from kino_refunds.events.schema import Event, Queue, queue_of

# The envelope that kombu writes around a body takes about 330 bytes.
_ENVELOPE_BYTES_MAX: Final = 512
# Larger pipelines are no faster, and block Redis' other clients for longer (500 events take it about 1 ms).
_PIPELINE_LENGTH: Final = 500


class EventPublisher:
    """Publishes the ends of jobs; an event that is published without an error is on its queue.

    `DependencyAway` means that Redis did not confirm the event: Redis is away, slow, full (`maxmemory`), not the
    primary any more, or refuses the user. The event may or may not be on its queue. **Publish it again, unchanged and
    with the same id, until this succeeds**: the same event twice refunds once. Store it durably until then, because no
    other copy exists (if it is lost, the job is found overdue after its deadline). The next call opens a new
    connection, after a failover to the new primary. The publisher never repeats an event itself, so no call waits
    longer than its timeout.

    `MalformedMessage` means that no worker would understand the event; it has the reason that the dead letter would
    have. Publishing it again cannot help: correct the caller.

    Threads may share a publisher: they take turns. Processes must not: open one after the fork.
    """

    def __init__(self, redis_url: str) -> None:
        """Take a redis:// or rediss:// URL; connects at the first event. Raises BadSettings."""
        read_url(redis_url, name="the Redis URL")
        self._redis_url = redis_url
        self._connection: Connection | None = None
        self._producer: Producer | None = None
        self._lock = threading.Lock()

    def publish(self, event: Event | Mapping[str, Any]) -> None:
        """Publish one event, with its unknown fields and its `message`; raises DependencyAway and MalformedMessage."""
        self.publish_many([event])

    def publish_many(self, events: Iterable[Event | Mapping[str, Any]]) -> int:
        """Publish events in their order, 500 in each round trip; return how many.

        Raises DependencyAway and MalformedMessage. Any of the events may be on the queues then: publish all of them
        again, with the same ids.
        """
        iterator, count = iter(events), 0
        while bodies := [to_wire(event) for event in islice(iterator, _PIPELINE_LENGTH)]:
            with self._lock:
                self._push(bodies)
            count += len(bodies)
        return count

    def close(self) -> None:
        """Close the connection; publishing afterwards opens a new one."""
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
        # Opening a channel would connect too, but after a failure it would wait 2 s and try again.
        self._connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
        channel = self._connection.channel()
        _declare(channel)
        return Producer(channel)

    def _forget(self) -> None:
        connection, self._connection, self._producer = self._connection, None, None
        if connection is not None:
            connection.release()


def _declare(channel: Any) -> None:
    # Delivery through the anonymous exchange needs no binding. A stock SimpleQueue does: without the binding it drops
    # its messages without an error.
    for queue in Queue:
        KombuQueue(queue.value, Exchange(queue.value, "direct"), queue.value, channel=channel).declare()


def to_wire(event: Event | Mapping[str, Any]) -> tuple[str, Queue]:
    """Return the event's body and its queue; raises MalformedMessage if a worker would not understand the body."""
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
