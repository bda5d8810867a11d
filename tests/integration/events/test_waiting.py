"""Reading what waits, without moving it: every place at once, whole, or said to be incomplete."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import pytest
from redis import Redis

from kino_refunds.events.queues import QUEUE_KEYS, QueuedMessages, depths, in_flight, read_queued
from tests.intake import A, B, die, queues_of
from tests.integration.events.claims import contents, counts, messages, numbered_raws
from tests.pipeline import COMPLETED, FAILED, TIMEOUT


def test_waiting_reads_every_place_at_once(redis: Redis) -> None:
    """Queues, priorities, in-flight and recovered lists: what is not decided is seen, and nothing moves."""
    redis.lpush(FAILED, b"recovered")
    queues_of(redis, "first").claim()
    die(redis, "first")
    queues_of(redis, A).recover()
    redis.lpush(TIMEOUT, b"in flight")
    queues_of(redis, B).claim(limit=1)
    redis.lpush(COMPLETED, b"queued")
    redis.lpush(f"{COMPLETED}\x06\x169", b"low priority")
    before = contents(redis)

    found = read_queued(redis)

    assert found == QueuedMessages(
        messages=messages(FAILED, b"recovered")
        + messages(TIMEOUT, b"in flight")
        + messages(COMPLETED, b"queued", b"low priority"),
        complete=True,
        unreadable=(),
    )
    assert contents(redis) == before
    assert depths(redis) == counts(JOB_COMPLETED=2, in_flight=1, recovered=1)


def test_a_batch_in_flight_is_seen_whole_or_not_at_all(redis: Redis) -> None:
    """Who looks at a worker's hands while it claims and releases never sees a part of its batch."""
    redis.lpush(FAILED, b"failed")
    redis.lpush(COMPLETED, b"completed")
    stop = Event()

    def claim_and_release() -> None:
        queues = queues_of(redis, A)
        while not stop.is_set():
            queues.release(queues.claim().token)

    with ThreadPoolExecutor(1) as pool:
        claiming = pool.submit(claim_and_release)
        try:
            seen: Counter[tuple[bytes, ...]] = Counter()
            while seen.total() < 1_000 or len(seen) < 2:
                seen[tuple(sorted(in_flight(redis, A)))] += 1
        finally:
            stop.set()
        claiming.result()

    assert set(seen) == {(), (b"completed", b"failed")}


def test_waiting_is_complete_only_when_everything_was_read(redis: Redis) -> None:
    """Exactly as many messages as the cap are all of them; one more is not."""
    redis.lpush(FAILED, *numbered_raws("m", 40))
    exact = read_queued(redis, limit=40)
    redis.lpush(COMPLETED, b"one more")

    over = read_queued(redis, limit=40)

    assert exact == QueuedMessages(messages(FAILED, *numbered_raws("m", 40)), complete=True, unreadable=())
    assert over == replace(exact, complete=False)


def test_waiting_stops_at_its_bytes(redis: Redis) -> None:
    """A reading of many big messages ends early and says so."""
    redis.lpush(FAILED, *[b"x" * 1000] * 40)

    found = read_queued(redis, max_bytes=5000)

    assert found == QueuedMessages(messages(FAILED, *[b"x" * 1000] * 16), complete=False, unreadable=())


@pytest.mark.parametrize("key", ["kino:workers", "kino:recovered:generation.timeout", *QUEUE_KEYS])
def test_waiting_names_what_it_could_not_read(redis: Redis, key: str) -> None:
    """A key of the wrong type is no proof that nothing waits there."""
    redis.set(key, "foreign")

    found = read_queued(redis)

    assert found == QueuedMessages(messages=(), complete=False, unreadable=(key,))
    assert depths(redis) == counts()
