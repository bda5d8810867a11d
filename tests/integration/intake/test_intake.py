"""Intake in this process, against real servers: every event that arrives is settled or kept, whatever is beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa
from kombu import Connection, Producer
from redis import Redis
from structlog.testing import CapturingLogger

from kino_refunds.events.publisher import EventPublisher
from kino_refunds.events.queues import QUEUE_KEYS, SERVED, depths
from kino_refunds.events.schema import Queue, to_json
from kino_refunds.settlement.batch import Part, settle_parts
from kino_refunds.settlement.deliveries import Delivery, delivery_of
from tests.intake import B, make_intake
from tests.integration.intake.batches import ACCOUNT, Letter, letters, outcomes
from tests.malformed import MALFORMED, envelope
from tests.pipeline import (
    CAPTURED,
    COMPLETED,
    EMPTY,
    FAILED,
    REFUNDED,
    SAFETY,
    TIMEOUT,
    drain,
    failures,
    ledger,
    numbered,
    open_jobs,
    push,
    several,
)
from tests.scenario import Scene, make_event
from workers import intake as intake_module
from workers.claims import sub_batches

# --- what arrives


def test_every_kind_of_event_settles_in_both_wire_forms(scene: Scene, redis: Redis, redis_url: str) -> None:
    """What kombu writes and what any language pushes by hand settle alike, from all four queues in one batch."""
    kinds = ("completed", "failed platform", "timeout", "safety before")
    jobs = {f"{form} {kind}": kind for form in ("kombu", "bare") for kind in kinds}
    open_jobs(scene, *jobs)
    with EventPublisher(redis_url) as publisher:
        publisher.publish_many(make_event(kind, job) for job, kind in jobs.items() if job.startswith("kombu"))
    push(redis, *[make_event(kind, job) for job, kind in jobs.items() if job.startswith("bare")])
    intake = make_intake(scene, redis)

    sizes = drain(intake)

    assert sizes == [8]
    assert ledger(scene) == {job: CAPTURED if kind == "completed" else REFUNDED for job, kind in jobs.items()}
    assert depths(redis) == EMPTY


def test_one_event_in_both_wire_forms_is_one_event(
    scene: Scene, redis: Redis, redis_url: str, said: CapturingLogger
) -> None:
    """An event republished by other means is told what it was told first, and moves nothing."""
    open_jobs(scene, "job-1")
    event = make_event("failed platform")
    push(redis, event)
    intake = make_intake(scene, redis)
    intake.run_once()
    with EventPublisher(redis_url) as publisher:
        publisher.publish(event)

    intake.run_once()

    assert outcomes(said) == [{"refunded": 1}, {"duplicate": 1}]
    assert ledger(scene) == {"job-1": REFUNDED}


@pytest.mark.parametrize("key", QUEUE_KEYS)
def test_every_key_of_every_queue_is_read(scene: Scene, redis: Redis, key: str) -> None:
    """An event settles from whichever key it is on: the type decides, the queue is transport."""
    open_jobs(scene, "job-1")
    redis.lpush(key, to_json(make_event("failed platform")))

    drain(make_intake(scene, redis))

    assert ledger(scene) == {"job-1": REFUNDED}
    assert depths(redis) == EMPTY


IDS = {
    "percent": "%s %(job)s %%",
    "colon": ":job_id ::text",
    "braces": '{a,b} {} {{0}} "{',
    "null": "NULL",
    "quotes": "'; DROP TABLE kino.charge; -- \"",
    "backslash": "\\ \\x00 \\u0000",
    "emoji": "\U0001f3ac" * 128,
    "combining": "e\u0301\u0323",
    "spaces inside": "a   b",
    "markup": "[bold]<b>&amp;",
}


@pytest.mark.parametrize("odd", IDS.values(), ids=IDS)
def test_ids_are_only_ever_values(scene: Scene, redis: Redis, odd: str) -> None:
    """An id that is printable is stored as it is, whatever it means to a database, a format or a screen."""
    open_jobs(scene, odd, "neighbour")
    push(redis, make_event("failed platform", odd, event_id=odd, source=odd, account_id=ACCOUNT))
    push(redis, make_event("failed platform", f"{odd} unknown"[-128:], event_id=f"{odd} again"[-128:]))
    push(redis, make_event("completed", "neighbour"))

    drain(make_intake(scene, redis))

    assert ledger(scene) == {odd: REFUNDED, "neighbour": CAPTURED}
    assert scene.story(odd).inbox == {odd: "refunded"}
    assert [waits.job_id for waits in scene.pending().values()] == [f"{odd} unknown"[-128:]]
    assert letters(scene) == []


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999+00:00"])
def test_an_event_of_any_time_settles(scene: Scene, redis: Redis, time: str) -> None:
    """A clock that is wrong by ages holds up nobody's refund."""
    open_jobs(scene, "job-1")
    redis.lpush(FAILED, to_json(make_event("failed platform", at=datetime.fromisoformat(time).astimezone(UTC))))

    drain(make_intake(scene, redis))

    assert ledger(scene) == {"job-1": REFUNDED}


# --- what cannot be understood (P7)


FORMS = {
    "kombu": {name: case for name, case in MALFORMED.items() if name.endswith(", kombu")},
    "bare": {name: case for name, case in MALFORMED.items() if not name.endswith(", kombu")},
}
"""Apart, so that each fits in one batch with a neighbour for every message."""


@pytest.mark.parametrize("key", [*SERVED, f"{FAILED}\x06\x166", f"{COMPLETED}\x06\x169"])
@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_understood_is_kept_and_stops_nobody(scene: Scene, redis: Redis, key: str, form: str) -> None:
    """Every malformed message becomes one dead letter with its bytes and reason; its neighbours settle with it."""
    jobs = numbered("good", len(FORMS[form]))
    open_jobs(scene, *jobs)
    for job, (raw, _) in zip(jobs, FORMS[form].values(), strict=True):
        redis.lpush(key, raw, to_json(make_event("failed platform", job)))
    intake = make_intake(scene, redis, intake_batch=1000)

    size = intake.run_once()

    assert size == 2 * len(jobs)
    assert ledger(scene) == dict.fromkeys(jobs, REFUNDED)
    assert letters(scene) == sorted(
        Letter(raw, key.partition("\x06")[0], reason.value, 1) for raw, reason in FORMS[form].values()
    )
    assert depths(redis) == EMPTY


def test_the_same_malformed_message_is_one_dead_letter(scene: Scene, redis: Redis) -> None:
    """A message that cannot be understood raises the count of its dead letter when it comes again."""
    redis.lpush(TIMEOUT, b"{", b"{", b"{")
    intake = make_intake(scene, redis, intake_batch=2)

    sizes = drain(intake)

    assert sizes == [2, 1]
    assert letters(scene) == [Letter(b"{", TIMEOUT, "bad_json", 3)]


def test_a_huge_message_is_kept_whole_and_blocks_nobody(scene: Scene, redis: Redis) -> None:
    """20 MB of anything are a dead letter with exactly these bytes, and what waits beside and behind settles."""
    jobs = ["before", "behind", "beside"]
    open_jobs(scene, *jobs)
    huge = bytes(range(256)) * (20 * 2**20 // 256)
    push(redis, make_event("failed platform", "before"))
    redis.lpush(FAILED, huge)
    push(redis, make_event("failed platform", "behind"), make_event("completed", "beside"))
    intake = make_intake(scene, redis)

    sizes = drain(intake)

    assert sum(sizes) == 4
    assert letters(scene) == [Letter(huge, FAILED, "too_large", 1)]
    assert ledger(scene) == {"before": REFUNDED, "behind": REFUNDED, "beside": CAPTURED}


# --- several events in one message


@pytest.mark.parametrize("form", [bytes, envelope], ids=["bare", "kombu"])
@pytest.mark.parametrize("queue", SERVED)
def test_each_event_of_a_message_is_decided_by_itself(
    scene: Scene, redis: Redis, form: Callable[[bytes], bytes], queue: Queue
) -> None:
    """What settles settles, what waits waits, and what is bad is a letter with the whole message and its place."""
    open_jobs(scene, "job-1", "job-2", "job-3")
    raw = form(
        several(
            make_event("completed", "job-1"),
            b'{"specversion":"1.0","subject":"job-9","data":{"job_id":"job-9"}}',
            make_event("failed platform", "job-2"),
            make_event("timeout", "no charge"),
            make_event("failed platform", "job-3", account_id="somebody else"),
            make_event("completed", "job-1"),
        )
    )
    redis.lpush(queue, raw)

    sizes = drain(make_intake(scene, redis))

    assert sizes == [1]
    assert ledger(scene) == {"job-1": CAPTURED, "job-2": REFUNDED, "job-3": []}
    assert [*scene.pending()] == ["no charge timeout"]
    found = scene.rows("SELECT element_index, reason, job_id, raw, may_hold_others FROM kino.dead_letter ORDER BY 1")
    assert [tuple(row) for row in found] == [
        (1, "invalid_event", "job-9", raw, False),
        (4, "account_mismatch", "job-3", raw, False),
    ]
    assert depths(redis) == EMPTY


def test_a_message_of_several_events_again_changes_nothing(scene: Scene, redis: Redis, said: CapturingLogger) -> None:
    """Sent again, in the other form and beside one of its events alone, each is told what it was told first."""
    open_jobs(scene, "job-1", "job-2")
    events = failures("job-1", "job-2")
    redis.lpush(FAILED, several(*events), envelope(several(*events)), to_json(events[0]), several(*events, b"{}"))
    intake = make_intake(scene, redis)

    drain(intake)
    redis.lpush(FAILED, several(*events, b"{}"))
    drain(intake)

    assert outcomes(said) == [{"refunded": 2, "duplicate": 5}, {"duplicate": 2}]
    assert ledger(scene) == {"job-1": REFUNDED, "job-2": REFUNDED}
    assert [(letter.reason, letter.seen) for letter in letters(scene)] == [("invalid_event", 2)]


def test_no_transaction_is_larger_than_a_batch(scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim of 12 messages with 100 events each is settled in batches of events; between them the worker lives."""
    jobs = numbered("job", 1_200)
    open_jobs(scene, *jobs)
    for start in range(0, len(jobs), 100):
        redis.lpush(FAILED, several(*failures(*jobs[start : start + 100])))
    intake = make_intake(scene, redis, intake_batch=250)
    done: list[int | str] = []

    def seen_batch(engine: sa.Engine, deliveries: list[Delivery], *args: Any, **kwargs: Any) -> Iterator[Part]:
        done.append(len(deliveries))
        return settle_parts(engine, deliveries, *args, **kwargs)

    monkeypatch.setattr(intake_module, "settle_parts", seen_batch)
    monkeypatch.setattr(intake._queues, "refresh", lambda: done.append("alive"))

    size = intake.run_once()

    assert size == 12
    assert done == [250, "alive", 250, "alive", 250, "alive", 250, "alive", 200]
    assert ledger(scene) == dict.fromkeys(jobs, REFUNDED)
    assert depths(redis) == EMPTY


def test_a_job_s_events_are_never_split() -> None:
    """The events of one job stay in one batch and in their order, though it is the larger for it."""
    jobs = ["a", "b", "a", "c", *["d"] * 5, "b", "e"]
    deliveries = [delivery_of(make_event("timeout", job, event_id=f"{n}")) for n, job in enumerate(jobs)]

    batches = list(sub_batches(deliveries, 3))

    assert [[each.event.job_id for each in batch] for batch in batches] == [
        ["a", "a"],
        ["b", "b", "c"],
        ["d"] * 5,
        ["e"],
    ]
    ids = [each.event.id for batch in batches for each in batch]
    assert sorted(ids, key=int) == [each.event.id for each in deliveries]
    assert [each for each in ids if each in {"4", "5", "6", "7", "8"}] == ["4", "5", "6", "7", "8"]


def test_a_stop_between_two_batches_of_one_claim_releases_it(
    scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is settled by then is a duplicate for the next worker, and no event of the message is lost."""
    jobs = numbered("job", 100)
    open_jobs(scene, *jobs)
    raw = several(*failures(*jobs))
    redis.lpush(FAILED, raw)
    intake = make_intake(scene, redis, intake_batch=40)

    def stop_and_settle(*args: Any, **kwargs: Any) -> Iterator[Part]:
        intake.stopping.set()
        return settle_parts(*args, **kwargs)

    monkeypatch.setattr(intake_module, "settle_parts", stop_and_settle)
    intake.run()
    left, settled = redis.lrange(FAILED, 0, -1), sum(map(len, ledger(scene).values()))
    drain(make_intake(scene, redis, B))

    assert (left, settled) == ([raw], 40)
    assert ledger(scene) == dict.fromkeys(jobs, REFUNDED)


def test_what_kombu_makes_of_bytes_is_read(scene: Scene, redis: Redis, redis_url: str) -> None:
    """A publisher that hands kombu its JSON as bytes, whose encoding kombu then calls binary, is understood."""
    open_jobs(scene, "job-1")
    with Connection(redis_url) as connection:
        Producer(connection.channel()).publish(
            to_json(make_event("failed platform")), routing_key=FAILED, content_type="application/json"
        )
    (encoding,) = [json.loads(raw)["content-encoding"] for raw in redis.lrange(FAILED, 0, -1)]

    drain(make_intake(scene, redis))

    assert encoding == "binary"
    assert ledger(scene) == {"job-1": REFUNDED}
    assert letters(scene) == []


# --- many messages


@pytest.mark.parametrize("flooded", [FAILED, COMPLETED])
def test_a_flooded_queue_delays_no_other(scene: Scene, redis: Redis, flooded: Queue) -> None:
    """With 5,000 messages on one queue, what waits on the others settles within the first batches."""
    flood = numbered("flood", 5_000)
    others = {queue: numbered(queue, 60) for queue in SERVED if queue != flooded}
    open_jobs(scene, *flood, *(job for jobs in others.values() for job in jobs))
    kinds = {FAILED: "failed platform", TIMEOUT: "timeout", SAFETY: "safety before", COMPLETED: "completed"}
    push(redis, *[make_event(kinds[flooded], job) for job in flood])
    for queue, jobs in others.items():
        push(redis, *[make_event(kinds[queue], job) for job in jobs])
    intake = make_intake(scene, redis)

    first_sizes = [intake.run_once(), intake.run_once()]
    first = ledger(scene)
    drain(intake)

    assert first_sizes == [500, 500]
    assert [job for jobs in others.values() for job in jobs if not first[job]] == []
    assert all(ledger(scene).values())
    assert depths(redis) == EMPTY


def test_a_message_and_its_copies_fill_a_batch_and_settle_once(scene: Scene, redis: Redis) -> None:
    """However often a publisher repeats itself, in one batch and across batches, a job is refunded once."""
    open_jobs(scene, "job-1")
    push(redis, *[make_event("failed platform")] * 700)
    intake = make_intake(scene, redis)

    sizes = drain(intake)

    assert sizes == [500, 200]
    assert ledger(scene) == {"job-1": REFUNDED}
    assert letters(scene) == []
