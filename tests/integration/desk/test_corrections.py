"""A corrected copy of a dead letter: of its own event, under an id of its own, and once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from kino_refunds.desk.replays import Replay
from kino_refunds.errors import DeadLetterClosed, MalformedMessage
from kino_refunds.events.schema import ID_LENGTH_MAX, to_json
from kino_refunds.settlement.dead_letters import poison_letter
from kino_refunds.settlement.deliveries import RECONCILER
from tests.failing import BadBuild
from tests.integration.desk.letters import LATER, Letter, history, letters, malformed, replay, with_id
from tests.malformed import bare
from tests.malformed import event as document
from tests.pipeline import FAILED
from tests.scenario import Scene, Settled, make_event

pytestmark = pytest.mark.usefixtures("sound_books")


def test_an_edited_copy_settles_under_an_id_of_its_own(scene: Scene) -> None:
    """A corrected message is another event: `<id>+edit.N`; the bytes that came are kept as they came."""
    scene.charged()
    wrong = make_event("failed platform", account_id="somebody else")
    scene.settle_batch(wrong)

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
        scene.settle_batch(make_event("failed platform", account_id="somebody else", event_id="e"))
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
    scene.settle_batch(make_event("failed platform", event_id=longest, account_id="somebody else"))

    replayed = replay(scene, edited=to_json(make_event("failed platform", event_id=longest)))

    assert (replayed.event_id, replayed.outcome) == (f"{longest}+edit.1", "refunded")


def test_a_corrected_copy_that_waits_comes_back(scene: Scene) -> None:
    """The longer id is read again by the retry sweep, and by the replay of the letter that it may become."""
    longest = "e" * ID_LENGTH_MAX
    scene.keep(poison_letter(b"nonsense", FAILED, 3))
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
    scene.settle_batch(with_id(make_event("failed platform", account_id="somebody else"), event_id))
    scene.settle_batch(make_event("failed platform", "job-2"))
    before = scene.everything()

    with pytest.raises(MalformedMessage, match=says):
        replay(scene, edited=edited)

    assert scene.everything() == before


def test_a_correction_of_a_message_without_an_id_is_of_its_job(scene: Scene) -> None:
    """Where only the job can be read from a letter, that is what keeps a correction from closing another letter."""
    scene.charged()
    scene.charged("job-2")
    scene.keep(malformed(bare({**document(), "id": 7})))
    assert scene.rows("SELECT event_id, job_id FROM kino.dead_letter") == [(None, "job-1")]

    with pytest.raises(MalformedMessage, match="the letter's is 'job-1'"):
        replay(scene, edited=to_json(make_event("failed platform", "job-2")))
    replayed = replay(scene, edited=to_json(make_event("failed platform")))

    assert (replayed.outcome, replayed.closed) == ("refunded", True)


def test_an_event_under_our_name_is_nobody_s_to_replay(scene: Scene) -> None:
    """What was published as the reconciler's settles only as somebody's own event: corrected, under another source."""
    scene.charged()
    forged = make_event("failed platform", event_id="overdue:1:failed.platform", source=RECONCILER)
    scene.keep(malformed(to_json(forged)))

    as_it_came = replay(scene)
    with pytest.raises(MalformedMessage, match="is this system's own"):
        replay(scene, edited=to_json(forged))
    corrected = replay(scene, edited=to_json(make_event("failed platform", event_id="e")))

    assert (as_it_came.outcome, as_it_came.closed) == ("invalid_event", False)
    assert (corrected.event_id, corrected.outcome, corrected.closed) == ("e+edit.1", "refunded", True)
    assert scene.story().settlement == Settled("refunded", "generation_failure", "2.failure", "e+edit.1")


def test_an_event_of_our_own_is_replayed(scene: Scene, bad_build: BadBuild) -> None:
    """A verdict of the reconciler's that failed in our own code settles when the code is mended."""
    scene.charged()
    bad_build.fails_for(".", build="test")
    scene.settle_batch(make_event("timeout", event_id="overdue:1:timed_out", source=RECONCILER))
    bad_build.mend()

    replayed = replay(scene)

    assert (replayed.event_id, replayed.outcome, replayed.closed) == ("overdue:1:timed_out", "refunded", True)


def test_a_letter_that_was_corrected_is_not_corrected_again(scene: Scene) -> None:
    """The second of two people hears what the first did, instead of settling something else for the same job."""
    scene.charged()
    scene.settle_batch(make_event("failed platform", account_id="somebody else", event_id="e"))
    replay(scene, edited=to_json(make_event("timeout", event_id="e")))
    before = scene.everything()

    with pytest.raises(DeadLetterClosed, match="dead letter 1 was replayed by anna at "):
        replay(scene, edited=to_json(make_event("completed", event_id="e")))

    assert scene.everything() == before


def test_two_corrections_at_once_are_one(scene: Scene) -> None:
    """Of two people who correct the same letter differently at the same instant one settles it, the other is told."""
    scene.charged()
    scene.settle_batch(make_event("failed platform", account_id="somebody else", event_id="e"))
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
    scene.settle_batch(make_event("failed platform", account_id="somebody else"))

    replayed = replay(scene, edited=to_json(make_event("failed platform", account_id="a third one")))

    assert (replayed.outcome, replayed.closed) == ("account_mismatch", False)
    assert "open" in [each.status for each in letters(scene)]
