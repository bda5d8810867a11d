"""Bad input from everywhere: it ends in a row or a clear error, the worker lives, and neighbours settle at once."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from redis import Redis

from kino_refunds.db.engine import create_engine
from kino_refunds.errors import MalformedMessage
from kino_refunds.events.envelope import parse
from kino_refunds.events.queues import QUEUE_KEYS, depths
from kino_refunds.events.schema import to_json
from kino_refunds.intake.tripwire import ERRORS_MAX
from kino_refunds.ledger import ChargeRequest
from kino_refunds.reconciliation.overdue import OverdueRules, sweep_overdue
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.settlement import batch
from kino_refunds.settlement.deliveries import RECONCILER, read_message
from kino_refunds.settlement.settle import settle
from tests.intake import make_intake
from tests.malformed import MALFORMED, TEN_KB, bare, envelope
from tests.malformed import event as document
from tests.pipeline import EMPTY, FAILED, Says, open_jobs, refunded
from tests.scenario import NOW, Scene, make_event, make_rules
from workers import claims

pytestmark = pytest.mark.usefixtures("sound_books")

RULES = OverdueRules(grace=timedelta(0), asks=1, ask_window=timedelta(0), running_max=timedelta(hours=24))


def kept(scene: Scene) -> list[bytes]:
    """The exact bytes of every dead letter."""
    return sorted(row[0] for row in scene.rows("SELECT raw FROM kino.dead_letter"))


def understood(raw: bytes) -> bool:
    try:
        parse(raw)
    except MalformedMessage:
        return False
    return True


# --- on the queues


def test_everything_malformed_at_once_is_kept_and_the_neighbours_settle(scene: Scene, redis: Redis) -> None:
    """In one batch with everything that cannot be read, what can be read settles; the rest is kept byte by byte."""
    raws = {raw for raw, _ in MALFORMED.values()}
    jobs = [f"job-{number}" for number in range(len(QUEUE_KEYS))]
    open_jobs(scene, *jobs)
    for number, raw in enumerate(sorted(raws)):
        redis.lpush(QUEUE_KEYS[number % len(QUEUE_KEYS)], raw)
    for key, job in zip(QUEUE_KEYS, jobs, strict=True):
        redis.lpush(key, to_json(make_event("failed platform", job)))

    size = make_intake(scene, redis, intake_batch=1000).run_once()

    assert size == len(raws) + len(jobs)
    assert refunded(scene) == sorted(jobs)
    assert kept(scene) == sorted(raws)
    assert depths(redis) == EMPTY


def test_nobody_publishes_under_our_own_name(scene: Scene, redis: Redis) -> None:
    """An event on a queue that says it is the reconciler's is kept, and does not take a verdict's place."""
    open_jobs(scene, "job-1")
    raw = to_json(make_event("completed", event_id="e-1", source=RECONCILER))
    redis.lpush("generation.job-completed", raw)

    make_intake(scene, redis, intake_batch=1000).run_once()

    assert kept(scene) == [raw]
    assert scene.rows("SELECT reason, detail FROM kino.dead_letter") == [
        ("invalid_event", "source 'kino-reconciler' is this system's own")
    ]
    assert scene.rows("SELECT count(*) FROM kino.inbox_event") == [(0,)]


VALUES: Sequence[Any] = (
    None,
    0,
    -1,
    1e308,
    float("nan"),
    True,
    "",
    "x",
    "\x00",
    "\ud800",
    TEN_KB,
    [],
    [[]],
    {},
    {"x": {}},
)
FIELDS = ("body", "content-encoding", "content-type", "headers", "properties")
PROPERTIES = (
    "delivery_mode",
    "delivery_info",
    "priority",
    "body_encoding",
    "delivery_tag",
    "correlation_id",
    "expiration",
)
HEADERS = ("compression", "lang", "task", "id", "eta", "retries", "x")


def oddities() -> Iterator[bytes]:
    """Kombu's envelope of a valid event with one thing about it odd."""
    for number, value in enumerate(VALUES):
        for name in (*FIELDS, *PROPERTIES, *HEADERS, ""):
            message = json.loads(envelope(document(id=f"{name} {number}", subject="no charge", data={
                "job_id": "no charge", "error": {"code": "E", "origin": "platform"}})))  # fmt: skip
            place = message
            if name in PROPERTIES:
                place = message["properties"]
            elif name in HEADERS:
                place = message["headers"]
            place[name] = value
            yield json.dumps(message).encode()


def test_whatever_is_odd_about_an_envelope_is_understood_or_kept(scene: Scene, redis: Redis) -> None:
    """Every field of kombu's envelope may hold anything: the event settles or is kept, and no neighbour waits."""
    odd = list(oddities())
    open_jobs(scene, "first", "last")
    redis.lpush(FAILED, to_json(make_event("failed platform", "first")), *odd)
    redis.lpush(FAILED, to_json(make_event("failed platform", "last")))

    size = make_intake(scene, redis, intake_batch=1000).run_once()

    letters = scene.rows("SELECT CAST(coalesce(sum(seen), 0) AS bigint) FROM kino.dead_letter")
    assert size == len(odd) + 2
    assert refunded(scene) == ["first", "last"]
    assert len(scene.pending()) == sum(map(understood, odd))
    assert letters == [(len(odd) - sum(map(understood, odd)),)]
    assert depths(redis) == EMPTY


def mutated(rng: random.Random) -> bytes:
    """A valid message of either form in which some bytes were lost, doubled, changed or cut off."""
    event = document(id=f"e{rng.random()}")
    content = bytearray(bare(event) if rng.random() < 0.5 else envelope(event))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content))
        match rng.randrange(5):
            case 0:
                del content[at : at + rng.randint(1, 20)]
            case 1:
                content[at:at] = content[at : at + rng.randint(1, 20)]
            case 2:
                content[at] = rng.randrange(256)
            case 3:
                content[at:at] = rng.randbytes(rng.randint(1, 8))
            case _:
                del content[max(at, 1) :]
        if not content:
            content = bytearray(b"{")
    return bytes(content)


@pytest.mark.parametrize("seed", range(2))
def test_no_damaged_message_is_lost_or_in_the_way(scene: Scene, redis: Redis, seed: int) -> None:
    """Whatever happened to a message on its way, it is decided, waits or is kept; the worker lives."""
    rng = random.Random(seed)
    raws = sorted({mutated(rng) for _ in range(300)})
    open_jobs(scene, "first", "last")
    redis.lpush(FAILED, to_json(make_event("failed platform", "first")), *raws)
    redis.lpush(FAILED, to_json(make_event("failed platform", "last")))
    intake = make_intake(scene, redis, intake_batch=1000)

    size = intake.run_once()

    broken = [raw for raw in raws if not understood(raw)]
    assert size == len(raws) + 2
    assert refunded(scene) == ["first", "last"]
    assert set(kept(scene)) >= set(broken)
    assert intake.counts["not_parsed"] == len(broken)
    assert intake.counts["apply_error"] == 0
    assert depths(redis) == EMPTY


# --- what our own errors say


class Mute(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


ERRORS: Mapping[str, Exception] = {
    "no text at all": Mute(),
    "controls": ValueError("\x00\x1b[2J\x9b31m\r\n\x7f\u202e"),
    "no utf-8": ValueError("\udcff \ud800"),
    "a megabyte": ValueError("x" * 2**20),
    "a megabyte that grows": ValueError("\x00" * 2**18),
    "percent and braces": ValueError("%s %(x)s {} {0} :job_id $1 \\u0000"),
    "empty": ValueError(),
    "a group": ExceptionGroup("\x00 many", [ValueError("\x00"), ValueError("\udcff")]),
}


def test_an_error_of_any_text_becomes_a_dead_letter(
    scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an exception says is stored escaped and cut, beside the event; the neighbours settle."""
    open_jobs(scene, *ERRORS, "good")
    redis.lpush(FAILED, *[to_json(make_event("failed platform", job)) for job in (*ERRORS, "good")])

    def failing(connection: sa.Connection, deliveries: Sequence[Any], *args: Any, **more: Any) -> Any:
        for delivery in deliveries:
            if delivery.event.job_id in ERRORS:
                raise ERRORS[delivery.event.job_id]
        return settle(connection, deliveries, *args, **more)

    monkeypatch.setattr(batch, "settle", failing)

    make_intake(scene, redis, intake_batch=1000).run_once()

    letters = scene.rows("SELECT job_id, reason, detail, exception FROM kino.dead_letter ORDER BY job_id")
    assert refunded(scene) == ["good"]
    assert [(letter.job_id, letter.reason) for letter in letters] == [(job, "apply_error") for job in sorted(ERRORS)]
    assert max(len(letter.detail) for letter in letters) <= 2_000
    assert max(len(letter.exception) for letter in letters) <= 20_000
    assert all(c.isprintable() or c == "\n" for letter in letters for c in letter.detail + letter.exception)


# --- what keeps even the letter away


EMOJI = "\U0001f3ac"


@pytest.fixture
def latin1(scene: Scene) -> Iterator[Scene]:
    """The scene with a worker whose encoding has no emoji, as a role's default made it before sessions were pinned."""
    engine = create_engine(scene.worker.url.render_as_string(hide_password=False))

    @sa.event.listens_for(engine, "connect")
    def unpin(raw: Any, _record: object) -> None:
        raw.execute("SET client_encoding = 'LATIN1'")
        raw.commit()

    yield replace(scene, worker=engine)
    engine.dispose()


def test_an_event_that_the_session_cannot_carry_is_kept_alone(scene: Scene, latin1: Scene, redis: Redis) -> None:
    """An id that fails the statement fails its letter too: the bytes alone are kept, and nothing waits behind it."""
    open_jobs(scene, "good")
    bad = to_json(make_event("failed platform", EMOJI))
    redis.lpush(FAILED, bad, to_json(make_event("failed platform", "good")))
    intake = make_intake(latin1, redis, intake_batch=1000)

    sizes = [intake.run_once(), intake.run_once()]

    assert sizes == [2, 0]
    assert refunded(scene) == ["good"]
    assert kept(scene) == [bad]
    [(reason, detail, *ids)] = scene.rows("SELECT reason, detail, source, event_id, job_id FROM kino.dead_letter")
    assert (reason, ids) == ("apply_error", [None, None, None])
    assert detail.startswith("UnicodeEncodeError: ")
    assert depths(redis) == EMPTY


def test_a_letter_that_cannot_be_written_takes_no_other_along(scene: Scene, latin1: Scene, redis: Redis) -> None:
    """Of messages that do not parse each has its letter, although the text of one is refused."""
    raws = [bare(document(id=event_id, type="unknown")) for event_id in ("e-1", EMOJI, "e-2")]
    redis.lpush(FAILED, *raws)
    intake = make_intake(latin1, redis, intake_batch=1000)

    size = intake.run_once()

    assert size == len(raws)
    assert scene.rows("SELECT raw, event_id, reason FROM kino.dead_letter ORDER BY event_id") == [
        (raws[0], "e-1", "unknown_type"),
        (raws[2], "e-2", "unknown_type"),
        (raws[1], None, "unknown_type"),
    ]
    assert depths(redis) == EMPTY


def stumble(monkeypatch: pytest.MonkeyPatch, word: bytes) -> None:
    """Let our own reading of messages fail on those that hold `word`."""

    def read(raw: bytes, queue: str) -> Any:
        if word in raw:
            raise RecursionError("planted")
        return read_message(raw, queue)

    monkeypatch.setattr(claims, "read_message", read)


def test_a_message_on_which_our_reading_fails_is_kept_alone(
    scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake of ours in reading one message costs that message: it is kept whole, its neighbours settle."""
    open_jobs(scene, "bad", "good")
    bad = to_json(make_event("failed platform", "bad"))
    redis.lpush(FAILED, bad, to_json(make_event("failed platform", "good")))
    stumble(monkeypatch, b'"bad"')

    size = make_intake(scene, redis, intake_batch=1000).run_once()

    assert size == 2
    assert refunded(scene) == ["good"]
    assert kept(scene) == [bad]
    assert scene.rows("SELECT reason, detail FROM kino.dead_letter") == [("apply_error", "RecursionError: planted")]
    assert depths(redis) == EMPTY


def test_a_build_that_can_read_nothing_trips(scene: Scene, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """When our reading fails on message after message intake pauses, and they go back to their queue."""
    redis.lpush(FAILED, *[to_json(make_event("failed platform", f"job-{n}")) for n in range(ERRORS_MAX + 1)])
    stumble(monkeypatch, b"job-")

    make_intake(scene, redis, intake_batch=1000).run_once()

    assert scene.rows("SELECT paused, actor FROM kino.intake_state") == [(True, "tripwire")]
    assert kept(scene) == []
    assert depths(redis) == {**EMPTY, str(FAILED): ERRORS_MAX + 1}


# --- in the tables, and from the source


ODD = ("a\x1b[2J\x9b\n\tb", TEN_KB, "", "\u202e")


def test_odd_text_in_the_tables_holds_up_no_overdue_neighbour(scene: Scene, redis: Redis) -> None:
    """Charges whose ids no event can carry are left for a person; every other overdue job is refunded."""
    for odd in ODD:
        for job, account in ((odd, "acct-1"), (f"job {ascii(odd)[:9]}", odd)):
            scene.rows(
                "INSERT INTO kino.charge (job_id, account_id, credits, deadline_at)"
                " VALUES (:job, :account, 0, now() - interval '1 day') RETURNING 1",
                job=job,
                account=account,
            )
    scene.as_superuser(
        "INSERT INTO kino.open_charge (charge_id, account_id, deadline_at, credits)"
        " SELECT charge_id, account_id, deadline_at, credits FROM kino.charge",
        "INSERT INTO kino.account (account_id) SELECT account_id FROM kino.charge WHERE account_id <> 'acct-1'",
        "INSERT INTO kino.credit_lot (reference, account_id, class, granted, remaining)"
        " SELECT md5(account_id), account_id, 'courtesy', 1, 1 FROM kino.account",
        "INSERT INTO kino.transfer (kind, from_book, to_book, account_id, lot_id, credits, reason, actor)"
        " SELECT 'grant', 'issued', 'wallet', account_id, lot_id, 1, 'courtesy', 'test' FROM kino.credit_lot",
    )
    open_jobs(scene, "neighbour", deadline=-timedelta(hours=1))

    report = sweep_overdue(scene.worker, redis, Says(lambda _: Answer(JobState.FAILED)), make_rules(), overdue=RULES)

    assert report.overdue == 2 * len(ODD) + 1
    assert refunded(scene) == ["neighbour"]


@pytest.mark.parametrize("state", [JobState.FAILED, JobState.TIMED_OUT, JobState.REJECTED])
def test_hostile_ids_go_through_the_sweep_as_ids(scene: Scene, redis: Redis, state: JobState) -> None:
    """Quotes, formats and markup in an id are text to source, event and ledger."""
    jobs = ["'; DROP TABLE kino.charge; --", "%s %(x)s", ":job_ids {} $1", "[bold]\U0001f3ac", "NULL", "a  b"]
    open_jobs(scene, *jobs, deadline=-timedelta(hours=1))

    sweep_overdue(scene.worker, redis, Says(lambda _: Answer(state)), make_rules(), overdue=RULES)

    assert refunded(scene) == sorted(jobs)


@pytest.mark.parametrize("name", ["job_id", "account_id"])
@pytest.mark.parametrize("odd", ["", "a\x00b", "\x1b[2J", "\ud800", TEN_KB, "a ", " a", " ", "a\xa0"], ids=ascii)
def test_the_ledger_opens_no_charge_that_no_event_can_name(name: str, odd: str) -> None:
    """An id that an event could not carry is refused when the job is charged, with a clear error."""
    fields = {"job_id": "job-1", "account_id": "acct-1", name: odd}

    with pytest.raises(ValueError, match=f"{name} must be 1 to 128 printable characters"):
        ChargeRequest(credits=1, deadline_at=NOW, **fields)
