"""Servers that are killed, full, or hold a key that is not ours cost time, and no event."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from redis import Redis
from redis.exceptions import OutOfMemoryError
from structlog.testing import CapturingLogger

from kino_refunds.dev.embedded import DATABASE, Servers
from kino_refunds.errors import WrongKeyType
from kino_refunds.events.queues import SERVED, depths
from kino_refunds.events.schema import to_json
from tests.conftest import Database
from tests.intake import make_intake
from tests.integration.intake.batches import Letter, letters
from tests.pipeline import (
    CAPTURED,
    COMPLETED,
    EMPTY,
    FAILED,
    REFUNDED,
    TIMEOUT,
    drain,
    failures,
    ledger,
    numbered,
    open_jobs,
    push,
)
from tests.scenario import Scene, make_event


def test_sessions_that_were_ended_cost_one_try(scene: Scene, redis: Redis) -> None:
    """When Postgres ends every session, the batch is kept and settles with the next try."""
    open_jobs(scene, "job-1", "job-2")
    intake = make_intake(scene, redis)
    push(redis, make_event("failed platform", "job-1"))
    intake.run_once()
    scene.as_superuser("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'kino_worker'")
    push(redis, make_event("failed platform", "job-2"))

    with pytest.raises(sa.exc.OperationalError):
        intake.run_once()
    in_between = depths(redis)
    sizes = drain(intake)

    assert sum(in_between.values()) == 1
    assert sizes == [1]
    assert ledger(scene) == {"job-1": REFUNDED, "job-2": REFUNDED}


@pytest.mark.faults
def test_a_killed_postgres_costs_only_time(own_servers: Servers, own_redis: Redis) -> None:
    """While Postgres is away every message stays in Redis, however often it is tried; once it is back, it settles."""
    database = Database(DATABASE, own_servers)
    with Scene.of(database) as before:
        open_jobs(before, "job-1", "job-2")
        push(own_redis, *failures("job-1", "job-2"))
        own_redis.lpush(FAILED, b"{")
        intake = make_intake(before, own_redis)
        own_servers.postgres.kill()
        for _ in range(3):
            with pytest.raises(sa.exc.OperationalError):
                intake.run_once()
        in_between = depths(own_redis)
        own_servers.postgres.start()

        sizes = drain(intake)

    assert sum(in_between.values()) == 3
    assert sizes == [3]
    with Scene.of(database) as after:
        assert ledger(after) == {"job-1": REFUNDED, "job-2": REFUNDED}
        assert letters(after) == [Letter(b"{", FAILED, "bad_json", 1)]
    assert depths(own_redis) == EMPTY


@pytest.mark.faults
def test_a_full_redis_drains(scene: Scene, own_redis: Redis) -> None:
    """A Redis at `maxmemory` takes no new event, and intake empties it all the same."""
    jobs = numbered("job", 300)
    open_jobs(scene, *jobs)
    push(own_redis, *failures(*jobs))
    own_redis.lpush(TIMEOUT, b"{")
    intake = make_intake(scene, own_redis, intake_batch=100)
    own_redis.config_set("maxmemory", 1)

    with pytest.raises(OutOfMemoryError):
        own_redis.lpush(FAILED, b"one more")
    sizes = drain(intake)
    own_redis.config_set("maxmemory", 0)

    assert sum(sizes) == 301
    assert ledger(scene) == dict.fromkeys(jobs, REFUNDED)
    assert letters(scene) == [Letter(b"{", TIMEOUT, "bad_json", 1)]
    assert depths(own_redis) == EMPTY


@pytest.mark.parametrize("key", [*SERVED, f"{FAILED}\x06\x163"])
def test_a_queue_key_of_the_wrong_type_is_named_and_passed_over(
    scene: Scene, redis: Redis, said: CapturingLogger, key: str
) -> None:
    """A foreign value on a queue's key is left alone and named in the log; every other queue is served."""
    open_jobs(scene, "job-1")
    redis.set(key, "foreign")
    other = COMPLETED if key != COMPLETED else FAILED
    redis.lpush(other, to_json(make_event("completed", "job-1")))

    drain(make_intake(scene, redis))

    assert ledger(scene) == {"job-1": CAPTURED}
    assert redis.get(key) == b"foreign"
    assert [call.kwargs["keys"] for call in said.calls if call.method_name == "error"] == [(key,)]


def test_a_foreign_key_of_our_own_name_stops_intake_and_loses_nothing(scene: Scene, redis: Redis) -> None:
    """Intake refuses before it moves anything, and goes on once somebody has removed the foreign value."""
    open_jobs(scene, "job-1")
    push(redis, *failures("job-1"))
    redis.set(f"kino:recovered:{TIMEOUT}", "foreign")
    intake = make_intake(scene, redis)

    with pytest.raises(WrongKeyType):
        intake.run_once()
    in_between = depths(redis)
    redis.delete(f"kino:recovered:{TIMEOUT}")
    sizes = drain(intake)

    assert in_between == {**EMPTY, FAILED: 1}
    assert sizes == [1]
    assert ledger(scene) == {"job-1": REFUNDED}
