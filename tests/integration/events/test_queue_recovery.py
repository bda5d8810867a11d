"""What a dead worker held: claimed one message at a time, and its crashes counted for the event in work."""

from __future__ import annotations

from dataclasses import replace

import pytest
from redis import Redis

from kino_refunds.errors import WrongKeyType
from kino_refunds.events.queues import POISON_CRASHES, Claim, QueuedMessages, Recovery, read_queued
from tests.intake import A, B, die, queues_of
from tests.integration.events.claims import claim_alone, claim_alone_of_one, contents, messages
from tests.pipeline import FAILED

# --- recovery


def test_a_dead_workers_batch_is_claimed_one_message_at_a_time(redis: Redis) -> None:
    """What a worker died with is settled with nothing else in flight, the oldest first."""
    redis.lpush(FAILED, b"1", b"2")
    queues_of(redis, A).claim()
    die(redis, A)
    queues = queues_of(redis, B)

    recovered = queues.recover()
    first = queues.claim()
    queues.drop(first.token)
    second = queues.claim()

    assert recovered == Recovery(workers=(A,), messages=2, skipped=())
    assert first == Claim(token=first.token, messages=messages(FAILED, b"1"), recovered=True)
    assert second == Claim(token=second.token, messages=messages(FAILED, b"2"), recovered=True)


def test_recovered_messages_alternate_with_normal_batches(redis: Redis) -> None:
    """A recovered backlog holds up no new message for long, nor the other way round."""
    redis.lpush(FAILED, b"1", b"2")
    queues_of(redis, A).claim()
    die(redis, A)
    redis.lpush(FAILED, b"3", b"4")
    queues = queues_of(redis, B)
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
    redis.lpush(FAILED, b"1", b"2")

    claim = claim_alone(redis, A)

    assert claim.crashes == 0
    assert list(redis.scan_iter("kino:crashes:*")) == []


def test_only_a_crash_of_a_message_alone_is_counted(redis: Redis) -> None:
    """After three workers ended with this one message, the claim says so; its neighbour is not blamed."""
    redis.lpush(FAILED, b"poison", b"neighbour")
    queues_of(redis, "first").claim()
    die(redis, "first")
    seen = []

    for name in ("w1", "w2", "w3", "w4", "w5"):
        queues = queues_of(redis, name)
        queues.recover()
        claim = queues.claim()
        seen.append((claim.messages[0].raw, claim.crashes))
        if claim.crashes == POISON_CRASHES or claim.messages[0].raw == b"neighbour":
            queues.drop(claim.token)
        else:
            die(redis, name)

    assert seen == [(b"poison", 0), (b"neighbour", 0), (b"poison", 1), (b"poison", 2), (b"poison", 3)]
    assert read_queued(redis) == QueuedMessages(messages=(), complete=True, unreadable=())


def test_a_drop_clears_the_crashes_of_its_message(redis: Redis) -> None:
    """A message that was settled starts from nought when it is published again; a count expires by itself."""
    redis.lpush(FAILED, b"1")
    claim_alone(redis, A)
    die(redis, A)
    queues = queues_of(redis, B)
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
    queues = queues_of(client, name)
    queues.recover()
    claim = queues.claim()
    found = [queues.begin(claim.token, index) for index in indices]
    die(client, name)
    return found


def test_a_crash_is_counted_for_the_event_that_was_in_work(redis: Redis) -> None:
    """Neither the message nor a neighbour is blamed for an event that ends workers."""
    redis.lpush(FAILED, b"several")
    queues_of(redis, "first").claim()
    die(redis, "first")

    counted = [begin_and_die(redis, f"w{number}", 0, 1) for number in range(POISON_CRASHES)]
    queues = queues_of(redis)
    queues.recover()
    claim = queues.claim()
    last = [queues.begin(claim.token, index) for index in (0, 1, 2)]

    assert counted == [[0, 0], [0, 1], [0, 2]]
    assert (claim.crashes, last) == (0, [0, POISON_CRASHES, 0])
    assert queues.drop(claim.token)
    assert contents(redis).keys() == {b"kino:workers", b"kino:alive:worker-a"}


def test_a_crash_between_two_events_is_the_message_s(redis: Redis) -> None:
    """Before the first event is in work, and after the last one, it is not known whose fault a crash is."""
    redis.lpush(FAILED, b"several")
    queues_of(redis, "first").claim()
    die(redis, "first")

    begin_and_die(redis, "w1")
    begin_and_die(redis, "w2", 0, None)
    queues = queues_of(redis)
    queues.recover()

    assert queues.claim().crashes == 2


def test_what_is_in_work_changes_no_token(redis: Redis) -> None:
    """A batch is claimed again, released and dropped under the token that its worker knows."""
    redis.lpush(FAILED, b"several")
    claim = claim_alone_of_one(redis)
    queues = queues_of(redis)
    queues.begin(claim.token, 99)

    again = queues.claim()
    released = queues.release(claim.token)
    later = queues.claim()
    begun = queues.begin(claim.token, 0), queues.begin(later.token, 0)

    assert again == replace(claim, again=True)
    assert released == 1
    assert begun == (None, 0)
    assert queues.drop(later.token)


def test_a_worker_that_was_taken_for_dead_is_told_before_its_next_event(redis: Redis) -> None:
    """A message that was handed on is not settled further beside its heir, and no mark of ours is left on it."""
    redis.lpush(FAILED, b"several")
    claim = claim_alone_of_one(redis)
    queues = queues_of(redis)
    die(redis, A)
    queues_of(redis, B).recover()
    before = contents(redis)

    assert queues.begin(claim.token, 1) is None
    assert contents(redis) == before


def test_a_batch_of_many_has_no_event_in_work(redis: Redis) -> None:
    """Only a message that is alone in flight can be blamed."""
    redis.lpush(FAILED, b"1", b"2")
    queues = queues_of(redis)
    claim = queues.claim()

    assert queues.begin(claim.token, 0) is None


def test_a_foreign_count_of_an_event_refuses(redis: Redis) -> None:
    """The count of an event is an own key like every other, and nothing is written over it."""
    redis.lpush(FAILED, b"1")
    claim = claim_alone_of_one(redis)
    counter = "kino:crashes:356a192b7913b04c54574d18c28d46e6395428ab:7"  # the digest of `1`
    redis.hset(counter, "foreign", "value")
    before = contents(redis)

    with pytest.raises(WrongKeyType, match=counter):
        queues_of(redis).begin(claim.token, 7)

    assert contents(redis) == before


def test_a_released_recovered_message_is_still_claimed_alone_and_uncounted(redis: Redis) -> None:
    """A clean stop in the middle of a recovered message neither blames it nor mixes it into a batch."""
    redis.lpush(FAILED, b"1", b"2")
    alone = claim_alone(redis, A)

    released = queues_of(redis, A).release(alone.token)
    redis.lpush(FAILED, b"3")
    queues = queues_of(redis, B)
    normal = queues.claim()
    queues.drop(normal.token)
    again = queues.claim()

    assert released == 1
    assert normal.messages == messages(FAILED, b"3")
    assert again == Claim(token=again.token, messages=messages(FAILED, b"1"), recovered=True)


def test_a_worker_that_comes_back_after_its_recovery_drops_nothing(redis: Redis) -> None:
    """A stopped worker finds its token gone; its messages belong to whoever claims them now."""
    redis.lpush(FAILED, b"1")
    zombie = queues_of(redis, A)
    claim = zombie.claim()
    die(redis, A)
    queues = queues_of(redis, B)
    queues.recover()

    dropped = zombie.drop(claim.token)
    again = queues.claim()

    assert not dropped
    assert again.messages == messages(FAILED, b"1")


def test_recovery_passes_over_a_dead_worker_with_a_foreign_key(redis: Redis) -> None:
    """One foreign key does not keep every other dead worker's messages from being recovered."""
    for name in ("first", "second"):
        redis.lpush(FAILED, name.encode())
        queues_of(redis, name).claim()
        die(redis, name)
    redis.delete("kino:token:first")
    redis.hset("kino:token:first", "foreign", "value")

    recovered = queues_of(redis, A).recover()

    assert recovered == Recovery(workers=("second",), messages=1, skipped=("kino:token:first",))
    assert redis.lrange("kino:inflight:first:generation.job-failed", 0, -1) == [b"first"]
    assert redis.hgetall("kino:token:first") == {b"foreign": b"value"}
