"""The list of finished jobs by SQL: queries that write, hang or give what is no row of it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa

from kino_refunds.errors import BadSettings, SourceBroken, SourceTimeout, SourceUnavailable
from kino_refunds.reconciliation.sql_source import SqlFinishedSource
from tests.conftest import Database
from tests.integration.reconciliation.finished_jobs import ASK, EVERYTHING, FINISHED, LISTED, WINDOW, read

AT = "timestamptz '2026-11-01 12:30+00'"
NAMES = "v (job_id, state, finished_at)"
ROWS: dict[str, type[Exception]] = {
    f"(VALUES ('a', 'gone fishing', {AT})) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'running', {AT})) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'unknown', {AT})) {NAMES}": SourceBroken,
    f"(VALUES ('a', NULL, {AT})) {NAMES}": SourceBroken,
    f"(VALUES (NULL, 'completed', {AT})) {NAMES}": SourceBroken,
    f"(VALUES ('', 'completed', {AT})) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'completed', NULL::timestamptz)) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'completed', timestamp '2026-11-01 12:30')) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'completed', '2026-11-01')) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'completed', 'infinity'::timestamptz)) {NAMES}": SourceUnavailable,
    f"(VALUES ('a', 'completed', {AT}), ('a', 'failed', {AT})) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'completed', timestamptz '2026-11-01 11:59+00')) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'completed', timestamptz '2026-11-01 13:00+00')) {NAMES}": SourceBroken,
    f"(VALUES ('a', 'failed', {AT}, 'the intern')) v (job_id, state, finished_at, origin)": SourceBroken,
    f"(VALUES ('a', 'completed', {AT}, 7.5)) v (job_id, state, finished_at, credits)": SourceBroken,
    f"(VALUES ('a', 'completed', {AT}, '7')) v (job_id, state, finished_at, credits)": SourceBroken,
    f"(VALUES ('a', 'completed', {AT}, -7)) v (job_id, state, finished_at, credits)": SourceBroken,
    f"(VALUES ('a', 'completed', {AT}, true)) v (job_id, state, finished_at, credits)": SourceBroken,
    f"(VALUES ('a', 'completed', {AT}, 7)) v (job_id, state, finished_at, account_id)": SourceBroken,
    f"(VALUES ('a', 'completed', {AT}, 7)) v (job_id, state, finished_at, credit)": BadSettings,
    f"(VALUES (1, 'completed', {AT})) {NAMES}": BadSettings,
    f"(VALUES ('a', {AT})) v (job_id, finished_at)": BadSettings,
    "(VALUES ('a', 'completed')) v (job_id, state)": BadSettings,
    "(SELECT WHERE false) v": BadSettings,
    "public.elsewhere": BadSettings,
}


@pytest.mark.parametrize(("rows", "error"), ROWS.items(), ids=ROWS)
def test_what_is_no_row_of_the_list_is_an_error(ended_jobs: sa.Engine, rows: str, error: type[Exception]) -> None:
    """A row of a wrong type, time or window breaks the list, and a wrong column is the setting's."""
    listing = f"SELECT * FROM {rows} WHERE CAST(:since AS timestamptz) < :until"

    assert read(SqlFinishedSource(ended_jobs, ASK, finished=listing)) is error


WRITES = {
    "update": "UPDATE public.ended SET state = 'completed' WHERE :since < :until RETURNING job_id, state, finished_at",
    "delete in a CTE": "WITH gone AS (DELETE FROM public.ended RETURNING *) SELECT job_id, state, finished_at FROM gone"
    " WHERE finished_at >= :since AND finished_at < :until",
    "row locks": f"{FINISHED} FOR UPDATE",
    "sequence": "SELECT 'a' AS job_id, nextval('kino.charge_charge_id_seq')::text AS state, CAST(:since AS timestamptz)"
    " AS finished_at WHERE CAST(:since AS timestamptz) < :until",
    "two statements": f"{FINISHED}) AS finished; COMMIT; DELETE FROM public.ended; SELECT * FROM ({FINISHED}",
}


@pytest.mark.parametrize("writes", WRITES.values(), ids=WRITES)
def test_a_list_that_writes_fails(ended_jobs: sa.Engine, writes: str) -> None:
    """The pipeline's table is read and never written, whatever the query says and whoever is connected."""
    listed = read(SqlFinishedSource(ended_jobs, ASK, finished=writes))

    assert isinstance(listed, type)
    with ended_jobs.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM public.ended")).scalar() == len(EVERYTHING) + 1


def test_a_list_that_hangs_ends(ended_jobs: sa.Engine) -> None:
    """A query that takes too long is no list, and the next one is read."""
    hanging = SqlFinishedSource(
        ended_jobs,
        ASK,
        finished=f"{FINISHED} AND pg_sleep(60)::text = ''",
        complete="SELECT now() WHERE pg_sleep(60)::text = ''",
    )

    assert read(hanging) is SourceTimeout
    with pytest.raises(SourceTimeout):
        hanging.complete_through()
    assert read(SqlFinishedSource(ended_jobs, ASK, finished=FINISHED)) == LISTED


def test_a_query_may_hold_braces_comments_and_percent_signs(ended_jobs: sa.Engine) -> None:
    """The query is the deployment's: what stands in it is left as it is."""
    odd = f"{FINISHED} AND job_id NOT LIKE '%{{x}}%' -- a comment at its end"

    assert read(SqlFinishedSource(ended_jobs, ASK, finished=odd)) == LISTED


PROMISES: dict[str, Any] = {
    "SELECT CAST(NULL AS timestamptz)": None,
    "SELECT timestamptz '2026-11-01 12:30+01'": datetime(2026, 11, 1, 11, 30, tzinfo=UTC),
    "SELECT max(finished_at) FROM public.ended WHERE false": None,
    "SELECT timestamp '2026-11-01 12:30'": SourceBroken,
    "SELECT date '2026-11-01'": SourceBroken,
    "SELECT 'soon'": SourceBroken,
    "SELECT 1793534400": SourceBroken,
    "SELECT now() WHERE false": SourceBroken,
    "SELECT now(), now()": SourceBroken,
    "VALUES (now()), (now())": SourceBroken,
    "SELECT soon": BadSettings,
    "DELETE FROM public.ended RETURNING now()": BadSettings,
}


@pytest.mark.parametrize(("query", "means"), PROMISES.items(), ids=PROMISES)
def test_the_promise_is_one_instant_or_none(ended_jobs: sa.Engine, query: str, means: Any) -> None:
    """The third query gives one instant with an offset; NULL promises nothing, and all else is an error."""
    source = SqlFinishedSource(ended_jobs, ASK, finished=FINISHED, complete=query)

    if isinstance(means, type):
        with pytest.raises(means):
            source.complete_through()
    else:
        assert source.complete_through() == means


def test_no_transaction_stays_open_while_the_list_is_compared(ended_jobs: sa.Engine, database: Database) -> None:
    """What is slow is our side: meanwhile nothing holds back the vacuum of the pipeline's database."""
    reader = SqlFinishedSource(ended_jobs, ASK, finished=FINISHED).finished(*WINDOW)
    next(reader)

    with database.connect("postgres") as superuser:
        open_ones = superuser.execute(
            sa.text(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND xact_start IS NOT NULL"
                " AND pid <> pg_backend_pid()"
            )
        ).scalar()

    assert open_ones == 0
    assert [job.job_id for job in reader] == [job.job_id for job in LISTED[1:]]
