"""A job source that needs no code of the product: read-only SQL queries (design, section 7)."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
import sqlalchemy as sa
from pydantic import TypeAdapter, ValidationError

from kino_refunds.db.engine import READ_ONLY
from kino_refunds.errors import (
    BadSettings,
    ForeignAnswer,
    KinoError,
    SourceBroken,
    SourceTimeout,
    SourceUnavailable,
    SourceUnreachable,
)
from kino_refunds.events.schema import Time
from kino_refunds.reconciliation.rows import FINISHED_COLUMNS, read_answers, read_finished
from kino_refunds.reconciliation.sources import Answer, JobState

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from datetime import datetime

    from kino_refunds.reconciliation.finished import FinishedJob, Place

ROWS_EACH_MAX = 100
"""Rows that a query may give for each job: a join may double them, but a missing condition gives the whole table."""
QUERY_REFUSED = ("42", "25006", "0A000")
"""SQLSTATEs of a query that Postgres can run for no job: no query at all, wrong names or rights, or one that writes."""
TIMED_OUT = {"57014", "25P04"}
"""SQLSTATEs of the timeout of a statement, and of the whole transaction, after which Postgres ends the session."""
FINISHED_PAGE = 5_000
"""Finished jobs that one query reads. Each page is a transaction of its own: while we compare them, none stays open in
the pipeline's database and holds back its vacuum. Smaller pages cost a table without an index on finished_at one more
scan each."""
QUERY, FINISHED_QUERY, COMPLETE_QUERY = (
    f"KINO_JOB_SOURCE_{name}" for name in ("QUERY", "FINISHED_QUERY", "COMPLETE_QUERY")
)


@dataclass(frozen=True, slots=True)
class WriteRights:
    """What could be written with the session that the queries run in."""

    refuses_writes: bool
    """Whether its transaction refuses to write, as every query of ours runs."""
    is_superuser: bool
    writable: str | None
    """A table that the login could write in another transaction; None: there is none."""


class SqlSource:
    """A job source that runs a configured query with the parameter `:job_ids`, an array of text.

    The query gives `job_id`, `state` (completed, failed, timed_out, rejected, running or unknown) and, if known,
    `origin`, `stage`, `result_produced` (boolean) and `finished_at` (timestamptz). A job without a row is unknown. The
    query runs in a read-only transaction.
    """

    def __init__(self, engine: sa.Engine, query: str) -> None:
        self._engine = engine
        self._query = sa.text(f"DECLARE answer NO SCROLL CURSOR FOR {query}")

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        """Return the answers of one query, by job id.

        Raises BadSettings for a query that can run for no job, SourceUnavailable (SourceUnreachable if there was no
        connection, SourceTimeout), ForeignAnswer and SourceBroken for rows that are not answers.
        """
        with self._reading(QUERY) as connection:
            rows = self._read(connection, job_ids)
        return dict.fromkeys(job_ids, Answer(JobState.UNKNOWN)) | read_answers(rows, job_ids)

    @contextmanager
    def _reading(self, setting: str) -> Iterator[sa.Connection]:
        """Open a read-only transaction for the query of `setting`; raises what `ask` raises."""
        try:
            connection = self._engine.connect()
        except (sa.exc.DBAPIError, psycopg.Error) as error:
            raise SourceUnreachable(f"the job source's database cannot be reached: {_first_line(error)}") from error
        with connection, connection.begin():
            try:
                connection.execute(sa.text("SET TRANSACTION READ ONLY"))
                yield connection
            except sa.exc.DBAPIError as error:
                raise _explained(error, setting) from error

    def write_rights(self) -> WriteRights:
        """Try to write in a transaction of ours, and return what the login could write; raises what `ask` raises."""
        with self._reading(QUERY) as connection:
            found = connection.execute(_RIGHTS).one()
        refused = False
        try:
            with self._reading(QUERY) as connection:
                connection.execute(sa.text("CREATE TEMPORARY TABLE kino_probe () ON COMMIT DROP"))
        except BadSettings as error:
            refused = getattr(getattr(error.__cause__, "orig", None), "sqlstate", None) == READ_ONLY
        return WriteRights(refused, found.is_superuser, found.writable)

    def _read(self, connection: sa.Connection, job_ids: Sequence[str]) -> list[dict[str, Any]]:
        rows_max = ROWS_EACH_MAX * len(job_ids)
        # By a cursor: without one, psycopg would read an endless result into memory before the first row is seen.
        connection.execute(self._query, {"job_ids": list(job_ids)})
        result = connection.execute(sa.text(f"FETCH FORWARD {rows_max + 1} FROM answer"))
        # Checked even if there are no rows: such a query would answer `unknown` for every job, which refunds them.
        _require_columns(QUERY, result.keys(), {"job_id", "state"})
        rows = result.mappings().all()
        if len(rows) > rows_max:
            raise ForeignAnswer(f"the job source gives over {rows_max:,} rows for {len(job_ids):,} jobs")
        return [dict(row) for row in rows]


class SqlFinishedSource(SqlSource):
    """A SqlSource with a second query, for the jobs that finished from `:since` to before `:until`.

    That query gives `job_id` (text), `state`, `finished_at` (timestamptz) and, if known, `origin`, `stage`,
    `result_produced`, `account_id` and `credits`, in any order: it is sorted here. A third one, if there is one, gives
    the instant through which the table is complete.
    """

    def __init__(self, engine: sa.Engine, query: str, *, finished: str, complete: str | None = None) -> None:
        super().__init__(engine, query)
        # Sorted by code point, whatever the database's collation: by another order a reader could not go on behind the
        # last job. A Postgres that has the table's rows by finished_at in an index sorts only within equal instants.
        rows = f"SELECT * FROM (\n{finished}\n) AS finished"  # noqa: S608 - the deployment's own query
        self._first = sa.text(f"{rows} {_IN_ORDER}")
        self._next = sa.text(f"{rows} {_BEHIND} {_IN_ORDER}")
        row = f"SELECT * FROM (\n{complete}\n) AS complete LIMIT 2"  # noqa: S608 - the deployment's own query
        self._complete = None if complete is None else sa.text(row)

    def finished(self, since: datetime, until: datetime) -> Iterator[FinishedJob]:
        """Yield the finished jobs of the window in order, page by page; each page is a short transaction of its own.

        Raises what `ask` raises, and SourceBroken for a row that is not a finished job.
        """
        after: Place | None = None
        while True:
            page = [read_finished(row) for row in self._page(since, until, after)]
            yield from page
            if len(page) < FINISHED_PAGE:
                return
            after = page[-1].place

    def _page(self, since: datetime, until: datetime, after: Place | None) -> Sequence[Mapping[str, Any]]:
        # From the last job's instant on, so that also a query which Postgres cannot look into begins there.
        window: dict[str, Any] = {"since": since if after is None else after[0], "until": until}
        with self._reading(FINISHED_QUERY) as connection:
            if after is None:
                result = connection.execute(self._first, window)
            else:
                result = connection.execute(
                    self._next, {**window, "kino_after_at": after[0], "kino_after_id": after[1]}
                )
            names = list(result.keys())
            _require_columns(FINISHED_QUERY, names, {"job_id", "state", "finished_at"})
            # A misspelt `credits` would never be compared, and nobody would know.
            if foreign := sorted(set(names) - FINISHED_COLUMNS):
                raise BadSettings(f"{FINISHED_QUERY} gives the column {foreign[0]}, which is none of a finished job")
            return [dict(row) for row in result.mappings()]

    def complete_through(self) -> datetime | None:
        """Return the instant that the third query gives, None without one or for NULL; raises what `ask` raises."""
        if self._complete is None:
            return None
        with self._reading(COMPLETE_QUERY) as connection:
            rows = connection.execute(self._complete).all()
        if len(rows) != 1 or len(rows[0]) != 1:
            raise SourceBroken(f"{COMPLETE_QUERY} must give one row of one column")
        return read_promise(rows[0][0])


_RIGHTS = sa.text("""
    SELECT r.rolsuper AS is_superuser,
           (SELECT format('%I.%I', n.nspname, c.relname)
            FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relkind IN ('r', 'p', 'v', 'f') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
              AND n.nspname NOT LIKE 'pg\\_%'
              AND pg_catalog.has_schema_privilege(n.oid, 'USAGE')
              AND pg_catalog.has_table_privilege(c.oid, 'INSERT, UPDATE, DELETE, TRUNCATE')
            ORDER BY 1 LIMIT 1) AS writable
    FROM pg_catalog.pg_roles r WHERE r.rolname = current_user
""")
_BEHIND = (
    'WHERE (finished_at, job_id COLLATE "C") > (CAST(:kino_after_at AS timestamptz), CAST(:kino_after_id AS text))'
)
_IN_ORDER = f'ORDER BY finished_at, job_id COLLATE "C" LIMIT {FINISHED_PAGE}'
_INSTANT: TypeAdapter[datetime | None] = TypeAdapter(Time | None)


def read_promise(value: object) -> datetime | None:
    """Return an instant through which a source says that it is complete; raises SourceBroken if it is none."""
    try:
        return _INSTANT.validate_python(value)
    except ValidationError as error:
        raise SourceBroken(f"the job source's complete_through: {error.errors()[0]['msg']}") from error


def _require_columns(setting: str, given: Collection[str], needed: set[str]) -> None:
    if missing := sorted(needed - set(given)):
        raise BadSettings(f"{setting} gives no column {' and no '.join(missing)}")


def _explained(error: sa.exc.DBAPIError, setting: str) -> KinoError:
    """Return the error for an error of the source's database; SourceUnavailable if one job may be the cause."""
    code, text = getattr(error.orig, "sqlstate", None) or "", _first_line(error)
    if code in TIMED_OUT:
        return SourceTimeout(f"the job source's query did not end in time: {text}")
    if code.startswith(QUERY_REFUSED):
        return BadSettings(f"{setting} cannot run: {text}")
    if error.connection_invalidated:
        return SourceUnreachable(f"the job source's database went away: {text}")
    return SourceUnavailable(f"the job source's query failed: {text}")


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).partition("\n")[0]
