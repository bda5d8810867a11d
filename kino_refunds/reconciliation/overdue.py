"""The overdue sweep: find charges whose job's event never came, and ask how the job ended (P9; design, section 7).

An ending that the source knows becomes an event, and is settled by `settle` like any other. For a job that no source
knows, the sweep may presume a timeout (clause 2.timeout). It never does so while the event may be missing because of
this system itself: see `reconciliation/guard.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, assert_never

import redis
import sqlalchemy as sa
from pydantic import ValidationError

from kino_refunds.errors import (
    BadSettings,
    ForeignAnswer,
    KinoError,
    SourceBroken,
    SourceUnavailable,
    SourceUnreachable,
)
from kino_refunds.events.schema import JobCompleted, JobFailed, JobSafetyRejected, JobTimedOut, stored_ids
from kino_refunds.reconciliation.clocks import read_clocks
from kino_refunds.reconciliation.guard import OverdueCharge, WithheldReason, note_queued, read_guard
from kino_refunds.reconciliation.sources import Answer, JobState, answers_of
from kino_refunds.reconciliation.verified import read_verified
from kino_refunds.settlement.batch import settle_batch
from kino_refunds.settlement.breaks import Break, BreakKind, raise_breaks
from kino_refunds.settlement.deliveries import RECONCILER, delivery_of
from kino_refunds.settlement.outcomes import Outcome
from kino_refunds.telemetry.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from kino_refunds.events.schema import Event
    from kino_refunds.reconciliation.sources import JobSource
    from kino_refunds.settings import Settings
    from kino_refunds.settlement.deliveries import Delivery
    from kino_refunds.settlement.rules import Rules

log = get_logger(__name__)

PAGE = 500
ASK_BATCH = 100
"""Jobs in one ask: small enough for a query string or an IN list of any source."""
TIMEOUTS_MAX = 10
"""Asks in a row that may end in a timeout: more than the 8 of a batch that is halved down to its one slow job. Without
this limit a source that hangs would hold a sweep for 199 timeouts a batch, half an hour, and one of the worker's two
threads with it. The price: four slow jobs at the head of a batch delay the jobs behind them, which is reported."""
LEFT_OUT = "the job source left out jobs that it was asked for: it must say `unknown` of those that it does not know"
PROBLEM_MAX = 300
"""Characters of a source's error that are kept: some errors are a whole page."""


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
    dry_run: bool = False,
    progress: Callable[[OverdueReport], None] = lambda _: None,
) -> OverdueReport:
    """Find every overdue charge, ask about its job, and settle the endings that are known; one pass. Return the report.

    `source` None means that there is none: every overdue job is unknown at once. With `dry_run` nothing is written, and
    the outcomes are those of the events that would be settled. `progress` is called with the report after each page.

    Raises what Postgres raises, and BadSettings if the source's own setting keeps it from answering at all. Any other
    failure of the source, or of Redis, withholds presumed timeouts and does not end the sweep.
    """
    report = OverdueReport(dry_run)
    with engine.connect() as connection:
        clocks = read_clocks(connection, redis_client)
    now = clocks.decides
    skewed = clocks.redis is not None and clocks.disagreement() is not None
    if not dry_run:
        note_queued(engine, redis_client, now=now)
    # The spacing lets a source get over a bad minute. Without a source there is nothing to wait for.
    asked_before = now if source is None else now - overdue.ask_spacing
    for page in _pages(engine, overdue, now, asked_before):
        report.overdue += len(page)
        answers = _ask(source, page, report)
        report.answers.update(answer.state.value for answer in answers.values())
        # An ask does not count while the clocks disagree: by a wrong clock it may seem hours after the one before.
        asks = _note_answers(engine, page, answers, now=now, dry_run=dry_run or skewed)
        _raise_running(engine, page, answers, running_max=overdue.running_max, now=now, dry_run=dry_run)
        known = [c for c in page if c.job_id in answers and answers[c.job_id].state not in _NOT_AN_END]
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
        _settle(engine, deliveries, page, rules=rules, report=report)
        progress(report)
    with engine.connect() as connection:
        report.verified_through = read_verified(connection).through
    return report


_NOT_AN_END = frozenset({JobState.RUNNING, JobState.UNKNOWN})


def _pages(
    engine: sa.Engine, overdue: OverdueRules, now: datetime, asked_before: datetime
) -> Iterator[list[OverdueCharge]]:
    after: tuple[datetime, int] | None = None
    while True:
        with engine.connect() as connection:
            rows = connection.execute(
                _OVERDUE,
                {
                    "due_before": now - overdue.grace,
                    "asked_before": asked_before,
                    "now": now,
                    "after_deadline": after and after[0],
                    "after_id": after and after[1],
                    "limit": PAGE,
                },
            ).all()
        if not rows:
            return
        after = (rows[-1].deadline_at, rows[-1].charge_id)
        page = [
            OverdueCharge(
                charge_id=row.charge_id,
                job_id=row.job_id,
                account_id=row.account_id,
                credits=row.credits,
                opened_at=row.opened_at,
                due_at=row.deadline_at + overdue.grace,
                asks=row.asks,
            )
            for row in rows
            if row.askable
        ]
        if page:
            yield page


# An ask that lies in the future was noted by a clock that has been set back since: it does not count.
_OVERDUE = sa.text("""
    SELECT o.charge_id, c.job_id, o.account_id, o.credits, c.opened_at, o.deadline_at,
           CASE WHEN a.last_asked_at <= :now THEN a.asks ELSE 0 END AS asks,
           coalesce(a.last_asked_at <= :asked_before OR a.last_asked_at > :now, true) AS askable
    FROM kino.open_charge o JOIN kino.charge c USING (charge_id) LEFT JOIN kino.overdue_ask a USING (charge_id)
    WHERE o.deadline_at < :due_before
      AND (CAST(:after_deadline AS timestamptz) IS NULL
           OR (o.deadline_at, o.charge_id) > (CAST(:after_deadline AS timestamptz), CAST(:after_id AS bigint)))
    ORDER BY o.deadline_at, o.charge_id
    LIMIT :limit
""")


def _ask(source: JobSource | None, page: Sequence[OverdueCharge], report: OverdueReport) -> dict[str, Answer]:
    """Return the source's answers by job id; a job that the source left out, or failed on, is missing.

    Asks in batches. A batch that fails is halved until the failing jobs are alone; they are left for the next sweep. A
    batch with an answer for another job is not halved: that answer may belong to any of its jobs, so none of them has
    an answer until the source is fixed.
    """
    job_ids = [charge.job_id for charge in page]
    if source is None:
        return dict.fromkeys(job_ids, Answer(JobState.UNKNOWN))
    answers: dict[str, Answer] = {}
    parts = [job_ids[start : start + ASK_BATCH] for start in range(0, len(job_ids), ASK_BATCH)]
    timeouts = 0
    while parts and not report.source_away:
        part = parts.pop()
        report.asked += len(part)
        try:
            said = answers_of(source.ask(part), part)
            timeouts = 0
            answers |= said
            if left_out := [job_id for job_id in part if job_id not in said]:
                # Reported, because a source that never says `unknown` would keep these jobs open forever, unnoticed.
                _note_problem(SourceUnavailable(LEFT_OUT), left_out, report)
        except BadSettings:
            raise
        except Exception as error:  # noqa: BLE001 - a source is foreign code; any error of it is no answer
            timeouts = timeouts + 1 if isinstance(error, TimeoutError) else 0
            report.source_away = isinstance(error, SourceUnreachable) or timeouts > TIMEOUTS_MAX
            if len(part) > 1 and not report.source_away and not isinstance(error, ForeignAnswer):
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
            else:
                _note_problem(error, part, report)
    report.source_errors += sum(map(len, parts))
    return answers


def _note_problem(error: Exception, part: Sequence[str], report: OverdueReport) -> None:
    """Count the jobs that have no answer; log and keep the reason once, not for each of 600 jobs."""
    broken = isinstance(error, SourceBroken)
    said = str(error) if isinstance(error, KinoError) else f"{type(error).__name__}: {error}"
    # The text is stored as jsonb, which takes no NUL and no lone surrogate: no error text may fail the slot's row.
    text = "".join(each if each.isprintable() else repr(each)[1:-1] for each in said[:PROBLEM_MAX])
    if text != report.source_problem:
        log.warning("the job source failed", jobs=len(part), first_job_id=part[0], broken=broken, error=text)
    if broken or not report.source_broken:
        report.source_problem = text
    if broken:
        report.source_broken += len(part)
    else:
        report.source_errors += len(part)


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


def event_of(charge: OverdueCharge, answer: Answer) -> Event:
    """Return the event that should have come, made from charge and answer alone: two sweeps make the same event.

    The id contains everything that the content depends on. So a source that answers differently the second time, even
    if it only knows `finished_at` by then, makes another event. The first one settles the charge (P1), and the second
    finds it settled. Under one id the second would be a conflicting duplicate, a dead letter that means nothing.

    A `finished_at` before the charge was opened, or in the future, is kept unchanged. It moves no money, because the
    policy version and the account's status are read at a time within [opened_at, now], as for every event. If it were
    refused, a clock that is a second fast would keep a job open.

    Raises ValueError for an answer that is not the end of a job, and pydantic's ValidationError if an id of the charge
    is not an id.
    """
    at = charge.due_at if answer.finished_at is None else answer.finished_at
    common: dict[str, Any] = {
        "source": RECONCILER,
        "time": at,
        "job_id": charge.job_id,
        "account_id": charge.account_id,
    }
    event_id = f"overdue:{charge.charge_id}:{answer.state}"
    finished = "" if answer.finished_at is None else f"@{at.isoformat(timespec='microseconds').replace('+00:00', 'Z')}"
    match answer.state:
        case JobState.COMPLETED:
            return JobCompleted.of(id=f"{event_id}{finished}", **common)
        case JobState.FAILED:
            error = {"code": "reported_by_job_source", "origin": answer.origin}
            return JobFailed.of(id=f"{event_id}.{answer.origin}{finished}", error=error, **common)
        case JobState.TIMED_OUT:
            # Without a result the event is the same as a presumed timeout, and as that of builds without this field.
            result = ".result_produced" if answer.result_produced else ""
            return JobTimedOut.of(id=f"{event_id}{result}{finished}", result_produced=answer.result_produced, **common)
        case JobState.REJECTED:
            return JobSafetyRejected.of(
                id=f"{event_id}.{answer.stage}{finished}",
                stage=answer.stage,
                category="reported_by_job_source",
                **common,
            )
        case JobState.RUNNING | JobState.UNKNOWN:
            raise ValueError(f"{answer.state} is not the end of a job")
        case _:
            assert_never(answer.state)


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
