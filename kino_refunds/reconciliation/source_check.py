"""Try a real job source before anything rests on it: types, order, clock, speed, and that it is only read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from kino_refunds.errors import SourceUnavailable
from kino_refunds.reconciliation.asking import ASK_BATCH, problem_of
from kino_refunds.reconciliation.clocks import SKEW_MAX
from kino_refunds.reconciliation.finished import FinishedJob, FinishedSource, checked
from kino_refunds.reconciliation.judging import written
from kino_refunds.reconciliation.matching_window import NO_LIST
from kino_refunds.reconciliation.sources import Answer, JobState, answers_of
from kino_refunds.reconciliation.sql_source import SqlSource

if TYPE_CHECKING:
    from kino_refunds.reconciliation.sources import JobSource

SAMPLE = 10_000
"""Finished jobs that are read: enough for the order and the speed to show, and little for a source to give."""
LOOKED_BACK = timedelta(days=1)
NOBODY = "no-such-job-a41f0c"
SLOW_ASK_S = 1.0
"""The sweep asks for batches of ASK_BATCH: at a second each an hour's backlog of a large pipeline takes an hour."""
SLOW_ROWS = 1_000
"""Rows a second: at this speed a day of a million jobs takes 17 minutes to read, and the checks share one thread."""


class Level(StrEnum):
    """What a finding means: `fail` breaks the contract, `warn` keeps it at a price, `away` was not answered at all."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    AWAY = "away"


class Finding(NamedTuple):
    """What one look at the source found."""

    what: str
    level: Level
    text: str


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What trying a source found; times are in seconds."""

    findings: tuple[Finding, ...]
    listed: int = 0
    """Finished jobs that were read."""
    rows_per_s: float | None = None
    ask_s: float | None = None
    """The time of one ask about up to ASK_BATCH jobs."""
    complete_through: datetime | None = None

    @property
    def is_sound(self) -> bool:
        """Whether the source keeps the contract; warnings leave it so."""
        return all(each.level in {Level.OK, Level.WARN} for each in self.findings)

    @property
    def is_away(self) -> bool:
        """Whether the source could not be tried, and nothing else was wrong with it."""
        levels = {each.level for each in self.findings}
        return Level.AWAY in levels and Level.FAIL not in levels


class _Stop(Exception):
    """A look at the source failed; what follows needs its result."""


class _Trial:
    """The looks at one source, in their order, and what they found."""

    def __init__(self, source: JobSource, now: datetime) -> None:
        self.source = source
        self.now = now
        self.found: list[Finding] = []
        self.jobs: list[FinishedJob] = []
        self.rows_per_s: float | None = None
        self.ask_s: float | None = None
        self.promised: datetime | None = None

    def note(self, what: str, level: Level, text: str) -> None:
        self.found.append(Finding(what, level, text))

    def look(self, what: str, question: Callable[[], Any]) -> Any:
        """Return what the source says; notes its error, and then raises _Stop."""
        try:
            return question()
        except Exception as error:  # a source is foreign code
            away = isinstance(error, SourceUnavailable | TimeoutError)
            self.note(what, Level.AWAY if away else Level.FAIL, problem_of(error))
            raise _Stop from error


def check_source(
    source: JobSource,
    *,
    now: datetime,
    since: datetime | None = None,
    until: datetime | None = None,
    sample: int = SAMPLE,
) -> SourceReport:
    """Try a source and return what was found; nothing is written, and an error of the source is a finding.

    `now` is `kino.clock()`. Lists up to `sample` jobs that finished from `since` to before `until`, by default in the
    day before now or before the source's promise, and asks about some of them.
    """
    trial = _Trial(source, now)
    try:
        if isinstance(source, SqlSource):
            _try_rights(trial, source)
        if isinstance(source, FinishedSource):
            _try_promise(trial, source)
            end = until or min(now, trial.promised or now)
            _try_list(trial, source, since=since or end - LOOKED_BACK, until=end, sample=sample)
            _try_clock(trial, source)
        else:
            trial.note("list", Level.WARN, f"{NO_LIST}; without it `matching` can compare nothing")
        _try_asks(trial)
    except _Stop:
        pass
    return SourceReport(
        findings=tuple(trial.found),
        listed=len(trial.jobs),
        rows_per_s=trial.rows_per_s,
        ask_s=trial.ask_s,
        complete_through=trial.promised,
    )


def _try_rights(trial: _Trial, source: SqlSource) -> None:
    rights = trial.look("read only", source.write_rights)
    if not rights.refuses_writes:
        trial.note("read only", Level.FAIL, "the transaction of a query did not refuse to write")
    elif rights.is_superuser:
        trial.note("read only", Level.WARN, "the login is a superuser: give the source a login that may only read")
    elif rights.writable:
        text = f"the login may write {rights.writable}: give the source a login that may only read"
        trial.note("read only", Level.WARN, text)
    else:
        trial.note("read only", Level.OK, "writes are refused, and the login has no right to write")


def _try_promise(trial: _Trial, source: FinishedSource) -> None:
    promised = trial.look("promise", source.complete_through)
    if promised is None:
        text = "the source does not say how far its list is complete: `matching` reads a day again each time"
        trial.note("promise", Level.WARN, text)
        return
    if not isinstance(promised, datetime) or promised.utcoffset() is None:
        trial.note("promise", Level.FAIL, "complete_through is not a date and time with an offset")
        raise _Stop
    trial.promised = promised
    if promised > trial.now + SKEW_MAX:
        text = f"the source says that it is complete through {written(promised)}, and it is {written(trial.now)}"
        trial.note("promise", Level.FAIL, text)
    else:
        trial.note("promise", Level.OK, f"complete through {written(promised)}, {_ago(trial.now - promised)}")


def _listed(source: FinishedSource, since: datetime, until: datetime) -> Iterator[FinishedJob]:
    return checked(source.finished(since, until), since=since, until=until)


def _try_list(trial: _Trial, source: FinishedSource, *, since: datetime, until: datetime, sample: int) -> None:
    began = time.monotonic()
    jobs: Sequence[FinishedJob] = trial.look("list", lambda: list(islice(_listed(source, since, until), sample)))
    took = time.monotonic() - began
    trial.jobs = list(jobs)
    window = f"from {written(since)} to before {written(until)}"
    if not jobs:
        trial.note("list", Level.WARN, f"no job finished {window}: nothing of the list could be tried")
        return
    trial.note("list", Level.OK, f"{len(jobs):,} jobs {window}: types, order and window are right")
    named = [name for name in ("account_id", "credits") if any(getattr(job, name) is not None for job in jobs)]
    missing = [name for name in ("account_id", "credits") if name not in named]
    if missing:
        trial.note("columns", Level.WARN, f"no job has {' or '.join(missing)}: that is not compared")
    if len(jobs) >= ASK_BATCH:  # fewer say nothing of the speed
        trial.rows_per_s = len(jobs) / max(took, 1e-6)
        slow = trial.rows_per_s < SLOW_ROWS
        text = f"{trial.rows_per_s:,.0f} rows a second"
        advice = ": an index on the column of finished_at makes that faster" if slow else ""
        trial.note("speed of the list", Level.WARN if slow else Level.OK, text + advice)
    _try_list_again(trial, source, since=since)


def _try_list_again(trial: _Trial, source: FinishedSource, *, since: datetime) -> None:
    # Up to an instant in the middle: that the window's end is outside shows as well.
    cut = trial.jobs[len(trial.jobs) // 2].finished_at
    first = [job for job in trial.jobs if job.finished_at < cut]
    again = trial.look("list again", lambda: list(islice(_listed(source, since, cut), len(first) + 1)))
    gone, added = {*first} - {*again}, {*again} - {*first}
    if not gone and not added:
        trial.note("list again", Level.OK, "the same jobs are listed again")
    elif not gone and (trial.promised is None or trial.promised < cut):
        text = f"{len(added):,} jobs came late into the list, {min(each.job_id for each in added)!a:.60}"
        trial.note("list again", Level.WARN, f"{text}: without a promise they may be missed")
    else:
        differ = sorted({each.job_id for each in gone ^ added})
        text = f"the list is another one the second time: {len(differ):,} jobs differ, {differ[0]!a:.60}"
        trial.note("list again", Level.FAIL, text)


def _try_clock(trial: _Trial, source: FinishedSource) -> None:
    begin, end = trial.now + SKEW_MAX, trial.now + timedelta(days=3650)
    ahead = trial.look("clock", lambda: list(islice(_listed(source, begin, end), 1)))
    if ahead:
        text = (
            f"job {ahead[0].job_id!a:.60} finished at {written(ahead[0].finished_at)}, and it is {written(trial.now)}"
        )
        trial.note("clock", Level.FAIL, f"{text}: look at the zone of the column, and at the source's clock")
    elif trial.jobs:
        newest = trial.jobs[-1].finished_at
        trial.note(
            "clock",
            Level.OK,
            f"no job finished in the future; the last one read {max(trial.now - newest, timedelta(0))} ago",
        )


def _try_asks(trial: _Trial) -> None:
    # Spread over the list: a source that knows the newest jobs only is found as well.
    step = max(1, len(trial.jobs) // (ASK_BATCH - 1))
    asked = {job.job_id: job.answer for job in trial.jobs[::step][: ASK_BATCH - 1]}
    padded = f"{next(iter(asked), NOBODY)} "
    began = time.monotonic()
    answers = trial.look("ask", lambda: answers_of(trial.source.ask([NOBODY, *asked]), [NOBODY, *asked]))
    took = time.monotonic() - began
    unknown, likes = Answer(JobState.UNKNOWN), [padded]
    if answers.get(NOBODY) != unknown:
        trial.note("unknown job", Level.FAIL, f"a job that no pipeline has is not answered `unknown` ({NOBODY})")
    elif trial.look("unknown job", lambda: dict(trial.source.ask(likes))) != {padded: unknown}:
        text = f"{padded!a:.60}, with a space at its end, is not answered `unknown`: ids are cut, padded or folded"
        trial.note("unknown job", Level.FAIL, text)
    else:
        trial.note("unknown job", Level.OK, "a job that does not exist is answered `unknown`")
    if not asked:
        return
    differ = [job_id for job_id, answer in asked.items() if answers.get(job_id) != answer]
    if differ:
        text = f"{len(differ):,} of {len(asked):,} jobs are answered otherwise than they are listed: {differ[0]!a:.60}"
        trial.note("ask", Level.FAIL, text)
    else:
        trial.note("ask", Level.OK, f"{len(asked):,} jobs are answered as they are listed")
    trial.ask_s = took
    slow = took > SLOW_ASK_S
    text = f"an ask about {len(asked) + 1} jobs took {took:.3f} s"
    advice = ": an index on job_id makes that faster" if slow else ""
    trial.note("speed of an ask", Level.WARN if slow else Level.OK, text + advice)


def _ago(passed: timedelta) -> str:
    return f"{max(passed.total_seconds(), 0.0):,.0f} s ago"
