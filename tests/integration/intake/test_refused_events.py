"""What Postgres refuses: one event is kept or waits, and its neighbours settle."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from redis import Redis

from kino_refunds.events.queues import depths, read_queued
from kino_refunds.events.schema import to_json
from kino_refunds.settlement.decide import Ruling
from kino_refunds.settlement.deliveries import Delivery
from kino_refunds.settlement.rules import Rules
from kino_refunds.settlement.settle import settle
from tests.failing import refuse
from tests.intake import make_intake
from tests.integration.intake.batches import Letter, letters
from tests.pipeline import (
    CAPTURED,
    COMPLETED,
    EMPTY,
    FAILED,
    REFUNDED,
    drain,
    failures,
    ledger,
    numbered,
    open_jobs,
    push,
)
from tests.scenario import Scene, Waits, make_event


def test_an_event_that_the_database_refuses_is_kept_and_its_neighbours_settle(scene: Scene, redis: Redis) -> None:
    """One event that Postgres will not take becomes a dead letter with its reason; the rest of its batch settles."""
    jobs = numbered("job", 40)
    open_jobs(scene, *jobs)
    push(redis, *failures(*jobs))
    refuse(scene, "settlement", "NEW.event_id ~ '^job-17 '", "RAISE EXCEPTION 'not this one'")

    sizes = drain(make_intake(scene, redis))

    assert sizes == [40]
    assert ledger(scene) == {job: [] if job == "job-17" else REFUNDED for job in jobs}
    assert letters(scene) == [Letter(to_json(make_event("failed platform", "job-17")), FAILED, "apply_error", 1)]
    (exception,) = scene.rows("SELECT exception FROM kino.dead_letter")[0]
    assert "RaiseException: not this one" in exception
    assert scene.story("job-17").dead_letters == {"job-17 failed platform": "apply_error"}
    assert depths(redis) == EMPTY


def test_our_own_mistake_with_one_event_is_a_dead_letter_too(
    scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception of our own code is the event's dead letter, and neither the worker's end nor its neighbours'."""
    jobs = numbered("job", 10)
    open_jobs(scene, *jobs)
    push(redis, *failures(*jobs))

    def trip(connection: sa.Connection, part: list[Delivery], terms: Rules, **options: Any) -> list[Ruling]:
        if any(delivery.event.job_id == "job-3" for delivery in part):
            raise KeyError("a field that nobody thought of")
        return settle(connection, part, terms, **options)

    monkeypatch.setattr("kino_refunds.settlement.batch.settle", trip)

    drain(make_intake(scene, redis))

    assert ledger(scene) == {job: [] if job == "job-3" else REFUNDED for job in jobs}
    assert [letter.reason for letter in letters(scene)] == ["apply_error"]


def test_a_job_whose_credits_somebody_holds_waits_alone(brisk_scene: Scene, redis: Redis) -> None:
    """A lot that another session keeps locked puts off its own job, and no other."""
    scene = brisk_scene
    held, *_ = [scene.charged(job) for job in ("held", "free-1", "free-2")]
    lots = ", ".join(str(lot_id) for lot_id, _ in held.lines)
    push(redis, *failures("free-1", "held", "free-2"))
    intake = make_intake(scene, redis)

    with scene.superuser.begin() as other:
        other.exec_driver_sql(f"SELECT FROM kino.credit_lot WHERE lot_id IN ({lots}) FOR NO KEY UPDATE")
        sizes = drain(intake)
        while_held = ledger(scene)
    after = scene.sweep(now=datetime.now(UTC) + timedelta(minutes=1))

    assert sizes == [3]
    assert while_held == {"held": [], "free-1": REFUNDED, "free-2": REFUNDED}
    assert after == {"refunded": 1}
    assert ledger(scene) == dict.fromkeys(("held", "free-1", "free-2"), REFUNDED)


def test_a_charge_that_another_session_is_settling_waits_alone(brisk_scene: Scene, redis: Redis) -> None:
    """A lock that is not a lot's is narrowed down to its job, which waits; the others settle now."""
    scene = brisk_scene
    jobs = numbered("job", 8)
    open_jobs(scene, *jobs)
    push(redis, *failures(*jobs))

    with scene.superuser.connect() as other:
        other.exec_driver_sql("""
            INSERT INTO kino.settlement
                (charge_id, kind, reason, clause, policy_version, event_source, event_id, event_time)
            SELECT charge_id, 'captured', 'completed', '1', 'v', 's', 'e', now() FROM kino.charge
            WHERE job_id = 'job-5'
        """)
        sizes = drain(make_intake(scene, redis))
        other.rollback()

    assert sizes == [8]
    assert ledger(scene) == {job: [] if job == "job-5" else REFUNDED for job in jobs}
    assert scene.pending() == {"job-5 failed platform": Waits("job-5", "busy", 0)}


def test_an_event_that_takes_too_long_waits_alone(brisk_scene: Scene, redis: Redis) -> None:
    """A statement time-out is narrowed down to its event, which is tried again later; the others settle now."""
    scene = brisk_scene
    jobs = numbered("job", 8)
    open_jobs(scene, *jobs)
    push(redis, *failures(*jobs))
    refuse(scene, "settlement", "NEW.event_id ~ '^job-5 '", "PERFORM pg_sleep(10)")

    sizes = drain(make_intake(scene, redis))

    assert sizes == [8]
    assert ledger(scene) == {job: [] if job == "job-5" else REFUNDED for job in jobs}
    assert scene.pending() == {"job-5 failed platform": Waits("job-5", "busy", 0)}


def test_somebody_who_holds_a_dead_letter_holds_up_no_other_event(brisk_scene: Scene, redis: Redis) -> None:
    """A person with a transaction open on a dead letter, whose message comes again, stops nobody's refund."""
    scene = brisk_scene
    open_jobs(scene, "beside", "behind")
    redis.lpush(FAILED, b"{")
    intake = make_intake(scene, redis)
    intake.run_once()

    with scene.superuser.begin() as person:
        person.exec_driver_sql("UPDATE kino.dead_letter SET notes = '[]'")
        redis.lpush(FAILED, b"{")
        push(redis, make_event("failed platform", "beside"))
        with suppress(sa.exc.OperationalError):
            intake.run_once()
        push(redis, make_event("failed platform", "behind"))
        with suppress(sa.exc.OperationalError):
            intake.run_once()
            intake.run_once()
        while_held = ledger(scene)
    drain(intake)

    assert while_held == {"beside": REFUNDED, "behind": REFUNDED}
    assert {letter.raw for letter in letters(scene)} == {b"{"}
    assert depths(redis) == EMPTY


def test_a_dead_letter_that_cannot_be_written_is_not_dropped(scene: Scene, redis: Redis) -> None:
    """While Postgres takes no dead letters, what would be one stays in flight, and becomes one afterwards."""
    open_jobs(scene, "job-1")
    redis.lpush(FAILED, b"{")
    push(redis, *failures("job-1"))
    scene.as_superuser("REVOKE INSERT ON kino.dead_letter FROM kino_worker")
    intake = make_intake(scene, redis)

    with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        intake.run_once()
    in_between = [message.raw for message in read_queued(redis).messages]
    scene.as_superuser("GRANT INSERT ON kino.dead_letter TO kino_worker")
    sizes = drain(intake)

    assert in_between == [b"{", to_json(make_event("failed platform", "job-1"))]
    assert sizes == [2]
    assert letters(scene) == [Letter(b"{", FAILED, "bad_json", 1)]
    assert ledger(scene) == {"job-1": REFUNDED}


def test_neighbours_settle_while_no_dead_letter_can_be_written(scene: Scene, redis: Redis) -> None:
    """A message that cannot be kept yet stays in flight; the events beside it do not wait for that."""
    open_jobs(scene, "job-1")
    redis.lpush(FAILED, b"{")
    push(redis, *failures("job-1"))
    scene.as_superuser("REVOKE INSERT ON kino.dead_letter FROM kino_worker")
    intake = make_intake(scene, redis)

    with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        intake.run_once()

    assert ledger(scene) == {"job-1": REFUNDED}
    assert depths(redis) == {**EMPTY, "in-flight": 2}


def test_a_malformed_message_in_a_batch_that_is_kept_counts_once(scene: Scene, redis: Redis) -> None:
    """However often a batch is tried, a dead letter counts how often its message came."""
    open_jobs(scene, "job-1")
    redis.lpush(FAILED, b"{")
    push(redis, *failures("job-1"))
    scene.as_superuser("REVOKE EXECUTE ON FUNCTION kino.settle_charges(jsonb) FROM kino_worker")
    intake = make_intake(scene, redis)
    for _ in range(3):
        with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
            intake.run_once()
    scene.as_superuser("GRANT EXECUTE ON FUNCTION kino.settle_charges(jsonb) TO kino_worker")

    drain(intake)

    assert letters(scene) == [Letter(b"{", FAILED, "bad_json", 1)]
    assert ledger(scene) == {"job-1": REFUNDED}


def test_somebody_who_holds_the_letter_of_a_conflict_holds_up_no_other_event(brisk_scene: Scene, redis: Redis) -> None:
    """The dead letter of an event that was understood can be held by a person just as well."""
    scene = brisk_scene
    open_jobs(scene, "job-1", "beside")
    push(redis, make_event("failed platform", event_id="same"), make_event("completed", event_id="same"))
    intake = make_intake(scene, redis)
    intake.run_once()

    with scene.superuser.begin() as person:
        person.exec_driver_sql("UPDATE kino.dead_letter SET notes = '[]'")
        push(redis, make_event("completed", event_id="same"), make_event("completed", "beside"))
        with suppress(sa.exc.OperationalError):
            intake.run_once()
            intake.run_once()
        while_held = ledger(scene)
    drain(intake)

    assert while_held == {"job-1": REFUNDED, "beside": CAPTURED}
    assert {(letter.reason, letter.queue) for letter in letters(scene)} == {("conflicting_duplicate", COMPLETED)}
    assert depths(redis) == EMPTY


def test_an_apply_error_that_cannot_be_written_is_not_dropped(scene: Scene, redis: Redis) -> None:
    """An event that failed leaves Redis only once its dead letter is in Postgres."""
    open_jobs(scene, "job-1")
    push(redis, *failures("job-1"))
    refuse(scene, "settlement", "NEW.event_id ~ '^job-1 '", "RAISE EXCEPTION 'not this one'")
    scene.as_superuser("REVOKE INSERT ON kino.dead_letter FROM kino_worker")
    intake = make_intake(scene, redis)

    with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        intake.run_once()
    in_between = depths(redis)
    scene.as_superuser("GRANT INSERT ON kino.dead_letter TO kino_worker")
    drain(intake)

    assert in_between == {**EMPTY, "in-flight": 1}
    assert [letter.reason for letter in letters(scene)] == ["apply_error"]
    assert depths(redis) == EMPTY
