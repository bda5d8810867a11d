"""Replay: whatever a dead letter's reason, it goes back by the front door, as the event that it is."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from kino_refunds.desk.replays import Replay
from kino_refunds.errors import MalformedMessage
from kino_refunds.events.schema import stored_ids, to_json
from kino_refunds.ledger import Balance
from kino_refunds.settlement.dead_letters import malformed_letter, poison_letter
from kino_refunds.settlement.deliveries import RECONCILER, read_message
from tests.clock import settle_batch_at
from tests.failing import BadBuild
from tests.integration.desk.letters import LATER, Letter, exhaust, history, letters, malformed, replay
from tests.malformed import MALFORMED, WIRE_FORMS, bare, envelope
from tests.malformed import event as document
from tests.pipeline import FAILED, several
from tests.scenario import NOW, Scene, Settled, make_event, make_rules

pytestmark = pytest.mark.usefixtures("sound_books")


# --- malformed


@pytest.mark.parametrize(
    "name", ["not json, bare", "unknown type, kombu", "compressed by zlib", "lone surrogate, bare"]
)
def test_what_did_not_parse_still_does_not(scene: Scene, name: str) -> None:
    """A message that no build of ours understands stays open, and every try at it is counted."""
    raw, reason = MALFORMED[name]
    letter = malformed(raw)
    scene.keep(letter)

    replays = [replay(scene), replay(scene)]

    assert replays == [Replay(1, letter.event_id, letter.job_id, reason, closed=False)] * 2
    assert letters(scene) == [Letter(1, letter.event_id, reason, 3, "open", None)]


def test_what_a_newer_build_understands_settles(scene: Scene) -> None:
    """A letter under another key, kept by a build that could not read it, settles as the event that it is."""
    scene.charged()
    raw = envelope(json.loads(to_json(make_event("failed platform"))))
    scene.keep(malformed_letter(raw, FAILED, MalformedMessage("unknown_type", "type is new")))

    replayed = replay(scene)

    assert replayed == Replay(1, "job-1 failed platform", "job-1", "refunded", closed=True)
    assert scene.story().settlement == Settled("refunded", "generation_failure", "2.failure", "job-1 failed platform")
    assert [(each.number, each.reason, each.status) for each in letters(scene)] == [(1, "unknown_type", "replayed")]


def test_what_a_newer_build_understands_and_refuses_is_one_open_letter(scene: Scene) -> None:
    """A letter under another key that fails again is replaced by the letter of its event, and that is open."""
    scene.charged()
    event = make_event("failed platform", account_id="somebody else")
    scene.keep(malformed_letter(to_json(event), FAILED, MalformedMessage("unknown_type", "type is new")))

    replay(scene)

    assert letters(scene) == [
        Letter(1, "job-1 failed platform", "unknown_type", 1, "replayed", "anna"),
        Letter(2, "job-1 failed platform", "account_mismatch", 1, "open", None),
    ]


def test_poison_settles_when_a_person_says_so(scene: Scene) -> None:
    """What killed three workers is read again only by replay, and then settles like any other event."""
    scene.charged()
    scene.keep(poison_letter(envelope(json.loads(to_json(make_event("failed platform")))), FAILED, 3))

    replayed = replay(scene)

    assert replayed == Replay(1, "job-1 failed platform", "job-1", "refunded", closed=True)
    assert scene.balance("acct of job-1") == Balance(100, 0)


def test_poison_that_does_not_parse_is_one_open_letter(scene: Scene) -> None:
    """A replay of poison that cannot be read leaves one letter that somebody has to look at, not two."""
    raw, _ = MALFORMED["unknown type, kombu"]
    scene.keep(poison_letter(raw, FAILED, 3))

    replay(scene)
    replay(scene)

    assert [each.reason for each in letters(scene) if each.status == "open"] == ["unknown_type"]


# --- apply_error


def test_an_apply_error_settles_after_the_fix(scene: Scene, bad_build: BadBuild) -> None:
    """While the bug remains a replay is counted and stays open; after the fix the customer is refunded once."""
    scene.charged()
    bad_build.fails_for(".", build="test")
    scene.settle_batch(make_event("failed platform"))

    before = replay(scene)
    open_letters = letters(scene)
    bad_build.mend()
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


def test_a_letter_whose_event_settled_meanwhile_is_a_duplicate(scene: Scene, bad_build: BadBuild) -> None:
    """What the pipeline sent again and settled is told its first outcome; the letter is closed, nothing moves."""
    scene.charged()
    bad_build.fails_for(".", build="test")
    scene.settle_batch(make_event("failed platform"))
    bad_build.mend()
    scene.settle_batch(make_event("failed platform"))
    story = scene.story()

    replayed = replay(scene)

    assert (replayed.outcome, replayed.closed) == ("duplicate", True)
    assert scene.story() == story


def test_a_letter_whose_job_another_event_settled_moves_nothing(scene: Scene, bad_build: BadBuild) -> None:
    """The key is the charge: after a timeout was refunded, the failure that was a letter changes nothing."""
    scene.charged()
    bad_build.fails_for(".", build="test")
    scene.settle_batch(make_event("failed platform"))
    bad_build.mend()
    scene.settle_batch(make_event("timeout"))

    replayed = replay(scene)

    assert (replayed.outcome, replayed.closed) == ("already_refunded", True)
    assert scene.balance("acct of job-1") == Balance(100, 0)


# --- the outcomes that are dead letters


def test_a_mismatch_stays(scene: Scene) -> None:
    """An event that names another account than its charge is open after any number of replays."""
    scene.charged()
    scene.settle_batch(make_event("failed platform", account_id="somebody else"))

    replays = [replay(scene), replay(scene)]

    assert [(each.outcome, each.closed) for each in replays] == [("account_mismatch", False)] * 2
    assert letters(scene) == [Letter(1, "job-1 failed platform", "account_mismatch", 3, "open", None)]
    assert scene.story().settlement is None


@pytest.mark.parametrize(("kind", "status"), [("completed", "captured"), ("timeout", "refunded")])
def test_a_mismatch_whose_job_is_settled_can_be_closed(scene: Scene, kind: str, status: str) -> None:
    """Once another event has settled the job nothing can move for this one: its replay closes the letter."""
    scene.charged()
    scene.settle_batch(make_event("failed platform", account_id="somebody else"))
    scene.settle_batch(make_event(kind))
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
    scene.settle_batch(make_event("completed", event_id="e-1"))
    scene.settle_batch(make_event("failed platform", event_id="e-1"))
    before = scene.story()

    replayed = replay(scene)

    assert replayed == Replay(1, "e-1", "job-1", "conflicting_duplicate", closed=False)
    assert letters(scene) == [Letter(1, "e-1", "conflicting_duplicate", 2, "open", None)]
    assert scene.story() == before


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


# --- several events in one message


@pytest.mark.parametrize("form", WIRE_FORMS)
def test_the_letter_of_one_event_of_several_is_replayed_as_that_event(
    scene: Scene, bad_build: BadBuild, form: str
) -> None:
    """The letter keeps the whole message, and its replay settles the one event at its place."""
    scene.charged()
    scene.charged("job-2")
    raw = WIRE_FORMS[form](several(make_event("completed", "job-2"), b"{}", make_event("failed platform")))
    deliveries, dead = read_message(raw, FAILED)
    bad_build.fails_for(".", build="test")
    settle_batch_at(scene.worker, deliveries[1:], make_rules(), NOW)
    scene.keep(*dead)
    bad_build.mend()

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
    scene.keep(poison_letter(raw, FAILED, 3, element_index=1))

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
    scene.keep(malformed_letter(raw, FAILED, MalformedMessage("invalid_event", "an event is a JSON object")))

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


def test_a_bug_in_a_whole_message_leaves_a_letter_for_each_event(scene: Scene, bad_build: BadBuild) -> None:
    """Closing the message's letter hides nothing: each of its events that fails has its own."""
    scene.charged()
    scene.keep(poison_letter(several(make_event("completed"), make_event("timeout")), FAILED, 3))
    bad_build.fails_for(".", build="test")

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
    scene.keep(malformed(raw))
    kept = scene.rows("SELECT reason, job_id, other_job_ids, may_hold_others FROM kino.dead_letter")

    replayed = replay(scene)

    assert [tuple(row) for row in kept] == [("invalid_event", "job-1 ", ["job-1"], True)]
    assert (replayed.job_id, replayed.outcome, replayed.closed) == ("job-1 ", "refunded", True)


def test_an_event_that_waited_with_such_an_id_settles(scene: Scene) -> None:
    """A row that a build of before has parked comes back by the rule of before."""
    with stored_ids():
        waiting = make_event("failed platform", "job-1 ", event_id="e ", source=" s")
    scene.settle_batch(waiting)
    old_charge(scene, "job-1 ")

    swept = scene.sweep(now=LATER)

    assert swept == {"refunded": 1}
    assert scene.rows("SELECT source, event_id, job_id FROM kino.inbox_event") == [(" s", "e ", "job-1 ")]


def test_a_correction_may_take_white_space_away(scene: Scene) -> None:
    """The corrected message is of the same event although its ids are written without the slip."""
    scene.charged()
    scene.keep(malformed(bare(document(id="evt-1 ", data=document()["data"] | {"account_id": None}))))

    replayed = replay(scene, edited=bare(document(data=document()["data"] | {"account_id": None})))

    assert (replayed.event_id, replayed.outcome) == ("evt-1+edit.1", "refunded")


@pytest.mark.parametrize("source", [f"{RECONCILER} ", f" {RECONCILER}"])
def test_our_name_with_white_space_is_our_name(scene: Scene, source: str) -> None:
    """What nearly says that it is the reconciler's is refused on the wire and in storage."""
    scene.charged()
    scene.keep(malformed(bare(document(source=source))))

    replayed = replay(scene)

    assert (replayed.outcome, replayed.closed) == ("invalid_event", False)
    assert scene.story().settlement is None
