from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from kombu import Connection, Producer
from redis import Redis

from kino_refunds.dev.embedded import EmbeddedValkey
from kino_refunds.errors import BadSettings, DependencyAway, MalformedMessage
from kino_refunds.events.envelope import MalformedReason, parse
from kino_refunds.events.publisher import EventPublisher
from kino_refunds.events.schema import Event, Queue, fingerprint
from tests.event_kinds import KINDS
from tests.malformed import bare, data, event

ONE_OF_EACH: dict[str, Event] = {queue: built for _, built, queue in KINDS.values()}


@pytest.fixture
def publisher(redis_url: str) -> Iterator[EventPublisher]:
    with EventPublisher(redis_url) as publisher:
        yield publisher


@pytest.fixture
def stock_kombu(redis_url: str) -> Iterator[Any]:
    """Give the test kombu as anybody would use it."""
    with Connection(redis_url) as connection:
        yield connection


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """Give the test a server that it may fill up and kill."""
    server = EmbeddedValkey(tmp_path).start()
    yield server
    server.stop()


def waiting(redis: Redis) -> dict[str, list[bytes]]:
    """Return what lies on the queues, priority keys included, the oldest message first."""
    keys = sorted(redis.scan_iter("generation.*"))
    return {key.decode(): cast("list[bytes]", redis.lrange(key, 0, -1))[::-1] for key in keys}


def test_each_event_goes_to_its_queue_and_reads_back(publisher: EventPublisher, redis: Redis) -> None:
    """What is published is on the queue of its kind, and a worker reads the same event from it."""
    count = publisher.publish_many(ONE_OF_EACH.values())

    read = {queue: [parse(raw) for raw in messages] for queue, messages in waiting(redis).items()}
    assert count == 4
    assert read == {queue: [built] for queue, built in ONE_OF_EACH.items()}


def test_the_wire_form_is_kombu_s(publisher: EventPublisher, redis: Redis) -> None:
    """A message carries kombu's envelope: JSON, base64, persistent, anonymous exchange, routed by queue."""
    publisher.publish(event())

    (raw,) = waiting(redis)["generation.job-failed"]
    envelope = json.loads(raw)
    del envelope["body"], envelope["properties"]["delivery_tag"]
    assert envelope == {
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {},
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "generation.job-failed"},
            "delivery_mode": 2,
            "priority": 0,
        },
    }


def test_a_stock_consumer_reads_what_is_published(publisher: EventPublisher, stock_kombu: Any) -> None:
    """Unknown fields and `message` pass through unchanged to any kombu consumer."""
    document = event(traceparent="00-4bf9-00f0-01", data=data(attempt=3, note="größe"))

    publisher.publish(document)

    with closing(stock_kombu.SimpleQueue("generation.job-failed")) as queue:
        message = queue.get(block=False)
        assert message.payload == document


def test_a_model_is_published_with_its_message(publisher: EventPublisher, stock_kombu: Any) -> None:
    """The text about an error, which we do not store, still reaches the other consumers."""
    publisher.publish(ONE_OF_EACH["generation.job-failed"])

    with closing(stock_kombu.SimpleQueue("generation.job-failed")) as queue:
        message = queue.get(block=False)
        assert message.payload["data"] == {
            "error": {"code": "GPU_OOM", "message": "out of memory on node 7", "origin": "platform"},
            "job_id": "job-1",
        }


def test_what_a_stock_simple_queue_puts_is_an_event(stock_kombu: Any, redis: Redis) -> None:
    """A pipeline that knows kombu alone, and not us, is understood."""
    with closing(stock_kombu.SimpleQueue("generation.job-failed")) as queue:
        queue.put(event(), serializer="json")

    (raw,) = waiting(redis)["generation.job-failed"]
    assert fingerprint(parse(raw)) == fingerprint(parse(bare(event())))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"serializer": "json", "compression": "zlib"}, MalformedReason.COMPRESSED),
        ({"serializer": "pickle"}, MalformedReason.WRONG_CONTENT_TYPE),
    ],
)
def test_what_stock_kombu_writes_otherwise_is_malformed(
    stock_kombu: Any, redis: Redis, options: dict[str, str], reason: MalformedReason
) -> None:
    """Compressed or pickled messages, as kombu itself writes them, are named as what they are."""
    with closing(stock_kombu.SimpleQueue("generation.job-failed")) as queue:
        queue.put(event(), **options)

    (raw,) = waiting(redis)["generation.job-failed"]
    with pytest.raises(MalformedMessage) as caught:
        parse(raw)
    assert caught.value.code == reason


def test_priorities_make_kombu_s_four_keys(stock_kombu: Any, redis: Redis) -> None:
    """Kombu spreads priorities over four lists, whose names intake must know; each holds an event."""
    producer = Producer(stock_kombu.default_channel)

    for priority in range(10):
        producer.publish(event(), routing_key="generation.timeout", serializer="json", priority=priority)

    read = {key: [parse(raw).id for raw in messages] for key, messages in waiting(redis).items()}
    assert read == {
        "generation.timeout": ["evt-1"] * 3,
        "generation.timeout\x06\x163": ["evt-1"] * 3,
        "generation.timeout\x06\x166": ["evt-1"] * 3,
        "generation.timeout\x06\x169": ["evt-1"],
    }


def test_the_queues_are_bound_for_stock_kombu(publisher: EventPublisher, redis: Redis) -> None:
    """A `SimpleQueue` publishes through an exchange named like its queue: the publisher declares that too."""
    publisher.publish(event())

    bindings = {key.decode(): redis.smembers(key) for key in redis.scan_iter("_kombu.binding.*")}
    assert bindings == {f"_kombu.binding.{queue}": {f"{queue}\x06\x16\x06\x16{queue}".encode()} for queue in Queue}


def test_many_events_keep_their_order(publisher: EventPublisher, redis: Redis) -> None:
    """More events than one pipeline holds arrive all, in the order given, from any iterable."""
    ids = [f"evt-{number}" for number in range(1_234)]

    count = publisher.publish_many(event(id=one) for one in ids)

    assert count == 1_234
    assert [parse(raw).id for raw in waiting(redis)["generation.job-failed"]] == ids


def test_no_events_are_no_error(publisher: EventPublisher, redis: Redis) -> None:
    """Publishing nothing does nothing, not even connect."""
    assert publisher.publish_many([]) == 0
    assert redis.keys() == []


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (event(id=1), MalformedReason.INVALID_EVENT),
        (event(type="kino.generation.job-started.v1"), MalformedReason.UNKNOWN_TYPE),
        (event(specversion="0.3"), MalformedReason.UNKNOWN_VERSION),
        (event(time=datetime(2026, 11, 2, tzinfo=UTC)), MalformedReason.BAD_JSON),
        (event(ratio=float("nan")), MalformedReason.BAD_JSON),
        (event(note="\ud800"), MalformedReason.BAD_JSON),
        (event(padding="x" * 196_000), MalformedReason.TOO_LARGE),
    ],
)
def test_what_a_worker_would_refuse_is_not_published(
    publisher: EventPublisher, redis: Redis, document: dict[str, Any], reason: MalformedReason
) -> None:
    """A malformed event is the publisher's error, under the worker's reason, before anything is sent."""
    with pytest.raises(MalformedMessage) as caught:
        publisher.publish_many([event(), document])

    assert caught.value.code == reason
    assert waiting(redis) == {}


def test_the_largest_event_that_is_taken_can_be_read(publisher: EventPublisher, redis: Redis) -> None:
    """The publisher's limit lies below the worker's: what it takes is never too large on the queue."""
    room = len(bare(event(padding="")))
    largest = event(padding="x" * (196_224 - room))

    publisher.publish(largest)

    (raw,) = waiting(redis)["generation.job-failed"]
    assert parse(raw) == parse(bare(event()))
    with pytest.raises(MalformedMessage):
        publisher.publish({**largest, "padding": largest["padding"] + "x"})


def test_threads_share_a_publisher(publisher: EventPublisher, redis: Redis) -> None:
    """Events of many threads through one publisher all arrive, each once."""
    ids = [f"evt-{number}" for number in range(400)]

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda one: publisher.publish(event(id=one)), ids))

    assert sorted(parse(raw).id for raw in waiting(redis)["generation.job-failed"]) == sorted(ids)


def test_a_closed_publisher_opens_again(publisher: EventPublisher, redis: Redis) -> None:
    """Closing is no end: the next event opens a new connection."""
    publisher.publish(event(id="evt-1"))
    publisher.close()

    publisher.publish(event(id="evt-2"))

    assert [parse(raw).id for raw in waiting(redis)["generation.job-failed"]] == ["evt-1", "evt-2"]


@pytest.mark.faults
def test_a_redis_that_is_full_raises_until_it_has_room(own_server: EmbeddedValkey) -> None:
    """A Redis at `maxmemory` is an error to the caller, and the same event passes once there is room."""
    url = own_server.url()
    with Redis.from_url(url) as redis, EventPublisher(url) as publisher:
        publisher.publish(event(id="evt-1"))
        redis.config_set("maxmemory", 1)

        with pytest.raises(DependencyAway, match="maxmemory"):
            publisher.publish(event(id="evt-2"))
        with pytest.raises(DependencyAway, match="maxmemory"):
            publisher.publish_many([event(id="evt-2"), event(id="evt-3")])
        redis.config_set("maxmemory", 0)
        publisher.publish(event(id="evt-2"))

        assert [parse(raw).id for raw in waiting(redis)["generation.job-failed"]] == ["evt-1", "evt-2"]


@pytest.mark.faults
def test_a_redis_that_was_killed_is_reached_again(own_server: EmbeddedValkey) -> None:
    """While Redis is away publishing raises; as soon as it is back the same publisher works."""
    with EventPublisher(own_server.url()) as publisher:
        publisher.publish(event(id="evt-1"))
        own_server.kill()

        with pytest.raises(DependencyAway):
            publisher.publish(event(id="evt-2"))
        with pytest.raises(DependencyAway):
            publisher.publish(event(id="evt-2"))
        own_server.restart()
        publisher.publish(event(id="evt-2"))

    with Redis.from_url(own_server.url()) as redis:
        assert parse(waiting(redis)["generation.job-failed"][-1]).id == "evt-2"


def test_a_redis_that_never_was_raises() -> None:
    """A wrong address is an error at the first event, not a wait."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

    with EventPublisher(f"redis://127.0.0.1:{port}/0") as publisher, pytest.raises(DependencyAway):
        publisher.publish(event())


def test_credentials_of_the_url_are_used(redis_url: str, redis: Redis) -> None:
    """User and password are taken from the URL, decoded; wrong ones are refused, and never shown."""
    user = f"pipeline-{redis_url.rsplit('/', 1)[1]}"
    url = redis_url.replace("redis://", f"redis://{user}:p%40ss%2Fword@")
    redis.acl_setuser(user, enabled=True, passwords=["+p@ss/word"], keys=["*"], commands=["+@all"])
    try:
        with EventPublisher(url) as publisher:
            publisher.publish(event())
        with (
            EventPublisher(url.replace("word", "w0rd")) as publisher,
            pytest.raises(DependencyAway) as caught,
        ):
            publisher.publish(event())
    finally:
        redis.acl_deluser(user)

    assert [parse(raw).id for raw in waiting(redis)["generation.job-failed"]] == ["evt-1"]
    assert "w0rd" not in str(caught.value)


@pytest.mark.parametrize("url", ["amqp://localhost", "unix:///run/redis.sock", "localhost:6379"])
def test_another_kind_of_url_is_refused_at_once(url: str) -> None:
    """A URL that cannot be Redis over TCP is an error where it is given, not at the first event."""
    with pytest.raises(BadSettings, match=r"^the Redis URL .*redis://"):
        EventPublisher(url)
