"""What kills worker after worker: given up only when it was alone each time, and kept unread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from redis import Redis

from kino_refunds.events.queues import POISON_CRASHES, depths
from kino_refunds.events.schema import to_json
from kino_refunds.settlement.batch import Part, settle_parts
from tests.failing import Killed
from tests.intake import A, B, die, make_intake, queues_of
from tests.malformed import envelope
from tests.pipeline import EMPTY, FAILED, drain, failures, open_jobs, push, refunded, several
from tests.scenario import Scene, make_event
from workers import intake as intake_module

# --- poison


class Given(NamedTuple):
    raw: bytes
    reason: str
    source: str | None
    event_id: str | None
    job_id: str | None
    attempts: int
    seen: int


def given_up(scene: Scene) -> list[Given]:
    rows = scene.rows("SELECT raw, reason, source, event_id, job_id, attempts, seen FROM kino.dead_letter ORDER BY raw")
    return [Given(*row) for row in rows]


def crash_with(client: Redis, worker_id: str, *, alone_with: bytes | None = None) -> None:
    """Let a worker recover what others left, claim, and die at once with what it holds."""
    dying = queues_of(client, worker_id)
    dying.recover()
    claim = dying.claim()
    assert alone_with is None or [message.raw for message in claim.messages] == [alone_with]
    die(client, worker_id)


def test_what_kills_three_workers_alone_is_a_dead_letter_unread(
    scene: Scene, redis: Redis, batches: list[list[str]]
) -> None:
    """At the third crash alone a message is kept by its exact bytes and not even parsed; its neighbours settle."""
    open_jobs(scene, "before", "poison", "after")
    push(redis, *failures("before", "poison", "after"))
    poison = to_json(make_event("failed platform", "poison"))
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
    assert given_up(scene) == [Given(poison, "poison_crash", None, None, None, POISON_CRASHES, 1)]
    assert refunded(scene) == ["after", "before"]
    assert depths(redis) == EMPTY
    assert list(redis.scan_iter("kino:crashes:*")) == []


@pytest.mark.parametrize("crashes", [1, 2])
def test_fewer_crashes_are_forgiven(scene: Scene, redis: Redis, crashes: int) -> None:
    """Twice may be a coincidence: the event settles, and its crashes are forgotten."""
    open_jobs(scene, "job-1")
    push(redis, *failures("job-1"))
    crash_with(redis, "in-a-batch")
    for number in range(crashes):
        crash_with(redis, f"dying-{number}", alone_with=to_json(make_event("failed platform", "job-1")))
    intake = make_intake(scene, redis, B)
    intake._queues.recover()

    drain(intake)

    assert refunded(scene) == ["job-1"]
    assert given_up(scene) == []
    assert list(redis.scan_iter("kino:crashes:*")) == []


def test_a_crash_in_company_accuses_nobody(scene: Scene, redis: Redis) -> None:
    """Whoever dies with a batch again and again leaves no suspicion on any of its events."""
    open_jobs(scene, "job-1", "job-2")
    for number in range(POISON_CRASHES + 1):
        push(redis, *failures("job-1", "job-2"))
        queues_of(redis, f"dying-{number}").claim()
        die(redis, f"dying-{number}")
    intake = make_intake(scene, redis, B)
    intake._queues.recover()

    sizes = drain(intake)

    assert sizes == [1] * 8
    assert refunded(scene) == ["job-1", "job-2"]
    assert given_up(scene) == []


def test_a_letter_that_cannot_be_written_keeps_the_poison_in_flight(scene: Scene, redis: Redis) -> None:
    """A poisonous message is dropped only once its dead letter is committed, as any other."""
    push(redis, *failures("job-1"))
    crash_with(redis, "in-a-batch")
    for number in range(POISON_CRASHES):
        crash_with(redis, f"dying-{number}")
    intake = make_intake(scene, redis, B)
    intake._queues.recover()
    scene.as_superuser("REVOKE INSERT ON kino.dead_letter FROM kino_worker")

    with pytest.raises(sa.exc.ProgrammingError):
        intake.run_once()
    kept = depths(redis)
    scene.as_superuser("GRANT INSERT ON kino.dead_letter TO kino_worker")
    sizes = drain(intake)

    assert kept == {**EMPTY, "in-flight": 1}
    assert sizes == [1]
    assert [letter.reason for letter in given_up(scene)] == ["poison_crash"]
    assert depths(redis) == EMPTY


# --- poison among several events


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
    raw = form(several(*failures(*jobs)))
    redis.lpush(FAILED, raw)
    deadly.add("poison")
    for number in range(POISON_CRASHES + 1):  # the first time in company, as it came
        live_and_die(scene, redis, f"dying-{number}")
    last = make_intake(scene, redis, "last")
    last._queues.recover()

    sizes = drain(last)

    assert sizes == [1]
    assert refunded(scene) == ["after", "before"]
    assert given_up(scene) == [Given(raw, "poison_crash", None, None, None, POISON_CRASHES, 1)]
    assert scene.rows("SELECT element_index, may_hold_others FROM kino.dead_letter") == [(1, True)]
    assert depths(redis) == EMPTY
    assert list(redis.scan_iter("kino:crashes:*")) == []


def test_two_poisonous_events_of_one_message_are_two_letters(scene: Scene, redis: Redis, deadly: set[str]) -> None:
    """What was found poisonous is not tried again while its neighbour is found out."""
    jobs = ["poison-1", "good", "poison-2"]
    open_jobs(scene, *jobs)
    redis.lpush(FAILED, several(*failures(*jobs)))
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
    redis.lpush(FAILED, several(*failures(*jobs), b"{}"))
    queues_of(redis, A).claim()
    die(redis, A)
    intake = make_intake(scene, redis, B)
    intake._queues.recover()

    sizes = drain(intake)

    assert (sizes, batches) == ([1], [["job-1"], ["job-2"], ["job-3"]])
    assert refunded(scene) == jobs
    assert [letter.reason for letter in given_up(scene)] == ["invalid_event"]
    assert depths(redis) == EMPTY


def test_a_worker_that_is_taken_for_dead_stops_between_two_events(
    scene: Scene, redis: Redis, batches: list[list[str]]
) -> None:
    """Its heir settles the message; what both settle is paid once."""
    jobs = ["job-1", "job-2"]
    open_jobs(scene, *jobs)
    redis.lpush(FAILED, several(*failures(*jobs)))
    queues_of(redis, A).claim()
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
