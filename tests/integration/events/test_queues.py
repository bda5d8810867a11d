"""The scripts of intake on a real Valkey: nothing is lost, and nothing is dropped by a late command."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from kombu import Connection as KombuConnection
from redis import Connection, Redis, ResponseError
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError
from redis.retry import Retry

from kino_refunds.dev.embedded import EmbeddedValkey
from kino_refunds.errors import WrongKeyType
from kino_refunds.events.queues import (
    POISON_CRASHES,
    QUEUE_KEYS,
    SERVED,
    Bound,
    Claim,
    Message,
    Queues,
    Recovered,
    Waiting,
    depths,
    in_flight,
    waiting,
)
from kino_refunds.events.schema import Queue

FAILED, TIMEOUT, SAFETY, COMPLETED = SERVED
A, B = "worker-a", "worker-b"


def worker(client: Redis, worker_id: str = A) -> Queues:
    return Queues(client, worker_id, alive_ttl_s=60)


def push(client: Redis, key: str, *raws: bytes) -> None:
    """Publish in this order: the last one is the newest."""
    client.lpush(key, *raws)


def messages(queue: Queue, *raws: bytes) -> tuple[Message, ...]:
    return tuple(Message(queue, raw) for raw in raws)


def numbered(prefix: str, count: int) -> list[bytes]:
    return [f"{prefix}-{number}".encode() for number in range(count)]


def die(client: Redis, worker_id: str = A) -> None:
    """As when the alive key expires."""
    client.delete(f"kino:alive:{worker_id}")


def contents(client: Redis) -> dict[bytes, object]:
    """Every key with its whole value, whatever its type."""
    read: dict[Any, Callable[[Any], object]] = {
        b"string": client.get,
        b"list": lambda key: client.lrange(key, 0, -1),
        b"set": client.smembers,
        b"hash": client.hgetall,
    }
    return {key: read[client.type(key)](key) for key in client.scan_iter()}


def counts(*, in_flight: int = 0, recovered: int = 0, **waiting: int) -> dict[str, int]:
    """Name what `depths` should count; what is not named is 0."""
    names: dict[str, int] = {queue: waiting.get(queue.name, 0) for queue in SERVED}
    return {**names, "in-flight": in_flight, "recovered": recovered}


# --- claim and drop


def test_a_claimed_batch_is_in_flight_until_it_is_dropped(redis: Redis) -> None:
    """A message leaves its queue for the worker's in-flight list, and Redis only by the drop."""
    push(redis, FAILED, b"1", b"2")
    queues = worker(redis)

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
        push(redis, queue, b"1", b"2", b"3")

    claim = worker(redis).claim(limit=12)

    assert claim.messages == tuple(Message(queue, raw) for queue in SERVED for raw in (b"1", b"2", b"3"))


def test_priority_keys_are_served_highest_first(redis: Redis) -> None:
    """Every priority key of kombu's belongs to its base queue, and 0 is served before 3, 6 and 9."""
    for priority in ("9", "3", "6"):
        push(redis, f"{TIMEOUT}\x06\x16{priority}", f"{priority}-old".encode(), f"{priority}-new".encode())
    push(redis, TIMEOUT, b"0")

    claim = worker(redis).claim()

    assert claim.messages == messages(TIMEOUT, b"0", b"3-old", b"3-new", b"6-old", b"6-new", b"9-old", b"9-new")


def test_an_empty_claim_writes_nothing(redis: Redis) -> None:
    """Polling empty queues costs neither memory nor a line of the append-only file."""
    queues = worker(redis)

    claim = queues.claim()

    assert claim == Claim(token="", messages=())
    assert contents(redis) == {}


def test_a_claim_registers_its_worker_and_says_that_it_lives(redis: Redis) -> None:
    """Whoever holds messages can be found by a recovery, and is not recovered while it lives."""
    push(redis, FAILED, b"1")

    worker(redis).claim()

    assert redis.smembers("kino:workers") == {b"worker-a"}
    assert 0 < redis.pttl("kino:alive:worker-a") <= 60_000
    assert worker(redis, B).recover() == Recovered(workers=(), messages=0, skipped=())


@pytest.mark.parametrize("limit", [0, 1001])
def test_a_claim_is_from_1_to_1000_messages(redis: Redis, limit: int) -> None:
    """No claim may hold Redis for long."""
    with pytest.raises(ValueError, match="1 to 1000"):
        worker(redis).claim(limit=limit)


# --- fairness and caps


@pytest.mark.parametrize("flooded", SERVED)
def test_a_flooded_queue_leaves_every_other_its_share(redis: Redis, flooded: Queue) -> None:
    """With 5,000 messages on one queue the others are in the next batch, and in the end all were claimed."""
    push(redis, flooded, *numbered("flood", 5000))
    others = [queue for queue in SERVED if queue != flooded]
    for queue in others:
        push(redis, queue, *numbered("other", 60))
    queues = worker(redis)

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
        messages(flooded, *numbered("flood", 5000))
        + tuple(message for queue in others for message in messages(queue, *numbered("other", 60)))
    )


def test_refund_bearing_queues_fill_a_batch_before_completed(redis: Redis) -> None:
    """Beyond its share a completion waits while a refund can be paid."""
    for queue in SERVED:
        push(redis, queue, *numbered("m", 100))

    claim = worker(redis).claim(limit=100)

    assert Counter(message.queue for message in claim.messages) == {
        FAILED: 70,
        TIMEOUT: 10,
        SAFETY: 10,
        COMPLETED: 10,
    }


def test_a_claim_stops_below_its_bytes(redis: Redis) -> None:
    """A message that would exceed the bytes of a batch stays on its queue, in its place."""
    push(redis, FAILED, b"a" * 40, b"b" * 40, b"c" * 40)

    claim = worker(redis).claim(max_bytes=100)

    assert claim.messages == messages(FAILED, b"a" * 40, b"b" * 40)
    assert redis.lrange(FAILED, 0, -1) == [b"c" * 40]


def test_an_oversize_message_is_claimed_alone(redis: Redis) -> None:
    """No message is too big to be claimed, kept and got out of the way."""
    push(redis, FAILED, b"x" * 1000, b"small")
    push(redis, COMPLETED, b"small")
    queues = worker(redis)

    first = queues.claim(max_bytes=100)
    queues.drop(first.token)
    second = queues.claim(max_bytes=100)

    assert first.messages == messages(FAILED, b"x" * 1000)
    assert second.messages == messages(FAILED, b"small") + messages(COMPLETED, b"small")


def test_big_messages_of_one_queue_leave_the_others_their_share(redis: Redis) -> None:
    """The share of a queue is in bytes too."""
    push(redis, FAILED, *[b"x" * 30] * 100)
    push(redis, COMPLETED, b"y" * 30)

    claim = worker(redis).claim(limit=100, max_bytes=300)

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
    queues = worker(redis)
    queues.claim()  # from here on the connection stands and the server knows the script
    push(redis, FAILED, *numbered("m", 10))

    lose_an_answer()
    claim = queues.claim(limit=3)

    assert claim == Claim(token=claim.token, messages=messages(FAILED, b"m-0", b"m-1", b"m-2"), again=True)
    assert redis.llen(FAILED) == 7


def test_a_repeated_claim_moves_nothing(redis: Redis) -> None:
    """A worker with a batch in flight gets that batch, under its token, however much waits."""
    push(redis, FAILED, b"1")
    queues = worker(redis)
    first = queues.claim()
    push(redis, FAILED, b"2")
    before = contents(redis)

    second = queues.claim(limit=1)

    assert second == replace(first, again=True)
    assert contents(redis) == before


def test_a_drop_whose_answer_was_lost_says_false_and_has_dropped(
    redis: Redis, lose_an_answer: Callable[[], None]
) -> None:
    """redis-py repeats the drop by itself; the second one finds nothing to do."""
    push(redis, FAILED, b"1")
    queues = worker(redis)
    claim = queues.claim()
    queues.drop("no such token")  # from here on the connection stands and the server knows the script

    lose_an_answer()
    dropped = queues.drop(claim.token)

    assert not dropped
    assert waiting(redis) == Waiting(messages=(), complete=True, unreadable=())


def test_a_drop_that_arrives_after_the_next_claim_deletes_nothing(redis: Redis) -> None:
    """A drop names its batch: late, it finds another token and leaves the new batch alone."""
    push(redis, FAILED, b"1", b"2")
    queues = worker(redis)
    first = queues.claim(limit=1)
    queues.drop(first.token)
    second = queues.claim(limit=1)

    late = queues.drop(first.token)

    assert not late
    assert queues.claim() == replace(second, again=True)
    assert second.messages == messages(FAILED, b"2")


def test_a_release_that_arrives_after_the_next_claim_moves_nothing(redis: Redis) -> None:
    """A release names its batch, as a drop does."""
    push(redis, FAILED, b"1", b"2")
    queues = worker(redis)
    first = queues.claim(limit=1)
    queues.drop(first.token)
    second = queues.claim(limit=1)

    late = queues.release(first.token)

    assert late == 0
    assert queues.claim() == replace(second, again=True)


def test_a_batch_without_its_token_gets_another(redis: Redis) -> None:
    """Somebody who deletes the token key loses no message, and the old token is void."""
    push(redis, FAILED, b"1")
    queues = worker(redis)
    first = queues.claim()
    redis.delete("kino:token:worker-a")

    second = queues.claim()

    assert second == replace(first, token=second.token, again=True)
    assert second.token != first.token
    assert not queues.drop(first.token)
    assert queues.drop(second.token)


def test_scripts_survive_a_flush_of_the_script_cache(redis: Redis) -> None:
    """A Redis that was restarted knows no script; the next command brings it along."""
    push(redis, FAILED, b"1")
    queues = worker(redis)
    claim = queues.claim()
    redis.script_flush()

    dropped = queues.drop(claim.token)

    assert dropped


# --- release and leave


def test_release_puts_a_batch_back_in_its_order(redis: Redis) -> None:
    """What was released is claimed next, before what was waiting behind it, in the same order."""
    push(redis, FAILED, b"1", b"2", b"3")
    push(redis, COMPLETED, b"4", b"5")
    queues = worker(redis)
    first = queues.claim(limit=3)

    released = queues.release(first.token)
    second = queues.claim()

    assert released == 3
    assert second.messages == messages(FAILED, b"1", b"2", b"3") + messages(COMPLETED, b"4", b"5")


def test_a_worker_that_leaves_is_forgotten(redis: Redis) -> None:
    """A clean stop leaves no key of this worker behind."""
    push(redis, FAILED, b"1")
    queues = worker(redis)
    queues.release(queues.claim().token)

    queues.leave()

    assert contents(redis) == {FAILED.encode(): [b"1"]}


def test_a_worker_that_leaves_a_batch_behind_is_recovered_at_once(redis: Redis) -> None:
    """Who leaves with messages in flight stays registered, and its end is no crash."""
    push(redis, FAILED, b"1")
    claim_alone(redis, A)

    worker(redis, A).leave()
    recovered = worker(redis, B).recover()
    claim = worker(redis, B).claim()

    assert recovered == Recovered(workers=(A,), messages=1, skipped=())
    assert claim == Claim(token=claim.token, messages=messages(FAILED, b"1"), recovered=True, crashes=0)


def test_refresh_keeps_a_worker_alive(redis: Redis) -> None:
    """A worker that refreshes is not recovered, even after its keys were lost."""
    push(redis, FAILED, b"1")
    queues = worker(redis)
    queues.claim()
    redis.delete("kino:alive:worker-a", "kino:workers")

    queues.refresh()

    assert worker(redis, B).recover() == Recovered(workers=(), messages=0, skipped=())
    assert depths(redis)["in-flight"] == 1


def test_a_dead_worker_that_was_idle_is_no_news(redis: Redis) -> None:
    """A worker that ended with nothing in flight leaves the registry, and is not named as recovered."""
    worker(redis).refresh()
    die(redis, A)

    assert worker(redis, B).recover() == Recovered(workers=(), messages=0, skipped=())
    assert redis.exists("kino:workers") == 0


# --- kombu's bindings

KINDS = ("_kombu.binding", "_kombu.binding_permanent")
BINDINGS = [f"{kind}.{queue}" for kind in KINDS for queue in SERVED]


def test_bindings_are_those_that_kombu_writes(redis: Redis, redis_url: str) -> None:
    """What the script puts back is, key by key, what kombu itself declares for a `SimpleQueue` of each queue."""
    with KombuConnection(redis_url) as stock:
        for queue in SERVED:
            stock.SimpleQueue(queue.value).close()
    by_kombu = {key: redis.smembers(key) for key in redis.scan_iter("_kombu.*")}
    redis.flushdb()

    bound = worker(redis).bind()

    assert {key: redis.smembers(key) for key in redis.scan_iter("_kombu.*")} == by_kombu
    assert sorted(by_kombu) == sorted(key.encode() for key in BINDINGS)
    assert bound == Bound(restored=tuple(sorted(SERVED)), skipped=())
    assert worker(redis).bind() == Bound(restored=(), skipped=())


@pytest.mark.parametrize("key", BINDINGS)
def test_each_lost_binding_is_put_back(redis: Redis, key: str) -> None:
    """One that is gone, or has other members only, is put back and named by its queue; the others stay as they are."""
    queues = worker(redis)
    queues.bind()
    whole = redis.smembers(key)
    redis.delete(key)
    gone = queues.bind()
    redis.delete(key)
    redis.sadd(key, "another's")
    incomplete = queues.bind()

    queue = next(queue for queue in SERVED if key.endswith(queue))
    assert gone == incomplete == Bound(restored=(queue,), skipped=())
    assert redis.smembers(key) == whole | {b"another's"}


def test_a_foreign_binding_is_left_alone_and_the_others_are_put_back(redis: Redis) -> None:
    """A key of another type is named, whichever it is, and ends nothing."""
    for number, key in enumerate(BINDINGS[::2]):
        if number % 2:
            redis.set(key, "x")
        else:
            redis.lpush(key, "x")

    bound = worker(redis).bind()

    assert bound.skipped == tuple(sorted(BINDINGS[::2]))
    assert redis.exists(*BINDINGS) == len(BINDINGS)
    assert worker(redis).bind() == Bound(restored=(), skipped=bound.skipped)


# --- a full Redis


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Redis]:
    """Start a server for one test alone, because it is filled up."""
    server = EmbeddedValkey(tmp_path / "valkey", scratch=True).start()
    with Redis.from_url(server.url()) as client:
        yield client
    server.stop()


@pytest.mark.faults
def test_a_full_redis_drains(own_redis: Redis) -> None:
    """At maxmemory, where every publisher is refused, claim, begin, release, refresh, bind, recovery and drop go on."""
    redis = own_redis
    for queue in SERVED:
        push(redis, queue, *numbered(queue, 1000))
    worker(redis, B).claim(limit=10)
    die(redis, B)
    queues = worker(redis)
    redis.config_set("maxmemory", 1)

    with pytest.raises(OutOfMemoryError) as refused:
        push(redis, FAILED, b"one more")
    redis.script_flush()
    released = queues.release(queues.claim(limit=1000).token)
    queues.refresh()
    bound = queues.bind()
    recovered = queues.recover()
    drained: list[Message] = []
    claim = queues.claim(limit=1000)
    while claim.messages:
        drained += claim.messages
        assert queues.begin(claim.token, 0) == (0 if claim.recovered else None)
        assert queues.drop(claim.token)
        claim = queues.claim(limit=1000)
    queues.leave()

    assert "maxmemory" in str(refused.value)
    assert released == 1000
    assert bound == Bound(restored=tuple(sorted(SERVED)), skipped=())
    assert recovered == Recovered(workers=(B,), messages=10, skipped=())
    assert Counter(drained) == Counter(
        message for queue in SERVED for message in messages(queue, *numbered(queue, 1000))
    )
    assert set(contents(redis)) == {key.encode() for key in BINDINGS}


# --- keys of the wrong type


@pytest.mark.parametrize("key", QUEUE_KEYS)
def test_a_queue_key_of_the_wrong_type_is_skipped_and_named(redis: Redis, key: str) -> None:
    """A foreign value under a queue's name stops nothing but that key, and is left as it is."""
    redis.set(key, "foreign")
    other = COMPLETED if key.startswith(FAILED) else FAILED
    push(redis, other, b"1")
    queues = worker(redis)

    claim = queues.claim()
    queues.drop(claim.token)
    empty = queues.claim()

    assert claim == Claim(token=claim.token, messages=messages(other, b"1"), skipped=(key,))
    assert empty == Claim(token="", messages=(), skipped=(key,))
    assert redis.get(key) == b"foreign"


def test_a_release_to_a_queue_of_the_wrong_type_keeps_its_messages(redis: Redis) -> None:
    """What cannot go back to its queue is claimed from the recovered list instead."""
    push(redis, FAILED, b"1")
    queues = worker(redis)
    claim = queues.claim()
    redis.set(FAILED, "foreign")

    released = queues.release(claim.token)
    again = queues.claim()

    assert released == 1
    assert again == Claim(token=again.token, messages=messages(FAILED, b"1"), recovered=True, skipped=(str(FAILED),))


OWN_KEYS = [
    "kino:workers",
    *(f"kino:{kind}:{A}" for kind in ("alive", "token")),
    *(f"kino:inflight:{A}:{queue}" for queue in SERVED),
    *(f"kino:recovered:{queue}" for queue in SERVED),
]


@pytest.mark.parametrize("key", OWN_KEYS)
def test_an_own_key_of_the_wrong_type_refuses_before_anything_moves(redis: Redis, key: str) -> None:
    """A foreign value under a name of ours is never deleted, and no message moves beside it."""
    push(redis, FAILED, b"1", b"2")
    queues = worker(redis)
    token = queues.claim(limit=1).token
    redis.delete(key)
    redis.hset(key, "foreign", "value")
    before = contents(redis)

    for command in (
        queues.claim,
        lambda: queues.drop(token),
        lambda: queues.release(token),
        lambda: queues.begin(token, 0),
        queues.refresh,
        queues.leave,
        queues.recover,
    ):
        with pytest.raises(WrongKeyType, match=f"^{key} holds a hash$"):
            command()

    assert contents(redis) == before


def test_a_foreign_crash_count_refuses_too(redis: Redis) -> None:
    """The count of a message that is alone in flight is an own key like every other."""
    push(redis, FAILED, b"1")
    claim_alone(redis, A)
    counter = "kino:crashes:356a192b7913b04c54574d18c28d46e6395428ab"  # the digest of `1`
    redis.hset(counter, "foreign", "value")

    with pytest.raises(WrongKeyType, match=counter):
        worker(redis).claim()

    assert redis.hgetall(counter) == {b"foreign": b"value"}


def test_other_errors_of_redis_are_not_renamed(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the scripts' own refusal is a foreign key."""
    queues = worker(redis)
    monkeypatch.setattr(queues, "_drop", redis.register_script("return redis.call('NONSENSE')"))

    with pytest.raises(ResponseError, match="Unknown"):
        queues.drop("1")


# --- recovery


def claim_alone(client: Redis, worker_id: str) -> Claim:
    """Claim what waits, die with it, recover it, and claim one message of it."""
    worker(client, "first").claim()
    die(client, "first")
    worker(client, worker_id).recover()
    return worker(client, worker_id).claim()


def test_a_dead_workers_batch_is_claimed_one_message_at_a_time(redis: Redis) -> None:
    """What a worker died with is settled with nothing else in flight, the oldest first."""
    push(redis, FAILED, b"1", b"2")
    worker(redis, A).claim()
    die(redis, A)
    queues = worker(redis, B)

    recovered = queues.recover()
    first = queues.claim()
    queues.drop(first.token)
    second = queues.claim()

    assert recovered == Recovered(workers=(A,), messages=2, skipped=())
    assert first == Claim(token=first.token, messages=messages(FAILED, b"1"), recovered=True)
    assert second == Claim(token=second.token, messages=messages(FAILED, b"2"), recovered=True)


def test_recovered_messages_alternate_with_normal_batches(redis: Redis) -> None:
    """A recovered backlog holds up no new message for long, nor the other way round."""
    push(redis, FAILED, b"1", b"2")
    worker(redis, A).claim()
    die(redis, A)
    push(redis, FAILED, b"3", b"4")
    queues = worker(redis, B)
    queues.recover()

    order = []
    claim = queues.claim(limit=1)
    while claim.messages:
        order.append((claim.messages[0].raw, claim.recovered))
        queues.drop(claim.token)
        claim = queues.claim(limit=1)

    assert order == [(b"3", False), (b"1", True), (b"4", False), (b"2", True)]


def test_a_crash_with_a_whole_batch_counts_for_none_of_its_messages(redis: Redis) -> None:
    """Nobody knows which message of a batch ended its worker, so none is blamed."""
    push(redis, FAILED, b"1", b"2")

    claim = claim_alone(redis, A)

    assert claim.crashes == 0
    assert list(redis.scan_iter("kino:crashes:*")) == []


def test_only_a_crash_of_a_message_alone_is_counted(redis: Redis) -> None:
    """After three workers ended with this one message, the claim says so; its neighbour is not blamed."""
    push(redis, FAILED, b"poison", b"neighbour")
    worker(redis, "first").claim()
    die(redis, "first")
    seen = []

    for name in ("w1", "w2", "w3", "w4", "w5"):
        queues = worker(redis, name)
        queues.recover()
        claim = queues.claim()
        seen.append((claim.messages[0].raw, claim.crashes))
        if claim.crashes == POISON_CRASHES or claim.messages[0].raw == b"neighbour":
            queues.drop(claim.token)
        else:
            die(redis, name)

    assert seen == [(b"poison", 0), (b"neighbour", 0), (b"poison", 1), (b"poison", 2), (b"poison", 3)]
    assert waiting(redis) == Waiting(messages=(), complete=True, unreadable=())


def test_a_drop_clears_the_crashes_of_its_message(redis: Redis) -> None:
    """A message that was settled starts from nought when it is published again; a count expires by itself."""
    push(redis, FAILED, b"1")
    claim_alone(redis, A)
    die(redis, A)
    queues = worker(redis, B)
    queues.recover()
    counters = list(redis.scan_iter("kino:crashes:*"))
    expires_s = redis.ttl(counters[0])

    claim = queues.claim()
    queues.drop(claim.token)

    assert claim.crashes == 1
    assert 0 < expires_s <= 3600
    assert list(redis.scan_iter("kino:crashes:*")) == []


# --- one of several events in work


def begin_and_die(client: Redis, name: str, *indices: int | None) -> list[int | None]:
    """Recover, claim the one message, say which events are in work, and die with the last of them."""
    queues = worker(client, name)
    queues.recover()
    claim = queues.claim()
    found = [queues.begin(claim.token, index) for index in indices]
    die(client, name)
    return found


def test_a_crash_is_counted_for_the_event_that_was_in_work(redis: Redis) -> None:
    """Neither the message nor a neighbour is blamed for an event that ends workers."""
    push(redis, FAILED, b"several")
    worker(redis, "first").claim()
    die(redis, "first")

    counted = [begin_and_die(redis, f"w{number}", 0, 1) for number in range(POISON_CRASHES)]
    queues = worker(redis)
    queues.recover()
    claim = queues.claim()
    last = [queues.begin(claim.token, index) for index in (0, 1, 2)]

    assert counted == [[0, 0], [0, 1], [0, 2]]
    assert (claim.crashes, last) == (0, [0, POISON_CRASHES, 0])
    assert queues.drop(claim.token)
    assert contents(redis).keys() == {b"kino:workers", b"kino:alive:worker-a"}


def test_a_crash_between_two_events_is_the_message_s(redis: Redis) -> None:
    """Before the first event is in work, and after the last one, it is not known whose fault a crash is."""
    push(redis, FAILED, b"several")
    worker(redis, "first").claim()
    die(redis, "first")

    begin_and_die(redis, "w1")
    begin_and_die(redis, "w2", 0, None)
    queues = worker(redis)
    queues.recover()

    assert queues.claim().crashes == 2


def test_what_is_in_work_changes_no_token(redis: Redis) -> None:
    """A batch is claimed again, released and dropped under the token that its worker knows."""
    push(redis, FAILED, b"several")
    claim = claim_alone_of_one(redis)
    queues = worker(redis)
    queues.begin(claim.token, 99)

    again = queues.claim()
    released = queues.release(claim.token)
    later = queues.claim()
    begun = queues.begin(claim.token, 0), queues.begin(later.token, 0)

    assert again == replace(claim, again=True)
    assert released == 1
    assert begun == (None, 0)
    assert queues.drop(later.token)


def claim_alone_of_one(client: Redis) -> Claim:
    worker(client, "first").claim()
    die(client, "first")
    queues = worker(client)
    queues.recover()
    return queues.claim()


def test_a_worker_that_was_taken_for_dead_is_told_before_its_next_event(redis: Redis) -> None:
    """A message that was handed on is not settled further beside its heir, and no mark of ours is left on it."""
    push(redis, FAILED, b"several")
    claim = claim_alone_of_one(redis)
    queues = worker(redis)
    die(redis, A)
    worker(redis, B).recover()
    before = contents(redis)

    assert queues.begin(claim.token, 1) is None
    assert contents(redis) == before


def test_a_batch_of_many_has_no_event_in_work(redis: Redis) -> None:
    """Only a message that is alone in flight can be blamed."""
    push(redis, FAILED, b"1", b"2")
    queues = worker(redis)
    claim = queues.claim()

    assert queues.begin(claim.token, 0) is None


def test_a_foreign_count_of_an_event_refuses(redis: Redis) -> None:
    """The count of an event is an own key like every other, and nothing is written over it."""
    push(redis, FAILED, b"1")
    claim = claim_alone_of_one(redis)
    counter = "kino:crashes:356a192b7913b04c54574d18c28d46e6395428ab:7"  # the digest of `1`
    redis.hset(counter, "foreign", "value")
    before = contents(redis)

    with pytest.raises(WrongKeyType, match=counter):
        worker(redis).begin(claim.token, 7)

    assert contents(redis) == before


def test_a_released_recovered_message_is_still_claimed_alone_and_uncounted(redis: Redis) -> None:
    """A clean stop in the middle of a recovered message neither blames it nor mixes it into a batch."""
    push(redis, FAILED, b"1", b"2")
    alone = claim_alone(redis, A)

    released = worker(redis, A).release(alone.token)
    push(redis, FAILED, b"3")
    queues = worker(redis, B)
    normal = queues.claim()
    queues.drop(normal.token)
    again = queues.claim()

    assert released == 1
    assert normal.messages == messages(FAILED, b"3")
    assert again == Claim(token=again.token, messages=messages(FAILED, b"1"), recovered=True)


def test_a_worker_that_comes_back_after_its_recovery_drops_nothing(redis: Redis) -> None:
    """A stopped worker finds its token gone; its messages belong to whoever claims them now."""
    push(redis, FAILED, b"1")
    zombie = worker(redis, A)
    claim = zombie.claim()
    die(redis, A)
    queues = worker(redis, B)
    queues.recover()

    dropped = zombie.drop(claim.token)
    again = queues.claim()

    assert not dropped
    assert again.messages == messages(FAILED, b"1")


def test_recovery_passes_over_a_dead_worker_with_a_foreign_key(redis: Redis) -> None:
    """One foreign key does not keep every other dead worker's messages from being recovered."""
    for name in ("first", "second"):
        push(redis, FAILED, name.encode())
        worker(redis, name).claim()
        die(redis, name)
    redis.delete("kino:token:first")
    redis.hset("kino:token:first", "foreign", "value")

    recovered = worker(redis, A).recover()

    assert recovered == Recovered(workers=("second",), messages=1, skipped=("kino:token:first",))
    assert redis.lrange("kino:inflight:first:generation.job-failed", 0, -1) == [b"first"]
    assert redis.hgetall("kino:token:first") == {b"foreign": b"value"}


# --- reading without moving


def test_waiting_reads_every_place_at_once(redis: Redis) -> None:
    """Queues, priorities, in-flight and recovered lists: what is not decided is seen, and nothing moves."""
    push(redis, FAILED, b"recovered")
    worker(redis, "first").claim()
    die(redis, "first")
    worker(redis, A).recover()
    push(redis, TIMEOUT, b"in flight")
    worker(redis, B).claim(limit=1)
    push(redis, COMPLETED, b"queued")
    push(redis, f"{COMPLETED}\x06\x169", b"low priority")
    before = contents(redis)

    found = waiting(redis)

    assert found == Waiting(
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
    push(redis, FAILED, b"failed")
    push(redis, COMPLETED, b"completed")
    stop = Event()

    def claim_and_release() -> None:
        queues = worker(redis, A)
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
    push(redis, FAILED, *numbered("m", 40))
    exact = waiting(redis, limit=40)
    push(redis, COMPLETED, b"one more")

    over = waiting(redis, limit=40)

    assert exact == Waiting(messages(FAILED, *numbered("m", 40)), complete=True, unreadable=())
    assert over == replace(exact, complete=False)


def test_waiting_stops_at_its_bytes(redis: Redis) -> None:
    """A reading of many big messages ends early and says so."""
    push(redis, FAILED, *[b"x" * 1000] * 40)

    found = waiting(redis, max_bytes=5000)

    assert found == Waiting(messages(FAILED, *[b"x" * 1000] * 16), complete=False, unreadable=())


@pytest.mark.parametrize("key", ["kino:workers", "kino:recovered:generation.timeout", *QUEUE_KEYS])
def test_waiting_names_what_it_could_not_read(redis: Redis, key: str) -> None:
    """A key of the wrong type is no proof that nothing waits there."""
    redis.set(key, "foreign")

    found = waiting(redis)

    assert found == Waiting(messages=(), complete=False, unreadable=(key,))
    assert depths(redis) == counts()


# --- any order of everything


class Conservation(RuleBasedStateMachine):
    """Two workers that publish, claim, drop, release, die and come back, in any order."""

    def __init__(self, client: Redis) -> None:
        super().__init__()
        client.flushdb()
        self.client = client
        self.workers = {name: worker(client, name) for name in (A, B)}
        self.published: Counter[Message] = Counter()
        self.dropped: Counter[Message] = Counter()
        self.claims: list[tuple[str, Claim]] = []

    def on_server(self, pattern: str = "*generation.*") -> Counter[Message]:
        """Read every message on any list, whether or not anybody is registered for it."""
        keys: Any = self.client.keys(pattern)
        found: Counter[Message] = Counter()
        for key in keys:
            raws: Any = self.client.lrange(key, 0, -1)
            found.update(messages(Queue(re.sub("\x06.*|kino:.*:", "", key.decode())), *raws))
        return found

    def in_flight(self, name: str) -> Counter[Message]:
        return self.on_server(f"kino:inflight:{name}:*")

    @rule(key=st.sampled_from(QUEUE_KEYS), raws=st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1))
    def publish(self, key: str, raws: list[bytes]) -> None:
        push(self.client, key, *raws)
        self.published.update(messages(Queue(key.partition("\x06")[0]), *raws))

    @rule(
        name=st.sampled_from([A, B]),
        limit=st.sampled_from([1, 4, 10]),
        max_bytes=st.sampled_from([1, 5, 100]),
    )
    def claim(self, name: str, limit: int, max_bytes: int) -> None:
        before = self.in_flight(name)
        claim = self.workers[name].claim(limit, max_bytes)
        assert claim.again == bool(before)
        assert Counter(claim.messages) == self.in_flight(name)
        if claim.again:
            assert Counter(claim.messages) == before
        if claim.messages:
            self.claims.append((name, claim))
        if claim.recovered:
            assert len(claim.messages) == 1

    @rule(name=st.sampled_from([A, B]))
    def claim_and_lose_the_answer(self, name: str) -> None:
        made = self.workers[name].claim()
        before = contents(self.client)
        claim = self.workers[name].claim()
        if made.messages:
            assert claim == replace(made, again=True)
            self.claims.append((name, claim))
        assert contents(self.client) == before

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Any token there ever was: of the batch in flight, of an older one, of one that was recovered."""
        name, claim = data.draw(st.sampled_from(self.claims))
        if self.workers[name].drop(claim.token):
            self.dropped.update(claim.messages)

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name, claim = data.draw(st.sampled_from(self.claims))
        assert self.workers[name].release(claim.token) in (0, len(claim.messages))

    @precondition(lambda self: self.claims)
    @rule(data=st.data(), index=st.none() | st.sampled_from([0, 7, 99]))
    def begin(self, data: st.DataObject, index: int | None) -> None:
        name, claim = data.draw(st.sampled_from(self.claims))
        if self.workers[name].begin(claim.token, index) is not None:
            assert Counter(claim.messages) == self.in_flight(name)
            assert claim.recovered

    @rule(name=st.sampled_from([A, B]))
    def expire(self, name: str) -> None:
        die(self.client, name)

    @rule(name=st.sampled_from([A, B]))
    def refresh(self, name: str) -> None:
        self.workers[name].refresh()

    @rule(name=st.sampled_from([A, B]))
    def recover(self, name: str) -> None:
        self.workers[name].recover()

    @rule(name=st.sampled_from([A, B]))
    def leave(self, name: str) -> None:
        self.workers[name].leave()

    @rule(name=st.sampled_from([A, B]))
    def restart(self, name: str) -> None:
        self.workers[name] = worker(self.client, name)

    @invariant()
    def nothing_is_lost_or_made(self) -> None:
        assert self.on_server() + self.dropped == self.published

    @invariant()
    def everything_can_be_found(self) -> None:
        found = waiting(self.client)
        assert Counter(found.messages) == self.on_server()
        assert found.complete


def test_no_order_of_commands_loses_or_makes_a_message(redis: Redis) -> None:
    """A published message is on a queue, in flight, recovered, or was dropped under the token it came by."""
    run_state_machine_as_test(
        cast("type[RuleBasedStateMachine]", lambda: Conservation(redis)),  # any factory will do
        settings=settings(
            max_examples=60,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
