"""`reconcile check-source`: a real source is tried, and each way in which it breaks the contract is a finding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.errors import BadSettings, SourceTimeout, SourceUnreachable
from kino_refunds.reconciliation import source_check
from kino_refunds.reconciliation.finished import FinishedJob
from kino_refunds.reconciliation.http_source import HttpFinishedSource
from kino_refunds.reconciliation.source_check import Level, SourceReport, check_source
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.reconciliation.sql_source import SqlFinishedSource
from tests.conftest import Database
from tests.integration.reconciliation.finished_jobs import (
    ASK,
    FINISHED,
    LISTED,
    OTHERS,
    SINCE,
    TICK,
    UNTIL,
    Lister,
    ended,
    fill,
    paged,
)
from tests.integration.reconciliation.job_sources import Endpoint
from tests.integration.reconciliation.sweeps import Source

NOW = UNTIL + timedelta(minutes=1)
JOBS = [*LISTED, *OTHERS]


def tried(source: Any, *, now: datetime = NOW, **options: Any) -> SourceReport:
    return check_source(source, now=now, **options)


def levels(report: SourceReport) -> dict[str, str]:
    return {each.what: each.level.value for each in report.findings}


SOUND = {
    "promise": "ok",
    "list": "ok",
    "list again": "ok",
    "clock": "ok",
    "unknown job": "ok",
    "ask": "ok",
    "speed of an ask": "ok",
}


@pytest.fixture
def reading(jobs: sa.Engine, database: Database) -> Iterator[sa.Engine]:
    """A login that may read the pipeline's table and write nothing."""
    fill(jobs, JOBS)
    with jobs.begin() as connection:
        connection.exec_driver_sql("CREATE ROLE kino_test_reader LOGIN")
        connection.exec_driver_sql("GRANT SELECT ON public.ended TO kino_test_reader")
    engine = create_engine(database.url("kino_test_reader"), holds_ledger=False)
    yield engine
    engine.dispose()
    with jobs.begin() as connection:
        connection.exec_driver_sql("DROP OWNED BY kino_test_reader")
        connection.exec_driver_sql("DROP ROLE kino_test_reader")


def sql(engine: sa.Engine) -> SqlFinishedSource:
    return SqlFinishedSource(engine, ASK, finished=FINISHED, complete="SELECT timestamptz '2026-11-01 13:00:30+00'")


def test_a_sound_query_is_sound(reading: sa.Engine) -> None:
    """A source that keeps the contract has no finding, and its figures are reported."""
    report = tried(sql(reading))

    assert levels(report) == {"read only": "ok", **SOUND}
    assert (report.is_sound, report.is_away, report.listed) == (True, False, len(JOBS))
    assert report.complete_through == UNTIL + timedelta(seconds=30)
    assert report.ask_s is not None
    assert report.rows_per_s is None  # eight rows say nothing of the speed


def test_a_login_that_may_write_is_named(reading: sa.Engine, jobs: sa.Engine) -> None:
    """Writes are refused whoever is connected; that the login could write elsewhere is a warning with the table."""
    superuser = tried(sql(jobs))
    with jobs.begin() as connection:
        connection.exec_driver_sql("GRANT UPDATE ON public.ended TO kino_test_reader")
    writer = tried(sql(reading))

    assert (levels(superuser)["read only"], superuser.is_sound) == ("warn", True)
    assert "superuser" in superuser.findings[0].text
    assert (levels(writer)["read only"], writer.is_sound) == ("warn", True)
    assert "may write public.ended" in writer.findings[0].text


def test_a_transaction_that_could_write_breaks_the_contract(
    reading: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard against a query that writes is tried, not believed."""
    real = sa.text

    def careless(text: str) -> Any:
        return real("SELECT 1" if text == "SET TRANSACTION READ ONLY" else text)

    source = sql(reading)
    monkeypatch.setattr(sa, "text", careless)

    report = tried(source)

    assert (levels(report)["read only"], report.is_sound) == ("fail", False)


def test_a_sound_endpoint_is_sound(endpoint: Endpoint) -> None:
    """The same over HTTP; what an endpoint's login may write cannot be seen from here."""
    endpoint.reply = paged(JOBS, promise="2026-11-01T13:00:30Z")
    with httpx.Client(timeout=5, trust_env=False) as client:
        report = tried(HttpFinishedSource(client, endpoint.url, finished_url=endpoint.url))

    assert levels(report) == SOUND


def test_speed_and_missing_columns_are_reported() -> None:
    """A list of some length has a speed; columns that no job has are named, for they are not compared."""
    source = Lister([ended(f"job-{number:03}", at=SINCE + number * TICK) for number in range(300)], promise=UNTIL)

    report = tried(source)

    assert levels(report) == {**SOUND, "columns": "warn", "speed of the list": "ok"}
    assert report.rows_per_s is not None
    assert report.rows_per_s > 0
    assert len(max(source.asked, key=len)) == 100


def test_slow_sources_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow source keeps the contract; a person reads what would make it faster."""
    monkeypatch.setattr(source_check, "SLOW_ROWS", 10**12)
    monkeypatch.setattr(source_check, "SLOW_ASK_S", 0.0)
    source = Lister([ended(f"job-{number:03}", at=SINCE + number * TICK) for number in range(300)], promise=UNTIL)

    report = tried(source)

    assert {what for what, level in levels(report).items() if level == "warn"} == {
        "columns",
        "speed of the list",
        "speed of an ask",
    }
    assert report.is_sound


class Odd(Lister):
    """A source with one fault."""

    def __init__(self, **faults: Callable[..., Any]) -> None:
        super().__init__(JOBS, promise=UNTIL)
        self.faults = faults
        self.lists = 0

    def ask(self, job_ids: Any) -> Any:
        said = super().ask(job_ids)
        return self.faults["ask"](said) if "ask" in self.faults else said

    def finished(self, since: datetime, until: datetime) -> Any:
        self.lists += 1
        if "finished" in self.faults:
            return self.faults["finished"](self, since, until)
        return super().finished(since, until)

    def complete_through(self) -> Any:
        return self.faults["promise"]() if "promise" in self.faults else super().complete_through()

    def inside(self, since: datetime, until: datetime) -> list[FinishedJob]:
        return list(super().finished(since, until))


def raises(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


COMPLETED = Answer(JobState.COMPLETED)
FAULTS: dict[str, tuple[Odd, str, str, str]] = {
    "out of order": (
        Odd(finished=lambda s, a, b: reversed(s.inside(a, b))),
        *("list", "fail", "the order must be"),
    ),
    "of another window": (Odd(finished=lambda s, _a, _b: s.jobs), "list", "fail", "outside of the window"),
    "of words": (Odd(finished=lambda s, a, b: [j.job_id for j in s.inside(a, b)]), "list", "fail", "lists a str"),
    "changing": (
        Odd(finished=lambda s, a, b: s.inside(a, b)[s.lists - 1 :]),
        *("list again", "fail", "another one the second time"),
    ),
    "an end that is inside": (
        Odd(finished=lambda s, a, b: s.inside(a, b + TICK) if s.lists == 2 else s.inside(a, b)),
        *("list again", "fail", "outside of the window"),
    ),
    "in the future": (
        Odd(finished=lambda s, a, b: s.inside(a, b) if a < NOW else [ended("soon", at=NOW + timedelta(hours=1))]),
        *("clock", "fail", "finished at 2026-11-01T14:01:00Z, and it is 2026-11-01T13:01:00Z"),
    ),
    "a promise of the future": (
        Odd(promise=lambda: NOW + timedelta(hours=1)),
        *("promise", "fail", "complete through 2026-11-01T14:01:00Z, and it is 2026-11-01T13:01:00Z"),
    ),
    "a promise of words": (Odd(promise=lambda: "soon"), "promise", "fail", "not a date and time"),
    "no promise": (Odd(promise=lambda: None), "promise", "warn", "reads a day again"),
    "an empty list": (Odd(finished=lambda *_: iter(())), "list", "warn", "no job finished"),
    "other endings when asked": (
        Odd(ask=lambda said: {j: replace(a, finished_at=None) for j, a in said.items()}),
        *("ask", "fail", "7 of 7 jobs are answered otherwise"),
    ),
    "everything completed": (Odd(ask=lambda said: dict.fromkeys(said, COMPLETED)), "unknown job", "fail", "no-such"),
    "ids that are stripped": (
        Odd(ask=lambda said: {j: COMPLETED if j.endswith(" ") else a for j, a in said.items()}),
        *("unknown job", "fail", "with a space at its end"),
    ),
    "answers for others": (Odd(ask=lambda said: said | {"another": COMPLETED}), "ask", "fail", "was not asked for"),
    "answers of words": (Odd(ask=lambda said: dict.fromkeys(said, "completed")), "ask", "fail", "returned str"),
    "wrong settings": (Odd(promise=raises(BadSettings("no table"))), "promise", "fail", "no table"),
    "a bug": (Odd(finished=raises(KeyError("a\0b"))), "list", "fail", "KeyError"),
    "away at the promise": (Odd(promise=raises(SourceUnreachable("no route"))), "promise", "away", "no route"),
    "away at the list": (Odd(finished=raises(SourceTimeout("hangs"))), "list", "away", "hangs"),
    "away at an ask": (Odd(ask=raises(TimeoutError("hangs"))), "ask", "away", "hangs"),
}


@pytest.mark.parametrize(("source", "what", "level", "says"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_a_finding(source: Odd, what: str, level: str, says: str) -> None:
    """One fault is one finding with its words; a source that is away is told from one that is wrong."""
    report = tried(source)

    worst = [each for each in report.findings if each.level is not Level.OK]
    assert (levels(report)[what], says in " ".join(each.text for each in worst)) == (level, True)
    assert (report.is_sound, report.is_away) == (level == "warn", level == "away")
    assert all(each.text.isprintable() for each in report.findings)


def test_a_source_without_a_list_is_asked_all_the_same() -> None:
    """What there is, is tried: without a list that is the answer for a job that does not exist."""
    unknown = Answer(JobState.UNKNOWN)
    report = tried(Source({"no-such-job-a41f0c": unknown, "no-such-job-a41f0c ": unknown}))

    assert levels(report) == {"list": "warn", "unknown job": "ok"}
    assert report.is_sound


def test_late_rows_are_no_fault_where_nothing_is_promised() -> None:
    """Without a promise rows may come late; with one they break it."""
    late = ended("late", at=SINCE)

    def growing(source: Odd, since: datetime, until: datetime) -> list[FinishedJob]:
        jobs = source.inside(since, until)
        return sorted([*jobs, late], key=lambda job: job.place) if source.lists == 2 else jobs

    promising, silent = Odd(finished=growing), Odd(finished=growing, promise=lambda: None)

    assert levels(tried(promising))["list again"] == "fail"
    assert levels(tried(silent))["list again"] == "warn"


def test_a_sample_is_read_and_no_more() -> None:
    """Of an endless list the sample is read: trying a source costs the pipeline little."""
    read = [0]

    def endless(_: Odd, since: datetime, _until: datetime) -> Iterator[FinishedJob]:
        number = 0
        while since < NOW:
            read[0] += 1
            number += 1
            yield ended(f"job-{number:09}", at=since)

    report = tried(Odd(finished=endless), sample=50)

    assert report.listed == 50
    assert read[0] <= 200
