"""Finished jobs as a pipeline lists them: rows, a table, an endpoint, and a source in Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any

import sqlalchemy as sa

from kino_refunds.errors import KinoError
from kino_refunds.events.schema import ErrorOrigin, SafetyStage
from kino_refunds.reconciliation.finished import FinishedJob, FinishedSource, checked
from kino_refunds.reconciliation.sources import Answer, JobState
from tests.integration.reconciliation.job_sources import Reply, send

SINCE = datetime(2026, 11, 1, 12, tzinfo=UTC)
UNTIL = SINCE + timedelta(hours=1)
WINDOW = (SINCE, UNTIL)
TICK = timedelta(microseconds=1)


def ended(
    job_id: str,
    state: str = "completed",
    *,
    at: datetime = SINCE,
    account_id: str | None = None,
    credits: int | None = None,
    **detail: Any,
) -> FinishedJob:
    return FinishedJob(job_id, Answer(JobState(state), finished_at=at, **detail), account_id, credits)


LISTED = [
    ended("at since", at=SINCE),
    ended("B", at=SINCE + TICK, account_id="acct-1", credits=7),
    ended("a", "failed", at=SINCE + TICK, origin=ErrorOrigin.USER, credits=0),
    ended("ä", "timed_out", at=SINCE + TICK, result_produced=True, account_id="acct-2"),
    ended("漢字", "rejected", at=SINCE + TICK, stage=SafetyStage.AFTER_GENERATION),
    ended("last", "failed", at=UNTIL - TICK),
]
"""Every job that finished in the window; by a human's alphabet, a would stand before B."""
OTHERS = [ended("before", at=SINCE - TICK), ended("at until", at=UNTIL)]
EVERYTHING = [*LISTED, *OTHERS]
TABLE = "CREATE TABLE public.ended (job_id text, state text, origin text, stage text, result_produced boolean, "
COLUMNS = "job_id, state, origin, stage, result_produced, finished_at"
ASK = f"SELECT {COLUMNS} FROM public.ended WHERE job_id = ANY(CAST(:job_ids AS text[]))"
FINISHED = (
    f"SELECT {COLUMNS}, account_id, credits FROM public.ended"
    " WHERE finished_at >= :since AND finished_at < :until AND state <> 'running'"
)


def row_of(job: FinishedJob) -> dict[str, Any]:
    answer = job.answer
    return {
        "job_id": job.job_id,
        "state": answer.state.value,
        "origin": answer.origin.value,
        "stage": answer.stage.value,
        "result_produced": answer.result_produced,
        "finished_at": job.finished_at.isoformat(),
        "account_id": job.account_id,
        "credits": job.credits,
    }


def fill(engine: sa.Engine, jobs: Iterable[FinishedJob]) -> None:
    """Make the pipeline's table of jobs, with one that runs."""
    running = {"job_id": "running", "state": "running"}
    with engine.begin() as connection:
        connection.exec_driver_sql(f"{TABLE} finished_at timestamptz, account_id text, credits bigint)")
        connection.execute(
            sa.text("INSERT INTO public.ended SELECT * FROM jsonb_populate_recordset(NULL::public.ended, :jobs)"),
            {"jobs": json.dumps([running, *map(row_of, jobs)])},
        )


class Lister:
    """A source in Python that lists the jobs it is told, and says the same of each when it is asked."""

    def __init__(self, jobs: Iterable[FinishedJob] = (), *, promise: datetime | None = None) -> None:
        self.jobs = sorted(jobs, key=lambda job: job.place)
        self.promise = promise
        self.answers: dict[str, Answer] = {}
        """What is said of jobs that are not listed, or another answer than the list's."""
        self.windows: list[tuple[datetime, datetime]] = []
        self.asked: list[list[str]] = []

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        self.asked.append(list(job_ids))
        known = {job.job_id: job.answer for job in self.jobs} | self.answers
        return {job_id: known.get(job_id, Answer(JobState.UNKNOWN)) for job_id in job_ids}

    def finished(self, since: datetime, until: datetime) -> Iterator[FinishedJob]:
        self.windows.append((since, until))
        return (job for job in self.jobs if since <= job.finished_at < until)

    def complete_through(self) -> datetime | None:
        return self.promise


class Liar(Lister):
    """A Lister that makes of its list what the test says."""

    def __init__(self, jobs: Iterable[FinishedJob], lie: Callable[[Iterator[FinishedJob]], Any]) -> None:
        super().__init__(jobs)
        self.lie = lie

    def finished(self, since: datetime, until: datetime) -> Any:
        return self.lie(super().finished(since, until))


def paged(jobs: Sequence[FinishedJob], *, each: int = 2, promise: str | None = None) -> Reply:
    """An endpoint that answers both questions, and lists `each` jobs a page."""
    known = {job.job_id: row_of(job) for job in jobs}

    def reply(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        if "job_ids" in asked:
            rows = [known.get(job_id, {"job_id": job_id, "state": "unknown"}) for job_id in asked["job_ids"]]
            send(handler, json.dumps({"jobs": rows}).encode())
            return
        since, until = (datetime.fromisoformat(asked[name]) for name in ("since", "until"))
        inside = [job for job in sorted(jobs, key=lambda job: job.place) if since <= job.finished_at < until]
        start = int(asked["cursor"] or 0)
        more = str(start + each) if start + each < len(inside) else None
        page = [row_of(job) | {"more": "is ignored"} for job in inside[start : start + each]]
        send(handler, json.dumps({"jobs": page, "next": more, "complete_through": promise}).encode())

    return reply


def read(source: FinishedSource) -> list[FinishedJob] | type[Exception]:
    try:
        return list(checked(source.finished(*WINDOW), since=SINCE, until=UNTIL))
    except KinoError as error:
        return type(error)
