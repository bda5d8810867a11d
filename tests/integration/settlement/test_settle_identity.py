"""Which event is which: copies, conflicts, order inside a claim, and dead letters that come again."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from kino_refunds.events.schema import JobFailed
from kino_refunds.ledger import Balance
from kino_refunds.policy.document import Policy, make_policy, published_policy
from kino_refunds.settlement.deliveries import delivery_of
from tests.clock import SECOND, settle_at
from tests.scenario import EVENT_AT, NOW, SOURCE, Dead, Scene, Waits, make_event, make_rules

# The same event.


@pytest.mark.parametrize("kind", ["completed", "failed platform", "failed user"])
def test_the_same_event_again_changes_nothing(scene: Scene, kind: str) -> None:
    """A redelivered event is told its first outcome and leaves every row of the database as it was."""
    scene.charged()
    event = delivery_of(make_event(kind))
    [first] = scene.settle(event)
    before = scene.everything()

    with scene.worker.connect() as connection:
        [again] = settle_at(connection, [event], make_rules(), NOW + timedelta(days=1))

    assert (again.outcome, again.first) == ("duplicate", first)
    assert scene.everything() == before


def test_the_same_event_in_one_batch_is_decided_once(scene: Scene) -> None:
    """Of three copies in one claim the first is decided and the others are told what it came to."""
    scene.charged()
    event = delivery_of(make_event("failed platform"))

    with scene.worker.connect() as connection:
        decisions = settle_at(connection, [event, event, event], make_rules(), NOW)

    assert [(d.outcome, d.first) for d in decisions] == [
        ("refunded", None),
        ("duplicate", "refunded"),
        ("duplicate", "refunded"),
    ]
    assert scene.inbox() == {"job-1 failed platform": "refunded"}
    assert scene.balance("acct of job-1") == Balance(100, 0)


def test_what_a_person_wrote_does_not_make_another_event(scene: Scene) -> None:
    """The same event with another error message is the same event: messages are not compared."""
    scene.charged()

    def failed(message: str) -> JobFailed:
        error = {"code": "E", "origin": "platform", "message": message}
        text = {"id": "evt", "source": SOURCE, "specversion": "1.0", "subject": "job-1", "time": EVENT_AT}
        kind = "kino.generation.job-failed.v1"
        return JobFailed.model_validate(
            {**text, "type": kind, "data": {"job_id": "job-1", "error": error}}, strict=False
        )

    said = scene.settle(failed("out of memory on node 7"), failed("out of memory on node 8"))

    assert said == ["refunded", "duplicate"]


def test_the_same_id_from_another_source_is_another_event(scene: Scene) -> None:
    """Identity is source and id together: two pipelines may count from one."""
    scene.charged("job-1")
    scene.charged("job-2")

    said = scene.settle(
        make_event("timeout", "job-1", event_id="1", source="/eu"),
        make_event("timeout", "job-2", event_id="1", source="/us"),
    )

    assert said == ["refunded", "refunded"]


# The same id, another content.


def conflicting_dead(event_id: str, job_id: str = "job-1", *, seen: int = 1) -> Dead:
    return Dead(event_id, job_id, "conflicting_duplicate", seen, "open")


@pytest.mark.parametrize("one_batch", [True, False], ids=["in one batch", "across batches"])
@pytest.mark.parametrize(("first", "second"), [("failed platform", "completed"), ("completed", "failed platform")])
def test_the_same_id_with_other_content_is_never_applied(
    scene: Scene, first: str, second: str, *, one_batch: bool
) -> None:
    """Of two messages under one id the first is the event; the other is kept for a person."""
    scene.charged()
    events = [make_event(first, event_id="evt"), make_event(second, event_id="evt")]

    said = scene.settle(*events) if one_batch else [*scene.settle(events[0]), *scene.settle(events[1])]

    word = "captured" if first == "completed" else "refunded"
    assert said == [word, "conflicting_duplicate"]
    assert scene.inbox() == {"evt": word}
    assert scene.dead_letters() == [conflicting_dead("evt")]
    assert scene.breaks() == []


def test_an_event_that_differs_by_its_time_alone_is_a_conflict(scene: Scene) -> None:
    """Everything that an event says counts, its time included."""
    scene.charged()
    event = make_event("failed platform")

    said = scene.settle(event, event.model_copy(update={"time": event.time + SECOND}))

    assert said == ["refunded", "conflicting_duplicate"]


@pytest.mark.parametrize("one_batch", [True, False], ids=["in one batch", "across batches"])
def test_one_event_id_under_two_jobs_refunds_one(scene: Scene, *, one_batch: bool) -> None:
    """An id is decided for one job; the other job's charge stays open and its message is kept."""
    scene.charged("job-1")
    scene.charged("job-2")
    events = [make_event("timeout", job_id, event_id="evt") for job_id in ("job-1", "job-2")]

    said = scene.settle(*events) if one_batch else [*scene.settle(events[0]), *scene.settle(events[1])]

    assert said == ["refunded", "conflicting_duplicate"]
    assert scene.dead_letters() == [conflicting_dead("evt", "job-2")]
    assert scene.balance("acct of job-1") == Balance(100, 0)
    assert scene.balance("acct of job-2") == Balance(90, 10)


def test_a_conflict_that_comes_again_is_counted(scene: Scene) -> None:
    """The same conflicting message is one dead letter, seen as often as it came; another is its own."""
    scene.charged()
    scene.settle(make_event("timeout", event_id="evt"))
    conflict = make_event("completed", event_id="evt")

    scene.settle(conflict, conflict)
    scene.settle(conflict, make_event("failed user", event_id="evt"))

    assert sorted(scene.dead_letters()) == [conflicting_dead("evt"), conflicting_dead("evt", seen=3)]


def test_a_conflict_keeps_the_bytes_it_came_in(scene: Scene) -> None:
    """What is not applied is kept whole: its bytes, its queue, and a sentence that says why."""
    scene.charged()
    scene.settle(make_event("timeout", event_id="evt"))
    conflict = replace(delivery_of(make_event("completed", event_id="evt")), raw=b'{"any": "bytes"}', queue="the queue")

    scene.settle(conflict)

    [row] = scene.rows("SELECT raw, queue, reason, detail, source, event_id, job_id, build FROM kino.dead_letter")
    assert tuple(row) == (
        b'{"any": "bytes"}',
        "the queue",
        "conflicting_duplicate",
        f"event evt of {SOURCE} came before with other content (refunded); this one is not applied",
        SOURCE,
        "evt",
        "job-1",
        "test",
    )


def test_a_conflict_with_an_event_that_waits_is_not_applied(scene: Scene) -> None:
    """An event that waits for its charge owns its id as well: another content under it never settles."""
    scene.settle(make_event("failed user", event_id="evt"))
    scene.charged()

    said = scene.settle(make_event("timeout", event_id="evt"))

    assert said == ["conflicting_duplicate"]
    assert scene.pending() == {"evt": Waits("job-1", "charge_not_found", 0)}
    assert scene.dead_letters() == [conflicting_dead("evt")]
    assert scene.story().settlement is None


def test_two_contents_that_both_wait_for_their_charge(scene: Scene) -> None:
    """In one batch too only the first content waits; the second is kept for a person at once."""
    said = scene.settle(make_event("timeout", "job-1", event_id="evt"), make_event("timeout", "job-2", event_id="evt"))

    assert said == ["charge_not_found", "conflicting_duplicate"]
    assert scene.pending() == {"evt": Waits("job-1", "charge_not_found", 0)}
    assert scene.dead_letters() == [conflicting_dead("evt", "job-2")]


@pytest.mark.parametrize("conflict_first", [True, False])
def test_a_conflict_beside_it_does_not_keep_a_decided_event_waiting(scene: Scene, *, conflict_first: bool) -> None:
    """An event that is decided waits no longer, even when its id came with other content in the same claim."""
    waiting = make_event("timeout", event_id="evt")
    scene.settle(waiting)
    scene.charged()
    conflict = make_event("completed", event_id="evt")

    said = scene.settle(*([conflict, waiting] if conflict_first else [waiting, conflict]))

    assert sorted(said) == ["conflicting_duplicate", "refunded"]
    assert scene.inbox() == {"evt": "refunded"}
    assert scene.pending() == {}


def test_an_id_decided_elsewhere_while_another_content_waited(scene: Scene) -> None:
    """When one content was decided and another waits, the one that waits is kept for a person in the end."""
    scene.settle(make_event("timeout", "job-2", event_id="evt"))
    [row] = scene.rows("SELECT event::text, fingerprint FROM kino.pending_event")
    scene.as_superuser("DELETE FROM kino.pending_event")
    scene.charged("job-1")
    scene.settle(make_event("timeout", "job-1", event_id="evt"))
    scene.rows(
        # Two workers can leave this behind: each read before the other wrote, into different tables.
        "INSERT INTO kino.pending_event"
        " (source, event_id, job_id, fingerprint, event, queue, outcome, next_attempt_at)"
        " VALUES (:source, 'evt', 'job-2', :fingerprint, CAST(:event AS jsonb), 'q', 'charge_not_found', :now)"
        " RETURNING 1",
        source=SOURCE,
        fingerprint=row[1],
        event=row[0],
        now=NOW,
    )
    scene.charged("job-2")

    said = scene.sweep()

    assert said == {"conflicting_duplicate": 1}
    assert scene.pending() == {}
    assert scene.dead_letters() == [conflicting_dead("evt", "job-2")]
    assert scene.story("job-2").settlement is None


# Copies of what is not final.


def test_a_copy_of_an_event_that_waits_waits_once(scene: Scene) -> None:
    """Copies of an event without a charge, in one batch and later, are one pending row, not tried by copies."""
    event = make_event("timeout")

    said = [*scene.settle(event, event), *scene.settle(event)]

    assert said == ["charge_not_found"] * 3
    assert scene.pending() == {"job-1 timeout": Waits("job-1", "charge_not_found", 0)}


def test_a_copy_of_an_event_with_the_wrong_account_is_counted(scene: Scene) -> None:
    """Copies of a dead letter in one batch are one row, seen as often as they came."""
    scene.charged()
    event = make_event("timeout", account_id="somebody else")

    said = scene.settle(event, event)

    assert said == ["account_mismatch", "account_mismatch"]
    assert scene.dead_letters() == [Dead("job-1 timeout", "job-1", "account_mismatch", 2, "open")]


# Whose job it is.


@pytest.mark.parametrize("kind", ["completed", "timeout"])
def test_an_event_that_names_another_account_is_kept(scene: Scene, kind: str) -> None:
    """An event about somebody else's charge moves nothing, and says in its dead letter who is who."""
    scene.charged()
    before = scene.balance("acct of job-1")

    said = scene.settle(make_event(kind, account_id="acct-2"))

    [detail] = scene.rows("SELECT detail FROM kino.dead_letter")[0]
    assert said == ["account_mismatch"]
    assert detail == "the event names account acct-2, the charge of job job-1 is of acct of job-1"
    assert scene.balance("acct of job-1") == before
    assert scene.inbox() == {}


def test_an_event_that_names_its_account_is_settled(scene: Scene) -> None:
    """The account is optional, and when it is right it changes nothing."""
    scene.charged()

    said = scene.settle(make_event("timeout", account_id="acct of job-1"))

    assert said == ["refunded"]


def test_a_wrong_account_does_not_stop_the_right_event(scene: Scene) -> None:
    """A dead letter of a job does not settle it: the job's true event still does."""
    scene.charged()

    said = scene.settle(
        make_event("timeout", account_id="acct-2", event_id="wrong", at=EVENT_AT - SECOND),
        make_event("timeout", event_id="right"),
    )

    assert said == ["account_mismatch", "refunded"]


# Order.


@pytest.mark.parametrize(
    ("earlier", "later", "expected"),
    [
        ("failed platform", "completed", ["refunded", "completed_after_refund"]),
        ("completed", "failed platform", ["captured", "failed_after_capture"]),
        ("failed user", "timeout", ["captured_not_covered", "failed_after_capture"]),
        ("timeout", "failed user", ["refunded", "already_refunded"]),
    ],
)
def test_a_job_s_events_are_settled_in_the_order_of_their_times(
    scene: Scene, earlier: str, later: str, expected: list[str]
) -> None:
    """Inside one claim the event that happened first decides, whichever was delivered first."""
    scene.charged()
    first, second = make_event(earlier, at=EVENT_AT - SECOND), make_event(later, at=EVENT_AT)

    said = scene.settle(second, first)

    assert said == list(reversed(expected))


def test_events_of_one_instant_are_settled_as_they_came(scene: Scene) -> None:
    """Where the times do not tell, the order of delivery does."""
    scene.charged()

    said = scene.settle(make_event("completed"), make_event("timeout"))

    assert said == ["captured", "failed_after_capture"]


def test_across_claims_the_first_decision_stands(scene: Scene) -> None:
    """An event that happened earlier but comes in a later claim does not undo what was decided."""
    scene.charged()
    scene.settle(make_event("completed"))

    said = scene.settle(make_event("timeout", at=EVENT_AT - SECOND))

    assert said == ["failed_after_capture"]


# Which policy.


def test_a_settlement_names_the_version_in_force_at_the_event(scene: Scene) -> None:
    """The version is that of the event's time, neither from before the charge was opened nor from after now."""
    jobs = ["long before", "just before", "at the change", "now", "in the future"]
    opened_at = max([scene.charged(job_id).opened_at for job_id in jobs])
    changed_at, now, changes_again_at = (opened_at + timedelta(hours=hours) for hours in (1, 2, 3))
    policy = versions(old=opened_at - timedelta(days=1), new=changed_at, draft=changes_again_at)
    times = [opened_at - timedelta(days=300), changed_at - SECOND, changed_at, now, changes_again_at]

    scene.settle(
        *(make_event("timeout", job_id, at=at) for job_id, at in zip(jobs, times, strict=True)),
        now=now,
        rules=make_rules(policy=policy),
    )

    rows = scene.rows("SELECT c.job_id, s.policy_version FROM kino.settlement s JOIN kino.charge c USING (charge_id)")
    assert dict(map(tuple, rows)) == {
        "long before": "old",
        "just before": "old",
        "at the change": "new",
        "now": "new",
        "in the future": "new",
    }


def versions(**effective_at: object) -> Policy:
    published = published_policy().versions[0]
    return make_policy(
        published.model_copy(update={"version": version, "effective_at": at}) for version, at in effective_at.items()
    )


# Dead letters.


@pytest.mark.parametrize(("before", "after"), [("open", "open"), ("replayed", "open"), ("discarded", "discarded")])
def test_a_dead_letter_that_comes_again(scene: Scene, before: str, after: str) -> None:
    """A replay that failed opens its letter again; what a person has discarded stays so; both are counted."""
    scene.charged()
    event = make_event("timeout", account_id="acct-2")
    scene.settle(event)
    scene.as_superuser(f"UPDATE kino.dead_letter SET status = '{before}'")

    scene.settle(event)

    assert scene.dead_letters() == [Dead("job-1 timeout", "job-1", "account_mismatch", 2, after)]
