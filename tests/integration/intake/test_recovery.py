"""What dead workers leave behind: recovered, settled one at a time, and given up only when it kills."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from structlog.testing import CapturingLogger

from kino_refunds.errors import DependencyAway, WrongKeyType
from kino_refunds.events.queues import POISON_CRASHES, SERVED, Queues, Recovered, depths
from kino_refunds.events.schema import Event, to_json
from kino_refunds.intake.gate import pause_intake
from kino_refunds.intake.heartbeat import Heartbeat
from kino_refunds.settings import Settings
from kino_refunds.settlement.batch import Part, settle_parts
from kino_refunds.settlement.rules import rules_of
from tests.conftest import Database
from tests.malformed import envelope
from tests.pipeline import drain, open_jobs, refunded
from tests.scenario import Scene, make_event, until
from workers import bootstep as bootstep_module
from workers import intake as intake_module
from workers.bootstep import Chores, IntakeStep, _recover
from workers.intake import Intake

A, B = "worker-a", "worker-b"
FAILED = SERVED[0]
EMPTY: dict[str, int] = {**dict.fromkeys(map(str, SERVED), 0), "in-flight": 0, "recovered": 0}
ID_A, ID_B = "00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-00000000000b"


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The jobs of each batch that intake settles, in order."""
    seen: list[list[str]] = []

    def seen_batch(engine: sa.Engine, deliveries: Sequence[Any], *args: Any, **kwargs: Any) -> Iterator[Part]:
        seen.append([delivery.event.job_id for delivery in deliveries])
        return settle_parts(engine, deliveries, *args, **kwargs)

    monkeypatch.setattr(intake_module, "settle_parts", seen_batch)
    return seen


def queues(client: Redis, worker_id: str) -> Queues:
    return Queues(client, worker_id, alive_ttl_s=60)


def make_intake(scene: Scene, client: Redis, worker_id: str = B, **chosen: Any) -> Intake:
    settings = Settings.model_construct(**chosen)
    return Intake(scene.worker, queues(client, worker_id), rules_of(settings), settings, name=worker_id)


def die(client: Redis, worker_id: str) -> None:
    """As when the alive key of a killed worker runs out."""
    client.delete(f"kino:alive:{worker_id}")


def push(client: Redis, *jobs: str) -> None:
    client.lpush(FAILED, *[to_json(failed(job)) for job in jobs])


def failed(job: str) -> Event:
    return make_event("failed platform", job)


class Letter(NamedTuple):
    raw: bytes
    reason: str
    source: str | None
    event_id: str | None
    job_id: str | None
    attempts: int
    seen: int


def letters(scene: Scene) -> list[Letter]:
    rows = scene.rows("SELECT raw, reason, source, event_id, job_id, attempts, seen FROM kino.dead_letter ORDER BY raw")
    return [Letter(*row) for row in rows]


# --- a dead worker's batch


def test_a_dead_worker_s_batch_settles_once_one_at_a_time_between_new_ones(
    scene: Scene, redis: Redis, batches: list[list[str]]
) -> None:
    """Recovered events are settled alone, and new work goes on between them: none waits for the other."""
    old, new = ["old-1", "old-2", "old-3"], ["new-1", "new-2", "new-3", "new-4"]
    open_jobs(scene, *old, *new)
    push(redis, *old)
    queues(redis, A).claim()
    push(redis, *new)
    die(redis, A)
    intake = make_intake(scene, redis, intake_batch=2)

    recovered = intake._queues.recover()
    drain(intake)

    assert recovered == Recovered(workers=(A,), messages=3, skipped=())
    assert batches == [["new-1", "new-2"], ["old-1"], ["new-3", "new-4"], ["old-2"], ["old-3"]]
    assert refunded(scene) == sorted(old + new)
    assert depths(redis) == EMPTY


def test_a_living_worker_s_batch_is_its_own(scene: Scene, redis: Redis) -> None:
    """As long as its alive key stands nobody takes a worker's batch, however slow it is."""
    open_jobs(scene, "job-1")
    push(redis, "job-1")
    queues(redis, A).claim()
    intake = make_intake(scene, redis)

    recovered = intake._queues.recover()
    sizes = drain(intake)

    assert recovered == Recovered(workers=(), messages=0, skipped=())
    assert sizes == []
    assert depths(redis) == {**EMPTY, "in-flight": 1}


def test_two_survivors_share_what_is_recovered(scene: Scene, redis: Redis) -> None:
    """Recovered once, by whoever comes first, and settled once, by whoever claims it."""
    old = [f"old-{number}" for number in range(6)]
    open_jobs(scene, *old)
    push(redis, *old)
    queues(redis, A).claim()
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
    push(redis, "job-1")
    for dying, heir in ((A, B), (B, "worker-c")):
        queues(redis, dying).claim()
        die(redis, dying)
        queues(redis, heir).recover()

    sizes = drain(make_intake(scene, redis, "worker-c"))

    assert sizes == [1]
    assert refunded(scene) == ["job-1"]
    assert letters(scene) == []


def test_a_zombie_s_late_drop_does_nothing(scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped worker that comes back behind its heir pays nothing again and drops nobody's batch."""
    open_jobs(scene, "job-1", "job-2", "job-3")
    push(redis, "job-1", "job-2")
    zombie, heir = make_intake(scene, redis, A), make_intake(scene, redis, B)
    meanwhile: list[Any] = []

    def stopped_before(*args: Any, **kwargs: Any) -> Iterator[Part]:
        if not meanwhile:
            meanwhile.append("the heir is at work")
            die(redis, A)
            meanwhile.append(heir._queues.recover().messages)
            meanwhile.append(drain(heir))
            push(redis, "job-3")
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
    push(redis, "job-1")
    zombie = make_intake(scene, redis, A)
    stale = zombie._queues.claim().token
    die(redis, A)
    heir = make_intake(scene, redis, B)
    heir._queues.recover()
    drain(heir)
    push(redis, "job-2")
    zombie._queues.claim()

    dropped = zombie._queues.drop(stale), zombie._queues.release(stale)
    behind = depths(redis)
    drain(zombie)

    assert dropped == (False, 0)
    assert behind == {**EMPTY, "in-flight": 1}
    assert refunded(scene) == ["job-1", "job-2"]


# --- poison


def crash_with(client: Redis, worker_id: str, *, alone_with: bytes | None = None) -> None:
    """Let a worker recover what others left, claim, and die at once with what it holds."""
    dying = queues(client, worker_id)
    dying.recover()
    claim = dying.claim()
    assert alone_with is None or [message.raw for message in claim.messages] == [alone_with]
    die(client, worker_id)


def test_what_kills_three_workers_alone_is_a_dead_letter_unread(
    scene: Scene, redis: Redis, batches: list[list[str]]
) -> None:
    """At the third crash alone a message is kept by its exact bytes and not even parsed; its neighbours settle."""
    open_jobs(scene, "before", "poison", "after")
    push(redis, "before", "poison", "after")
    poison = to_json(failed("poison"))
    crash_with(redis, "first")
    survivor = make_intake(scene, redis, "survivor")
    survivor._queues.recover()
    survivor.run_once()
    crash_with(redis, "dying-1", alone_with=poison)
    survivor._queues.recover()
    survivor.run_once()
    crash_with(redis, "dying-2", alone_with=poison)
    crash_with(redis, "dying-3", alone_with=poison)
    last = make_intake(scene, redis, "last")
    last._queues.recover()

    sizes = drain(last)

    assert sizes == [1]
    assert batches == [["before"], ["after"], []]
    assert letters(scene) == [Letter(poison, "poison_crash", None, None, None, POISON_CRASHES, 1)]
    assert refunded(scene) == ["after", "before"]
    assert depths(redis) == EMPTY
    assert list(redis.scan_iter("kino:crashes:*")) == []


@pytest.mark.parametrize("crashes", [1, 2])
def test_fewer_crashes_are_forgiven(scene: Scene, redis: Redis, crashes: int) -> None:
    """Twice may be a coincidence: the event settles, and its crashes are forgotten."""
    open_jobs(scene, "job-1")
    push(redis, "job-1")
    crash_with(redis, "in-a-batch")
    for number in range(crashes):
        crash_with(redis, f"dying-{number}", alone_with=to_json(failed("job-1")))
    intake = make_intake(scene, redis)
    intake._queues.recover()

    drain(intake)

    assert refunded(scene) == ["job-1"]
    assert letters(scene) == []
    assert list(redis.scan_iter("kino:crashes:*")) == []


def test_a_crash_in_company_accuses_nobody(scene: Scene, redis: Redis) -> None:
    """Whoever dies with a batch again and again leaves no suspicion on any of its events."""
    open_jobs(scene, "job-1", "job-2")
    for number in range(POISON_CRASHES + 1):
        push(redis, "job-1", "job-2")
        queues(redis, f"dying-{number}").claim()
        die(redis, f"dying-{number}")
    intake = make_intake(scene, redis)
    intake._queues.recover()

    sizes = drain(intake)

    assert sizes == [1] * 8
    assert refunded(scene) == ["job-1", "job-2"]
    assert letters(scene) == []


def test_a_letter_that_cannot_be_written_keeps_the_poison_in_flight(scene: Scene, redis: Redis) -> None:
    """A poisonous message is dropped only once its dead letter is committed, as any other."""
    push(redis, "job-1")
    crash_with(redis, "in-a-batch")
    for number in range(POISON_CRASHES):
        crash_with(redis, f"dying-{number}")
    intake = make_intake(scene, redis)
    intake._queues.recover()
    scene.as_superuser("REVOKE INSERT ON kino.dead_letter FROM kino_worker")

    with pytest.raises(sa.exc.ProgrammingError):
        intake.run_once()
    kept = depths(redis)
    scene.as_superuser("GRANT INSERT ON kino.dead_letter TO kino_worker")
    sizes = drain(intake)

    assert kept == {**EMPTY, "in-flight": 1}
    assert sizes == [1]
    assert [letter.reason for letter in letters(scene)] == ["poison_crash"]
    assert depths(redis) == EMPTY


# --- poison among several events


class Killed(BaseException):
    """As kill -9: nothing of ours catches it, and nothing is cleaned up."""


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Jobs whose events end the process that settles them."""
    jobs: set[str] = set()

    def settle_or_die(engine: sa.Engine, deliveries: Sequence[Any], *args: Any, **kwargs: Any) -> Iterator[Part]:
        if any(delivery.event.job_id in jobs for delivery in deliveries):
            raise Killed
        return settle_parts(engine, deliveries, *args, **kwargs)

    monkeypatch.setattr(intake_module, "settle_parts", settle_or_die)
    return jobs


def live_and_die(scene: Scene, client: Redis, worker_id: str) -> None:
    intake = make_intake(scene, client, worker_id)
    intake._queues.recover()
    with pytest.raises(Killed):
        drain(intake)
    die(client, worker_id)


@pytest.mark.parametrize("form", [bytes, envelope], ids=["bare", "kombu"])
def test_a_poisonous_event_of_several_is_a_dead_letter_and_its_neighbours_settle(
    scene: Scene, redis: Redis, deadly: set[str], form: Callable[[bytes], bytes]
) -> None:
    """What ends workers is found among the events of its message, and kept by the message and its place in it."""
    jobs = ["before", "poison", "after"]
    open_jobs(scene, *jobs)
    raw = form(b"[%s]" % b",".join(to_json(failed(job)) for job in jobs))
    redis.lpush(FAILED, raw)
    deadly.add("poison")
    for number in range(POISON_CRASHES + 1):  # the first time in company, as it came
        live_and_die(scene, redis, f"dying-{number}")
    last = make_intake(scene, redis, "last")
    last._queues.recover()

    sizes = drain(last)

    assert sizes == [1]
    assert refunded(scene) == ["after", "before"]
    assert letters(scene) == [Letter(raw, "poison_crash", None, None, None, POISON_CRASHES, 1)]
    assert scene.rows("SELECT element_index, may_hold_others FROM kino.dead_letter") == [(1, True)]
    assert depths(redis) == EMPTY
    assert list(redis.scan_iter("kino:crashes:*")) == []


def test_two_poisonous_events_of_one_message_are_two_letters(scene: Scene, redis: Redis, deadly: set[str]) -> None:
    """What was found poisonous is not tried again while its neighbour is found out."""
    jobs = ["poison-1", "good", "poison-2"]
    open_jobs(scene, *jobs)
    redis.lpush(FAILED, b"[%s]" % b",".join(to_json(failed(job)) for job in jobs))
    deadly.update(["poison-1", "poison-2"])
    for number in range(2 * POISON_CRASHES + 1):
        live_and_die(scene, redis, f"dying-{number}")
    last = make_intake(scene, redis, "last")
    last._queues.recover()

    drain(last)

    assert refunded(scene) == ["good"]
    assert scene.rows("SELECT element_index, reason FROM kino.dead_letter ORDER BY 1") == [
        (0, "poison_crash"),
        (2, "poison_crash"),
    ]
    assert depths(redis) == EMPTY


def test_recovered_events_of_one_message_settle_one_a_transaction(
    scene: Scene, redis: Redis, batches: list[list[str]]
) -> None:
    """After a crash each is alone in work, in the order of their times, and the message goes when all are decided."""
    jobs = ["job-1", "job-2", "job-3"]
    open_jobs(scene, *jobs)
    redis.lpush(FAILED, b"[%s]" % b",".join([*(to_json(failed(job)) for job in jobs), b"{}"]))
    queues(redis, A).claim()
    die(redis, A)
    intake = make_intake(scene, redis)
    intake._queues.recover()

    sizes = drain(intake)

    assert (sizes, batches) == ([1], [["job-1"], ["job-2"], ["job-3"]])
    assert refunded(scene) == jobs
    assert [letter.reason for letter in letters(scene)] == ["invalid_event"]
    assert depths(redis) == EMPTY


def test_a_worker_that_is_taken_for_dead_stops_between_two_events(
    scene: Scene, redis: Redis, batches: list[list[str]]
) -> None:
    """Its heir settles the message; what both settle is paid once."""
    jobs = ["job-1", "job-2"]
    open_jobs(scene, *jobs)
    redis.lpush(FAILED, b"[%s]" % b",".join(to_json(failed(job)) for job in jobs))
    queues(redis, A).claim()
    die(redis, A)
    slow, heir = make_intake(scene, redis, B), make_intake(scene, redis, "worker-c")
    slow._queues.recover()
    begin = slow._queues.begin

    def late(token: str, index: int | None) -> int | None:
        if index == 1:
            die(redis, B)
            heir._queues.recover()
            drain(heir)
        return begin(token, index)

    slow._queues.begin = late  # type: ignore[method-assign]

    size = slow.run_once()

    assert size == 1
    assert batches == [["job-1"], ["job-1"], ["job-2"]]
    assert refunded(scene) == jobs
    assert depths(redis) == EMPTY


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
    push(redis, "job-1", "no charge")
    redis.lpush(FAILED, b"nonsense")
    intake = make_intake(scene, redis)
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
    push(redis, "job-1", "job-2")
    queues(redis, A).claim()
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
        recovered = queues(redis, A).recover()
        registered = redis.smembers("kino:workers")
    finally:
        step.stop(None)
        step._intake._engine.dispose()

    assert recovered == Recovered(workers=(), messages=0, skipped=())
    assert registered == {step._intake._name.encode()}
    assert list(redis.scan_iter("kino:*")) == []


def test_only_what_was_recovered_is_logged(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead worker with a batch is a warning, and one that was idle is removed without a word."""
    said = CapturingLogger()
    monkeypatch.setattr(bootstep_module, "log", said)
    queues(redis, A).refresh()
    die(redis, A)

    _recover(queues(redis, B))
    quiet = list(said.calls)
    push(redis, "job-1")
    queues(redis, A).claim()
    die(redis, A)
    _recover(queues(redis, B))

    assert quiet == []
    assert [(call.method_name, call.kwargs) for call in said.calls] == [("warning", {"workers": (A,), "messages": 1})]
