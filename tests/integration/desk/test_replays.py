"""Replay: whatever a dead letter's reason, it goes back by the front door, as the event that it is."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any, NamedTuple

import psycopg
import pytest
import sqlalchemy as sa

from kino_refunds.desk import replays
from kino_refunds.desk.replays import Replay
from kino_refunds.errors import DeadLetterClosed, DeadLetterNotFound, MalformedMessage
from kino_refunds.events.schema import ID_LENGTH_MAX, Event, Queue, stored_ids, to_json
from kino_refunds.ledger import Balance
from kino_refunds.reconciliation.integrity import violations
from kino_refunds.settlement import batch
from kino_refunds.settlement.dead_letters import DeadLetter, malformed_letter, poison_letter
from kino_refunds.settlement.deliveries import RECONCILER, delivery_of, read_delivery, read_message
from kino_refunds.settlement.settle import settle as settle_events
from tests.clock import (
    discard_letter,
    note_letter,
    record_dead_letters,
    replay_letter,
    set_letter_status,
    settle_batch_at,
)
from tests.conftest import Database
from tests.malformed import MALFORMED, bare, celery_task, envelope
from tests.malformed import event as document
from tests.scenario import NOW, SOURCE, Scene, Settled, make_event, make_rules

LATER = NOW + timedelta(minutes=10)
FAILED = "generation.job-failed"


@pytest.fixture
def scene(database: Database) -> Iterator[Scene]:
    with Scene.of(database) as scene:
        yield scene
        with scene.superuser.begin() as connection:
            assert violations(connection) == []


@pytest.fixture
def bug(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let every settle raise while it is on."""

    def failing(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a mistake of this build")

    def switch(state: str) -> None:
        monkeypatch.setattr(batch, "settle", failing if state == "on" else settle_events)

    return switch


def replay(scene: Scene, number: int = 1, **options: Any) -> Replay:
    return replay_letter(scene.worker, number, make_rules(), LATER, actor="anna", **options)


def record(scene: Scene, *letters: DeadLetter) -> None:
    with scene.worker.begin() as connection:
        record_dead_letters(connection, letters, now=NOW, build="test")


def settle(scene: Scene, *events: Event) -> None:
    """Settle as intake does, so that what fails becomes a dead letter."""
    settle_batch_at(scene.worker, [delivery_of(event) for event in events], make_rules(), NOW)


def malformed(raw: bytes) -> DeadLetter:
    with pytest.raises(MalformedMessage) as caught:
        read_delivery(raw, FAILED)
    return malformed_letter(raw, FAILED, caught.value)


def with_id(event: Event, event_id: str) -> Event:
    """The event under an id that may only be stored."""
    return event.model_copy(update={"id": event_id})


class Letter(NamedTuple):
    number: int
    event_id: str | None
    reason: str
    seen: int
    status: str
    actor: str | None


def letters(scene: Scene) -> list[Letter]:
    rows = scene.rows(
        "SELECT dead_letter_id, event_id, reason, seen, status, status_actor FROM kino.dead_letter"
        " ORDER BY dead_letter_id"
    )
    return [Letter(*row) for row in rows]


def history(scene: Scene, number: int = 1) -> list[dict[str, Any]]:
    """The letter's history, without times and details."""
    ((entries,),) = scene.rows("SELECT history FROM kino.dead_letter WHERE dead_letter_id = :n", n=number)
    return [{key: value for key, value in entry.items() if key not in {"at", "detail"}} for entry in entries]


# --- malformed


@pytest.mark.parametrize(
    "name", ["not json, bare", "unknown type, kombu", "compressed by zlib", "lone surrogate, bare"]
)
def test_what_did_not_parse_still_does_not(scene: Scene, name: str) -> None:
    """A message that no build of ours understands stays open, and every try at it is counted."""
    raw, reason = MALFORMED[name]
    letter = malformed(raw)
    record(scene, letter)

    replays = [replay(scene), replay(scene)]

    assert replays == [Replay(1, letter.event_id, letter.job_id, reason, closed=False)] * 2
    assert letters(scene) == [Letter(1, letter.event_id, reason, 3, "open", None)]


def test_what_a_newer_build_understands_settles(scene: Scene) -> None:
    """A letter under another key, kept by a build that could not read it, settles as the event that it is."""
    scene.charged()
    raw = envelope(json.loads(to_json(make_event("failed platform"))))
    record(scene, malformed_letter(raw, FAILED, MalformedMessage("unknown_type", "type is new")))

    replayed = replay(scene)

    assert replayed == Replay(1, "job-1 failed platform", "job-1", "refunded", closed=True)
    assert scene.story().settlement == Settled("refunded", "generation_failure", "2.failure", "job-1 failed platform")
    assert [(each.number, each.reason, each.status) for each in letters(scene)] == [(1, "unknown_type", "replayed")]


def test_what_a_newer_build_understands_and_refuses_is_one_open_letter(scene: Scene) -> None:
    """A letter under another key that fails again is replaced by the letter of its event, and that is open."""
    scene.charged()
    event = make_event("failed platform", account_id="somebody else")
    record(scene, malformed_letter(to_json(event), FAILED, MalformedMessage("unknown_type", "type is new")))

    replay(scene)

    assert letters(scene) == [
        Letter(1, "job-1 failed platform", "unknown_type", 1, "replayed", "anna"),
        Letter(2, "job-1 failed platform", "account_mismatch", 1, "open", None),
    ]


def test_poison_settles_when_a_person_says_so(scene: Scene) -> None:
    """What killed three workers is read again only by replay, and then settles like any other event."""
    scene.charged()
    record(scene, poison_letter(envelope(json.loads(to_json(make_event("failed platform")))), FAILED, 3))

    replayed = replay(scene)

    assert replayed == Replay(1, "job-1 failed platform", "job-1", "refunded", closed=True)
    assert scene.balance("acct of job-1") == Balance(100, 0)


def test_poison_that_does_not_parse_is_one_open_letter(scene: Scene) -> None:
    """A replay of poison that cannot be read leaves one letter that somebody has to look at, not two."""
    raw, _ = MALFORMED["unknown type, kombu"]
    record(scene, poison_letter(raw, FAILED, 3))

    replay(scene)
    replay(scene)

    assert [each.reason for each in letters(scene) if each.status == "open"] == ["unknown_type"]


# --- apply_error


def test_an_apply_error_settles_after_the_fix(scene: Scene, bug: Callable[[str], None]) -> None:
    """While the bug remains a replay is counted and stays open; after the fix the customer is refunded once."""
    scene.charged()
    bug("on")
    settle(scene, make_event("failed platform"))

    before = replay(scene)
    open_letters = letters(scene)
    bug("off")
    after = [replay(scene), replay(scene)]

    assert before == Replay(1, "job-1 failed platform", "job-1", "apply_error", closed=False)
    assert open_letters == [Letter(1, "job-1 failed platform", "apply_error", 2, "open", None)]
    assert [(each.outcome, each.closed) for each in after] == [("refunded", True), ("duplicate", True)]
    assert letters(scene) == [Letter(1, "job-1 failed platform", "apply_error", 2, "replayed", "anna")]
    assert history(scene) == [
        {"reason": "apply_error"},
        {"status": "replayed", "actor": "anna", "outcome": "refunded"},
        {"status": "replayed", "actor": "anna", "outcome": "duplicate"},
    ]
    assert scene.balance("acct of job-1") == Balance(100, 0)


def test_a_letter_whose_event_settled_meanwhile_is_a_duplicate(scene: Scene, bug: Callable[[str], None]) -> None:
    """What the pipeline sent again and settled is told its first outcome; the letter is closed, nothing moves."""
    scene.charged()
    bug("on")
    settle(scene, make_event("failed platform"))
    bug("off")
    settle(scene, make_event("failed platform"))
    story = scene.story()

    replayed = replay(scene)

    assert (replayed.outcome, replayed.closed) == ("duplicate", True)
    assert scene.story() == story


def test_a_letter_whose_job_another_event_settled_moves_nothing(scene: Scene, bug: Callable[[str], None]) -> None:
    """The key is the charge: after a timeout was refunded, the failure that was a letter changes nothing."""
    scene.charged()
    bug("on")
    settle(scene, make_event("failed platform"))
    bug("off")
    settle(scene, make_event("timeout"))

    replayed = replay(scene)

    assert (replayed.outcome, replayed.closed) == ("already_refunded", True)
    assert scene.balance("acct of job-1") == Balance(100, 0)


# --- the outcomes that are dead letters


def test_a_mismatch_stays(scene: Scene) -> None:
    """An event that names another account than its charge is open after any number of replays."""
    scene.charged()
    settle(scene, make_event("failed platform", account_id="somebody else"))

    replays = [replay(scene), replay(scene)]

    assert [(each.outcome, each.closed) for each in replays] == [("account_mismatch", False)] * 2
    assert letters(scene) == [Letter(1, "job-1 failed platform", "account_mismatch", 3, "open", None)]
    assert scene.story().settlement is None


@pytest.mark.parametrize(("kind", "status"), [("completed", "captured"), ("timeout", "refunded")])
def test_a_mismatch_whose_job_is_settled_can_be_closed(scene: Scene, kind: str, status: str) -> None:
    """Once another event has settled the job nothing can move for this one: its replay closes the letter."""
    scene.charged()
    settle(scene, make_event("failed platform", account_id="somebody else"))
    settle(scene, make_event(kind))
    story = scene.story()

    foretold = replay(scene, dry_run=True)
    replayed = replay(scene)

    assert foretold == replayed == Replay(1, "job-1 failed platform", "job-1", "account_mismatch", closed=True)
    assert [each.status for each in letters(scene)] == ["replayed"]
    assert scene.story() == story
    assert scene.rows("SELECT status FROM kino.charge_status") == [(status,)]


def test_a_conflict_stays(scene: Scene) -> None:
    """Another content under an id that was decided is never applied, replayed or not."""
    scene.charged()
    settle(scene, make_event("completed", event_id="e-1"))
    settle(scene, make_event("failed platform", event_id="e-1"))
    before = scene.story()

    replayed = replay(scene)

    assert replayed == Replay(1, "e-1", "job-1", "conflicting_duplicate", closed=False)
    assert letters(scene) == [Letter(1, "e-1", "conflicting_duplicate", 2, "open", None)]
    assert scene.story() == before


def exhaust(scene: Scene, event: Event) -> None:
    """Let an event wait for its charge for a day, in vain."""
    scene.settle(event, now=NOW - timedelta(hours=25))
    scene.sweep(now=NOW)


def test_an_exhausted_event_settles_once_its_charge_exists(scene: Scene) -> None:
    """A charge that came more than a day late is refunded by the replay of its event."""
    exhaust(scene, make_event("failed platform"))
    kept = letters(scene), scene.pending()
    scene.charged()

    replayed = replay(scene)

    assert kept == ([Letter(1, "job-1 failed platform", "charge_not_found", 1, "open", None)], {})
    assert replayed == Replay(1, "job-1 failed platform", "job-1", "refunded", closed=True)
    assert scene.balance("acct of job-1") == Balance(100, 0)


def test_an_exhausted_event_without_a_charge_waits_again_and_comes_back(scene: Scene) -> None:
    """A replay that came too early lets the event wait for another day; then its letter is open again."""
    exhaust(scene, make_event("failed platform"))

    replayed = replay(scene)
    waits = scene.pending()["job-1 failed platform"].outcome
    scene.sweep(now=LATER + timedelta(hours=25))

    assert (replayed.outcome, replayed.closed, waits) == ("charge_not_found", True, "charge_not_found")
    assert letters(scene) == [Letter(1, "job-1 failed platform", "charge_not_found", 2, "open", "anna")]
    assert history(scene) == [
        {"reason": "charge_not_found"},
        {"status": "replayed", "actor": "anna", "outcome": "charge_not_found"},
        {"reason": "charge_not_found"},
    ]


# --- edited


def test_an_edited_copy_settles_under_an_id_of_its_own(scene: Scene) -> None:
    """A corrected message is another event: `<id>+edit.N`; the bytes that came are kept as they came."""
    scene.charged()
    wrong = make_event("failed platform", account_id="somebody else")
    settle(scene, wrong)

    replayed = replay(scene, edited=to_json(make_event("failed platform")))

    assert replayed == Replay(1, "job-1 failed platform+edit.1", "job-1", "refunded", closed=True)
    assert scene.story().inbox == {"job-1 failed platform+edit.1": "refunded"}
    assert letters(scene) == [Letter(1, "job-1 failed platform", "account_mismatch", 1, "replayed", "anna")]
    assert history(scene)[1:] == [
        {"status": "replayed", "actor": "anna", "outcome": "refunded", "as": "job-1 failed platform+edit.1"}
    ]
    assert scene.rows("SELECT raw FROM kino.dead_letter") == [(to_json(wrong),)]


def test_edits_are_counted_up(scene: Scene) -> None:
    """Each correction of a message that keeps coming is an event of its own, and is not mistaken for the first."""
    scene.charged()

    replays = []
    for kind in ("completed", "timeout", "completed"):
        settle(scene, make_event("failed platform", account_id="somebody else", event_id="e"))
        replays.append(replay(scene, edited=to_json(make_event(kind, event_id="e"))))

    assert [(each.event_id, each.outcome) for each in replays] == [
        ("e+edit.1", "captured"),
        ("e+edit.2", "failed_after_capture"),
        ("e+edit.3", "already_captured"),
    ]
    assert scene.breaks()[0].kind == "failed_after_capture"


def test_the_longest_id_can_be_corrected(scene: Scene) -> None:
    """A corrected copy's id may be longer than the 128 characters of a published one."""
    longest = "e" * ID_LENGTH_MAX
    scene.charged()
    settle(scene, make_event("failed platform", event_id=longest, account_id="somebody else"))

    replayed = replay(scene, edited=to_json(make_event("failed platform", event_id=longest)))

    assert (replayed.event_id, replayed.outcome) == (f"{longest}+edit.1", "refunded")


def test_a_corrected_copy_that_waits_comes_back(scene: Scene) -> None:
    """The longer id is read again by the retry sweep, and by the replay of the letter that it may become."""
    longest = "e" * ID_LENGTH_MAX
    record(scene, poison_letter(b"nonsense", FAILED, 3))
    waits = replay(scene, edited=to_json(make_event("failed platform", event_id=longest)))
    scene.sweep(now=LATER + timedelta(hours=25))
    scene.charged()

    replayed = replay(scene, 2)

    assert (waits.outcome, waits.event_id) == ("charge_not_found", f"{longest}+edit.1")
    assert replayed == Replay(2, f"{longest}+edit.1", "job-1", "refunded", closed=True)


LONG_ID = "e" * ID_LENGTH_MAX + "+edit.1"


@pytest.mark.parametrize(
    ("event_id", "edited", "says"),
    [
        ("e", b"nonsense", "expected ident"),
        (LONG_ID, to_json(with_id(make_event("failed platform"), LONG_ID)), "is over 140 characters"),
        (
            "e",
            to_json(make_event("failed platform", "job-2")),
            "its id is 'job-2 failed platform', the letter's is 'e'",
        ),
        ("e", to_json(make_event("failed platform", event_id="e", source="x")), "its source is 'x', the letter's is "),
        ("e", to_json(make_event("failed platform", event_id="e", source=RECONCILER)), "is this system's own"),
    ],
    ids=["malformed", "id too long", "of another event", "of another source", "of our own"],
)
def test_a_correction_that_is_none_of_this_letter_changes_nothing(
    scene: Scene, event_id: str, edited: bytes, says: str
) -> None:
    """Whoever corrects a message wrongly is told so, and the letter stays as it was: it may guard a job's credits."""
    scene.charged()
    scene.charged("job-2")
    settle(scene, with_id(make_event("failed platform", account_id="somebody else"), event_id))
    settle(scene, make_event("failed platform", "job-2"))
    before = scene.everything()

    with pytest.raises(MalformedMessage, match=says):
        replay(scene, edited=edited)

    assert scene.everything() == before


def test_a_correction_of_a_message_without_an_id_is_of_its_job(scene: Scene) -> None:
    """Where only the job can be read from a letter, that is what keeps a correction from closing another letter."""
    scene.charged()
    scene.charged("job-2")
    record(scene, malformed(bare({**document(), "id": 7})))
    assert scene.rows("SELECT event_id, job_id FROM kino.dead_letter") == [(None, "job-1")]

    with pytest.raises(MalformedMessage, match="the letter's is 'job-1'"):
        replay(scene, edited=to_json(make_event("failed platform", "job-2")))
    replayed = replay(scene, edited=to_json(make_event("failed platform")))

    assert (replayed.outcome, replayed.closed) == ("refunded", True)


def test_an_event_under_our_name_is_nobody_s_to_replay(scene: Scene) -> None:
    """What was published as the reconciler's settles only as somebody's own event: corrected, under another source."""
    scene.charged()
    forged = make_event("failed platform", event_id="overdue:1:failed.platform", source=RECONCILER)
    record(scene, malformed(to_json(forged)))

    as_it_came = replay(scene)
    with pytest.raises(MalformedMessage, match="is this system's own"):
        replay(scene, edited=to_json(forged))
    corrected = replay(scene, edited=to_json(make_event("failed platform", event_id="e")))

    assert (as_it_came.outcome, as_it_came.closed) == ("invalid_event", False)
    assert (corrected.event_id, corrected.outcome, corrected.closed) == ("e+edit.1", "refunded", True)
    assert scene.story().settlement == Settled("refunded", "generation_failure", "2.failure", "e+edit.1")


def test_an_event_of_our_own_is_replayed(scene: Scene, bug: Callable[[str], None]) -> None:
    """A verdict of the reconciler's that failed in our own code settles when the code is mended."""
    scene.charged()
    bug("on")
    settle(scene, make_event("timeout", event_id="overdue:1:timed_out", source=RECONCILER))
    bug("off")

    replayed = replay(scene)

    assert (replayed.event_id, replayed.outcome, replayed.closed) == ("overdue:1:timed_out", "refunded", True)


def test_a_letter_that_was_corrected_is_not_corrected_again(scene: Scene) -> None:
    """The second of two people hears what the first did, instead of settling something else for the same job."""
    scene.charged()
    settle(scene, make_event("failed platform", account_id="somebody else", event_id="e"))
    replay(scene, edited=to_json(make_event("timeout", event_id="e")))
    before = scene.everything()

    with pytest.raises(DeadLetterClosed, match="dead letter 1 was replayed by anna at "):
        replay(scene, edited=to_json(make_event("completed", event_id="e")))

    assert scene.everything() == before


def test_two_corrections_at_once_are_one(scene: Scene) -> None:
    """Of two people who correct the same letter differently at the same instant one settles it, the other is told."""
    scene.charged()
    settle(scene, make_event("failed platform", account_id="somebody else", event_id="e"))
    together = threading.Barrier(2)

    def at_once(kind: str) -> str:
        together.wait(30)
        try:
            return replay(scene, edited=to_json(make_event(kind, event_id="e"))).outcome
        except DeadLetterClosed:
            return "told"

    with ThreadPoolExecutor(2) as pool:
        outcomes = set(pool.map(at_once, ("completed", "timeout")))

    assert outcomes in ({"captured", "told"}, {"refunded", "told"})
    assert scene.breaks() == []
    assert len(scene.story().inbox) == 1


def test_a_correction_that_fails_is_not_closed(scene: Scene) -> None:
    """A replay that fails leaves a letter open, and says so, also when it was edited."""
    scene.charged()
    settle(scene, make_event("failed platform", account_id="somebody else"))

    replayed = replay(scene, edited=to_json(make_event("failed platform", account_id="a third one")))

    assert (replayed.outcome, replayed.closed) == ("account_mismatch", False)
    assert "open" in [each.status for each in letters(scene)]


# --- several events in one message


def several(*events: Event | bytes) -> bytes:
    return b"[%s]" % b",".join(event if isinstance(event, bytes) else to_json(event) for event in events)


WIRE_FORMS: dict[str, Callable[[bytes], bytes]] = {"bare": lambda raw: raw, "kombu": envelope}


@pytest.mark.parametrize("form", WIRE_FORMS)
def test_the_letter_of_one_event_of_several_is_replayed_as_that_event(
    scene: Scene, bug: Callable[[str], None], form: str
) -> None:
    """The letter keeps the whole message, and its replay settles the one event at its place."""
    scene.charged()
    scene.charged("job-2")
    raw = WIRE_FORMS[form](several(make_event("completed", "job-2"), b"{}", make_event("failed platform")))
    deliveries, dead = read_message(raw, FAILED)
    bug("on")
    settle_batch_at(scene.worker, deliveries[1:], make_rules(), NOW)
    record(scene, *dead)
    bug("off")

    replays = [replay(scene, 1), replay(scene, 2)]

    assert [(each.event_id, each.outcome, each.closed) for each in replays] == [
        ("job-1 failed platform", "refunded", True),
        (None, "invalid_event", False),
    ]
    assert scene.rows("SELECT raw, element_index, seen FROM kino.dead_letter ORDER BY dead_letter_id") == [
        (raw, 2, 1),
        (raw, 1, 2),
    ]
    assert scene.story("job-2").settlement is None


def test_a_poisonous_event_of_several_settles_when_a_person_says_so(scene: Scene) -> None:
    """What was not read is read by its replay, at its place."""
    scene.charged()
    raw = several(make_event("completed", "job-2"), make_event("failed platform"))
    record(scene, poison_letter(raw, FAILED, 3, element_index=1))

    replayed = replay(scene)

    assert replayed == Replay(1, "job-1 failed platform", "job-1", "refunded", closed=True)


def test_a_whole_message_of_several_events_settles_each(scene: Scene) -> None:
    """A letter from before such messages were read is replayed event by event; what fails has a letter of its own."""
    for job in ("job-1", "job-2", "job-3"):
        scene.charged(job)
    raw = several(
        make_event("completed", "job-1"),
        make_event("failed platform", "job-2"),
        make_event("failed platform", "job-3", account_id="somebody else"),
        b"{}",
    )
    record(scene, malformed_letter(raw, FAILED, MalformedMessage("invalid_event", "an event is a JSON object")))

    foretold = replay(scene, dry_run=True)
    replayed = replay(scene)

    outcome = "account_mismatch: 1, captured: 1, invalid_event: 1, refunded: 1"
    assert foretold == replayed == Replay(1, None, None, outcome, closed=True)
    assert [(each.number, each.reason, each.status) for each in letters(scene)] == [
        (1, "invalid_event", "replayed"),
        (2, "account_mismatch", "open"),
        (3, "invalid_event", "open"),
    ]
    assert scene.rows("SELECT element_index FROM kino.dead_letter ORDER BY dead_letter_id") == [(None,), (2,), (3,)]


def test_a_bug_in_a_whole_message_leaves_a_letter_for_each_event(scene: Scene, bug: Callable[[str], None]) -> None:
    """Closing the message's letter hides nothing: each of its events that fails has its own."""
    scene.charged()
    record(scene, poison_letter(several(make_event("completed"), make_event("timeout")), FAILED, 3))
    bug("on")

    replayed = replay(scene)

    assert replayed.outcome == "apply_error: 2"
    assert [(each.reason, each.status) for each in letters(scene)] == [
        ("poison_crash", "replayed"),
        ("apply_error", "open"),
        ("apply_error", "open"),
    ]


def test_a_correction_of_one_event_of_several_is_one_event(scene: Scene) -> None:
    """A correction is of one event, also where the message holds several."""
    scene.charged()
    raw = several(make_event("failed platform", account_id="somebody else", event_id="e"), make_event("completed", "x"))
    settle_batch_at(scene.worker, read_message(raw, FAILED)[0][:1], make_rules(), NOW)

    with pytest.raises(MalformedMessage, match="an array of 2 events, where one is expected"):
        replay(scene, edited=raw)
    replayed = replay(scene, edited=to_json(make_event("failed platform", event_id="e")))

    assert replayed == Replay(1, "e+edit.1", "job-1", "refunded", closed=True)


# --- ids from before today's rule


def old_charge(scene: Scene, job_id: str) -> None:
    scene.grant("acct-1")
    scene.as_superuser(
        "INSERT INTO kino.charge (job_id, account_id, credits, deadline_at)"
        f" VALUES ('{job_id}', 'acct-1', 0, now() + interval '1 hour')"
    )


def test_a_letter_about_a_charge_whose_id_has_white_space_settles(scene: Scene) -> None:
    """The wire refuses such an id today; the letter that it becomes is replayed by the rule of before."""
    old_charge(scene, "job-1 ")
    raw = bare(document(subject="job-1 ", data={"job_id": "job-1 ", "error": {"code": "E", "origin": "platform"}}))
    record(scene, malformed(raw))
    kept = scene.rows("SELECT reason, job_id, other_job_ids, may_hold_others FROM kino.dead_letter")

    replayed = replay(scene)

    assert [tuple(row) for row in kept] == [("invalid_event", "job-1 ", ["job-1"], True)]
    assert (replayed.job_id, replayed.outcome, replayed.closed) == ("job-1 ", "refunded", True)


def test_an_event_that_waited_with_such_an_id_settles(scene: Scene) -> None:
    """A row that a build of before has parked comes back by the rule of before."""
    with stored_ids():
        waiting = make_event("failed platform", "job-1 ", event_id="e ", source=" s")
    settle(scene, waiting)
    old_charge(scene, "job-1 ")

    swept = scene.sweep(now=LATER)

    assert swept == {"refunded": 1}
    assert scene.rows("SELECT source, event_id, job_id FROM kino.inbox_event") == [(" s", "e ", "job-1 ")]


def test_a_correction_may_take_white_space_away(scene: Scene) -> None:
    """The corrected message is of the same event although its ids are written without the slip."""
    scene.charged()
    record(scene, malformed(bare(document(id="evt-1 ", data=document()["data"] | {"account_id": None}))))

    replayed = replay(scene, edited=bare(document(data=document()["data"] | {"account_id": None})))

    assert (replayed.event_id, replayed.outcome) == ("evt-1+edit.1", "refunded")


@pytest.mark.parametrize("source", [f"{RECONCILER} ", f" {RECONCILER}"])
def test_our_name_with_white_space_is_our_name(scene: Scene, source: str) -> None:
    """What nearly says that it is the reconciler's is refused on the wire and in storage."""
    scene.charged()
    record(scene, malformed(bare(document(source=source))))

    replayed = replay(scene)

    assert (replayed.outcome, replayed.closed) == ("invalid_event", False)
    assert scene.story().settlement is None


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
            record(scene, *read_message(raw, queue)[1])

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
        settle(scene, make_event("failed platform", job))

    groups = scene.rows("SELECT count(*) FROM kino.dead_letter GROUP BY group_fingerprint ORDER BY 1")
    assert [tuple(row) for row in groups] == [(1,), (2,)]


# --- dry run


def a_mismatch(scene: Scene) -> None:
    settle(scene, make_event("failed platform", account_id="somebody else"))


def a_conflict(scene: Scene) -> None:
    settle(scene, make_event("completed", event_id="e"), make_event("timeout", event_id="e"))


def an_exhausted_event(scene: Scene) -> None:
    exhaust(scene, make_event("failed platform", "job-2"))
    scene.charged("job-2")


def an_exhausted_event_without_charge(scene: Scene) -> None:
    exhaust(scene, make_event("failed platform", "job-2"))


def a_malformed_message(scene: Scene) -> None:
    record(scene, malformed(b"nonsense"))


def an_unread_one(scene: Scene) -> None:
    record(scene, poison_letter(to_json(make_event("safety during")), FAILED, 3))


def one_settled_meanwhile(scene: Scene) -> None:
    record(scene, poison_letter(to_json(make_event("timeout")), FAILED, 3))
    settle(scene, make_event("timeout"))


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
    settle(scene, make_event("failed platform", account_id="somebody else"))
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
    record(scene, poison_letter(to_json(make_event("failed platform")), FAILED, 3))

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
    record(scene, malformed(b"to be replayed"))
    record(scene, malformed(b"to be discarded"))
    with scene.worker.begin() as connection:
        for number, status in ((1, "replayed"), (2, "discarded")):
            set_letter_status(connection, number, status, actor="anna", now=NOW, entry={})

    record(scene, malformed(b"to be replayed"), malformed(b"to be discarded"), malformed(b"to be discarded"))

    assert letters(scene) == [
        Letter(1, None, "bad_json", 2, "open", "anna"),
        Letter(2, None, "bad_json", 3, "discarded", "anna"),
    ]


def test_a_discarded_letter_whose_replay_fails_is_open_again(scene: Scene) -> None:
    """A person took it up once more: while it fails it is somebody's business, and guards its job."""
    scene.charged()
    settle(scene, make_event("failed platform", account_id="somebody else"))
    record(scene, malformed(b"nonsense"))
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
    record(scene, poison_letter(to_json(make_event("failed platform")), FAILED, 3))
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
    record(scene, poison_letter(to_json(make_event("failed platform")), FAILED, 3))
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
    record(scene, poison_letter(to_json(make_event("failed platform")), FAILED, 3))
    monkeypatch.setattr(replays, "HELD_FOR_S_MAX", 0.1)

    with replays._alone_with(scene.worker, 1), pytest.raises(DeadLetterClosed, match="is being replayed by somebody"):
        replay(scene)
    afterwards = replay(scene)

    assert afterwards.outcome == "refunded"


def test_a_replay_waits_in_no_transaction(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who keeps a letter for itself holds no snapshot meanwhile, and no limit on idle transactions ends it."""
    scene.charged()
    record(scene, poison_letter(to_json(make_event("failed platform")), FAILED, 3))
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
    record(scene, poison_letter(to_json(make_event("failed platform")), FAILED, 3))

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
    record(scene, poison_letter(to_json(make_event("failed platform")), FAILED, 3))
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
    record(scene, poison_letter(to_json(event), FAILED, 3))

    replay(scene)

    assert scene.rows("SELECT source, event_id, event_at FROM kino.inbox_event") == [(SOURCE, event.id, event.time)]
    assert scene.rows("SELECT event_source, event_id, event_time FROM kino.settlement") == [
        (SOURCE, event.id, event.time)
    ]
