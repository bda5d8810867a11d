"""What dead workers leave behind: recovered, settled one at a time, by a worker that says that it lives."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from structlog.testing import CapturingLogger

from kino_refunds.errors import DependencyAway, WrongKeyType
from kino_refunds.events.queues import Recovery, depths
from kino_refunds.intake.gate import pause_intake
from kino_refunds.intake.heartbeat import Heartbeat
from kino_refunds.settlement.batch import Part, settle_parts
from tests.conftest import Database
from tests.intake import A, B, die, make_intake, queues_of
from tests.integration.intake.batches import letters
from tests.pipeline import EMPTY, FAILED, drain, failures, open_jobs, push, refunded
from tests.scenario import Scene, until
from workers import bootstep as bootstep_module
from workers import intake as intake_module
from workers.bootstep import Chores, IntakeStep, _recover

ID_A, ID_B = "00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-00000000000b"


# --- a dead worker's batch


def test_a_dead_worker_s_batch_settles_once_one_at_a_time_between_new_ones(
    scene: Scene, redis: Redis, batches: list[list[str]]
) -> None:
    """Recovery events are settled alone, and new work goes on between them: none waits for the other."""
    old, new = ["old-1", "old-2", "old-3"], ["new-1", "new-2", "new-3", "new-4"]
    open_jobs(scene, *old, *new)
    push(redis, *failures(*old))
    queues_of(redis, A).claim()
    push(redis, *failures(*new))
    die(redis, A)
    intake = make_intake(scene, redis, B, intake_batch=2)

    recovered = intake._queues.recover()
    drain(intake)

    assert recovered == Recovery(workers=(A,), messages=3, skipped=())
    assert batches == [["new-1", "new-2"], ["old-1"], ["new-3", "new-4"], ["old-2"], ["old-3"]]
    assert refunded(scene) == sorted(old + new)
    assert depths(redis) == EMPTY


def test_a_living_worker_s_batch_is_its_own(scene: Scene, redis: Redis) -> None:
    """As long as its alive key stands nobody takes a worker's batch, however slow it is."""
    open_jobs(scene, "job-1")
    push(redis, *failures("job-1"))
    queues_of(redis, A).claim()
    intake = make_intake(scene, redis, B)

    recovered = intake._queues.recover()
    sizes = drain(intake)

    assert recovered == Recovery(workers=(), messages=0, skipped=())
    assert sizes == []
    assert depths(redis) == {**EMPTY, "in-flight": 1}


def test_two_survivors_share_what_is_recovered(scene: Scene, redis: Redis) -> None:
    """Recovery once, by whoever comes first, and settled once, by whoever claims it."""
    old = [f"old-{number}" for number in range(6)]
    open_jobs(scene, *old)
    push(redis, *failures(*old))
    queues_of(redis, A).claim()
    die(redis, A)
    first, second = make_intake(scene, redis, B), make_intake(scene, redis, "worker-c")

    recovered = [first._queues.recover().messages, second._queues.recover().messages]
    sizes = [each.run_once() for _ in range(4) for each in (first, second)]

    assert recovered == [6, 0]
    assert sizes == [1, 1, 1, 1, 1, 1, 0, 0]
    assert refunded(scene) == old
    assert depths(redis) == EMPTY


def test_a_worker_that_dies_with_a_recovered_event_is_recovered_too(scene: Scene, redis: Redis) -> None:
    """Death upon death delays an event and loses nothing."""
    open_jobs(scene, "job-1")
    push(redis, *failures("job-1"))
    for dying, heir in ((A, B), (B, "worker-c")):
        queues_of(redis, dying).claim()
        die(redis, dying)
        queues_of(redis, heir).recover()

    sizes = drain(make_intake(scene, redis, "worker-c"))

    assert sizes == [1]
    assert refunded(scene) == ["job-1"]
    assert letters(scene) == []


def test_a_zombie_s_late_drop_does_nothing(scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped worker that comes back behind its heir pays nothing again and drops nobody's batch."""
    open_jobs(scene, "job-1", "job-2", "job-3")
    push(redis, *failures("job-1", "job-2"))
    zombie, heir = make_intake(scene, redis, A), make_intake(scene, redis, B)
    meanwhile: list[Any] = []

    def stopped_before(*args: Any, **kwargs: Any) -> Iterator[Part]:
        if not meanwhile:
            meanwhile.append("the heir is at work")
            die(redis, A)
            meanwhile.append(heir._queues.recover().messages)
            meanwhile.append(drain(heir))
            push(redis, *failures("job-3"))
            meanwhile.append(len(heir._queues.claim().messages))
        return settle_parts(*args, **kwargs)

    monkeypatch.setattr(intake_module, "settle_parts", stopped_before)

    size = zombie.run_once()
    behind = depths(redis)
    drain(zombie)
    drain(heir)

    assert meanwhile == ["the heir is at work", 2, [1, 1], 1]
    assert size == 2
    assert behind == {**EMPTY, "in-flight": 1}
    assert refunded(scene) == ["job-1", "job-2", "job-3"]
    assert zombie.counts["duplicate"] == 2
    assert depths(redis) == EMPTY


def test_a_drop_that_arrives_late_does_not_drop_the_next_batch(scene: Scene, redis: Redis) -> None:
    """A worker that was recovered and has claimed again loses nothing to its own drop of before."""
    open_jobs(scene, "job-1", "job-2")
    push(redis, *failures("job-1"))
    zombie = make_intake(scene, redis, A)
    stale = zombie._queues.claim().token
    die(redis, A)
    heir = make_intake(scene, redis, B)
    heir._queues.recover()
    drain(heir)
    push(redis, *failures("job-2"))
    zombie._queues.claim()

    dropped = zombie._queues.drop(stale), zombie._queues.release(stale)
    behind = depths(redis)
    drain(zombie)

    assert dropped == (False, 0)
    assert behind == {**EMPTY, "in-flight": 1}
    assert refunded(scene) == ["job-1", "job-2"]


# --- heartbeat


class Row(NamedTuple):
    worker_id: str
    host: str
    pid: int
    build: str
    counts: dict[str, int]
    stopped: bool


def workers(scene: Scene) -> list[Row]:
    rows = scene.rows(
        "SELECT CAST(worker_id AS text), host, pid, build, counts, stopped_at IS NOT NULL FROM kino.intake_worker"
        " ORDER BY worker_id"
    )
    return [Row(*row) for row in rows]


def test_a_heartbeat_is_a_row_that_follows_its_worker(scene: Scene, redis: Redis) -> None:
    """On call sees of each worker where it runs, what it did so far, and that it ended in order."""
    open_jobs(scene, "job-1")
    push(redis, *failures("job-1", "no charge"))
    redis.lpush(FAILED, b"nonsense")
    intake = make_intake(scene, redis, B)
    heartbeat = Heartbeat(scene.worker, ID_A, "b1", intake.counts)
    row = Row(ID_A, socket.gethostname(), os.getpid(), "b1", {}, stopped=False)
    counts = {"batches": 1, "messages": 3, "refunded": 1, "charge_not_found": 1, "not_parsed": 1, "apply_error": 0}

    heartbeat.beat()
    first = workers(scene)
    drain(intake)
    heartbeat.beat()
    second = workers(scene)
    heartbeat.stop()

    assert first == [row]
    assert second == [row._replace(counts=counts)]
    assert workers(scene) == [row._replace(counts=counts, stopped=True)]


def test_workers_that_are_long_gone_are_forgotten(scene: Scene) -> None:
    """A row of last week tells nobody anything; one of yesterday may."""
    for worker_id, age in ((ID_A, "8 days"), (ID_B, "1 day")):
        scene.as_superuser(
            "INSERT INTO kino.intake_worker (worker_id, host, pid, build, started_at, seen_at)"
            f" VALUES ('{worker_id}', 'h', 1, 'b', now(), now() - interval '{age}')"
        )
    heartbeat = Heartbeat(scene.worker, ID_B.replace("b", "c"), "b1", {})

    heartbeat.beat()

    assert [row.worker_id for row in workers(scene)] == [ID_B, ID_B.replace("b", "c")]


# --- chores


FAILURES: dict[str, Exception] = {
    "Redis refuses": RedisConnectionError("away"),
    "Redis is away": DependencyAway("Redis did not confirm"),
    "a foreign key": WrongKeyType("kino:workers holds a hash"),
    "Postgres is away": sa.exc.OperationalError("SELECT", None, Exception("away")),
}


def fails(error: Exception) -> Callable[[], None]:
    def chore() -> None:
        raise error

    return chore


@pytest.mark.parametrize("error", [pytest.param(error, id=name) for name, error in FAILURES.items()])
def test_a_chore_that_fails_does_not_stop_the_others(error: Exception) -> None:
    """Each chore is tried when it is due, whatever happens to those before it, and intake goes on."""
    done: list[str] = []
    chores = Chores({"bad": (0.0, fails(error)), "good": (0.0, lambda: done.append("good"))})

    chores()
    chores()

    assert done == ["good", "good"]


def test_a_chore_is_done_when_it_is_due() -> None:
    """Everything is due at first; afterwards each keeps its own pace, failed or not."""
    done: list[str] = []

    def refused() -> None:
        done.append("refused")
        raise RedisConnectionError("away")

    chores = Chores(
        {
            "always": (0.0, lambda: done.append("always")),
            "seldom": (3600.0, lambda: done.append("seldom")),
            "refused": (3600.0, refused),
        }
    )

    chores()
    chores()

    assert done == ["always", "seldom", "refused", "always"]


# --- all of it together


def test_a_worker_that_starts_takes_over_from_a_dead_one(
    scene: Scene, database: Database, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's step recovers at its start, settles, says that it lives, and leaves without a trace in Redis."""
    monkeypatch.setenv("KINO_DATABASE_URL", database.url())
    monkeypatch.setenv("KINO_REDIS_URL", redis_url)
    open_jobs(scene, "job-1", "job-2")
    push(redis, *failures("job-1", "job-2"))
    queues_of(redis, A).claim()
    die(redis, A)
    step = IntakeStep(None)

    step.start(None)
    until(lambda: depths(redis) == EMPTY)
    step.stop(None)
    assert step._intake is not None
    step._intake._engine.dispose()

    assert refunded(scene) == ["job-1", "job-2"]
    assert [(row.counts["refunded"], row.stopped) for row in workers(scene)] == [(2, True)]
    assert list(redis.scan_iter("kino:*")) == []


@pytest.mark.parametrize("paused", [False, True], ids=["idle", "paused"])
def test_a_worker_that_takes_nothing_stays_alive(
    scene: Scene, database: Database, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch, paused: bool
) -> None:
    """Without a single message, or while intake is paused, a worker says again and again that it lives."""
    for limit in ("LOCK_TIMEOUT", "STATEMENT_TIMEOUT", "IDLE_IN_TRANSACTION_TIMEOUT", "TRANSACTION_TIMEOUT"):
        monkeypatch.setenv(f"KINO_{limit}_MS", "100")  # for a short alive TTL
    monkeypatch.setenv("KINO_TCP_USER_TIMEOUT_MS", "100")
    monkeypatch.setenv("KINO_DATABASE_URL", database.url())
    monkeypatch.setenv("KINO_REDIS_URL", redis_url)
    if paused:
        with scene.worker.begin() as connection:
            pause_intake(connection, reason="a test", actor="somebody")
    step = IntakeStep(None)
    step.start(None)
    assert step._intake is not None
    alive = f"kino:alive:{step._intake._name}"
    try:
        for _ in range(2):
            until(lambda: redis.exists(alive))
            redis.delete(alive)  # as when its TTL is over
        until(lambda: redis.exists(alive))
        recovered = queues_of(redis, A).recover()
        registered = redis.smembers("kino:workers")
    finally:
        step.stop(None)
        step._intake._engine.dispose()

    assert recovered == Recovery(workers=(), messages=0, skipped=())
    assert registered == {step._intake._name.encode()}
    assert list(redis.scan_iter("kino:*")) == []


def test_only_what_was_recovered_is_logged(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead worker with a batch is a warning, and one that was idle is removed without a word."""
    said = CapturingLogger()
    monkeypatch.setattr(bootstep_module, "log", said)
    queues_of(redis, A).refresh()
    die(redis, A)

    _recover(queues_of(redis, B))
    quiet = list(said.calls)
    push(redis, *failures("job-1"))
    queues_of(redis, A).claim()
    die(redis, A)
    _recover(queues_of(redis, B))

    assert quiet == []
    assert [(call.method_name, call.kwargs) for call in said.calls] == [("warning", {"workers": (A,), "messages": 1})]
