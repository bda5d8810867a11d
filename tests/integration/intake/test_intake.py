"""Intake in this process, against real servers: whatever is on the queues, nothing is lost, twice or in the way."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import psycopg
import pytest
import sqlalchemy as sa
from kombu import Connection, Producer
from redis import Connection as RedisConnection
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError
from structlog.testing import CapturingLogger

from kino_refunds.db.engine import SessionLimits
from kino_refunds.db.migrate import migrate
from kino_refunds.dev.embedded import DATABASE, Servers, servers
from kino_refunds.errors import WrongKeyType
from kino_refunds.events.connection import redis_client
from kino_refunds.events.publisher import EventPublisher
from kino_refunds.events.queues import QUEUE_KEYS, SERVED, Queues, depths, waiting
from kino_refunds.events.schema import Event, Queue, to_json
from kino_refunds.settings import Settings
from kino_refunds.settlement.batch import Part, settle_batch, settle_parts
from kino_refunds.settlement.decide import Ruling
from kino_refunds.settlement.deliveries import Delivery, delivery_of
from kino_refunds.settlement.rules import Rules, rules_of
from kino_refunds.settlement.settle import settle
from tests.conftest import Database
from tests.malformed import MALFORMED, envelope
from tests.pipeline import CAPTURED, EMPTY, REFUNDED, drain, ledger, numbered, open_jobs, push
from tests.scenario import Scene, Waits, make_event, make_rules, until
from workers import bootstep as bootstep_module
from workers import intake as intake_module
from workers.bootstep import Binding, Chores
from workers.intake import Intake, read_claim, sub_batches

FAILED, TIMEOUT, SAFETY, COMPLETED = SERVED
A, B = "worker-a", "worker-b"
ACCOUNT = "acct-1"
BRISK = SessionLimits(lock_timeout_ms=50, statement_timeout_ms=300)


@pytest.fixture
def brisk_scene(database: Database) -> Iterator[Scene]:
    """A scene whose worker waits for nobody and nothing for long."""
    with Scene.of(database, limits=BRISK) as scene:
        yield scene


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> CapturingLogger:
    """What intake logs, instead of logging it."""
    logger = CapturingLogger()
    monkeypatch.setattr(intake_module, "log", logger)
    monkeypatch.setattr(bootstep_module, "log", logger)
    return logger


def outcomes(said: CapturingLogger) -> list[dict[str, int]]:
    """What each batch came to, as its log line has it."""
    return [call.kwargs["outcomes"] for call in said.calls if call.args == ("batch",)]


def make_intake(scene: Scene, client: Redis, worker_id: str = A, **chosen: Any) -> Intake:
    settings = Settings.model_construct(**chosen)
    return Intake(scene.worker, Queues(client, worker_id, alive_ttl_s=60), rules_of(settings), settings)


def failures(job_ids: list[str]) -> list[Event]:
    return [make_event("failed platform", job_id) for job_id in job_ids]


class Letter(NamedTuple):
    """A dead letter as it was received."""

    raw: bytes
    queue: str
    reason: str
    seen: int


def letters(scene: Scene) -> list[Letter]:
    rows = scene.rows("SELECT raw, queue, reason, seen FROM kino.dead_letter")
    return sorted(Letter(*row) for row in rows)


def count_letters(scene: Scene) -> int:
    return int(scene.rows("SELECT count(*) FROM kino.dead_letter")[0][0])


def refuse(scene: Scene, event_id: str, does: str = "RAISE EXCEPTION 'not this one'") -> None:
    """Let the database do something of its own when an event whose id matches this expression settles."""
    scene.as_superuser(
        f"""CREATE FUNCTION kino.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF NEW.event_id ~ '{event_id}' THEN {does}; END IF; RETURN NEW; END $$""",
        "CREATE TRIGGER refuse BEFORE INSERT ON kino.settlement FOR EACH ROW EXECUTE FUNCTION kino.refuse()",
    )


def refuse_no_more(scene: Scene) -> None:
    scene.as_superuser("DROP TRIGGER refuse ON kino.settlement")


def fail_first(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *errors: Exception, after: bool = False
) -> list[Exception]:
    """Let a method raise these errors first, before or after its work; returns the errors still to come."""
    real = getattr(owner, name)
    left = list(errors)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if not left:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise left.pop(0)

    monkeypatch.setattr(owner, name, failing)
    return left


@contextmanager
def running(intake: Intake, **options: Any) -> Iterator[threading.Thread]:
    """Run intake in a thread, as a worker does, and stop it as a worker does."""
    thread = threading.Thread(target=intake.run, kwargs=options, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        intake.stopping.set()
        thread.join(30)
    assert not thread.is_alive()


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


def several(*events: Event | bytes) -> bytes:
    """One message that holds all of these."""
    return b"[%s]" % b",".join(event if isinstance(event, bytes) else to_json(event) for event in events)


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
    events = failures(["job-1", "job-2"])
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
        redis.lpush(FAILED, several(*failures(jobs[start : start + 100])))
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
    raw = several(*failures(jobs))
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


# --- what Postgres refuses (P8)


def test_an_event_that_the_database_refuses_is_kept_and_its_neighbours_settle(scene: Scene, redis: Redis) -> None:
    """One event that Postgres will not take becomes a dead letter with its reason; the rest of its batch settles."""
    jobs = numbered("job", 40)
    open_jobs(scene, *jobs)
    push(redis, *failures(jobs))
    refuse(scene, "^job-17 ")

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
    push(redis, *failures(jobs))

    def trip(connection: sa.Connection, part: list[Delivery], rules: Rules, **options: Any) -> list[Ruling]:
        if any(delivery.event.job_id == "job-3" for delivery in part):
            raise KeyError("a field that nobody thought of")
        return settle(connection, part, rules, **options)

    monkeypatch.setattr("kino_refunds.settlement.batch.settle", trip)

    drain(make_intake(scene, redis))

    assert ledger(scene) == {job: [] if job == "job-3" else REFUNDED for job in jobs}
    assert [letter.reason for letter in letters(scene)] == ["apply_error"]


def test_a_job_whose_credits_somebody_holds_waits_alone(brisk_scene: Scene, redis: Redis) -> None:
    """A lot that another session keeps locked puts off its own job, and no other."""
    scene = brisk_scene
    held, *_ = [scene.charged(job) for job in ("held", "free-1", "free-2")]
    lots = ", ".join(str(lot_id) for lot_id, _ in held.lines)
    push(redis, *failures(["free-1", "held", "free-2"]))
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
    push(redis, *failures(jobs))

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
    push(redis, *failures(jobs))
    refuse(scene, "^job-5 ", "PERFORM pg_sleep(10)")

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
    push(redis, *failures(["job-1"]))
    scene.as_superuser("REVOKE INSERT ON kino.dead_letter FROM kino_worker")
    intake = make_intake(scene, redis)

    with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        intake.run_once()
    in_between = [message.raw for message in waiting(redis).messages]
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
    push(redis, *failures(["job-1"]))
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
    push(redis, *failures(["job-1"]))
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
    push(redis, *failures(["job-1"]))
    refuse(scene, "^job-1 ")
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


# --- a batch that is settled more than once (P2, P6)


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
    push(client, *failures(["job-1", "job-2"]))
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
    push(redis, *failures(["job-1", "job-2"]))
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
    push(redis, *failures(jobs))
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
    push(redis, *failures(jobs))
    intake = make_intake(scene, redis, intake_batch=1)

    sizes = drain(intake)

    assert sizes == [1] * 10
    with scene.worker.connect() as connection:
        prepared = connection.execute(sa.text("SELECT statement FROM pg_prepared_statements")).scalars().all()
    reached = ("settle_charges", "inbox_event", "pending_event", "charge")
    assert [name for name in reached if not any(f"kino.{name}" in statement for statement in prepared)] == []


# --- what is away, full or foreign


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


@pytest.fixture(scope="module")
def own_servers() -> Iterator[Servers]:
    """Servers that these tests may kill and fill."""
    with servers() as running:
        migrate(running.database_url(role="kino_owner"))
        yield running


@pytest.fixture
def own_redis(own_servers: Servers) -> Iterator[Redis]:
    with redis_client(own_servers.redis_url()) as client:
        client.flushdb()
        yield client


@pytest.mark.faults
def test_a_killed_postgres_costs_only_time(own_servers: Servers, own_redis: Redis) -> None:
    """While Postgres is away every message stays in Redis, however often it is tried; once it is back, it settles."""
    database = Database(DATABASE, own_servers)
    with Scene.of(database) as before:
        open_jobs(before, "job-1", "job-2")
        push(own_redis, *failures(["job-1", "job-2"]))
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
    push(own_redis, *failures(jobs))
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
    push(redis, *failures(["job-1"]))
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


# --- the thread


def test_the_thread_outlives_every_error(
    scene: Scene, redis: Redis, said: CapturingLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is raised, wherever, is logged, and intake goes on."""
    monkeypatch.setattr(intake_module, "BACK_OFF_MAX_S", 0.01)
    open_jobs(scene, "job-1")
    push(redis, *failures(["job-1"]))
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
    push(redis, *failures(["job-1"]))
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
    push(redis, *failures(jobs))
    refuse(scene, ".", "PERFORM pg_sleep(0.02); RAISE EXCEPTION 'not this one'")
    intake = make_intake(scene, redis)

    with running(intake):
        until(lambda: count_letters(scene) > 0)
    left = depths(redis)
    keys = sorted(redis.scan_iter("kino:*"))
    found = len(letters(scene))
    refuse_no_more(scene)
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
    push(redis, *failures(["job-1", "job-2"]))
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
    push(redis, *failures(jobs))
    intake = make_intake(scene, redis, intake_batch=10)

    def stop_and_settle(*args: Any, **kwargs: Any) -> Iterator[Part]:
        intake.stopping.set()
        return settle_parts(*args, **kwargs)

    monkeypatch.setattr(intake_module, "settle_parts", stop_and_settle)

    intake.run()

    assert ledger(scene) == {job: REFUNDED if job in jobs[:10] else [] for job in jobs}
    assert depths(redis) == {**EMPTY, FAILED: 20}
    assert list(redis.scan_iter("kino:*")) == []
