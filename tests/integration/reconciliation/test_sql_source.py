"""The job source that is a query, against a real table, honest and lying."""

from __future__ import annotations

import pytest
import sqlalchemy as sa

from kino_refunds.errors import BadSettings, KinoError, SourceTimeout, SourceUnavailable
from kino_refunds.reconciliation.contract import JobSourceContract
from kino_refunds.reconciliation.sources import Answer, JobSource
from kino_refunds.reconciliation.sql_source import SqlSource
from tests.integration.reconciliation.job_sources import BROKEN, COMPLETED, FAILED, FOREIGN, JOBS, KNOWN, QUERY, UNKNOWN
from tests.malformed import TEN_KB


class TestSqlSource(JobSourceContract):
    """The SQL adapter keeps the contract that the sweep relies on."""

    @pytest.fixture
    def source(self, jobs: sa.Engine) -> JobSource:
        return SqlSource(jobs, QUERY)

    @pytest.fixture
    def known(self) -> dict[str, Answer]:
        return KNOWN


WRITES = {
    "update": "UPDATE public.job SET state = 'completed' WHERE job_id = ANY(:job_ids) RETURNING job_id, state",
    "delete in a CTE": "WITH gone AS (DELETE FROM public.job RETURNING *)"
    " SELECT job_id, state FROM gone WHERE job_id = ANY(:job_ids)",
    "row locks": "SELECT job_id, state FROM public.job WHERE job_id = ANY(:job_ids) FOR UPDATE",
    "sequence": "SELECT j AS job_id, nextval('kino.charge_charge_id_seq')::text AS state"
    " FROM unnest(CAST(:job_ids AS text[])) j",
    "switching it off": "SELECT j AS job_id, set_config('transaction_read_only', 'off', false) AS state"
    " FROM unnest(CAST(:job_ids AS text[])) j",
    "two statements": "COMMIT; UPDATE public.job SET state = 'completed' WHERE job_id = ANY(:job_ids)",
}


def asked(source: SqlSource, *job_ids: str) -> dict[str, Answer] | type[Exception]:
    try:
        return dict(source.ask(job_ids))
    except KinoError as error:
        return type(error)


def test_a_query_that_writes_fails(jobs: sa.Engine) -> None:
    """The source is read and never written, whatever the query says and whoever is connected."""
    answers = {name: asked(SqlSource(jobs, query), "failed") for name, query in WRITES.items()}

    assert {name for name, answer in answers.items() if isinstance(answer, dict)} == set()
    with jobs.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM public.job")).scalar() == len(JOBS)
        assert connection.execute(sa.text("SELECT state FROM public.job WHERE job_id = 'failed'")).scalar() == "failed"


def test_a_query_that_hangs_ends(jobs: sa.Engine) -> None:
    """A query that takes too long is no answer, and the connection serves the next ask."""
    hanging = SqlSource(jobs, "SELECT j AS job_id, pg_sleep(60)::text AS state FROM unnest(CAST(:job_ids AS text[])) j")

    with pytest.raises(SourceTimeout, match="statement timeout"):
        hanging.ask(["completed"])

    assert SqlSource(jobs, QUERY).ask(["completed"]) == {"completed": COMPLETED}


ROWS: dict[str, type[Exception]] = {
    "(VALUES ('a', 'gone fishing')) v (job_id, state)": BROKEN,
    "(VALUES ('a', NULL)) v (job_id, state)": BROKEN,
    "(VALUES ('a', 1)) v (job_id, state)": BROKEN,
    "(VALUES ('a', 'failed', 'the intern')) v (job_id, state, origin)": BROKEN,
    "(VALUES ('a', 'rejected', 'sometime')) v (job_id, state, stage)": BROKEN,
    "(VALUES ('a', 'completed'), ('a', 'failed')) v (job_id, state)": BROKEN,
    "(VALUES ('a', 'failed', 'user'), ('a', 'failed', 'platform')) v (job_id, state, origin)": BROKEN,
    "(VALUES ('a', 'timed_out', 1)) v (job_id, state, result_produced)": BROKEN,
    "(VALUES ('a', 'timed_out', 'false')) v (job_id, state, result_produced)": BROKEN,
    "(VALUES ('a', 'timed_out', 't')) v (job_id, state, result_produced)": BROKEN,
    "(VALUES ('a', 'timed_out', true), ('a', 'timed_out', false)) v (job_id, state, result_produced)": BROKEN,
    "(VALUES ('a', 'completed', timestamp '2026-11-01 12:00')) v (job_id, state, finished_at)": BROKEN,
    "(VALUES ('a', 'completed', date '2026-11-01')) v (job_id, state, finished_at)": BROKEN,
    "(VALUES ('a', 'completed', '2026-11-01 12:00')) v (job_id, state, finished_at)": BROKEN,
    "(VALUES ('a', 'completed', 1793534400)) v (job_id, state, finished_at)": BROKEN,
    "(VALUES ('a', 'completed', 'NaN'::float8)) v (job_id, state, finished_at)": BROKEN,
    "(VALUES ('a', 'completed', 'infinity'::timestamptz)) v (job_id, state, finished_at)": SourceUnavailable,
    "(VALUES ('a', 'completed'), ('a ', 'completed')) v (job_id, state)": FOREIGN,
    "(VALUES ('a'::char(20), 'completed')) v (job_id, state)": FOREIGN,
    "(VALUES ('A', 'completed')) v (job_id, state)": FOREIGN,
    "(VALUES ('a', 'completed'), ('c', 'completed')) v (job_id, state)": FOREIGN,
    "(VALUES ('c', NULL)) v (job_id, state)": FOREIGN,
    "(VALUES (NULL, NULL)) v (job_id, state)": FOREIGN,
    "(VALUES (NULL, 'completed')) v (job_id, state)": FOREIGN,
    "(VALUES (1, 'completed')) v (job_id, state)": FOREIGN,
    "(VALUES ('NaN'::float8, 'completed')) v (job_id, state)": FOREIGN,
    "public.job": FOREIGN,
    "(SELECT 'a' AS job_id, 'completed' AS state, generate_series(1, 1000000000)) v": FOREIGN,
    "(VALUES ('a')) v (job_id)": BadSettings,
    "(VALUES ('completed')) v (state)": BadSettings,
    "(VALUES ('a', 'completed')) v (\"JOB_ID\", state)": BadSettings,
    "(SELECT WHERE false) v": BadSettings,
    "public.elsewhere": BadSettings,
}


@pytest.mark.parametrize(("rows", "error"), ROWS.items(), ids=ROWS)
def test_what_is_no_row_of_the_contract_is_no_answer(jobs: sa.Engine, rows: str, error: type[Exception]) -> None:
    """A row that cannot be read is its job's error, one of another job everybody's, other columns the setting's."""
    source = SqlSource(jobs, f"SELECT * FROM {rows} WHERE CAST(:job_ids AS text[]) IS NOT NULL")

    assert asked(source, "a", "b") is error


def test_the_same_answer_twice_is_one_answer(jobs: sa.Engine) -> None:
    """A join that doubles rows does no harm as long as they agree."""
    source = SqlSource(jobs, f"{QUERY} UNION ALL {QUERY}")

    assert source.ask(["failed"]) == {"failed": FAILED}


def test_ids_of_any_length_and_kind_are_asked_for(jobs: sa.Engine) -> None:
    """A 10 kB id is an id; one with NUL, which no database can hold, is an error and not an answer."""
    source = SqlSource(jobs, QUERY)

    assert source.ask([TEN_KB, "\x1b[31m", "failed"]) == {TEN_KB: UNKNOWN, "\x1b[31m": UNKNOWN, "failed": FAILED}
    with pytest.raises(SourceUnavailable, match="0x00"):
        source.ask(["a\x00b"])
