"""The check `matching`: what the source lists against what the ledger settled, both ways."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from kino_refunds.errors import SourceUnreachable
from kino_refunds.events.schema import ErrorOrigin, SafetyStage
from kino_refunds.ledger import AccountStatus
from kino_refunds.reconciliation import judging
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.settlement.breaks import BreakKind
from tests.clock import DAY, HOUR, MINUTE, SECOND, clock_at
from tests.integration.reconciliation.matching_scene import (
    AT,
    GRACE,
    Fails,
    again,
    done,
    lister,
    match,
    run_of,
    scope_of,
    settled,
)
from tests.scenario import NOW, Scene, make_event

pytestmark = pytest.mark.usefixtures("opened_before")


# --- planted mismatches -------------------------------------------------------------------------------------------

USERS = {"state": "failed", "origin": ErrorOrigin.USER}
OURS = {"state": "failed", "origin": ErrorOrigin.PROVIDER}
LATE = {"state": "rejected", "stage": SafetyStage.AFTER_GENERATION}
EARLY = {"state": "rejected", "stage": SafetyStage.BEFORE_GENERATION}
RESULT = {"state": "timed_out", "result_produced": True}
NO_RESULT = {"state": "timed_out"}
DONE = {"state": "completed"}

PLANTED: dict[str, tuple[str | None, dict[str, Any], set[str]]] = {
    # what the event said (None: it never came), what the source says, what that is
    "completed": ("completed", DONE, set()),
    "failed": ("failed provider", OURS, set()),
    "failed by the user": ("failed user", USERS, set()),
    "ended otherwise, covered too": ("timeout", OURS, set()),
    "ended otherwise, not covered either": ("completed", USERS, set()),
    "a lost completion": (None, DONE, {"missing_event"}),
    "a lost failure": (None, OURS, {"missing_event"}),
    "a lie that captured": ("completed", OURS, {"failed_but_captured"}),
    "a lie that captured a timeout": ("completed", NO_RESULT, {"failed_but_captured"}),
    "a lie that captured a rejection": ("safety after", EARLY, {"failed_but_captured"}),
    "the user's fault, by mistake": ("failed user", OURS, {"failed_but_captured"}),
    "a lie that refunded": ("failed provider", DONE, {"completed_but_refunded"}),
    "a presumed timeout": ("timeout", DONE, {"completed_but_refunded"}),
    "refunded, the user's fault": ("failed provider", USERS, {"not_covered_but_refunded"}),
    "refunded with a result": ("timeout", RESULT, {"not_covered_but_refunded"}),
    "refunded after the generation": ("safety during", LATE, {"not_covered_but_refunded"}),
    "another account": ("completed", DONE | {"account_id": "acct-9"}, {"account_differs"}),
    "other credits": ("completed", DONE | {"credits": 9}, {"credits_differ"}),
    "no credits": ("completed", DONE | {"credits": 0}, {"credits_differ"}),
    "the same account and credits": ("completed", DONE | {"account_id": "acct of job", "credits": 10}, set()),
    "all at once": (
        "completed",
        OURS | {"account_id": "Acct of job", "credits": 11},
        {"failed_but_captured", "account_differs", "credits_differ"},
    ),
}


@pytest.mark.parametrize(("event", "said", "kinds"), PLANTED.values(), ids=PLANTED)
def test_each_planted_mismatch_is_found(
    scene: Scene, reader: sa.Engine, event: str | None, said: dict[str, Any], kinds: set[str]
) -> None:
    """What the source says and the ledger settled otherwise is a break of its kind; what agrees is none."""
    scene.charged("job")
    if event is not None:
        scene.settle(make_event(event, "job"))

    found = match(reader, lister(done("job", **said)))

    assert found.kinds == ({"job": kinds} if kinds else {})
    assert found.numbers == (1, 1 if kinds else 0, {})
    assert found.comparable


def test_a_completed_job_without_a_charge_is_found(scene: Scene, reader: sa.Engine) -> None:
    """A video for nothing is a break of the source's credits; other endings without a charge owe nothing."""
    scene.charged("job")
    scene.settle(make_event("completed", "job"))

    found = match(
        reader, lister(done("job"), done("free"), done("priced", credits=7), done("failed", "failed"), done("x" * 129))
    )

    assert {each.job_id: (each.kind, each.credits) for each in found.breaks} == {
        "free": ("uncharged_job", 0),
        "priced": ("uncharged_job", 7),
    }
    assert "the source's list must leave it out" in found.breaks[0].detail
    assert found.numbers == (4, 2, {judging.NO_CHARGE_CAN_HAVE_THIS_ID: 1})


def test_a_settled_charge_whose_job_is_unknown_is_found(scene: Scene, reader: sa.Engine) -> None:
    """The source is asked about each job that the ledger settled: one that it does not know is an orphan."""
    for job_id in ("job", "orphan", "runs"):
        scene.charged(job_id)
        scene.settle(make_event("completed", job_id))
    scene.charged("open")
    source = lister(done("job"))
    source.answers = {"runs": Answer(JobState.RUNNING)}

    found = match(reader, source)

    assert found.kinds == {"orphan": {"orphan_charge"}}
    assert found.numbers == (2, 1, {"the source says that the job still runs": 1})


def test_a_refund_that_came_too_late_is_found(scene: Scene, reader: sa.Engine) -> None:
    """Late is more than 5 min after the end and after deadline and grace: the later of the two counts."""
    due = NOW + HOUR + GRACE
    for job_id in ("by its end", "late by a second", "in time"):
        scene.charged(job_id)
    by_end = due + 10 * MINUTE
    scene.settle(make_event("failed provider", "by its end", at=by_end), now=by_end + 5 * MINUTE)
    scene.settle(make_event("failed provider", "late by a second"), now=due + 5 * MINUTE + SECOND)
    scene.settle(make_event("failed provider", "in time"), now=due + 5 * MINUTE)
    jobs = [done("by its end", "failed", at=by_end), done("late by a second", "failed"), done("in time", "failed")]

    scope = scope_of(reader, lister(*jobs, promise=due + HOUR), now=due + HOUR)
    found = run_of(replace(scope, window=replace(scope.window, until=due + HOUR)))

    assert found.kinds == {"late by a second": {"late"}}
    assert found.numbers == (3, 1, {})


def test_a_corrected_capture_counts_as_refunded(scene: Scene, reader: sa.Engine) -> None:
    """A repair ends the break; a correction against the source's word is one of its own."""
    charges = {job_id: scene.charged(job_id) for job_id in ("repaired", "given")}
    for job_id, charge in charges.items():
        scene.settle(make_event("completed", job_id))
        scene.correct(charge)

    found = match(reader, lister(done("repaired", "failed"), done("given")))

    assert found.kinds == {"given": {"completed_but_refunded"}}


# --- when and by what is judged -----------------------------------------------------------------------------------


def test_an_ending_is_judged_by_the_status_of_its_time(scene: Scene, reader: sa.Engine) -> None:
    """An account that was terminated for violation forfeits what ended afterwards, and nothing of before."""
    for job_id in ("before", "after"):
        scene.charged(job_id)
    with clock_at(scene.worker, NOW - 30 * MINUTE):
        for job_id in ("before", "after"):
            scene.set_status(f"acct of {job_id}", AccountStatus.TERMINATED)
    early = NOW - 50 * MINUTE
    scene.settle(make_event("failed provider", "before", at=early), make_event("failed provider", "after"))

    right = match(reader, lister(done("before", "failed", at=early), done("after", "failed")))
    wrong = match(reader, lister(done("before", "failed"), done("after", "failed", at=early)))

    assert right.kinds == {}
    assert wrong.kinds == {"before": {"not_covered_but_refunded"}, "after": {"failed_but_captured"}}


def test_two_clocks_may_read_one_end_some_minutes_apart(scene: Scene, reader: sa.Engine) -> None:
    """Where the status changed between the event's time and the source's, either of them may be right."""
    scene.charged("job")
    with clock_at(scene.worker, AT + SECOND):
        scene.set_status("acct of job", AccountStatus.TERMINATED)
    scene.settle(make_event("failed provider", "job"))

    near = match(reader, lister(done("job", "failed", at=AT + 10 * MINUTE)))
    far = match(reader, lister(done("job", "failed", at=AT + 10 * MINUTE + SECOND)))

    assert (near.kinds, far.kinds) == ({}, {"job": {"not_covered_but_refunded"}})


def test_a_wrongful_termination_that_was_corrected_is_no_break(scene: Scene, reader: sa.Engine) -> None:
    """A person gave the credits back although the history still says terminated: that is what a correction is for."""
    charge = scene.charged("job")
    scene.set_status("acct of job", AccountStatus.TERMINATED)
    scene.settle(make_event("failed provider", "job"))
    scene.correct(charge)

    assert match(reader, lister(done("job", "failed"))).numbers == (1, 0, {})


def test_a_job_that_ended_just_now_is_not_judged_yet(scene: Scene, reader: sa.Engine) -> None:
    """For 5 minutes an event may be on its way; a settlement that contradicts is found at once."""
    for job_id in ("open", "captured"):
        scene.charged(job_id)
    scene.settle(make_event("completed", "captured"))
    source = lister(done("open"), done("free"), done("captured", "failed"))

    young = match(reader, source, now=AT + 5 * MINUTE - SECOND)
    old = match(reader, source, now=AT + 5 * MINUTE)

    assert (young.kinds, young.numbers) == ({"captured": {"failed_but_captured"}}, (1, 1, {judging.NOT_YET: 2}))
    assert old.kinds == {
        "open": {"missing_event"},
        "free": {"uncharged_job"},
        "captured": {"failed_but_captured"},
    }


def test_a_break_says_what_is_at_stake_since_when(scene: Scene, reader: sa.Engine) -> None:
    """Credits, both sides, and when they came apart: from that the time to detect is counted."""
    charge = scene.charged("open", credits=7)
    scene.charged("captured", credits=8)
    scene.settle(make_event("completed", "captured"), now=NOW)

    found = match(reader, lister(done("open", "failed"), done("captured", "failed", credits=5)))

    breaks = {(each.job_id, each.kind): each for each in found.breaks}
    missing = breaks["open", BreakKind.MISSING_EVENT]
    assert (missing.charge_id, missing.credits, missing.happened_at) == (charge.charge_id, 7, AT)
    assert missing.sides == "open / failed.unknown"
    assert breaks["captured", BreakKind.FAILED_BUT_CAPTURED].happened_at == NOW
    assert breaks["captured", BreakKind.CREDITS_DIFFER].credits == 3


def test_what_the_jobs_own_event_says_already_is_no_second_break(scene: Scene, reader: sa.Engine) -> None:
    """Of one matter there is one row, which the event raised; it counts as broken all the same."""
    for job_id in ("captured", "refunded"):
        scene.charged(job_id)
    scene.settle(make_event("completed", "captured"), make_event("failed provider", "refunded"))
    scene.settle(make_event("failed provider", "captured"), make_event("completed", "refunded"))
    source = lister(done("captured", "failed", credits=9), done("refunded"))

    live = match(reader, source)
    scene.as_superuser("UPDATE kino.break SET status = 'closed'")
    closed = match(reader, source)

    assert {each.kind for each in scene.breaks()} == {"failed_after_capture", "completed_after_refund"}
    assert (live.kinds, live.broken) == ({"captured": {"credits_differ"}}, 2)
    assert closed.kinds == {
        "captured": {"failed_but_captured", "credits_differ"},
        "refunded": {"completed_but_refunded"},
    }


def test_a_settlement_of_a_job_that_ended_in_another_window_is_judged(scene: Scene, reader: sa.Engine) -> None:
    """A charge that is settled days after its job ended is compared by the run that sees the settlement."""
    scene.charged("old")
    scene.charged("new")
    scene.settle(make_event("completed", "old"), make_event("completed", "new"))
    source = lister(done("new"), done("old", "failed", at=NOW - 3 * DAY))

    assert match(reader, source).kinds == {"old": {"failed_but_captured"}}


# --- looking again ------------------------------------------------------------------------------------------------


def test_repaired_breaks_are_found_to_agree(scene: Scene, reader: sa.Engine) -> None:
    """After the event came, a correction was made or the source learnt of the job, both sides agree."""
    (captured, *_) = settled(scene, "captured", "orphan")
    scene.charged("open")
    source = lister(done("captured", "failed"), done("open", account_id="acct-9", credits=9), done("free", credits=3))
    found = match(reader, source).breaks

    still = again(reader, source, found)
    scene.correct(captured)
    scene.settle(make_event("completed", "open"))
    source.jobs = sorted(
        [
            done("captured", "failed"),
            done("open", account_id="acct of open", credits=10),
            done("free", "failed"),
            done("orphan"),
        ],
        key=lambda job: job.place,
    )
    now_agree = again(reader, source, found)

    assert still == {f"{each.kind} {each.job_id}": str(each.kind) for each in found}
    assert set(still) == {
        "failed_but_captured captured",
        "orphan_charge orphan",
        "missing_event open",
        "account_differs open",
        "credits_differ open",
        "uncharged_job free",
    }
    assert now_agree == dict.fromkeys(still)


@pytest.mark.parametrize(
    "answer",
    [Answer(JobState.UNKNOWN), Answer(JobState.RUNNING)],
    ids=["unknown", "running"],
)
def test_an_uncertain_answer_closes_nothing(scene: Scene, reader: sa.Engine, answer: Answer) -> None:
    """A source that says no certain end of a job now leaves its break as it is."""
    settled(scene, "job")
    source = lister(done("job", "failed"))
    found = match(reader, source).breaks
    source.jobs, source.answers = [], {"job": answer}

    assert again(reader, source, found) == {}


@pytest.mark.parametrize("source", [None, Fails(SourceUnreachable("away"), what="ask")], ids=["none", "away"])
def test_a_source_that_is_away_closes_nothing(scene: Scene, reader: sa.Engine, source: Any) -> None:
    """Without an answer every break stays."""
    settled(scene, "job")
    found = match(reader, lister(done("job", "failed"))).breaks

    assert again(reader, source, found) == {}


def test_a_late_refund_stays_late(scene: Scene, reader: sa.Engine) -> None:
    """Nothing makes a late refund timely: a person accepts it."""
    scene.charged("job")
    scene.settle(make_event("failed provider", "job"), now=NOW + DAY)
    source = lister(done("job", "failed"))
    found = match(reader, source).breaks

    assert again(reader, source, found) == {"late job": "late"}
