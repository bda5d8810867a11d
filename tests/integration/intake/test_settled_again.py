"""A batch that is settled more than once, by whatever death, lost answer or late command, pays once."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from redis import Connection as RedisConnection
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from structlog.testing import CapturingLogger

from kino_refunds.events.connection import redis_client
from kino_refunds.events.queues import Queues, depths
from kino_refunds.events.schema import to_json
from kino_refunds.settlement.batch import settle_batch
from tests.failing import fail_first
from tests.intake import A, B, make_intake
from tests.integration.intake.batches import outcomes
from tests.pipeline import CAPTURED, EMPTY, FAILED, REFUNDED, drain, failures, ledger, numbered, open_jobs, push
from tests.scenario import Scene, make_event, make_rules
from workers.claims import read_claim


def test_a_batch_settled_and_not_dropped_is_told_duplicates(
    scene: Scene, redis: Redis, said: CapturingLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When Redis is away between COMMIT and drop, the batch stays in flight, comes again and moves nothing twice."""
    open_jobs(scene, "job-1", "job-2")
    push(redis, make_event("failed platform", "job-1"), make_event("completed", "job-2"))
    intake = make_intake(scene, redis)
    fail_first(monkeypatch, intake._queues, "drop", RedisConnectionError("Redis is away"))

    with pytest.raises(RedisConnectionError):
        intake.run_once()
    before = ledger(scene)
    in_between = depths(redis)
    sizes = drain(intake)

    assert before == {"job-1": REFUNDED, "job-2": CAPTURED}
    assert in_between == {**EMPTY, "in-flight": 2}
    assert sizes == [2]
    assert outcomes(said) == [{"duplicate": 2}]
    assert ledger(scene) == before
    assert depths(redis) == EMPTY


def test_a_drop_whose_answer_was_lost_has_dropped(
    scene: Scene, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repeated drop finds nothing to do, deletes nothing of the next batch, and intake goes on."""
    open_jobs(scene, "job-1", "job-2")
    client = redis_client(redis_url)
    push(client, *failures("job-1", "job-2"))
    intake = make_intake(scene, client, intake_batch=1)
    real_drop, read_response = intake._queues.drop, RedisConnection.read_response
    dropped: list[bool] = []

    def lose_once(connection: RedisConnection, *args: Any, **kwargs: Any) -> None:
        read_response(connection, *args, **kwargs)
        monkeypatch.setattr(RedisConnection, "read_response", read_response)
        raise RedisConnectionError("the answer was lost")

    def drop(token: str) -> bool:
        if not dropped:
            real_drop("no such token")  # the server knows the script from here on
            monkeypatch.setattr(RedisConnection, "read_response", lose_once)
        dropped.append(real_drop(token))
        return dropped[-1]

    monkeypatch.setattr(intake._queues, "drop", drop)

    sizes = drain(intake)

    assert sizes == [1, 1]
    assert dropped == [False, True]
    assert ledger(scene) == {"job-1": REFUNDED, "job-2": REFUNDED}
    assert depths(client) == EMPTY
    client.close()


def test_a_worker_that_died_between_commit_and_drop_paid_once(
    scene: Scene, redis: Redis, said: CapturingLogger
) -> None:
    """The worker that gets a dead one's settled batch is told duplicates, one message at a time."""
    open_jobs(scene, "job-1", "job-2")
    push(redis, *failures("job-1", "job-2"))
    deliveries, _ = read_claim(Queues(redis, A, alive_ttl_s=60).claim())
    settle_batch(scene.worker, deliveries, make_rules())
    redis.delete(f"kino:alive:{A}")
    survivor = make_intake(scene, redis, B)

    survivor._queues.recover()
    sizes = drain(survivor)

    assert sizes == [1, 1]
    assert outcomes(said) == [{"duplicate": 1}, {"duplicate": 1}]
    assert ledger(scene) == {"job-1": REFUNDED, "job-2": REFUNDED}
    assert depths(redis) == EMPTY


def test_a_worker_taken_for_dead_and_its_heir_settle_once(
    scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow worker's batch is handed on while it settles: both settle it, and it moves once."""
    jobs = numbered("job", 5)
    open_jobs(scene, *jobs)
    push(redis, *failures(*jobs))
    slow, heir = make_intake(scene, redis, A), make_intake(scene, redis, B)
    real = slow._queues.drop
    taken: list[list[int]] = []

    def late_drop(token: str) -> bool:
        redis.delete(f"kino:alive:{A}")
        heir._queues.recover()
        redis.lpush(FAILED, to_json(make_event("failed platform", "unknown")))
        taken.append(drain(heir))
        return real(token)

    monkeypatch.setattr(slow._queues, "drop", late_drop)

    sizes = drain(slow)

    assert sizes == [5]
    assert sum(taken[0]) == 6
    assert ledger(scene) == dict.fromkeys(jobs, REFUNDED)
    assert depths(redis) == EMPTY


def test_a_commit_whose_answer_was_lost_is_settled_again(
    scene: Scene, redis: Redis, said: CapturingLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows whether Postgres has committed: the batch is kept, settled again, and told what it was told."""
    open_jobs(scene, "job-1", "job-2")
    push(redis, make_event("failed platform", "job-1"))
    intake = make_intake(scene, redis)
    intake.run_once()  # from here on a session stands, and its next commit is the batch's
    push(redis, make_event("failed platform", "job-2"))
    lost = psycopg.OperationalError("server closed the connection unexpectedly")
    fail_first(monkeypatch, psycopg.Connection, "commit", lost, after=True)

    with pytest.raises(sa.exc.OperationalError):
        intake.run_once()
    in_between = depths(redis)
    sizes = drain(intake)

    assert in_between == {**EMPTY, "in-flight": 1}
    assert sizes == [1]
    assert outcomes(said) == [{"refunded": 1}, {"duplicate": 1}]
    assert ledger(scene) == {"job-1": REFUNDED, "job-2": REFUNDED}


def test_statements_are_planned_once_and_not_for_every_batch(scene: Scene, redis: Redis) -> None:
    """What a session prepared it keeps: a rollback between two batches would make psycopg forget all of it."""
    jobs = numbered("job", 10)
    open_jobs(scene, *jobs)
    push(redis, *failures(*jobs))
    intake = make_intake(scene, redis, intake_batch=1)

    sizes = drain(intake)

    assert sizes == [1] * 10
    with scene.worker.connect() as connection:
        prepared = connection.execute(sa.text("SELECT statement FROM pg_prepared_statements")).scalars().all()
    reached = ("settle_charges", "inbox_event", "pending_event", "charge")
    assert [name for name in reached if not any(f"kino.{name}" in statement for statement in prepared)] == []
