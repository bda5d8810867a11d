"""Compare one finished job of the source with its charge, from values alone: no database, no clock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING

from kino_refunds.ledger.accounts import PastStatus
from kino_refunds.ledger.values import SettlementKind
from kino_refunds.policy.automatic import coverage_of
from kino_refunds.policy.document import clamped
from kino_refunds.reconciliation.endings import event_of
from kino_refunds.reconciliation.guard import OverdueCharge
from kino_refunds.reconciliation.sources import JobState
from kino_refunds.settlement.breaks import Break, BreakKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kino_refunds.events.schema import Event
    from kino_refunds.ledger.accounts import StatusHistory
    from kino_refunds.policy.document import Policy
    from kino_refunds.reconciliation.finished import FinishedJob
    from kino_refunds.reconciliation.sources import Answer

SETTLED_WITHIN = timedelta(minutes=5)
"""P9: a job that has ended is refunded within this time."""
CLOCKS_APART = timedelta(minutes=10)
"""The event's time and the source's finished_at are two readings of one end, by two clocks. Where the policy's version
or the account's status changed between two readings that are this close, either of them may be right."""
NOT_YET = "ended just now: the event may be on its way"
NO_CHARGE_CAN_HAVE_THIS_ID = "the job's id is none that a charge can have"
ID_LENGTH_MAX = 128


@dataclass(frozen=True, slots=True)
class Booked:
    """What the ledger has of a job: its charge, and how that is settled; `credits` are whole."""

    charge_id: int
    account_id: str
    credits: int
    opened_at: datetime
    deadline_at: datetime
    kind: SettlementKind | None
    """None: the charge is open."""
    event_time: datetime | None
    settled_at: datetime | None
    corrected: bool
    """Whether a capture was refunded later, by reversal."""
    history: StatusHistory

    @property
    def is_refunded(self) -> bool:
        """Whether the customer has the credits back: by a refund, or by a correction of the capture."""
        return self.kind is SettlementKind.REFUNDED or self.corrected


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the comparison of one job found; without breaks and without a reason both sides agree."""

    breaks: tuple[Break, ...] = ()
    not_comparable: str | None = None


def judge(
    job: FinishedJob,
    booked: Booked | None,
    *,
    policy: Policy,
    now: datetime,
    overdue_grace: timedelta,
    grace: timedelta,
) -> Verdict:
    """Return whether the ledger agrees with what the source says of a job that has ended.

    `now` is `kino.clock()`; for `grace` after a job's end its event may be on its way. An ending is judged as `settle`
    judges its event: by the policy and by the account's status at its time, within [opened_at, now].
    """
    young = now < job.finished_at + grace
    if booked is None:
        if not can_be_charged(job.job_id):
            return Verdict(not_comparable=NO_CHARGE_CAN_HAVE_THIS_ID)
        if job.answer.state is not JobState.COMPLETED:
            return Verdict()  # nothing was charged, and nothing is owed: the two agree
        return Verdict(not_comparable=NOT_YET) if young else Verdict((_uncharged(job),))
    if booked.kind is None and young:
        return Verdict(not_comparable=NOT_YET)
    found = [*_terms(job, booked)]
    if booked.kind is None:
        found.append(_missing_event(job, booked))
    else:
        found += _contradictions(job, booked, policy=policy, now=now)
        found += _lateness(job, booked, overdue_grace=overdue_grace)
    return Verdict(tuple(found))


def can_be_charged(job_id: str) -> bool:
    """Tell whether a charge can have this id: the ledger refuses others, and Postgres cannot even look some up."""
    return len(job_id) <= ID_LENGTH_MAX and job_id.isprintable()


def _uncharged(job: FinishedJob) -> Break:
    return Break(
        kind=BreakKind.UNCHARGED_JOB,
        job_id=job.job_id,
        credits=job.credits or 0,
        detail=(
            f"{_said(job)}, and the ledger has no charge for it: the customer has the video for nothing, or this is"
            " another system's job, and then the source's list must leave it out"
        ),
        sides=f"no charge / completed {job.account_id!a:.60} {job.credits}",
        happened_at=job.finished_at,
    )


def _terms(job: FinishedJob, booked: Booked) -> Iterator[Break]:
    if job.account_id is not None and job.account_id != booked.account_id:
        sides = f"{booked.account_id!a:.60} / {job.account_id!a:.60}"
        yield Break(
            kind=BreakKind.ACCOUNT_DIFFERS,
            job_id=job.job_id,
            charge_id=booked.charge_id,
            credits=booked.credits,
            detail=f"charged to account {booked.account_id!a:.60}, and the source says account {job.account_id!a:.60}",
            sides=sides,
            happened_at=booked.opened_at,
        )
    if job.credits is not None and job.credits != booked.credits:
        yield Break(
            kind=BreakKind.CREDITS_DIFFER,
            job_id=job.job_id,
            charge_id=booked.charge_id,
            credits=abs(job.credits - booked.credits),
            detail=f"charged {booked.credits:,} credits, and the source says {job.credits:,}",
            sides=f"{booked.credits} / {job.credits}",
            happened_at=booked.opened_at,
        )


def _missing_event(job: FinishedJob, booked: Booked) -> Break:
    return Break(
        kind=BreakKind.MISSING_EVENT,
        job_id=job.job_id,
        charge_id=booked.charge_id,
        credits=booked.credits,
        detail=f"{_said(job)}, and its charge is open: no event settled it",
        sides=f"open / {ending_of(job.answer).ending}",
        happened_at=job.finished_at,
        ending=ending_of(job.answer).ending,
    )


def _contradictions(job: FinishedJob, booked: Booked, *, policy: Policy, now: datetime) -> Iterator[Break]:
    assert booked.event_time is not None, "the charge is settled"
    instants = {job.finished_at}
    if abs(booked.event_time - job.finished_at) <= CLOCKS_APART:
        instants.add(booked.event_time)
    if any(_is_covered(job, booked, policy, at=at, now=now) is booked.is_refunded for at in instants):
        return
    completed = job.answer.state is JobState.COMPLETED
    if not booked.is_refunded:
        kind, stands, owed = BreakKind.FAILED_BUT_CAPTURED, "captured", "the policy refunds that"
    elif completed:
        kind, stands, owed = BreakKind.COMPLETED_BUT_REFUNDED, "refunded", "the policy refunds no completed job"
    else:
        kind, stands, owed = BreakKind.NOT_COVERED_BUT_REFUNDED, "refunded", "the policy does not refund that"
    yield Break(
        kind=kind,
        job_id=job.job_id,
        charge_id=booked.charge_id,
        credits=booked.credits,
        detail=f"{_said(job)}, and its charge is {stands}: {owed}",
        sides=f"{stands} / {ending_of(job.answer).ending}",
        happened_at=max(job.finished_at, booked.settled_at or job.finished_at),
        ending=ending_of(job.answer).ending,
    )


def _is_covered(job: FinishedJob, booked: Booked, policy: Policy, *, at: datetime, now: datetime) -> bool:
    as_of = clamped(at, opened_at=booked.opened_at, now=now)
    violation = booked.history.at(as_of) is PastStatus.TERMINATED_FOR_VIOLATION
    # A person corrects a capture for an account that was terminated wrongly: its history still says terminated.
    forfeits = violation and not booked.corrected
    return coverage_of(ending_of(job.answer), policy.at(as_of), terminated_for_violation=forfeits).refund


def _lateness(job: FinishedJob, booked: Booked, *, overdue_grace: timedelta) -> Iterator[Break]:
    # A correction is late by its nature, and the break that it repaired has said so.
    if booked.kind is not SettlementKind.REFUNDED or booked.settled_at is None:
        return
    # After a lost event, P9 counts from the deadline and its grace.
    by = max(job.finished_at, booked.deadline_at + overdue_grace) + SETTLED_WITHIN
    if booked.settled_at > by:
        yield Break(
            kind=BreakKind.LATE,
            job_id=job.job_id,
            charge_id=booked.charge_id,
            credits=booked.credits,
            detail=f"{_said(job)}, and was refunded at {written(booked.settled_at)}, {booked.settled_at - by} too late",
            sides=f"{written(booked.settled_at)} / {written(by)}",
            happened_at=by,
        )


def orphan(job_id: str, booked: Booked) -> Break:
    """Return the break for a settled charge whose job the source does not know."""
    stands = "refunded" if booked.is_refunded else "captured"
    return Break(
        kind=BreakKind.ORPHAN_CHARGE,
        job_id=job_id,
        charge_id=booked.charge_id,
        credits=booked.credits,
        detail=f"the charge is {stands}, and the source does not know the job",
        sides=f"{stands} / unknown",
        happened_at=booked.settled_at,
    )


def written(instant: datetime) -> str:
    """Write an instant in UTC, for a sentence."""
    return instant.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _said(job: FinishedJob) -> str:
    return f"the source says {ending_of(job.answer).ending} at {written(job.finished_at)}"


_ANY_TIME = datetime(2000, 1, 1, tzinfo=UTC)
_ANY_CHARGE = OverdueCharge(
    charge_id=1,
    job_id="job",
    account_id="account",
    credits=0,
    opened_at=_ANY_TIME,
    due_at=_ANY_TIME,
    asks=0,
)


def ending_of(answer: Answer) -> Event:
    """Return an event that ends a job in this way, for the policy: its job, account and time mean nothing."""
    return _ending_of(replace(answer, finished_at=None))


@cache
def _ending_of(answer: Answer) -> Event:
    # Some dozen endings exist: a million jobs build no more events than that.
    return event_of(_ANY_CHARGE, answer)
