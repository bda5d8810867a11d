"""The scripts of intake on a real Valkey: nothing is lost, and nothing is dropped by a late command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from kombu import Connection as KombuConnection
from redis import Connection, Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from kino_refunds.events.queues import SERVED, BindReport, Claim, Message, QueuedMessages, Recovery, depths, read_queued
from kino_refunds.events.schema import Queue
from tests.intake import A, B, die, queues_of
from tests.integration.events.claims import BINDINGS, claim_alone, contents, counts, messages, numbered_raws
from tests.pipeline import COMPLETED, FAILED, SAFETY, TIMEOUT

# --- claim and drop


def test_a_claimed_batch_is_in_flight_until_it_is_dropped(redis: Redis) -> None:
    """A message leaves its queue for the worker's in-flight list, and Redis only by the drop."""
    redis.lpush(FAILED, b"1", b"2")
    queues = queues_of(redis)

    claim = queues.claim()
    in_flight = depths(redis)
    dropped = queues.drop(claim.token)

    assert claim == Claim(token=claim.token, messages=messages(FAILED, b"1", b"2"))
    assert in_flight == counts(in_flight=2)
    assert dropped
    assert contents(redis) == {b"kino:alive:worker-a": b"1", b"kino:workers": {b"worker-a"}}


def test_each_queue_is_claimed_oldest_first(redis: Redis) -> None:
    """Messages of one queue come in the order of their publishing, refund-bearing queues first."""
    for queue in Queue:
        redis.lpush(queue, b"1", b"2", b"3")

    claim = queues_of(redis).claim(limit=12)

    assert claim.messages == tuple(Message(queue, raw) for queue in SERVED for raw in (b"1", b"2", b"3"))


def test_priority_keys_are_served_highest_first(redis: Redis) -> None:
    """Every priority key of kombu's belongs to its base queue, and 0 is served before 3, 6 and 9."""
    for priority in ("9", "3", "6"):
        redis.lpush(f"{TIMEOUT}\x06\x16{priority}", f"{priority}-old".encode(), f"{priority}-new".encode())
    redis.lpush(TIMEOUT, b"0")

    claim = queues_of(redis).claim()

    assert claim.messages == messages(TIMEOUT, b"0", b"3-old", b"3-new", b"6-old", b"6-new", b"9-old", b"9-new")


def test_an_empty_claim_writes_nothing(redis: Redis) -> None:
    """Polling empty queues costs neither memory nor a line of the append-only file."""
    queues = queues_of(redis)

    claim = queues.claim()

    assert claim == Claim(token="", messages=())
    assert contents(redis) == {}


def test_a_claim_registers_its_worker_and_says_that_it_lives(redis: Redis) -> None:
    """Whoever holds messages can be found by a recovery, and is not recovered while it lives."""
    redis.lpush(FAILED, b"1")

    queues_of(redis).claim()

    assert redis.smembers("kino:workers") == {b"worker-a"}
    assert 0 < redis.pttl("kino:alive:worker-a") <= 60_000
    assert queues_of(redis, B).recover() == Recovery(workers=(), messages=0, skipped=())


@pytest.mark.parametrize("limit", [0, 1001])
def test_a_claim_is_from_1_to_1000_messages(redis: Redis, limit: int) -> None:
    """No claim may hold Redis for long."""
    with pytest.raises(ValueError, match="1 to 1000"):
        queues_of(redis).claim(limit=limit)


# --- fairness and caps


@pytest.mark.parametrize("flooded", SERVED)
def test_a_flooded_queue_leaves_every_other_its_share(redis: Redis, flooded: Queue) -> None:
    """With 5,000 messages on one queue the others are in the next batch, and in the end all were claimed."""
    redis.lpush(flooded, *numbered_raws("flood", 5000))
    others = [queue for queue in SERVED if queue != flooded]
    for queue in others:
        redis.lpush(queue, *numbered_raws("other", 60))
    queues = queues_of(redis)

    first = queues.claim(limit=500)
    seen = Counter(message.queue for message in first.messages)
    everything = list(first.messages)
    claim = first
    while claim.messages:
        queues.drop(claim.token)
        claim = queues.claim(limit=500)
        everything += claim.messages

    assert sum(seen.values()) == 500
    assert all(seen[queue] >= 50 for queue in SERVED)
    assert Counter(everything) == Counter(
        messages(flooded, *numbered_raws("flood", 5000))
        + tuple(message for queue in others for message in messages(queue, *numbered_raws("other", 60)))
    )


def test_refund_bearing_queues_fill_a_batch_before_completed(redis: Redis) -> None:
    """Beyond its share a completion waits while a refund can be paid."""
    for queue in SERVED:
        redis.lpush(queue, *numbered_raws("m", 100))

    claim = queues_of(redis).claim(limit=100)

    assert Counter(message.queue for message in claim.messages) == {
        FAILED: 70,
        TIMEOUT: 10,
        SAFETY: 10,
        COMPLETED: 10,
    }


def test_a_claim_stops_below_its_bytes(redis: Redis) -> None:
    """A message that would exceed the bytes of a batch stays on its queue, in its place."""
    redis.lpush(FAILED, b"a" * 40, b"b" * 40, b"c" * 40)

    claim = queues_of(redis).claim(max_bytes=100)

    assert claim.messages == messages(FAILED, b"a" * 40, b"b" * 40)
    assert redis.lrange(FAILED, 0, -1) == [b"c" * 40]


def test_an_oversize_message_is_claimed_alone(redis: Redis) -> None:
    """No message is too big to be claimed, kept and got out of the way."""
    redis.lpush(FAILED, b"x" * 1000, b"small")
    redis.lpush(COMPLETED, b"small")
    queues = queues_of(redis)

    first = queues.claim(max_bytes=100)
    queues.drop(first.token)
    second = queues.claim(max_bytes=100)

    assert first.messages == messages(FAILED, b"x" * 1000)
    assert second.messages == messages(FAILED, b"small") + messages(COMPLETED, b"small")


def test_big_messages_of_one_queue_leave_the_others_their_share(redis: Redis) -> None:
    """The share of a queue is in bytes too."""
    redis.lpush(FAILED, *[b"x" * 30] * 100)
    redis.lpush(COMPLETED, b"y" * 30)

    claim = queues_of(redis).claim(limit=100, max_bytes=300)

    assert claim.messages == messages(FAILED, *[b"x" * 30] * 9) + messages(COMPLETED, b"y" * 30)


# --- answers that are lost, commands that come late


@pytest.fixture
def lose_an_answer(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Break the connection once, after the server has done what it was told and before the answer is seen."""
    redis.set_retry(Retry(NoBackoff(), 3))
    read_response = Connection.read_response

    def lose_once(connection: Connection, *args: Any, **kwargs: Any) -> None:
        read_response(connection, *args, **kwargs)
        monkeypatch.setattr(Connection, "read_response", read_response)
        connection.disconnect()  # type: ignore[no-untyped-call]
        raise RedisConnectionError("the answer was lost")

    return lambda: monkeypatch.setattr(Connection, "read_response", lose_once)


def test_a_claim_whose_answer_was_lost_is_repeated_with_the_same_batch(
    redis: Redis, lose_an_answer: Callable[[], None]
) -> None:
    """redis-py repeats the claim by itself: the same messages, and no second batch moved."""
    queues = queues_of(redis)
    queues.claim()  # from here on the connection stands and the server knows the script
    redis.lpush(FAILED, *numbered_raws("m", 10))

    lose_an_answer()
    claim = queues.claim(limit=3)

    assert claim == Claim(token=claim.token, messages=messages(FAILED, b"m-0", b"m-1", b"m-2"), again=True)
    assert redis.llen(FAILED) == 7


def test_a_repeated_claim_moves_nothing(redis: Redis) -> None:
    """A worker with a batch in flight gets that batch, under its token, however much waits."""
    redis.lpush(FAILED, b"1")
    queues = queues_of(redis)
    first = queues.claim()
    redis.lpush(FAILED, b"2")
    before = contents(redis)

    second = queues.claim(limit=1)

    assert second == replace(first, again=True)
    assert contents(redis) == before


def test_a_drop_whose_answer_was_lost_says_false_and_has_dropped(
    redis: Redis, lose_an_answer: Callable[[], None]
) -> None:
    """redis-py repeats the drop by itself; the second one finds nothing to do."""
    redis.lpush(FAILED, b"1")
    queues = queues_of(redis)
    claim = queues.claim()
    queues.drop("no such token")  # from here on the connection stands and the server knows the script

    lose_an_answer()
    dropped = queues.drop(claim.token)

    assert not dropped
    assert read_queued(redis) == QueuedMessages(messages=(), complete=True, unreadable=())


def test_a_drop_that_arrives_after_the_next_claim_deletes_nothing(redis: Redis) -> None:
    """A drop names its batch: late, it finds another token and leaves the new batch alone."""
    redis.lpush(FAILED, b"1", b"2")
    queues = queues_of(redis)
    first = queues.claim(limit=1)
    queues.drop(first.token)
    second = queues.claim(limit=1)

    late = queues.drop(first.token)

    assert not late
    assert queues.claim() == replace(second, again=True)
    assert second.messages == messages(FAILED, b"2")


def test_a_release_that_arrives_after_the_next_claim_moves_nothing(redis: Redis) -> None:
    """A release names its batch, as a drop does."""
    redis.lpush(FAILED, b"1", b"2")
    queues = queues_of(redis)
    first = queues.claim(limit=1)
    queues.drop(first.token)
    second = queues.claim(limit=1)

    late = queues.release(first.token)

    assert late == 0
    assert queues.claim() == replace(second, again=True)


def test_a_batch_without_its_token_gets_another(redis: Redis) -> None:
    """Somebody who deletes the token key loses no message, and the old token is void."""
    redis.lpush(FAILED, b"1")
    queues = queues_of(redis)
    first = queues.claim()
    redis.delete("kino:token:worker-a")

    second = queues.claim()

    assert second == replace(first, token=second.token, again=True)
    assert second.token != first.token
    assert not queues.drop(first.token)
    assert queues.drop(second.token)


def test_scripts_survive_a_flush_of_the_script_cache(redis: Redis) -> None:
    """A Redis that was restarted knows no script; the next command brings it along."""
    redis.lpush(FAILED, b"1")
    queues = queues_of(redis)
    claim = queues.claim()
    redis.script_flush()

    dropped = queues.drop(claim.token)

    assert dropped


# --- release and leave


def test_release_puts_a_batch_back_in_its_order(redis: Redis) -> None:
    """What was released is claimed next, before what was waiting behind it, in the same order."""
    redis.lpush(FAILED, b"1", b"2", b"3")
    redis.lpush(COMPLETED, b"4", b"5")
    queues = queues_of(redis)
    first = queues.claim(limit=3)

    released = queues.release(first.token)
    second = queues.claim()

    assert released == 3
    assert second.messages == messages(FAILED, b"1", b"2", b"3") + messages(COMPLETED, b"4", b"5")


def test_a_worker_that_leaves_is_forgotten(redis: Redis) -> None:
    """A clean stop leaves no key of this worker behind."""
    redis.lpush(FAILED, b"1")
    queues = queues_of(redis)
    queues.release(queues.claim().token)

    queues.leave()

    assert contents(redis) == {FAILED.encode(): [b"1"]}


def test_a_worker_that_leaves_a_batch_behind_is_recovered_at_once(redis: Redis) -> None:
    """Who leaves with messages in flight stays registered, and its end is no crash."""
    redis.lpush(FAILED, b"1")
    claim_alone(redis, A)

    queues_of(redis, A).leave()
    recovered = queues_of(redis, B).recover()
    claim = queues_of(redis, B).claim()

    assert recovered == Recovery(workers=(A,), messages=1, skipped=())
    assert claim == Claim(token=claim.token, messages=messages(FAILED, b"1"), recovered=True, crashes=0)


def test_refresh_keeps_a_worker_alive(redis: Redis) -> None:
    """A worker that refreshes is not recovered, even after its keys were lost."""
    redis.lpush(FAILED, b"1")
    queues = queues_of(redis)
    queues.claim()
    redis.delete("kino:alive:worker-a", "kino:workers")

    queues.refresh()

    assert queues_of(redis, B).recover() == Recovery(workers=(), messages=0, skipped=())
    assert depths(redis)["in-flight"] == 1


def test_a_dead_worker_that_was_idle_is_no_news(redis: Redis) -> None:
    """A worker that ended with nothing in flight leaves the registry, and is not named as recovered."""
    queues_of(redis).refresh()
    die(redis, A)

    assert queues_of(redis, B).recover() == Recovery(workers=(), messages=0, skipped=())
    assert redis.exists("kino:workers") == 0


# --- kombu's bindings


def test_bindings_are_those_that_kombu_writes(redis: Redis, redis_url: str) -> None:
    """What the script puts back is, key by key, what kombu itself declares for a `SimpleQueue` of each queue."""
    with KombuConnection(redis_url) as stock:
        for queue in SERVED:
            stock.SimpleQueue(queue.value).close()
    by_kombu = {key: redis.smembers(key) for key in redis.scan_iter("_kombu.*")}
    redis.flushdb()

    bound = queues_of(redis).bind()

    assert {key: redis.smembers(key) for key in redis.scan_iter("_kombu.*")} == by_kombu
    assert sorted(by_kombu) == sorted(key.encode() for key in BINDINGS)
    assert bound == BindReport(restored=tuple(sorted(SERVED)), skipped=())
    assert queues_of(redis).bind() == BindReport(restored=(), skipped=())


@pytest.mark.parametrize("key", BINDINGS)
def test_each_lost_binding_is_put_back(redis: Redis, key: str) -> None:
    """One that is gone, or has other members only, is put back and named by its queue; the others stay as they are."""
    queues = queues_of(redis)
    queues.bind()
    whole = redis.smembers(key)
    redis.delete(key)
    gone = queues.bind()
    redis.delete(key)
    redis.sadd(key, "another's")
    incomplete = queues.bind()

    queue = next(queue for queue in SERVED if key.endswith(queue))
    assert gone == incomplete == BindReport(restored=(queue,), skipped=())
    assert redis.smembers(key) == whole | {b"another's"}


def test_a_foreign_binding_is_left_alone_and_the_others_are_put_back(redis: Redis) -> None:
    """A key of another type is named, whichever it is, and ends nothing."""
    for number, key in enumerate(BINDINGS[::2]):
        if number % 2:
            redis.set(key, "x")
        else:
            redis.lpush(key, "x")

    bound = queues_of(redis).bind()

    assert bound.skipped == tuple(sorted(BINDINGS[::2]))
    assert redis.exists(*BINDINGS) == len(BINDINGS)
    assert queues_of(redis).bind() == BindReport(restored=(), skipped=bound.skipped)
