"""The thread of intake: it outlives every error, and its stop leaves no batch behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from structlog.testing import CapturingLogger

from kino_refunds.errors import WrongKeyType
from kino_refunds.events.queues import SERVED, Queues, depths
from kino_refunds.settlement.batch import Part, settle_parts
from tests.failing import fail_first, mend, refuse
from tests.intake import A, B, make_intake
from tests.integration.intake.batches import count_letters, letters, running
from tests.pipeline import EMPTY, FAILED, REFUNDED, drain, failures, ledger, numbered, open_jobs, push
from tests.scenario import Scene, until
from workers import intake as intake_module
from workers.bootstep import Binding, Chores


def test_the_thread_outlives_every_error(
    scene: Scene, redis: Redis, said: CapturingLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is raised, wherever, is logged, and intake goes on."""
    monkeypatch.setattr(intake_module, "BACK_OFF_MAX_S", 0.01)
    open_jobs(scene, "job-1")
    push(redis, *failures("job-1"))
    intake = make_intake(scene, redis)
    errors = [
        RuntimeError("ours"),
        MemoryError("ours"),
        RecursionError("ours"),
        UnicodeDecodeError("utf-8", b"", 0, 1, "ours"),
        RedisConnectionError("away"),
        WrongKeyType("kino:workers holds a hash"),
        sa.exc.OperationalError("SELECT", None, psycopg.OperationalError("away")),
        sa.exc.ProgrammingError("SELECT", None, psycopg.errors.UndefinedTable("not migrated")),
    ]
    ways = [
        fail_first(monkeypatch, intake._queues, "claim", *errors),
        fail_first(monkeypatch, intake._queues, "drop", *errors),
        fail_first(monkeypatch, intake._queues, "refresh", RedisConnectionError("away"), WrongKeyType("foreign")),
        fail_first(monkeypatch, intake_module, "settle_parts", *errors),
    ]

    with running(intake) as thread:
        until(lambda: depths(redis) == EMPTY)
        alive = thread.is_alive()

    assert alive
    assert ways == [[], [], [], []]
    assert len([call for call in said.calls if str(call.args[0]).startswith("batch kept")]) == 3 * len(errors)
    assert ledger(scene) == {"job-1": REFUNDED}


def test_foreign_binding_cannot_keep_intake_from_settling(
    scene: Scene, redis: Redis, said: CapturingLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A binding's key that holds something else is named once, the other bindings are put back, and events settle."""
    monkeypatch.setattr(intake_module, "BACK_OFF_MAX_S", 0.01)
    open_jobs(scene, "job-1")
    push(redis, *failures("job-1"))
    redis.set("_kombu.binding.generation.job-failed", "foreign")
    intake = make_intake(scene, redis)
    looks = 0
    bind = Binding(Queues(redis, A, alive_ttl_s=60))

    def chore() -> None:
        nonlocal looks
        bind()
        looks += 1

    with running(intake, chores=Chores({"bind": (0.0, chore)})):
        until(lambda: depths(redis) == EMPTY and looks > 1)

    (named,) = [call for call in said.calls if call.method_name == "error"]
    assert named.kwargs == {"keys": ("_kombu.binding.generation.job-failed",)}
    assert redis.exists(*(f"_kombu.binding.{queue}" for queue in SERVED)) == 4
    assert redis.get("_kombu.binding.generation.job-failed") == b"foreign"
    assert ledger(scene) == {"job-1": REFUNDED}


def test_a_stop_in_a_long_search_releases_the_batch(scene: Scene, redis: Redis) -> None:
    """Told to stop while it looks for bad events, intake puts the batch back and leaves no key of its own."""
    jobs = numbered("job", 64)
    open_jobs(scene, *jobs)
    push(redis, *failures(*jobs))
    refuse(scene, "settlement", "true", "PERFORM pg_sleep(0.02); RAISE EXCEPTION 'not this one'")
    intake = make_intake(scene, redis)

    with running(intake):
        until(lambda: count_letters(scene) > 0)
    left = depths(redis)
    keys = sorted(redis.scan_iter("kino:*"))
    found = len(letters(scene))
    mend(scene)
    sizes = drain(make_intake(scene, redis, B))

    assert left == {**EMPTY, FAILED: 64}
    assert keys == []
    assert found < 64
    assert sizes == [64]
    assert ledger(scene) == dict.fromkeys(jobs, REFUNDED)


def test_a_stop_while_postgres_is_away_releases_the_batch(
    scene: Scene, redis: Redis, said: CapturingLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that waits for Postgres gives its batch back when it is stopped, oldest first."""
    open_jobs(scene, "job-1", "job-2")
    push(redis, *failures("job-1", "job-2"))
    before = redis.lrange(FAILED, 0, -1)
    away = sa.exc.OperationalError("SELECT", None, psycopg.OperationalError("away"))
    left = fail_first(monkeypatch, intake_module, "settle_parts", *[away] * 1000)
    intake = make_intake(scene, redis)

    with running(intake):
        until(lambda: len(left) < 1000)
    keys = sorted(redis.scan_iter("kino:*"))

    assert redis.lrange(FAILED, 0, -1) == before
    assert keys == []
    assert said.calls[-1] == ("info", ("intake stopped",), {"released": 2})


def test_a_stopped_intake_finishes_the_batch_in_hand(
    scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop that comes while a batch settles waits for it, claims no other, and leaves no key of its own."""
    jobs = numbered("job", 30)
    open_jobs(scene, *jobs)
    push(redis, *failures(*jobs))
    intake = make_intake(scene, redis, intake_batch=10)

    def stop_and_settle(*args: Any, **kwargs: Any) -> Iterator[Part]:
        intake.stopping.set()
        return settle_parts(*args, **kwargs)

    monkeypatch.setattr(intake_module, "settle_parts", stop_and_settle)

    intake.run()

    assert ledger(scene) == {job: REFUNDED if job in jobs[:10] else [] for job in jobs}
    assert depths(redis) == {**EMPTY, FAILED: 20}
    assert list(redis.scan_iter("kino:*")) == []
