"""The check `matching`: the job source's finished jobs against charges and settlements, both ways (design, part B).

    1. the source's list, from window.since to before window.until  ->  the ledger's charges of these jobs
    2. settlements of window.from_xid to before window.to_xid       ->  the source, asked about their jobs

The first finds what the ledger lacks or decided otherwise, the second what only the ledger knows. A source that is
away, that breaks its contract, or that lists nothing where the ledger has settlements is not comparable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.errors import BadSettings
from kino_refunds.reconciliation.asking import Asked, ask_about
from kino_refunds.reconciliation.booked import BY_KEY, read_booked
from kino_refunds.reconciliation.comparison import PAGE, LiveBreak, Page, Scope, Window
from kino_refunds.reconciliation.finished import ENDS, FinishedJob, FinishedSource, checked
from kino_refunds.reconciliation.judging import Booked, Verdict, judge, orphan, written
from kino_refunds.reconciliation.matching_window import NO_LIST, NO_SOURCE, NoList, read_promise, reason_of
from kino_refunds.reconciliation.sources import JobState
from kino_refunds.settlement.breaks import BreakKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kino_refunds.reconciliation.finished import Place
    from kino_refunds.reconciliation.sources import Answer, JobSource
    from kino_refunds.settlement.breaks import Break

BROKEN_MAX = 10_000
"""Broken jobs that are kept in memory; with more of them, what the list leaves out is not looked for."""
BEHIND = "the source lists no job that finished later: it may be behind"
OWN_KINDS = {
    BreakKind.FAILED_BUT_CAPTURED: BreakKind.FAILED_AFTER_CAPTURE,
    BreakKind.COMPLETED_BUT_REFUNDED: BreakKind.COMPLETED_AFTER_REFUND,
}
"""Kinds of matching, each with the kind by which the job's own event already says the same."""
KINDS = (
    BreakKind.MISSING_EVENT,
    BreakKind.FAILED_BUT_CAPTURED,
    BreakKind.COMPLETED_BUT_REFUNDED,
    BreakKind.NOT_COVERED_BUT_REFUNDED,
    BreakKind.ACCOUNT_DIFFERS,
    BreakKind.CREDITS_DIFFER,
    BreakKind.UNCHARGED_JOB,
    BreakKind.ORPHAN_CHARGE,
    BreakKind.LATE,
)
"""The kinds that this check finds, and closes."""


# --- a run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cursor:
    """Where the next page begins: behind a place in the source's list, or behind a charge in the second part."""

    listed: int = 0
    """Jobs that the source listed so far."""
    place: Place | None = None
    """The last job of the list that was compared."""
    charge_id: int | None = None
    """None: in the first part; 0: at the beginning of the second."""

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> _Cursor:
        place = None
        if "at" in stored:
            place = datetime.fromisoformat(stored["at"]), bytes.fromhex(stored["job"]).decode("utf-8", "surrogatepass")
        return cls(stored.get("listed", 0), place, stored.get("charge_id"))

    def written(self) -> dict[str, Any]:
        kept: dict[str, Any] = {"listed": self.listed}
        if self.place is not None:
            # In hex, because a job's id may hold what jsonb refuses (NUL).
            at, job_id = self.place
            kept |= {"at": at.isoformat(), "job": job_id.encode("utf-8", "surrogatepass").hex()}
        if self.charge_id is not None:
            kept["charge_id"] = self.charge_id
        return kept


@dataclass
class _Broken:
    """Jobs that the first part found broken: the second part must not count them again."""

    is_known: bool
    """False: they are not all known, so any job may be one of them."""
    jobs: set[str] = field(default_factory=set)

    def add(self, job_ids: Iterable[str]) -> None:
        self.jobs.update(job_ids)
        if len(self.jobs) > BROKEN_MAX:
            self.is_known = False
            self.jobs.clear()

    def may_have(self, job_id: str) -> bool:
        return not self.is_known or job_id in self.jobs


def pages(scope: Scope, cursor: Mapping[str, Any]) -> Generator[Page]:
    """Compare the window page by page, from `cursor` on; the last page is not comparable if the source is not.

    Raises what Postgres raises; an error of the source is never raised.
    """
    begin = _Cursor.read(cursor)
    source = scope.source
    if not isinstance(source, FinishedSource):
        yield _not_comparable(scope, begin, NO_SOURCE if source is None else NO_LIST)
        return
    # A run that goes on after a kill does not know what its first process found in the list.
    broken = _Broken(is_known=not cursor)
    try:
        detail = _detail(_standing_promise(source, scope.window))
        for page in _compare_list(scope, source, begin, detail, broken=broken):
            yield page
            begin = _Cursor.read(page.cursor)
    except NoList as error:
        yield _not_comparable(scope, begin, str(error))
        return
    yield from _compare_settlements(scope, source, begin, detail, broken=broken)


def _not_comparable(scope: Scope, cursor: _Cursor, why: str) -> Page:
    return Page(
        cursor=cursor.written(),
        not_comparable={why: _settlements(scope)},
        detail={"why": why},
        is_comparable=False,
    )


def _standing_promise(source: FinishedSource, window: Window) -> datetime | None:
    """Return the source's promise, now; raises NoList if it was taken back since the window was chosen."""
    promised = read_promise(source)
    if promised is not None and promised < window.until:
        raise NoList(
            f"the source took back its promise: it was complete through {written(window.until)}, and says"
            f" {written(promised)} now"
        )
    return promised


def _detail(promised: datetime | None) -> dict[str, Any]:
    if promised is not None:
        return {
            "complete_through": promised.isoformat(),
            "assumption": f"the source says that its list is complete through {written(promised)}",
        }
    return {
        "complete_through": None,
        "assumption": "the source does not say how far its list is complete: it is assumed that a job is listed"
        " by the end of the window, and each run reads the last 24 h again",
    }


def _compare_list(
    scope: Scope, source: FinishedSource, begin: _Cursor, detail: Mapping[str, Any], *, broken: _Broken
) -> Iterator[Page]:
    """Yield the pages of the first part; raises NoList."""
    if begin.charge_id is not None:
        return
    for jobs in _listed(source, scope.window, begin.place):
        begin = _Cursor(begin.listed + len(jobs), jobs[-1].place)
        yield _compare(scope, jobs, begin, detail, broken=broken)


def _listed(source: FinishedSource, window: Window, after: Place | None) -> Iterator[list[FinishedJob]]:
    """Yield the source's list in pages; raises NoList for whatever the source does instead."""
    assert window.since is not None, "matching's window has a beginning"
    since = window.since if after is None else after[0]
    try:
        jobs = checked(source.finished(since, window.until), since=since, until=window.until, after=after)
        while page := list(islice(jobs, PAGE)):
            yield page
    except Exception as error:  # a source is foreign code
        raise NoList(reason_of(error)) from error


def _compare(
    scope: Scope, jobs: Sequence[FinishedJob], cursor: _Cursor, detail: Mapping[str, Any], *, broken: _Broken
) -> Page:
    with scope.engine.connect() as connection:
        booked = read_booked(connection, [job.job_id for job in jobs])
        verdicts = [_judge(scope, job, booked.get(job.job_id)) for job in jobs]
        broken.add(job.job_id for job, verdict in zip(jobs, verdicts, strict=True) if verdict.breaks)
        breaks = _without_own(connection, [each for verdict in verdicts for each in verdict.breaks])
    return _page(verdicts, breaks, cursor=cursor, detail=detail)


def _judge(scope: Scope, job: FinishedJob, booked: Booked | None) -> Verdict:
    return judge(
        job,
        booked,
        policy=scope.policy,
        now=scope.now,
        overdue_grace=scope.overdue_grace,
        grace=scope.grace,
    )


def _page(
    verdicts: Sequence[Verdict],
    breaks: Sequence[Break],
    *,
    cursor: _Cursor,
    detail: Mapping[str, Any],
    silent: Mapping[str, int] | None = None,
) -> Page:
    """Return the page of these verdicts; `silent` counts what could not be compared beside them."""
    missing = Counter(verdict.not_comparable for verdict in verdicts if verdict.not_comparable is not None)
    return Page(
        cursor=cursor.written(),
        compared=len(verdicts) - missing.total(),
        broken=sum(1 for verdict in verdicts if verdict.breaks),
        breaks=breaks,
        not_comparable={**missing, **(silent or {})},
        detail=detail,
    )


def _without_own(connection: sa.Connection, breaks: Sequence[Break]) -> list[Break]:
    """Leave out the breaks that the job's own event has raised already, while those live."""
    kinds = {own.value: kind.value for kind, own in OWN_KINDS.items()}
    job_ids = [each.job_id for each in breaks if each.kind in OWN_KINDS]
    if not job_ids:
        return list(breaks)
    told = {
        (kinds[row.kind], row.job_id)
        for row in connection.execute(_OWN, {"kinds": list(kinds), "job_ids": job_ids}).all()
    }
    return [each for each in breaks if (str(each.kind), each.job_id) not in told]


_OWN = sa.text("""
    SELECT kind, job_id FROM kino.break
    WHERE job_id = ANY(CAST(:job_ids AS text[])) AND kind = ANY(CAST(:kinds AS text[]))
      AND status IN ('open', 'investigating', 'repaired')
""")


# --- settlements whose jobs the source does not know -------------------------------------------------------------


def _compare_settlements(
    scope: Scope, source: JobSource, begin: _Cursor, detail: Mapping[str, Any], *, broken: _Broken
) -> Iterator[Page]:
    """Yield the pages of the second part: the source is asked about each job that the ledger settled."""
    newest = None if detail["complete_through"] is not None else begin.place and begin.place[0]
    bounds = _bounds(scope)
    after = begin.charge_id or 0
    while bounds is not None:
        with scope.engine.connect() as connection:
            part = {**_numbers(scope), "after": max(after, bounds[0] - 1), "last": bounds[1]}
            connection.execute(BY_KEY)
            job_ids = [row.job_id for row in connection.execute(_SETTLED, part).all()]
            booked = read_booked(connection, job_ids)
        if not job_ids:
            break
        after = booked[job_ids[-1]].charge_id
        cursor = _Cursor(begin.listed, begin.place, after)
        asked = Asked()
        try:
            answers = ask_about(source, job_ids, asked)
        except BadSettings as error:
            yield _not_comparable(scope, begin, reason_of(error))
            return
        if asked.away:
            yield _not_comparable(scope, begin, f"the source is away: {asked.problem}")
            return
        silent = Counter[str]()
        if missing := len(job_ids) - len(answers):
            silent[f"the source has no answer: {asked.problem}"] = missing
        verdicts = []
        for job_id, answer in answers.items():
            if answer.state is JobState.UNKNOWN and begin.listed == 0:
                # A quiet hour lists nothing either, but then the source knows the jobs that were settled in it.
                text = f"the source lists no job where the ledger has {_settlements(scope):,} settlements"
                yield _not_comparable(scope, begin, text)
                return
            verdict, why = _answered(scope, job_id, answer, booked=booked[job_id], newest=newest, broken=broken)
            if verdict is not None:
                verdicts.append(verdict)
            elif why is not None:
                silent[why] += 1
        with scope.engine.connect() as connection:
            breaks = _without_own(connection, [each for verdict in verdicts for each in verdict.breaks])
        yield _page(verdicts, breaks, cursor=cursor, detail=detail, silent=silent)
        begin = cursor


def _answered(
    scope: Scope, job_id: str, answer: Answer, *, booked: Booked, newest: datetime | None, broken: _Broken
) -> tuple[Verdict | None, str | None]:
    """Return the verdict on a settled job, or why there is none; neither if the first part compares the job."""
    window = scope.window
    assert booked.event_time is not None, "the charge is settled"
    if answer.state is JobState.RUNNING:
        return None, "the source says that the job still runs"
    if answer.state is not JobState.UNKNOWN:
        at = answer.finished_at
        if at is None:
            return None, None  # without a time it cannot be said in whose window the job belongs
        verdict = _judge(scope, FinishedJob(job_id, answer), booked)
        listed = window.since is not None and window.since <= at < window.until
        if listed and (not verdict.breaks or broken.may_have(job_id)):
            return None, None  # the first part has compared it
        # Settled or corrected now, finished in another run's window: after a lost event, or by a list that changed.
        # Or the list leaves out what the answer says: then the two disagree, and this is the only look.
        return verdict, None
    if min(booked.event_time, booked.settled_at or booked.event_time) >= window.until:
        return None, "settled after the window: the source may not know the job yet"
    if newest is not None and booked.event_time > newest:
        return None, BEHIND
    return Verdict((orphan(job_id, booked),)), None


def _numbers(scope: Scope) -> dict[str, int]:
    return {"from_xid": scope.window.from_xid, "to_xid": scope.window.to_xid}


def _settlements(scope: Scope) -> int:
    """Count the settlements in the window."""
    with scope.engine.connect() as connection:
        return int(connection.execute(_COUNT, _numbers(scope)).scalar_one())


def _bounds(scope: Scope) -> tuple[int, int] | None:
    """Return the first and the last charge that was settled in the window, by number; None if none was."""
    with scope.engine.connect() as connection:
        first, last = connection.execute(_BOUNDS, _numbers(scope)).one()
    return None if first is None else (first, last)


# By the index over the numbers of transactions, whose expression this is.
_IN_WINDOW = "CAST(CAST(s.xid AS text) AS bigint) >= :from_xid AND CAST(CAST(s.xid AS text) AS bigint) < :to_xid"
_CORRECTED = "k.xid >= CAST(CAST(:from_xid AS text) AS xid8) AND k.xid < CAST(CAST(:to_xid AS text) AS xid8)"
_COUNT = sa.text(f"SELECT count(*) FROM kino.settlement s WHERE {_IN_WINDOW}")  # noqa: S608 - a constant
# `+ 0`: otherwise Postgres would look for the first such charge along the primary key, through all of before.
_BOUNDS = sa.text(f"""
    SELECT min(first), max(last) FROM (
        SELECT min(s.charge_id + 0) AS first, max(s.charge_id + 0) AS last FROM kino.settlement s WHERE {_IN_WINDOW}
        UNION ALL
        SELECT min(k.charge_id + 0), max(k.charge_id + 0) FROM kino.correction k WHERE {_CORRECTED}
    ) AS either
""")  # noqa: S608 - constants
# What was corrected is looked at as well, whenever it was settled: a correction may rest on an event that lied.
# By the primary key: pages by the transaction's number would sort the whole window for each.
# The page first and its charges then: joined in one, each page could be a merge from the first charge on.
_SETTLED = sa.text(f"""
    SELECT c.job_id FROM (
        (SELECT s.charge_id FROM kino.settlement s
         WHERE s.charge_id > :after AND s.charge_id <= :last AND {_IN_WINDOW} ORDER BY s.charge_id LIMIT {PAGE})
        UNION
        (SELECT k.charge_id FROM kino.correction k
         WHERE k.charge_id > :after AND k.charge_id <= :last AND {_CORRECTED} ORDER BY k.charge_id LIMIT {PAGE})
        ORDER BY charge_id LIMIT {PAGE}
    ) AS page JOIN kino.charge c USING (charge_id) ORDER BY page.charge_id
""")  # noqa: S608 - constants


# --- looking again ------------------------------------------------------------------------------------------------


def again(scope: Scope, live: Sequence[LiveBreak]) -> dict[int, Break | None]:
    """Ask the source about the jobs of live breaks, and judge them anew; by break id, None where both sides agree now.

    A job of which the source says nothing certain is left out. Raises what Postgres raises.
    """
    source = scope.source
    ours = [each for each in live if each.job_id is not None and each.kind in KINDS]
    if source is None or not ours:
        return {}
    job_ids = sorted({each.job_id for each in ours if each.job_id is not None})
    try:
        answers = ask_about(source, job_ids, Asked())
    except BadSettings:
        return {}
    with scope.engine.connect() as connection:
        booked = read_booked(connection, job_ids)
    looked: dict[int, Break | None] = {}
    for each in ours:
        assert each.job_id is not None, "chosen above"
        answer = answers.get(each.job_id)
        if answer is None:
            continue
        found = _again(scope, source, each, answer=answer, booked=booked.get(each.job_id))
        if found is not None:
            looked[each.break_id] = next((one for one in found if one.kind == each.kind), None)
    return looked


def _again(
    scope: Scope, source: JobSource, live: LiveBreak, *, answer: Answer, booked: Booked | None
) -> Sequence[Break] | None:
    """Return the breaks of a job as it is now; None if that cannot be said."""
    assert live.job_id is not None, "chosen by the caller"
    if answer.state not in ENDS:
        # Unknown is an answer for an orphan only: of any other job the source said before how it ended.
        if answer.state is JobState.UNKNOWN and live.kind == BreakKind.ORPHAN_CHARGE:
            return () if booked is None else (orphan(live.job_id, booked),)
        return None
    if live.kind == BreakKind.ORPHAN_CHARGE:
        return ()
    at = answer.finished_at or (None if booked is None else booked.event_time)
    if at is None:
        return None
    job = FinishedJob(live.job_id, replace(answer, finished_at=at))
    if live.kind in {BreakKind.ACCOUNT_DIFFERS, BreakKind.CREDITS_DIFFER}:
        # Only the list has account and credits.
        found = _find(source, job)
        if found is None:
            return None
        job = found
    verdict = _judge(scope, job, booked)
    return None if verdict.not_comparable is not None else verdict.breaks


def _find(source: JobSource, job: FinishedJob) -> FinishedJob | None:
    """Return the job as the source lists it; None if it does not, or cannot."""
    if not isinstance(source, FinishedSource):
        return None
    since, until = job.finished_at, job.finished_at + timedelta(microseconds=1)
    try:
        listed = checked(source.finished(since, until), since=since, until=until)
        return next((each for each in listed if each.job_id == job.job_id), None)
    except Exception:  # noqa: BLE001 - a source is foreign code; an error is no answer
        return None
