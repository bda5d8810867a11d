"""The scripts of intake where Redis is full or a key has the wrong type: refused before anything moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis, ResponseError
from redis.exceptions import OutOfMemoryError

from kino_refunds.dev.embedded import EmbeddedValkey
from kino_refunds.errors import WrongKeyType
from kino_refunds.events.queues import QUEUE_KEYS, SERVED, BindReport, Claim, Message, Recovery
from tests.intake import A, B, die, queues_of
from tests.integration.events.claims import BINDINGS, claim_alone, contents, messages, numbered_raws
from tests.pipeline import COMPLETED, FAILED

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
        redis.lpush(queue, *numbered_raws(queue, 1000))
    queues_of(redis, B).claim(limit=10)
    die(redis, B)
    queues = queues_of(redis)
    redis.config_set("maxmemory", 1)

    with pytest.raises(OutOfMemoryError) as refused:
        redis.lpush(FAILED, b"one more")
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
    assert bound == BindReport(restored=tuple(sorted(SERVED)), skipped=())
    assert recovered == Recovery(workers=(B,), messages=10, skipped=())
    assert Counter(drained) == Counter(
        message for queue in SERVED for message in messages(queue, *numbered_raws(queue, 1000))
    )
    assert set(contents(redis)) == {key.encode() for key in BINDINGS}


# --- keys of the wrong type


@pytest.mark.parametrize("key", QUEUE_KEYS)
def test_a_queue_key_of_the_wrong_type_is_skipped_and_named(redis: Redis, key: str) -> None:
    """A foreign value under a queue's name stops nothing but that key, and is left as it is."""
    redis.set(key, "foreign")
    other = COMPLETED if key.startswith(FAILED) else FAILED
    redis.lpush(other, b"1")
    queues = queues_of(redis)

    claim = queues.claim()
    queues.drop(claim.token)
    empty = queues.claim()

    assert claim == Claim(token=claim.token, messages=messages(other, b"1"), skipped=(key,))
    assert empty == Claim(token="", messages=(), skipped=(key,))
    assert redis.get(key) == b"foreign"


def test_a_release_to_a_queue_of_the_wrong_type_keeps_its_messages(redis: Redis) -> None:
    """What cannot go back to its queue is claimed from the recovered list instead."""
    redis.lpush(FAILED, b"1")
    queues = queues_of(redis)
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
    redis.lpush(FAILED, b"1", b"2")
    queues = queues_of(redis)
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
    redis.lpush(FAILED, b"1")
    claim_alone(redis, A)
    counter = "kino:crashes:356a192b7913b04c54574d18c28d46e6395428ab"  # the digest of `1`
    redis.hset(counter, "foreign", "value")

    with pytest.raises(WrongKeyType, match=counter):
        queues_of(redis).claim()

    assert redis.hgetall(counter) == {b"foreign": b"value"}


def test_other_errors_of_redis_are_not_renamed(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the scripts' own refusal is a foreign key."""
    queues = queues_of(redis)
    monkeypatch.setattr(queues, "_drop", redis.register_script("return redis.call('NONSENSE')"))

    with pytest.raises(ResponseError, match="Unknown"):
        queues.drop("1")
