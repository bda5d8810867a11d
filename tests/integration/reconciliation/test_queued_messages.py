"""What forbids a verdict of our own: messages that wait in Redis, or a Redis that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

import pytest
from redis import Redis

from kino_refunds.events.connection import redis_client
from kino_refunds.events.queues import Queues, read_queued
from kino_refunds.events.schema import Queue, to_json
from kino_refunds.reconciliation import guard
from tests.clock import DAY, HOUR, SECOND, TICK
from tests.integration.reconciliation.sweeps import (
    COMPLETED,
    DUE,
    REFUNDED_ONE,
    SPACING,
    UNKNOWN,
    Source,
    charged,
    statuses,
    sweep,
    withheld,
)
from tests.malformed import MALFORMED, WIRE_FORMS
from tests.pipeline import several
from tests.scenario import NOW, Scene, make_event

pytestmark = pytest.mark.usefixtures("stopped_clock")


def on(key: str) -> Callable[[Redis, bytes], object]:
    return lambda redis, raw: redis.lpush(key, raw)


def in_flight(redis: Redis, raw: bytes) -> None:
    redis.lpush(Queue.JOB_COMPLETED, raw)
    Queues(redis, "worker-1", alive_ttl_s=60).claim()


def recovered(redis: Redis, raw: bytes) -> None:
    in_flight(redis, raw)
    redis.delete("kino:alive:worker-1")
    Queues(redis, "worker-2", alive_ttl_s=60).recover()


PLACES: dict[str, Callable[[Redis, bytes], object]] = {
    **{queue.value: on(queue) for queue in Queue},
    **{f"priority {n}": on(f"{Queue.JOB_COMPLETED}\x06\x16{n}") for n in (3, 6, 9)},
    "in flight": in_flight,
    "recovered": recovered,
}


@pytest.mark.parametrize("form", WIRE_FORMS)
def test_no_verdict_unless_every_waiting_message_is_newer(scene: Scene, redis: Redis, form: str) -> None:
    """A message from not after deadline and grace may be the job's end, wherever it waits; a newer one is not."""
    message_at = NOW - 10 * SECOND
    raw = WIRE_FORMS[form](to_json(make_event("completed", "somebody", at=message_at)))

    found = {}
    for number, (place, put) in enumerate(PLACES.items()):
        redis.flushdb()
        put(redis, raw)
        charged(scene, f"due before {place}", due=message_at - TICK)
        charged(scene, f"due as sent {place}", due=message_at)
        came_to = sweep(scene, redis, now=NOW + number * SPACING)
        found[place] = [message.raw for message in read_queued(redis).messages], came_to["withheld"]

    # What was withheld at one place is looked at again at the next.
    assert found == {p: ([raw], {"older_message_waiting": n}) for n, p in enumerate(PLACES, start=1)}
    assert statuses(scene) == {f"due as sent {place}": "open" for place in PLACES} | {
        f"due before {place}": "refunded" for place in PLACES
    }


def test_the_oldest_of_many_waiting_messages_decides(scene: Scene, redis: Redis) -> None:
    """One old message among new ones, on whatever queue, is enough."""
    charged(scene, "job-1")
    for number in range(20):
        at = DUE if number == 7 else NOW + number * SECOND
        redis.lpush([*Queue][number % 4], to_json(make_event("completed", f"other-{number}", at=at)))

    came_to = sweep(scene, redis)

    assert came_to == withheld(older_message_waiting=1)


@pytest.mark.parametrize("form", WIRE_FORMS)
@pytest.mark.parametrize("at", [NOW, NOW + 365 * 24 * HOUR])
def test_no_verdict_on_a_job_that_a_waiting_message_names(scene: Scene, redis: Redis, form: str, at: datetime) -> None:
    """Its end waits for us, however new it says it is; its neighbour, of whom nothing waits, is settled."""
    charged(scene, "job-1", "job-2", "job-3")
    other = to_json(make_event("completed", "job-2", at=at))
    both = several(make_event("failed platform", "somebody", at=at), other)
    redis.lpush(Queue.TIMEOUT, WIRE_FORMS[form](to_json(make_event("completed", at=at))), WIRE_FORMS[form](both))

    came_to = sweep(scene, redis)

    assert came_to["withheld"] == {"named_by_waiting_message": 2}
    assert statuses(scene) == {"job-1": "open", "job-2": "open", "job-3": "refunded"}


def test_the_oldest_event_of_a_waiting_message_decides(scene: Scene, redis: Redis) -> None:
    """Of several events in one message each could be what holds a verdict back."""
    charged(scene, "job-1")
    times = [NOW, DUE, NOW + SECOND]
    raw = several(*(make_event("completed", f"o-{n}", at=at) for n, at in enumerate(times)))
    redis.lpush(Queue.JOB_COMPLETED, raw)

    assert sweep(scene, redis) == withheld(older_message_waiting=1)


STUCK: dict[str, bytes] = {
    "nonsense": b"nonsense",
    "old": to_json(make_event("completed", "somebody", at=NOW - DAY)),
    "several, one unreadable": b"[%s,{}]" % to_json(make_event("completed", "somebody", at=NOW - DAY)),
}


@pytest.mark.parametrize("raw", STUCK.values(), ids=STUCK)
def test_a_message_that_is_stuck_for_a_day_holds_back_its_own_job_only(scene: Scene, redis: Redis, raw: bytes) -> None:
    """What nobody removes must not end all verdicts for good: after a day by the sweep's own row it is passed over."""
    charged(scene, "somebody")
    redis.lpush(Queue.JOB_COMPLETED, raw)
    first = sweep(scene, redis)["withheld"]
    charged(scene, "job-1")

    a_day_later = sweep(scene, redis, now=NOW + DAY)
    later = sweep(scene, redis, now=NOW + DAY + TICK)

    assert sum(first.values()) == 1
    assert sum(a_day_later["withheld"].values()) == 2
    named = b"somebody" in raw
    assert later["withheld"] == ({"named_by_waiting_message": 1} if named else {})
    assert statuses(scene) == {"job-1": "refunded", "somebody": "open" if named else "refunded"}


def test_since_when_a_message_waits_is_noted_without_any_verdict_due(scene: Scene, redis: Redis) -> None:
    """The first overdue charge does not wait another day for a message that has been stuck for months."""
    redis.lpush(Queue.JOB_COMPLETED, b"nonsense")
    sweep(scene, redis, now=NOW - 2 * DAY)
    charged(scene, "job-1")

    came_to = sweep(scene, redis)

    assert came_to == REFUNDED_ONE


def noted(scene: Scene) -> list[tuple[datetime, list[str]]]:
    return [tuple(row) for row in scene.rows("SELECT first_seen_at, job_ids FROM kino.waiting_message ORDER BY 1, 2")]


def test_what_waits_no_longer_is_forgotten(scene: Scene, redis: Redis) -> None:
    """A message that was taken leaves no row: the same one a week later is new."""
    raw = to_json(make_event("completed"))
    redis.lpush(Queue.JOB_COMPLETED, raw)
    sweep(scene, redis)
    before = noted(scene)
    redis.delete(Queue.JOB_COMPLETED)
    sweep(scene, redis, now=NOW + SECOND)
    gone = noted(scene)
    redis.lpush(Queue.JOB_COMPLETED, raw)

    sweep(scene, redis, now=NOW + 2 * SECOND)

    assert (before, gone, noted(scene)) == ([(NOW, ["job-1"])], [], [(NOW + 2 * SECOND, ["job-1"])])


def test_of_a_backlog_the_oldest_are_noted(scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much waits, a sweep writes a bounded number of rows: the unreadable first, then by age."""
    monkeypatch.setattr(guard, "NOTED_MAX", 3)
    for number in range(5):
        redis.lpush(Queue.TIMEOUT, to_json(make_event("timeout", f"job-{number}", at=NOW - number * SECOND)))
    redis.lpush(Queue.JOB_COMPLETED, b"nonsense")

    sweep(scene, redis)
    sweep(scene, redis, now=NOW + SECOND)

    assert noted(scene) == [(NOW, []), (NOW, ["job-3"]), (NOW, ["job-4"])]


def test_what_cannot_be_read_whole_is_not_forgotten(scene: Scene, redis: Redis) -> None:
    """A reading that is not complete says nothing about what waits no longer."""
    redis.lpush(Queue.JOB_COMPLETED, b"nonsense")
    sweep(scene, redis)
    redis.delete(Queue.JOB_COMPLETED)
    redis.set(Queue.TIMEOUT, "not a list")

    sweep(scene, redis, now=NOW + SECOND)

    assert noted(scene) == [(NOW, [])]


@pytest.mark.parametrize("kind", ["time naive, bare", "time naive, kombu", "not json, bare"])
def test_no_verdict_while_a_message_waits_whose_time_cannot_be_read(scene: Scene, redis: Redis, kind: str) -> None:
    """What cannot be read may be as old as it likes, and anybody's, wherever it waits."""
    charged(scene, "job-1")

    found = {}
    for number, (place, put) in enumerate(PLACES.items()):
        redis.flushdb()
        put(redis, MALFORMED[kind][0])
        found[place] = sweep(scene, redis, now=NOW + number * SPACING)["withheld"]

    assert found == {place: {"unreadable_message_waiting": 1} for place in PLACES}
    assert statuses(scene) == {"job-1": "open"}


def test_no_verdict_while_a_key_cannot_be_read(scene: Scene, redis: Redis) -> None:
    """A queue key, or the registry that leads to the in-flight lists, of another type hides what waits there."""
    charged(scene, "job-1")
    keys = [Queue.JOB_COMPLETED.value, f"{Queue.TIMEOUT}\x06\x166", "kino:recovered:generation.timeout", "kino:workers"]

    found = {}
    for number, key in enumerate(keys):
        redis.flushdb()
        redis.set(key, "not a list")
        found[key] = sweep(scene, redis, now=NOW + number * SPACING)["withheld"]

    assert found == {key: {"unreadable_queue": 1} for key in keys}


def test_no_verdict_while_redis_is_away(scene: Scene) -> None:
    """Who cannot look at the queues must not say that nothing waits there; what a source knows settles."""
    charged(scene, "job-1", "job-2")
    source = Source({"job-1": COMPLETED, "job-2": UNKNOWN})
    with redis_client("redis://127.0.0.1:1/0") as away:
        found = [sweep(scene, away, source, now=NOW + number * SPACING)["withheld"] for number in range(3)]

    assert found == [{}, {}, {"redis_away": 1}]
    assert statuses(scene) == {"job-1": "captured", "job-2": "open"}


@pytest.mark.parametrize("kept_back", [False, True])
def test_no_verdict_behind_a_backlog_that_cannot_be_read(scene: Scene, redis: Redis, *, kept_back: bool) -> None:
    """One message more than is ever read, however new, and we are too far behind to judge."""
    charged(scene, "job-1")
    limit = (read_queued.__kwdefaults__ or {})["limit"]
    raw = to_json(make_event("completed", "other", at=NOW))
    redis.lpush(Queue.JOB_COMPLETED, *[raw] * (limit + kept_back))

    came_to = sweep(scene, redis)

    assert came_to == (withheld(backlog_too_large=1) if kept_back else REFUNDED_ONE)


def test_no_verdict_behind_a_backlog_of_too_many_bytes(scene: Scene, redis: Redis) -> None:
    """Few but large messages are a backlog too."""
    charged(scene, "job-1")
    max_bytes = (read_queued.__kwdefaults__ or {})["max_bytes"]
    raw = to_json(make_event("completed", "other", at=NOW)).replace(b"{", b"{" + b" " * 200_000, 1)
    redis.lpush(Queue.JOB_COMPLETED, *[raw] * (max_bytes // len(raw) + 20))

    came_to = sweep(scene, redis)

    assert came_to == withheld(backlog_too_large=1)
