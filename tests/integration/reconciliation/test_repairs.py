"""Repairs: by the event that never came, or by a reversal; once, as planned, and closed by the check's next run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytest

from kino_refunds.errors import BreakNotFound, CannotRepair, LedgerBusy
from kino_refunds.events.schema import ErrorOrigin
from kino_refunds.ledger import AccountStatus
from kino_refunds.reconciliation.repairs import Line, Means, plan_repair, repair, report_termination
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.settlement.breaks import Break, BreakKind, raise_breaks
from tests.clock import DAY, clock_at
from tests.integration.reconciliation.checking import check, shop, statuses
from tests.scenario import EVENT_AT, NOW, Scene, make_event

OURS: Any = {"actor": "dana", "note": "incident 7"}


class Told:
    """A source that says what it was told to say."""

    def __init__(self, **answers: Answer) -> None:
        self._answers = answers

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        unknown = Answer(JobState.UNKNOWN)
        return {job_id: self._answers.get(job_id.replace("-", "_"), unknown) for job_id in job_ids}


def contradicted(scene: Scene, kind: str = "failed provider", **terms: Any) -> int:
    """A job that was captured and then said to have failed; return the number of its break."""
    scene.charged("job-1", **terms)
    scene.settle(make_event("completed", "job-1", event_id="first"))
    scene.settle(make_event(kind, "job-1", event_id="second"))
    [row] = scene.rows("SELECT break_id FROM kino.break")
    return int(row.break_id)


def opened(scene: Scene, kind: BreakKind) -> int:
    """A break about the open charge of job-1; return its number."""
    charge = scene.charged("job-1")
    found = Break(
        kind=kind, job_id="job-1", charge_id=charge.charge_id, credits=10, detail="planted", sides="open / ended"
    )
    with scene.worker.begin() as connection:
        raise_breaks(connection, [found])
    [row] = scene.rows("SELECT break_id FROM kino.break")
    return int(row.break_id)


@pytest.mark.parametrize(
    ("kind", "clause"),
    [("failed provider", "2.failure"), ("timeout", "2.timeout"), ("safety during", "2.safety")],
)
@pytest.mark.usefixtures("sound_books")
def test_a_capture_that_was_wrong_is_reversed_under_its_clause(scene: Scene, kind: str, clause: str) -> None:
    """The charge stays captured, its status says refunded, and the customer has the credits."""
    number = contradicted(scene, kind)

    done = repair(shop(scene), number, **OURS)
    check(scene, "corrected")

    assert (done.means, done.clause, done.available, done.available_after) == (Means.REVERSAL, clause, 90, 100)
    assert scene.balance("acct of job-1").available == 100
    assert scene.rows("SELECT status, clause FROM kino.charge_status")[0] == ("refunded", clause)
    assert scene.rows("SELECT kind FROM kino.settlement")[0][0] == "captured"
    assert scene.rows("SELECT reference, actor FROM kino.correction")[0] == (f"break:{number}", "dana")
    assert statuses(scene) == [("failed_after_capture", "closed")]


@pytest.mark.usefixtures("sound_books")
def test_a_repair_that_is_repeated_moves_nothing_twice(scene: Scene) -> None:
    """Killed between the reversal and the note with the break, it is done again: the same reference, no transfer."""
    number = contradicted(scene)
    repair(shop(scene), number, **OURS)
    scene.as_superuser("UPDATE kino.break SET status = 'open'")

    with pytest.raises(CannotRepair, match="was corrected before, by break:"):
        repair(shop(scene), number, **OURS)
    check(scene, "corrected")

    assert scene.rows("SELECT count(*) FROM kino.transfer WHERE kind = 'reversal'")[0][0] == 1
    assert statuses(scene) == [("failed_after_capture", "closed")]


def test_a_plan_is_what_the_repair_does_and_writes_nothing(scene: Scene) -> None:
    """The dry run names lots, credits and balances; the repair then does just that."""
    number = contradicted(scene)
    before = scene.everything()

    plan = plan_repair(shop(scene), number)

    assert scene.everything() == before
    [lot] = scene.rows("SELECT lot_id FROM kino.credit_lot")
    assert list(plan.lines) == [Line(lot.lot_id, 10, "back into the lot")]
    assert asdict(repair(shop(scene), number, **OURS)) == asdict(plan)


@pytest.mark.usefixtures("sound_books")
def test_a_plan_names_a_successor_where_the_lot_expires(scene: Scene) -> None:
    """What was purchased and has expired meanwhile comes back in a successor, which can be spent."""
    number = contradicted(scene, expires_at=NOW + DAY)

    plan = plan_repair(shop(scene), number)
    repair(shop(scene), number, **OURS)

    assert plan.lines[0].fate.startswith("into a successor of the lot that expires at ")
    assert scene.rows("SELECT remaining FROM kino.credit_lot WHERE successor_of IS NOT NULL")[0][0] == 10


@pytest.mark.usefixtures("sound_books")
def test_a_reversal_into_a_voided_lot_is_voided_too_and_the_plan_says_so(scene: Scene) -> None:
    """The purchase was charged back: its credits do not come back by another way."""
    number = contradicted(scene, purchase_id="order-1")
    with scene.superuser.begin() as connection:
        connection.exec_driver_sql("SET LOCAL ROLE kino_ledger")
        connection.exec_driver_sql("SELECT * FROM kino.void_purchase('order-1', 'dispute', 'd-1', 'test')")

    plan = plan_repair(shop(scene), number)
    repair(shop(scene), number, **OURS)

    assert plan.lines[0].fate == "back, and voided again under the cause that voided the lot"
    assert (plan.available, plan.available_after) == (0, 0)
    assert scene.balance("acct of job-1").available == 0


@pytest.mark.parametrize(
    ("answer", "means", "available"),
    [
        (Answer(JobState.FAILED, origin=ErrorOrigin.PROVIDER), "refunded", 100),
        (Answer(JobState.COMPLETED), "captured", 90),
        (Answer(JobState.FAILED, origin=ErrorOrigin.USER), "captured_not_covered", 90),
    ],
)
@pytest.mark.usefixtures("sound_books")
def test_an_event_that_never_came_is_settled_by_the_front_door(
    scene: Scene, answer: Answer, means: str, available: int
) -> None:
    """The source is asked anew; the event has the reconciler's name, and what it comes to was in the plan."""
    number = opened(scene, BreakKind.MISSING_EVENT)

    done = repair(shop(scene, source=Told(job_1=answer)), number, **OURS)

    assert (done.means, done.outcome, done.available_after, done.held, done.held_after) == (
        Means.EVENT,
        means,
        available,
        10,
        0,
    )
    assert scene.balance("acct of job-1").available == available
    assert [*scene.inbox().values()] == [means]
    assert statuses(scene) == [("missing_event", "repaired")]


@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.UNKNOWN])
def test_a_source_that_has_changed_its_mind_settles_nothing(scene: Scene, state: JobState) -> None:
    """The break was right when it was found; now there is no ending to settle."""
    number = opened(scene, BreakKind.MISSING_EVENT)

    with pytest.raises(CannotRepair, match=f"says {state} of job job-1 now"):
        repair(shop(scene, source=Told(job_1=Answer(state))), number, **OURS)

    assert scene.rows("SELECT count(*) FROM kino.settlement")[0][0] == 0


@pytest.mark.usefixtures("sound_books")
def test_a_job_that_runs_for_ever_is_timed_out_by_a_person(scene: Scene) -> None:
    """The source may still say running: a person has looked, and the credits go back under clause 2.timeout."""
    number = opened(scene, BreakKind.RUNNING_PAST_CAP)

    done = repair(shop(scene, source=Told(job_1=Answer(JobState.RUNNING))), number, **OURS)
    check(scene, "settled")

    assert (done.outcome, done.clause) == ("refunded", "2.timeout")
    assert statuses(scene) == [("running_past_cap", "closed")]


@pytest.mark.usefixtures("sound_books")
def test_a_wrongful_termination_is_repaired_with_its_case(scene: Scene) -> None:
    """The account was reinstated: what clause 6 kept goes back under clause 2, with the case as its reference."""
    scene.charged("job-1")
    scene.as_superuser(
        "SET session_replication_role = replica",
        "UPDATE kino.charge SET opened_at = opened_at - interval '1 day'",
    )
    with clock_at(scene.worker, EVENT_AT - DAY / 2):
        scene.set_status("acct of job-1", AccountStatus.TERMINATED)
    scene.settle(make_event("failed provider", "job-1"))
    scene.set_status("acct of job-1", AccountStatus.ACTIVE, reason="appeal")

    number = report_termination(shop(scene), "job-1", detail="case 12")
    with pytest.raises(CannotRepair, match="needs --reference"):
        repair(shop(scene), number, **OURS)
    done = repair(shop(scene), number, reference="case-12", **OURS)
    check(scene, "corrected")

    assert (done.clause, scene.balance("acct of job-1").available) == ("2.failure", 100)
    assert scene.rows("SELECT reference FROM kino.correction")[0][0] == "case-12"
    assert statuses(scene) == [("wrongful_termination", "closed")]


def test_only_what_clause_6_kept_is_reported_as_a_wrongful_termination(scene: Scene) -> None:
    """A job that was settled otherwise is not."""
    scene.charged("job-1")
    scene.settle(make_event("completed", "job-1"))

    with pytest.raises(CannotRepair, match=r"was not captured by clause 6\.terminated"):
        report_termination(shop(scene), "job-1", detail="case 12")


@pytest.mark.parametrize(
    "kind",
    sorted(
        {*BreakKind}
        - {
            "missing_event",
            "running_past_cap",
            "failed_after_capture",
            "failed_but_captured",
            "wrongful_termination",
            "account_status_differs",
            "decision_differs",
        }
    ),
)
def test_what_has_no_repair_says_what_there_is_instead(scene: Scene, kind: str) -> None:
    """Accept it, or find its cause: no credits move for these."""
    number = opened(scene, BreakKind(kind))

    with pytest.raises(CannotRepair, match="accept it, or mark it as a false alarm"):
        plan_repair(shop(scene), number)


def test_what_is_not_owed_is_not_reversed(scene: Scene) -> None:
    """The event said that the user's own input failed: the policy captures that."""
    number = contradicted(scene)
    scene.as_superuser("UPDATE kino.break SET ending = 'failed.user'")

    with pytest.raises(CannotRepair, match=r"does not refund a job that ended failed\.user"):
        repair(shop(scene), number, **OURS)


def test_an_old_break_needs_its_ending_from_a_person(scene: Scene) -> None:
    """A build of before did not store it, and the settlement's own ending (completed) is not the other side's."""
    number = contradicted(scene)
    scene.as_superuser("UPDATE kino.break SET ending = NULL")

    with pytest.raises(CannotRepair, match="it is not known how"):
        plan_repair(shop(scene), number)

    assert plan_repair(shop(scene), number, ending="failed.provider").clause == "2.failure"


def test_a_break_that_is_not_there_or_closed_is_named(scene: Scene) -> None:
    """Nothing is guessed."""
    number = contradicted(scene)
    scene.as_superuser("UPDATE kino.break SET status = 'accepted'")

    with pytest.raises(CannotRepair, match="is accepted: only one that lives is repaired"):
        repair(shop(scene), number, **OURS)
    with pytest.raises(BreakNotFound):
        repair(shop(scene), number + 1, **OURS)


def test_a_lot_that_another_session_holds_makes_the_repair_wait_and_give_up(scene: Scene) -> None:
    """Nothing was done; the break is as it was, and the person tries again."""
    number = contradicted(scene)
    with scene.superuser.connect() as other:
        other.begin()
        other.exec_driver_sql("SELECT FROM kino.credit_lot FOR UPDATE")

        with pytest.raises(LedgerBusy):
            repair(shop(scene), number, **OURS)

    assert statuses(scene) == [("failed_after_capture", "open")]
    assert scene.rows("SELECT count(*) FROM kino.correction")[0][0] == 0


def test_a_plan_that_has_changed_since_it_was_shown_is_refused(scene: Scene) -> None:
    """The person said yes to a refund; the source says otherwise now."""
    number = opened(scene, BreakKind.MISSING_EVENT)
    shown = plan_repair(shop(scene, source=Told(job_1=Answer(JobState.FAILED, origin=ErrorOrigin.PROVIDER))), number)

    with pytest.raises(CannotRepair, match="the plan has changed since it was shown"):
        repair(shop(scene, source=Told(job_1=Answer(JobState.COMPLETED))), number, confirmed=shown, **OURS)

    assert scene.rows("SELECT count(*) FROM kino.settlement")[0][0] == 0


def test_an_event_that_lied_is_not_repaired_against_the_source(scene: Scene) -> None:
    """The job completed, and an event says that it failed: the source is asked, and nothing is given away."""
    number = contradicted(scene)

    with pytest.raises(CannotRepair, match="does not refund a job that ended completed"):
        repair(shop(scene, source=Told(job_1=Answer(JobState.COMPLETED))), number, **OURS)

    assert scene.balance("acct of job-1").available == 90


def test_a_rightly_terminated_account_is_owed_nothing_by_a_wrong_clause(scene: Scene) -> None:
    """The settlement cites another clause than 6, which is a difference, and no debt."""
    scene.charged("job-1")
    scene.as_superuser(
        "SET session_replication_role = replica",
        "UPDATE kino.charge SET opened_at = opened_at - interval '1 day'",
    )
    with clock_at(scene.worker, EVENT_AT - DAY / 2):
        scene.set_status("acct of job-1", AccountStatus.TERMINATED)
    scene.settle(make_event("failed provider", "job-1"))
    scene.as_superuser("SET session_replication_role = replica", "UPDATE kino.settlement SET clause = '2.failure'")
    check(scene, "decisions")
    [row] = scene.rows("SELECT break_id FROM kino.break")

    with pytest.raises(CannotRepair, match=r"does not refund a job that ended failed\.provider"):
        plan_repair(shop(scene), row.break_id)


def test_a_job_that_has_ended_after_all_is_settled_as_it_ended(scene: Scene) -> None:
    """It ran past its cap when the break was raised; the source is asked before a person's timeout is taken."""
    number = opened(scene, BreakKind.RUNNING_PAST_CAP)

    done = repair(shop(scene, source=Told(job_1=Answer(JobState.COMPLETED))), number, **OURS)

    assert done.outcome == "captured"


def test_a_blank_reference_is_none(scene: Scene) -> None:
    """A case must be named."""
    scene.charged("job-1")
    with clock_at(scene.worker, EVENT_AT - DAY / 2):
        scene.set_status("acct of job-1", AccountStatus.TERMINATED)
    scene.settle(make_event("failed provider", "job-1"))
    number = report_termination(shop(scene), "job-1", detail="case 12")

    with pytest.raises(CannotRepair, match="needs --reference"):
        repair(shop(scene), number, reference=" ", **OURS)
