"""Which job source the settings choose, and what is said of settings that choose none."""

from __future__ import annotations

import re
from datetime import date, datetime, timedelta, timezone, tzinfo
from typing import Any

import pytest
import sqlalchemy as sa

from kino_refunds.errors import BadSettings, SourceBroken, SourceUnavailable, SourceUnreachable
from kino_refunds.reconciliation.adapters import source_of
from kino_refunds.reconciliation.http_source import HttpSource
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.reconciliation.sql_source import SqlSource
from kino_refunds.settings import Settings
from tests.conftest import Database
from tests.integration.reconciliation.job_sources import COMPLETED, FAILED, QUERY, UNKNOWN, Endpoint, settings

SQL_URL = "postgresql://kino_read@127.0.0.1/kino"
WRONG: dict[str, tuple[Settings, str]] = {
    "unset": (settings(), "KINO_JOB_SOURCE is not set"),
    "sql without url": (settings(job_source="sql", job_source_query=QUERY), "needs KINO_JOB_SOURCE_URL"),
    "sql without query": (settings(job_source="sql", job_source_url=SQL_URL), "needs KINO_JOB_SOURCE_QUERY"),
    "sql with a query that asks for nobody": (
        settings(job_source="sql", job_source_url=SQL_URL, job_source_query="SELECT 1"),
        "with the parameter :job_ids",
    ),
    "sql with a parameter that nobody gives": (
        settings(job_source="sql", job_source_url=SQL_URL, job_source_query=f"{QUERY} AND state <> :state"),
        "has the parameter :state, and only :job_ids is given",
    ),
    **{
        f"sql at {url}": (settings(job_source="sql", job_source_url=url, job_source_query=QUERY), says)
        for url, says in {
            "mysql://h/d": "KINO_JOB_SOURCE_URL is not Postgres by psycopg but mysql; for example postgresql://",
            "sqlite:///d": "KINO_JOB_SOURCE_URL is not Postgres by psycopg but sqlite",
            "https://jobs.example/ask": "KINO_JOB_SOURCE_URL is not Postgres by psycopg but https",
            "redis://h:6379/0": "KINO_JOB_SOURCE_URL is not Postgres by psycopg but redis",
            "postgresql://u:hunter2@h:port/d": "KINO_JOB_SOURCE_URL cannot be read",
            "postgresql://u:hun@ter2@h/d": "KINO_JOB_SOURCE_URL cannot be read",
            "jobs": "KINO_JOB_SOURCE_URL cannot be read",
            "postgresql://h/d?no_such_option=1": "has options that Postgres does not know: no_such_option",
        }.items()
    },
    "http with a token that is none": (
        settings(job_source="http", job_source_url="https://h/ask", job_source_token="hunter2ö"),
        "KINO_JOB_SOURCE_TOKEN has characters that no HTTP header can carry",
    ),
    "http with a token of two lines": (
        settings(job_source="http", job_source_url="https://h/ask", job_source_token="hunter2\nX-Admin: 1"),
        "KINO_JOB_SOURCE_TOKEN has characters that no HTTP header can carry",
    ),
    **{
        f"http at {url!a}": (settings(job_source="http", job_source_url=url), "KINO_JOB_SOURCE_URL cannot be read")
        for url in ("http://[::1/ask", "https://u:hunter2@h:port/ask", "https://h:99999/ask", "https://h/\x01")
    },
    "http without url": (settings(job_source="http"), "needs KINO_JOB_SOURCE_URL"),
    **{
        f"http at {url}": (settings(job_source="http", job_source_url=url), "must be https://")
        for url in (
            "http://jobs.example/ask",
            "http://10.0.0.1/ask",
            "http://localhost.example/ask",
            "http://localhost@jobs.example/ask",
            "http://127.0.0.1:80@jobs.example/ask",
            "http://127.0.0.1.example/ask",
            "ftp://localhost/ask",
            "localhost/ask",
            "//localhost/ask",
            "https://",
            "https:///ask",
            "postgresql://h/d",
            "",
        )
    },
}


@pytest.mark.parametrize(("wrong", "says"), WRONG.values(), ids=WRONG)
def test_a_source_that_cannot_be_is_a_clear_error(wrong: Settings, says: str) -> None:
    """What is missing, cannot be read or would send answers in the clear is named on one line, before anybody is asked.

    A password is not in it.
    """
    with pytest.raises(BadSettings, match=re.escape(says)) as caught, source_of(wrong):
        pass

    assert str(caught.value).isprintable()
    assert "hunter2" not in str(caught.value)
    assert "ter2" not in str(caught.value)


def test_a_database_that_cannot_be_reached_is_an_error_of_the_source(database: Database) -> None:
    """A port that nobody listens on, a role and a database that do not exist answer for no job, in one line."""
    here = database.url("postgres")
    for url in (
        "postgresql://postgres:hunter2@127.0.0.1:1/kino",
        database.url("nobody_of_this_name"),
        here.rpartition("/")[0] + "/no_such_database",
    ):
        with source_of(settings(job_source="sql", job_source_url=url, job_source_query=QUERY)) as source:
            assert source is not None
            with pytest.raises(SourceUnreachable, match="the job source's database cannot be reached") as caught:
                source.ask(["a"])
        assert str(caught.value).isprintable()
        assert "hunter2" not in str(caught.value)


def test_a_database_that_goes_away_in_the_middle_is_away(jobs: sa.Engine) -> None:
    """A session that ends under the query is no job's doing, and the next ask has another."""
    dying = SqlSource(jobs, "SELECT '' AS job_id, pg_terminate_backend(pg_backend_pid())::text AS state, :job_ids AS j")

    with pytest.raises(SourceUnreachable, match="went away"):
        dying.ask(["completed"])

    assert SqlSource(jobs, QUERY).ask(["completed"]) == {"completed": COMPLETED}


def test_a_time_out_of_less_than_a_millisecond_is_a_limit(database: Database) -> None:
    """The shortest time-out that can be set is the shortest limit that Postgres has, and not none."""
    tiny = settings(
        job_source="sql",
        job_source_url=database.url("postgres"),
        job_source_query="SELECT j AS job_id, pg_sleep(60)::text AS state FROM unnest(CAST(:job_ids AS text[])) j",
        job_source_timeout_s=0.0001,
    )

    with source_of(tiny) as source:
        assert source is not None
        with pytest.raises(SourceUnavailable):
            source.ask(["a"])


class Nowhere(tzinfo):
    """A time zone that fails, as foreign ones may."""

    def __repr__(self) -> str:
        return "Nowhere()"  # without an address: the test is called the same in every process

    def fail(self, _: datetime | None) -> Any:
        raise NotImplementedError

    utcoffset = dst = tzname = fail


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": "completed"},
        {"state": None},
        {"state": float("nan")},
        {"origin": "user"},
        {"origin": None},
        {"stage": "after_generation"},
        {"result_produced": 1},
        {"result_produced": "false"},
        {"result_produced": None},
        {"result_produced": float("nan")},
        {"finished_at": datetime(2026, 11, 1)},  # noqa: DTZ001 - what is refused
        {"finished_at": date(2026, 11, 1)},
        {"finished_at": "2026-11-01T12:00:00Z"},
        {"finished_at": 1793534400},
        {"finished_at": float("nan")},
        {"finished_at": datetime(2026, 11, 1, tzinfo=Nowhere())},
        {"finished_at": datetime.min.replace(tzinfo=timezone(timedelta(hours=1)))},
    ],
    ids=str,
)
def test_an_answer_of_wrong_types_cannot_be_built(wrong: dict[str, Any]) -> None:
    """A source in Python learns where it builds an answer that a value is not of its type, not from a settlement."""
    with pytest.raises(SourceBroken):
        Answer(**{"state": JobState.TIMED_OUT, **wrong})


def test_none_says_that_nobody_knows() -> None:
    """Running without a source is said in so many words."""
    with source_of(settings(job_source="none")) as source:
        assert source is None


@pytest.mark.usefixtures("jobs")
def test_the_configured_sources_answer(database: Database, endpoint: Endpoint) -> None:
    """What the settings name is asked, with the token, over http only on loopback."""
    over_http = settings(
        job_source="http", job_source_url=endpoint.url, job_source_token="t0ken", job_source_timeout_s=5.0
    )
    over_sql = settings(
        job_source="sql", job_source_url=database.url("postgres"), job_source_query=QUERY, job_source_timeout_s=5.0
    )

    answers = []
    for each in (over_http, over_sql):
        with source_of(each) as source:
            assert source is not None
            answers.append(dict(source.ask(["failed", "nobody"])))

    assert answers == [{"failed": FAILED, "nobody": UNKNOWN}] * 2
    assert endpoint.requests == [("/jobs", "Bearer t0ken", {"job_ids": ["failed", "nobody"]})]


@pytest.mark.parametrize("url", ["https://jobs.example/ask", "http://localhost:1/ask", "http://[::1]:1/ask"])
def test_where_answers_cannot_be_changed_on_the_way_is_fine(url: str) -> None:
    """Https everywhere, http on this machine only."""
    with source_of(settings(job_source="http", job_source_url=url)) as source:
        assert isinstance(source, HttpSource)
