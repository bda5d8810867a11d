"""The checks `settled`, `corrected` and `relay`: each finds what was planted, and nothing where nothing is wrong."""

from __future__ import annotations

from datetime import timedelta

import pytest
from redis import Redis

from kino_refunds.outbox.relay import relay_refunds
from kino_refunds.reconciliation.run_rows import RunState
from kino_refunds.reconciliation.settled import OVERDUE_MAX
from kino_refunds.reconciliation.told import NO_CURSOR, OFF
from tests.clock import SECOND, clock_at
from tests.integration.reconciliation.checking import check, live, numbers, statuses
from tests.scenario import NOW, Scene, make_event

GRACE = timedelta(seconds=60)
QUEUE = "kino.credits-refunded"
DUE = NOW + timedelta(hours=1) + GRACE
"""When a charge of a scene is past its deadline and grace."""


@pytest.mark.parametrize(("late", "found"), [(-SECOND, []), (SECOND, [("open_past_deadline", "job-1", 10)])])
def test_a_charge_that_nothing_ends_is_found_five_minutes_after_it_was_due(
    scene: Scene, late: timedelta, found: list[tuple[str, str, int]]
) -> None:
    """Until then the overdue sweep has its time (P9)."""
    scene.charged("job-1")

    with clock_at(scene.worker, DUE + OVERDUE_MAX + late):
        ran = check(scene, "settled")

    assert live(scene) == found
    assert numbers(ran) == (1, 1 - len(found), len(found), 0)


@pytest.mark.parametrize(
    ("plant", "says"),
    [
        ("SELECT 1", "the job source has not answered for it"),
        (
            "INSERT INTO kino.overdue_ask SELECT charge_id, 2, 'unknown', now(), now() FROM kino.charge",
            "the job source answered unknown, 2 times in a row, and a presumed timeout is withheld",
        ),
        (
            "INSERT INTO kino.overdue_ask SELECT charge_id, 0, 'running', now(), now() FROM kino.charge",
            "the job source says that it is running",
        ),
        (
            """INSERT INTO kino.pending_event (source, event_id, job_id, fingerprint, event, queue, outcome,
               next_attempt_at) VALUES ('s', 'e', 'job-1', 'f', '{}', 'q', 'busy', now())""",
            "its event waits for another try (busy)",
        ),
        (
            """INSERT INTO kino.dead_letter (message_key, raw, queue, reason, detail, group_fingerprint, build, job_id)
               VALUES ('k', 'r', 'q', 'apply_error', 'd', 'g', 'b', 'job-1')""",
            "dead letter 1 holds its event (apply_error)",
        ),
    ],
)
def test_the_break_says_why_nothing_ended_the_charge(scene: Scene, plant: str, says: str) -> None:
    """On-call reads the reason in the break, and need not look for it."""
    scene.charged("job-1")
    scene.as_superuser(plant)

    with clock_at(scene.worker, DUE + OVERDUE_MAX + SECOND):
        check(scene, "settled")

    [row] = scene.rows("SELECT detail FROM kino.break")
    assert says in row.detail


def test_a_charge_that_was_settled_late_closes_its_break(scene: Scene) -> None:
    """The next run looks again by key; the time to detect begins when P9 was broken."""
    scene.charged("job-1")
    with clock_at(scene.worker, DUE + OVERDUE_MAX + timedelta(minutes=7)):
        check(scene, "settled")
        [row] = scene.rows("SELECT first_seen_at - happened_at AS detect FROM kino.break")
        scene.settle(make_event("timeout", "job-1"), now=None)
        check(scene, "settled")

    assert row.detect == timedelta(minutes=7)
    assert statuses(scene) == [("open_past_deadline", "closed")]


def test_a_job_that_runs_past_its_cap_is_one_break_and_not_two(scene: Scene) -> None:
    """The overdue sweep has raised it under its own kind; it is closed once the charge has ended."""
    scene.charged("job-1")
    scene.as_superuser(
        "INSERT INTO kino.break (kind, job_id, charge_id, credits, detail)"
        " SELECT 'running_past_cap', job_id, charge_id, credits, 'd' FROM kino.charge"
    )
    with clock_at(scene.worker, DUE + timedelta(hours=25)):
        ran = check(scene, "settled")
        assert (ran.broken, live(scene)) == (1, [("running_past_cap", "job-1", 10)])

        scene.settle(make_event("completed", "job-1"), now=None)
        check(scene, "settled")

    assert statuses(scene) == [("running_past_cap", "closed")]


def corrected(scene: Scene) -> None:
    charge = scene.charged("job-1")
    scene.settle(make_event("completed", "job-1"))
    scene.correct(charge)


def test_a_correction_with_its_transfers_matches(scene: Scene) -> None:
    """One correction, compared once."""
    corrected(scene)

    assert numbers(check(scene, "corrected")) == (1, 1, 0, 0)
    assert numbers(check(scene, "corrected")) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("planted", "credits"),
    [
        ("DELETE FROM kino.transfer WHERE kind = 'reversal'", 10),
        ("UPDATE kino.transfer SET credits = 4 WHERE kind = 'reversal'", 6),
        ("UPDATE kino.settlement SET kind = 'refunded', reason = 'timeout', clause = '2.timeout'", 0),
        ("DELETE FROM kino.settlement", 0),
    ],
)
def test_a_correction_whose_credits_did_not_move_is_found(scene: Scene, planted: str, credits: int) -> None:
    """Without its transfers, with others, or of a charge that was not captured."""
    corrected(scene)
    scene.as_superuser("SET session_replication_role = replica", planted)

    check(scene, "corrected")

    assert live(scene) == [("correction_differs", "job-1", credits)]


def test_a_contradiction_is_closed_by_its_correction(scene: Scene) -> None:
    """Failed after it was captured: the break lives until the customer has the credits, and no longer."""
    charge = scene.charged("job-1")
    scene.settle(make_event("completed", "job-1", event_id="first"))
    scene.settle(make_event("failed provider", "job-1", event_id="second"))
    check(scene, "corrected")
    assert statuses(scene) == [("failed_after_capture", "open")]

    scene.correct(charge)
    check(scene, "corrected")

    assert statuses(scene) == [("failed_after_capture", "closed")]


def test_news_that_was_not_told_is_found_after_the_grace(scene: Scene, redis: Redis) -> None:
    """A refund that the relay has passed is told; one behind its cursor is not, once it is old enough."""
    relay_refunds(scene.worker, redis, QUEUE)
    scene.charged("told")
    scene.settle(make_event("timeout", "told"))
    relay_refunds(scene.worker, redis, QUEUE)
    scene.charged("untold")
    scene.settle(make_event("timeout", "untold"))

    young = check(scene, "relay", relay_queue=QUEUE, check_grace_s=300.0)
    old = check(scene, "relay", relay_queue=QUEUE)

    assert (young.compared, numbers(old)) == (0, (2, 1, 1, 0))
    assert live(scene) == [("untold_refund", "untold", 10)]

    relay_refunds(scene.worker, redis, QUEUE)
    check(scene, "relay", relay_queue=QUEUE)
    assert statuses(scene) == [("untold_refund", "closed")]


def test_a_correction_that_was_not_told_is_found(scene: Scene, redis: Redis) -> None:
    """It is a refund like another, for the product."""
    relay_refunds(scene.worker, redis, QUEUE)
    corrected(scene)

    check(scene, "relay", relay_queue=QUEUE)

    assert live(scene) == [("untold_refund", "job-1", 10)]


def test_a_relay_that_is_off_is_not_comparable(scene: Scene) -> None:
    """Nothing was told, so "0 breaks" would mean nothing; nothing is verified by that run."""
    scene.charged("job-1")
    scene.settle(make_event("timeout", "job-1"))

    off = check(scene, "relay")
    never_ran = check(scene, "relay", relay_queue=QUEUE)

    assert (off.state, off.not_comparable) == (RunState.NOT_COMPARABLE, {OFF: 1})
    assert (never_ran.state, never_ran.not_comparable) == (RunState.NOT_COMPARABLE, {NO_CURSOR: 1})
