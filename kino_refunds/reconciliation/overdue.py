"""The overdue sweep: find charges whose job's event never came, and ask how the job ended (P9; design, section 7).

An ending that the source knows becomes an event, and is settled by `settle` like any other. For a job that no source
knows, the sweep may presume a timeout (clause 2.timeout). It never does so while the event may be missing because of
this system itself: see `reconciliation/guard.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import redis
import sqlalchemy as sa
from pydantic import ValidationError

from kino_refunds.events.schema import stored_ids
from kino_refunds.reconciliation.asking import Asked, ask_about
from kino_refunds.reconciliation.clocks import read_clocks
from kino_refunds.reconciliation.endings import event_of
from kino_refunds.reconciliation.guard import OverdueCharge, WithheldReason, note_queued, read_guard
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.reconciliation.verified import read_verified
from kino_refunds.settlement.batch import settle_batch
from kino_refunds.settlement.breaks import Break, BreakKind, raise_breaks
from kino_refunds.settlement.deliveries import delivery_of
from kino_refunds.settlement.outcomes import Outcome
from kino_refunds.telemetry.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from kino_refunds.reconciliation.sources import JobSource
    from kino_refunds.settings import Settings
    from kino_refunds.settlement.deliveries import Delivery
    from kino_refunds.settlement.rules import Rules

log = get_logger(__name__)

PAGE = 500


@dataclass(frozen=True, slots=True)
class Which:
    """The open charges that a sweep asks about.

    By default those past deadline and grace. `early` takes the others too: after a flush the source knows how a job
    ended long before its deadline. `job_id` and `opened_since` narrow that down.
    """

    early: bool = False
    job_id: str | None = None
    opened_since: datetime | None = None

    @classmethod
    def job(cls, job_id: str) -> Which:
        """Return the open charge of one job."""
        return cls(early=True, job_id=job_id)

    @classmethod
    def since(cls, opened_since: datetime) -> Which:
        """Return the open charges that were opened at this instant or later."""
        return cls(early=True, opened_since=opened_since)


OVERDUE, ALL_OPEN = Which(), Which(early=True)


@dataclass(frozen=True, slots=True)
class OverdueRules:
    """When the sweep asks about a job, how often, and for how long."""

    grace: timedelta
    asks: int
    ask_window: timedelta
    running_max: timedelta

    @property
    def ask_spacing(self) -> timedelta:
        """The least time between two asks about one job: three asks in one bad second would count as one.

        Shorter than the even share of the window, so that a sweep which starts a moment early is not skipped, and the
        last ask is still inside the window.
        """
        return self.ask_window / (self.asks + 1)


def overdue_rules_of(settings: Settings) -> OverdueRules:
    """Return the rules of the sweep, from the settings."""
    return OverdueRules(
        grace=settings.overdue_grace,
        asks=settings.overdue_asks,
        ask_window=timedelta(seconds=settings.overdue_ask_window_s),
        running_max=timedelta(hours=settings.overdue_running_max_h),
    )


@dataclass
class OverdueReport:
    """The result of one sweep, or with `dry_run` what it would be; credits are whole."""

    dry_run: bool
    overdue: int = 0
    early: int = 0
    """Jobs that were asked about before deadline and grace, or again sooner than the sweep would."""
    asked: int = 0
    source_errors: int = 0
    """Jobs for which the source failed."""
    source_broken: int = 0
    """Jobs that have no answer because the source broke its contract."""
    source_problem: str | None = None
    """What was wrong with the source. A broken contract is named before a failure, because time does not fix it."""
    source_away: bool = False
    """Whether the sweep stopped asking until the next one."""
    answers: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    refunded_credits: int = 0
    withheld: Counter[str] = field(default_factory=Counter)
    """Presumed timeouts that were due and were withheld, by the reason."""
    verified_through: datetime | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return {
            "dry_run": self.dry_run,
            "overdue": self.overdue,
            "early": self.early,
            "asked": self.asked,
            "source_errors": self.source_errors,
            "source_broken": self.source_broken,
            "source_problem": self.source_problem,
            "answers": dict(self.answers),
            "outcomes": dict(self.outcomes),
            "refunded": self.outcomes[Outcome.REFUNDED.value],
            "refunded_credits": self.refunded_credits,
            "withheld": dict(self.withheld),
            "verified_through": self.verified_through and self.verified_through.isoformat(),
        }


def sweep_overdue(
    engine: sa.Engine,
    redis_client: redis.Redis,
    source: JobSource | None,
    rules: Rules,
    *,
    overdue: OverdueRules,
    which: Which = OVERDUE,
    dry_run: bool = False,
    progress: Callable[[OverdueReport], None] = lambda _: None,
) -> OverdueReport:
    """Find every overdue charge, ask about its job, and settle the endings that are known; one pass. Return the report.

    `which` takes other open charges too. Of a job that is not overdue only an ending counts: `unknown` and `running`
    are not noted, and nothing is presumed. `source` None means that there is none: every job is unknown at once. With
    `dry_run` nothing is written, and the outcomes are those of the events that would be settled. `progress` is called
    with the report after each page.

    Raises what Postgres raises, and BadSettings if the source's own setting keeps it from answering at all. Any other
    failure of the source, or of Redis, withholds presumed timeouts and does not end the sweep.
    """
    report, asked = OverdueReport(dry_run), Asked()
    with engine.connect() as connection:
        clocks = read_clocks(connection, redis_client)
    now = clocks.decides
    skewed = clocks.redis is not None and clocks.disagreement() is not None
    if not dry_run:
        note_queued(engine, redis_client, now=now)
    # The spacing lets a source get over a bad minute. Without a source there is nothing to wait for.
    asked_before = now if source is None else now - overdue.ask_spacing
    for found in _pages(engine, overdue, which, now=now, asked_before=asked_before):
        page, early = found.due, found.early
        report.overdue += len(page)
        report.early += len(early)
        answers = _ask(source, [*page, *early], asked, report)
        report.answers.update(answer.state.value for answer in answers.values())
        # An ask does not count while the clocks disagree: by a wrong clock it may seem hours after the one before.
        asks = _note_answers(engine, page, answers, now=now, dry_run=dry_run or skewed)
        _raise_running(engine, page, answers, running_max=overdue.running_max, now=now, dry_run=dry_run)
        known = [c for c in (*page, *early) if c.job_id in answers and answers[c.job_id].state not in _NOT_AN_END]
        deliveries = [each for charge in known for each in _deliver(charge, answers[charge.job_id], report)]
        unheard = [
            charge
            for charge in page
            if charge.job_id in answers
            and answers[charge.job_id].state is JobState.UNKNOWN
            and (source is None or asks[charge.charge_id] >= overdue.asks)
        ]
        deliveries += _presumed_timeouts(
            engine, redis_client, unheard, report, now=now, source_configured=source is not None
        )
        _settle(engine, deliveries, [*page, *early], rules=rules, report=report)
        progress(report)
    with engine.connect() as connection:
        report.verified_through = read_verified(connection).through
    return report


_NOT_AN_END = frozenset({JobState.RUNNING, JobState.UNKNOWN})


@dataclass(frozen=True, slots=True)
class _Found:
    """A page of open charges: those whose asks count, and those that are asked about early or once more."""

    due: list[OverdueCharge]
    early: list[OverdueCharge]


def _pages(
    engine: sa.Engine, overdue: OverdueRules, which: Which, *, now: datetime, asked_before: datetime
) -> Iterator[_Found]:
    after: tuple[datetime, int] | None = None
    while True:
        with engine.connect() as connection:
            rows = connection.execute(
                _OPEN if which.early else _OVERDUE,
                {
                    "due_before": now - overdue.grace,
                    "asked_before": asked_before,
                    "now": now,
                    "after_deadline": after and after[0],
                    "after_id": after and after[1],
                    "limit": PAGE,
                    **({"job_id": which.job_id, "opened_since": which.opened_since} if which.early else {}),
                },
            ).all()
        if not rows:
            return
        after = (rows[-1].deadline_at, rows[-1].charge_id)
        found = _Found([], [])
        for row in rows:
            charge = OverdueCharge(
                charge_id=row.charge_id,
                job_id=row.job_id,
                account_id=row.account_id,
                credits=row.credits,
                opened_at=row.opened_at,
                due_at=row.deadline_at + overdue.grace,
                asks=row.asks,
            )
            if row.askable:
                found.due.append(charge)
            elif which.early:
                found.early.append(charge)
        if found.due or found.early:
            yield found


# An ask that lies in the future was noted by a clock that has been set back since: it does not count.
_PAGE = """
    SELECT o.charge_id, c.job_id, o.account_id, o.credits, c.opened_at, o.deadline_at,
           CASE WHEN a.last_asked_at <= :now THEN a.asks ELSE 0 END AS asks,
           o.deadline_at < :due_before
           AND coalesce(a.last_asked_at <= :asked_before OR a.last_asked_at > :now, true) AS askable
    FROM kino.open_charge o JOIN kino.charge c USING (charge_id) LEFT JOIN kino.overdue_ask a USING (charge_id)
    WHERE {which}
      AND (CAST(:after_deadline AS timestamptz) IS NULL
           OR (o.deadline_at, o.charge_id) > (CAST(:after_deadline AS timestamptz), CAST(:after_id AS bigint)))
    ORDER BY o.deadline_at, o.charge_id
    LIMIT :limit
"""
_OVERDUE = sa.text(_PAGE.format(which="o.deadline_at < :due_before"))
_OPEN = sa.text(
    _PAGE.format(
        which="(CAST(:job_id AS text) IS NULL OR c.job_id = CAST(:job_id AS text))"
        " AND (CAST(:opened_since AS timestamptz) IS NULL OR c.opened_at >= CAST(:opened_since AS timestamptz))"
    )
)


def _ask(
    source: JobSource | None, charges: Sequence[OverdueCharge], asked: Asked, report: OverdueReport
) -> dict[str, Answer]:
    """Return the answers by job id, and put into the report what the source failed on; raises what `ask_about` does."""
    job_ids = [charge.job_id for charge in charges]
    if source is None:
        return dict.fromkeys(job_ids, Answer(JobState.UNKNOWN))
    answers = ask_about(source, job_ids, asked)
    report.asked, report.source_errors, report.source_broken = asked.asked, asked.errors, asked.broken
    report.source_problem, report.source_away = asked.problem, asked.away
    return answers


def _note_answers(
    engine: sa.Engine,
    page: Sequence[OverdueCharge],
    answers: Mapping[str, Answer],
    *,
    now: datetime,
    dry_run: bool,
) -> dict[int, int]:
    """Store the answers `running` and `unknown`; return charge id -> asks in a row with `unknown`, with this one."""
    noted = [(c, answers[c.job_id].state) for c in page if answers.get(c.job_id, _NO_ANSWER).state in _NOT_AN_END]
    asks = {c.charge_id: c.asks + 1 if state is JobState.UNKNOWN else 0 for c, state in noted}
    if noted and not dry_run:
        with engine.begin() as connection:
            connection.execute(
                _NOTE,
                {
                    "charge_ids": [c.charge_id for c, _ in noted],
                    "asks": [asks[c.charge_id] for c, _ in noted],
                    "states": [state.value for _, state in noted],
                    "now": now,
                },
            )
    return asks


_NO_ANSWER = Answer(JobState.COMPLETED)
_NOTE = sa.text("""
    INSERT INTO kino.overdue_ask AS o (charge_id, asks, last_answer, first_asked_at, last_asked_at)
    SELECT charge_id, asks, state, :now, :now
    FROM unnest(CAST(:charge_ids AS bigint[]), CAST(:asks AS integer[]), CAST(:states AS text[]))
         AS n (charge_id, asks, state)
    ORDER BY charge_id
    ON CONFLICT (charge_id) DO UPDATE SET
        asks = excluded.asks, last_answer = excluded.last_answer, last_asked_at = excluded.last_asked_at
    WHERE o.last_asked_at < excluded.last_asked_at OR o.last_asked_at > kino.clock()
""")


def _raise_running(
    engine: sa.Engine,
    page: Sequence[OverdueCharge],
    answers: Mapping[str, Answer],
    *,
    running_max: timedelta,
    now: datetime,
    dry_run: bool,
) -> None:
    """Raise a break for each job that still runs after `running_max`: until then it has time, then a person looks."""
    found = [
        Break(
            kind=BreakKind.RUNNING_PAST_CAP,
            job_id=charge.job_id,
            charge_id=charge.charge_id,
            credits=charge.credits,
            detail=f"the job source still says running, {now - charge.due_at} after the deadline and its grace",
            sides="open / running",
            happened_at=charge.due_at + running_max,
        )
        for charge in page
        if charge.job_id in answers
        and answers[charge.job_id].state is JobState.RUNNING
        and now - charge.due_at > running_max
    ]
    if found and not dry_run:
        with engine.begin() as connection:
            raise_breaks(connection, found)


def _deliver(charge: OverdueCharge, answer: Answer, report: OverdueReport) -> list[Delivery]:
    """Return the event as a delivery, or nothing if the charge's ids are not ids: it must not block other charges."""
    try:
        with stored_ids():  # the charge may be older than today's rule for ids, and must be settled all the same
            return [delivery_of(event_of(charge, answer))]
    except ValidationError as error:
        report.withheld[WithheldReason.IDS] += 1
        log.warning(
            "a charge has ids that no event can carry: a person must decide it, see `kino-refunds why JOB`",
            charge_id=charge.charge_id,
            errors=error.error_count(),
        )
        return []


def _presumed_timeouts(
    engine: sa.Engine,
    redis_client: redis.Redis,
    charges: Sequence[OverdueCharge],
    report: OverdueReport,
    *,
    now: datetime,
    source_configured: bool,
) -> list[Delivery]:
    if not charges:
        return []
    guard = read_guard(engine, redis_client, charges, now=now, source_configured=source_configured)
    with engine.connect() as connection:
        clocks = read_clocks(connection, redis_client)
    disagreement = clocks.disagreement()
    if guard.refused is None and disagreement is not None:
        report.withheld[WithheldReason.CLOCK] += len(charges)
        log.error(
            "presumed timeouts are withheld: the clocks disagree, set them by NTP",
            why=disagreement,
            charges=len(charges),
        )
        return []
    presumed = []
    for charge in charges:
        # `now` was read when the sweep began. If the clock was set back since, the charge may not be overdue yet.
        reason = guard.reason(charge) or (WithheldReason.CLOCK if charge.due_at >= clocks.decides else None)
        if reason is None:
            presumed += _deliver(charge, Answer(JobState.TIMED_OUT), report)
        else:
            report.withheld[reason] += 1
    return presumed


def _settle(
    engine: sa.Engine,
    deliveries: Sequence[Delivery],
    page: Sequence[OverdueCharge],
    *,
    rules: Rules,
    report: OverdueReport,
) -> None:
    if report.dry_run:
        report.outcomes.update(f"would settle: {delivery.event.type}" for delivery in deliveries)
        return
    credits = {charge.job_id: charge.credits for charge in page}
    for ruling in settle_batch(engine, deliveries, rules) if deliveries else ():
        report.outcomes[ruling.outcome.value] += 1
        if ruling.outcome is Outcome.REFUNDED:
            report.refunded_credits += credits[ruling.delivery.event.job_id]
