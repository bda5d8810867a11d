"""Dead letters at the desk: their groups, what a dry run tells, and what people do to them at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from kino_refunds.desk import replays
from kino_refunds.errors import DeadLetterClosed, DeadLetterNotFound
from kino_refunds.events.schema import Queue, to_json
from kino_refunds.ledger import Balance
from kino_refunds.settlement import batch
from kino_refunds.settlement.dead_letters import LetterStatus, poison_letter
from kino_refunds.settlement.deliveries import read_message
from kino_refunds.settlement.settle import settle as settle_events
from tests.clock import discard_letter, note_letter, set_letter_status
from tests.integration.desk.letters import LATER, Letter, exhaust, history, letters, malformed, replay
from tests.malformed import bare, celery_task, envelope
from tests.malformed import event as document
from tests.pipeline import FAILED, several
from tests.scenario import NOW, SOURCE, Scene, make_event

pytestmark = pytest.mark.usefixtures("sound_books")


# --- groups


def test_letters_are_grouped_by_cause_and_not_by_queue(scene: Scene) -> None:
    """Six mistakes by four queues are six groups."""
    mistakes: list[list[bytes]] = [
        [bare(document(id=f"a{number}", time="x")) for number in range(4)],
        [bare(document(id=number)) for number in range(4)],
        [celery_task("tasks.a", task_id=f"t{number}") for number in range(4)],
        [celery_task("tasks.b", task_id=f"t{number}") for number in range(4)],
        [envelope(document(id=f"b{number}"), content_type="text/plain") for number in range(4)],
        [several(document_bytes(number), b"{}") for number in range(4)],
    ]
    for raws in mistakes:
        for queue, raw in zip(Queue, raws, strict=True):
            scene.keep(*read_message(raw, queue)[1])

    groups = scene.rows("SELECT count(*) FROM kino.dead_letter GROUP BY group_fingerprint")

    assert [tuple(row) for row in groups] == [(4,)] * 6


def document_bytes(number: int) -> bytes:
    return bare(document(id=f"c{number}"))


def test_exceptions_are_grouped_by_where_they_came_from(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bugs are two groups although Postgres or the driver raised both, and one bug is one, whatever it said."""
    errors = iter([psycopg.errors.RaiseException("job 1"), psycopg.errors.RaiseException("job 2")])

    def by_postgres(*_: Any, **__: Any) -> Any:
        raise sa.exc.InternalError("SELECT", None, next(errors))

    def by_ours(*_: Any, **__: Any) -> Any:
        raise sa.exc.InternalError("SELECT", None, psycopg.errors.DivisionByZero("x"))

    for failing, job in ((by_postgres, "job-1"), (by_postgres, "job-2"), (by_ours, "job-3")):
        monkeypatch.setattr(batch, "settle", failing)
        scene.settle_batch(make_event("failed platform", job))

    groups = scene.rows("SELECT count(*) FROM kino.dead_letter GROUP BY group_fingerprint ORDER BY 1")
    assert [tuple(row) for row in groups] == [(1,), (2,)]


# --- dry run


def a_mismatch(scene: Scene) -> None:
    scene.settle_batch(make_event("failed platform", account_id="somebody else"))


def a_conflict(scene: Scene) -> None:
    scene.settle_batch(make_event("completed", event_id="e"), make_event("timeout", event_id="e"))


def an_exhausted_event(scene: Scene) -> None:
    exhaust(scene, make_event("failed platform", "job-2"))
    scene.charged("job-2")


def an_exhausted_event_without_charge(scene: Scene) -> None:
    exhaust(scene, make_event("failed platform", "job-2"))


def a_malformed_message(scene: Scene) -> None:
    scene.keep(malformed(b"nonsense"))


def an_unread_one(scene: Scene) -> None:
    scene.keep(poison_letter(to_json(make_event("safety during")), FAILED, 3))


def one_settled_meanwhile(scene: Scene) -> None:
    scene.keep(poison_letter(to_json(make_event("timeout")), FAILED, 3))
    scene.settle_batch(make_event("timeout"))


@pytest.mark.parametrize(
    "arrange",
    [
        a_mismatch,
        a_conflict,
        an_exhausted_event,
        an_exhausted_event_without_charge,
        a_malformed_message,
        an_unread_one,
        one_settled_meanwhile,
    ],
)
def test_a_dry_run_writes_nothing_and_tells_what_will_be(scene: Scene, arrange: Callable[[Scene], None]) -> None:
    """What a dry run says is what the replay then comes to; until then no table has changed."""
    scene.charged()
    arrange(scene)
    before = scene.everything()

    foretold = replay(scene, dry_run=True)
    after = scene.everything()
    real = replay(scene)

    assert after == before
    assert foretold == real


def test_a_dry_run_of_a_correction_writes_nothing(scene: Scene) -> None:
    """A correction can be tried first; its number is not used up."""
    scene.charged()
    scene.settle_batch(make_event("failed platform", account_id="somebody else"))
    before = scene.everything()
    edited = to_json(make_event("failed platform"))

    foretold = replay(scene, edited=edited, dry_run=True)
    after = scene.everything()

    assert after == before
    assert foretold == replay(scene, edited=edited)


# --- the letter itself


def test_a_number_that_nobody_has_is_an_error(scene: Scene) -> None:
    """An unknown number changes nothing and says where the numbers are."""
    before = scene.everything()

    with pytest.raises(DeadLetterNotFound, match="there is no dead letter 7; see `kino-refunds dead-letters list`"):
        replay(scene, 7)
    with scene.worker.begin() as connection, pytest.raises(DeadLetterNotFound):
        discard_letter(connection, 7, note="x", actor="anna", now=NOW)
    with scene.worker.begin() as connection, pytest.raises(DeadLetterNotFound):
        note_letter(connection, 7, "text", actor="anna", now=NOW)

    assert scene.everything() == before


def test_what_people_did_is_kept(scene: Scene) -> None:
    """Notes, who discarded and why, and who replayed after all: all of it stays with the letter, in order."""
    scene.charged()
    scene.keep(poison_letter(to_json(make_event("failed platform")), FAILED, 3))

    with scene.worker.begin() as connection:
        note_letter(connection, 1, "the pipeline is asked \U0001f3ac", actor="anna", now=NOW)
        discard_letter(connection, 1, note="a test", actor="bob", now=NOW)
        note_letter(connection, 1, "no, it is real", actor="eve", now=NOW)
    discarded = letters(scene)
    replay(scene)

    assert discarded == [Letter(1, None, "poison_crash", 1, "discarded", "bob")]
    assert letters(scene) == [Letter(1, None, "poison_crash", 1, "replayed", "anna")]
    assert history(scene) == [
        {"reason": "poison_crash"},
        {"status": "discarded", "actor": "bob", "note": "a test"},
        {"status": "replayed", "actor": "anna", "outcome": "refunded"},
    ]
    assert scene.rows("SELECT notes FROM kino.dead_letter") == [
        (
            [
                {"at": NOW.isoformat(), "actor": "anna", "text": "the pipeline is asked \U0001f3ac"},
                {"at": NOW.isoformat(), "actor": "eve", "text": "no, it is real"},
            ],
        )
    ]


def test_a_letter_that_came_again_is_open_unless_somebody_judged_it(scene: Scene) -> None:
    """After a replay the same message failing again opens its letter; a discarded one is only counted."""
    scene.keep(malformed(b"to be replayed"))
    scene.keep(malformed(b"to be discarded"))
    with scene.worker.begin() as connection:
        for number, status in ((1, LetterStatus.REPLAYED), (2, LetterStatus.DISCARDED)):
            set_letter_status(connection, number, status, actor="anna", now=NOW, entry={})

    scene.keep(malformed(b"to be replayed"), malformed(b"to be discarded"), malformed(b"to be discarded"))

    assert letters(scene) == [
        Letter(1, None, "bad_json", 2, "open", "anna"),
        Letter(2, None, "bad_json", 3, "discarded", "anna"),
    ]


def test_a_discarded_letter_whose_replay_fails_is_open_again(scene: Scene) -> None:
    """A person took it up once more: while it fails it is somebody's business, and guards its job."""
    scene.charged()
    scene.settle_batch(make_event("failed platform", account_id="somebody else"))
    scene.keep(malformed(b"nonsense"))
    with scene.worker.begin() as connection:
        discard_letter(connection, 1, note="x", actor="bob", now=NOW)
        discard_letter(connection, 2, note="x", actor="bob", now=NOW)

    replay(scene, 1)
    replay(scene, 2)

    assert [(each.number, each.status, each.actor) for each in letters(scene)] == [
        (1, "open", "anna"),
        (2, "open", "anna"),
    ]


@pytest.mark.parametrize("how", ["replayed", "discarded"])
def test_a_letter_that_is_closed_is_not_discarded(scene: Scene, how: str) -> None:
    """Whoever comes second is told; a letter whose credits have moved never says that it was thrown away."""
    scene.charged()
    scene.keep(poison_letter(to_json(make_event("failed platform")), FAILED, 3))
    if how == "replayed":
        replay(scene)
    else:
        with scene.worker.begin() as connection:
            discard_letter(connection, 1, note="x", actor="anna", now=NOW)
    before = scene.everything()

    with scene.worker.begin() as connection, pytest.raises(DeadLetterClosed, match=f"was {how} by anna at "):
        discard_letter(connection, 1, note="y", actor="bob", now=LATER)

    assert scene.everything() == before


def test_a_letter_that_is_being_replayed_is_not_discarded(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its event settles a letter is in somebody's hands."""
    scene.charged()
    scene.keep(poison_letter(to_json(make_event("failed platform")), FAILED, 3))
    told: list[str] = []

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        with scene.worker.begin() as connection, pytest.raises(DeadLetterClosed) as caught:
            discard_letter(connection, 1, note="y", actor="bob", now=LATER)
        told.append(str(caught.value))
        return settle_events(*arguments, **options)

    monkeypatch.setattr(batch, "settle", meanwhile)
    replayed = replay(scene)

    assert replayed.outcome == "refunded"
    assert told == ["dead letter 1 is being replayed by somebody else; nothing was done, look at it again"]
    assert [each.status for each in letters(scene)] == ["replayed"]


def test_a_letter_that_somebody_sits_on_is_not_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay that stands still, such as a stopped terminal, holds up nobody for long."""
    scene.charged()
    scene.keep(poison_letter(to_json(make_event("failed platform")), FAILED, 3))
    monkeypatch.setattr(replays, "HELD_FOR_S_MAX", 0.1)

    with replays._alone_with(scene.worker, 1), pytest.raises(DeadLetterClosed, match="is being replayed by somebody"):
        replay(scene)
    afterwards = replay(scene)

    assert afterwards.outcome == "refunded"


def test_a_replay_waits_in_no_transaction(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who keeps a letter for itself holds no snapshot meanwhile, and no limit on idle transactions ends it."""
    scene.charged()
    scene.keep(poison_letter(to_json(make_event("failed platform")), FAILED, 3))
    idle: list[int] = []

    def look(*arguments: Any, **options: Any) -> Any:
        ((count,),) = scene.rows(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND state LIKE 'idle in transaction%' AND pid <> pg_backend_pid()"
        )
        idle.append(count)
        return settle_events(*arguments, **options)

    monkeypatch.setattr(batch, "settle", look)
    replay(scene)

    assert idle == [0]


def test_a_lost_lock_does_not_hide_what_was_settled(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session that kept the letter ends while its event settles: the outcome is told, and the letter closed."""
    scene.charged()
    scene.keep(poison_letter(to_json(make_event("failed platform")), FAILED, 3))

    def end_the_others(*arguments: Any, **options: Any) -> Any:
        settled = settle_events(*arguments, **options)
        scene.as_superuser(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        return settled

    monkeypatch.setattr(batch, "settle", end_the_others)
    replayed = replay(scene)
    monkeypatch.setattr(batch, "settle", settle_events)
    again = replay(scene)

    assert (replayed.outcome, replayed.closed, again.outcome) == ("refunded", True, "duplicate")
    assert [each.status for each in letters(scene)] == ["replayed"]


def test_two_replays_at_once_refund_once(scene: Scene) -> None:
    """Two people who replay the same letter at the same instant refund it once; the second is told duplicate."""
    scene.charged()
    scene.keep(poison_letter(to_json(make_event("failed platform")), FAILED, 3))
    together = threading.Barrier(2)

    def at_once(_: int) -> str:
        together.wait(30)
        return replay(scene).outcome

    with ThreadPoolExecutor(2) as pool:
        outcomes = sorted(pool.map(at_once, range(2)))

    assert outcomes == ["duplicate", "refunded"]
    assert scene.balance("acct of job-1") == Balance(100, 0)
    assert [move.kind for move in scene.story().moved] == ["refund"]
    assert [(each.status, each.actor) for each in letters(scene)] == [("replayed", "anna")]


def test_a_replay_keeps_the_event_s_identity(scene: Scene) -> None:
    """A replayed event is the one that came: its source and id are in the inbox, its time in the settlement."""
    scene.charged()
    event = make_event("failed platform")
    scene.keep(poison_letter(to_json(event), FAILED, 3))

    replay(scene)

    assert scene.rows("SELECT source, event_id, event_at FROM kino.inbox_event") == [(SOURCE, event.id, event.time)]
    assert scene.rows("SELECT event_source, event_id, event_time FROM kino.settlement") == [
        (SOURCE, event.id, event.time)
    ]
