"""The rows of `kino.check_run`: runs with their four numbers, and what complete runs cover without a gap."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from kino_refunds.errors import CheckBusy
from kino_refunds.reconciliation.comparison import Page, Window
from kino_refunds.settlement.breaks import Break, raise_breaks

FOUND_MAX = 1_000
"""What a dry run keeps of what it found: memory stays flat, and nobody reads more."""


class RunState(StrEnum):
    """Where a run stands. The words are stored, so a word here never changes."""

    RUNNING = "running"
    """Not at its end: it is at work now, or was interrupted, and the next run goes on with it."""
    COMPLETE = "complete"
    NOT_COMPARABLE = "not_comparable"
    """One side was not there. Nothing is verified by it, and the next run compares the same window."""
    STOPPED = "stopped"
    """Given up for a run of another window."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a check: what it compared, and its four numbers. `broken` had a break; `not_comparable` by reason."""

    run_id: int
    check: str
    window: Window
    full: bool
    state: RunState
    cursor: Mapping[str, Any]
    compared: int
    matched: int
    broken: int
    not_comparable: Mapping[str, int]
    detail: Mapping[str, Any]
    build: str
    actor: str
    started_at: datetime
    finished_at: datetime | None
    accepted: int = 0
    """Differences found by this process that a person had accepted; they are among the broken."""
    found: tuple[Break, ...] = field(default=(), repr=False)
    """With `dry_run`: what would have become a break."""

    @property
    def is_complete(self) -> bool:
        """Whether it compared its whole window."""
        return self.state is RunState.COMPLETE

    @property
    def uncomparable(self) -> int:
        """How many had no second side, whatever the reason."""
        return sum(self.not_comparable.values())


_COLUMNS = """
    run_id, "check", since, until, CAST(CAST(from_xid AS text) AS bigint) AS from_xid,
    CAST(CAST(to_xid AS text) AS bigint) AS to_xid, is_full, state, cursor, compared, matched, broken, not_comparable,
    detail, build, actor, started_at, finished_at
"""
_RUNNING = sa.text(f"SELECT {_COLUMNS} FROM kino.check_run WHERE \"check\" = :check AND state = 'running'")  # noqa: S608
_STOP = sa.text("""
    UPDATE kino.check_run SET state = 'stopped', finished_at = kino.clock(),
           detail = detail || jsonb_build_object('stopped', CAST(:note AS text))
    WHERE run_id = :run_id AND state = 'running'
""")
_INSERT = sa.text("""
    INSERT INTO kino.check_run ("check", since, until, from_xid, to_xid, is_full, state, not_comparable, detail, actor,
                                build, started_at, finished_at)
    VALUES (:check, :since, :until, CAST(CAST(:from_xid AS text) AS xid8), CAST(CAST(:to_xid AS text) AS xid8),
            :is_full, :state, CAST(:not_comparable AS jsonb), CAST(:detail AS jsonb), :actor, :build, :started_at,
            :finished_at)
    RETURNING run_id
""")
# Only from the cursor that this process knows: if another one went on with the run, this page is stored there.
_STORE = sa.text("""
    UPDATE kino.check_run SET cursor = CAST(:cursor AS jsonb), compared = :compared, matched = :matched,
           broken = :broken, not_comparable = CAST(:not_comparable AS jsonb), detail = CAST(:detail AS jsonb)
    WHERE run_id = :run_id AND state = 'running' AND cursor = CAST(:before AS jsonb)
""")
_END = sa.text("""
    UPDATE kino.check_run SET state = :state, finished_at = kino.clock() WHERE run_id = :run_id AND state = 'running'
    RETURNING finished_at
""")


def _run_of(row: sa.Row[tuple[Any, ...]]) -> Run:
    return Run(
        run_id=row.run_id,
        check=row.check,
        window=Window(since=row.since, until=row.until, from_xid=row.from_xid, to_xid=row.to_xid),
        full=row.is_full,
        state=RunState(row.state),
        cursor=row.cursor,
        compared=row.compared,
        matched=row.matched,
        broken=row.broken,
        not_comparable=row.not_comparable,
        detail=row.detail,
        build=row.build,
        actor=row.actor,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )


def _columns(run: Run) -> dict[str, Any]:
    return {
        "check": run.check,
        "since": run.window.since,
        "until": run.window.until,
        "from_xid": run.window.from_xid,
        "to_xid": run.window.to_xid,
        "is_full": run.full,
        "not_comparable": json.dumps(dict(run.not_comparable)),
        "state": run.state,
        "detail": json.dumps(dict(run.detail)),
        "build": run.build,
        "actor": run.actor,
        "finished_at": run.finished_at,
        "started_at": run.started_at,
    }


def add_page(run: Run, page: Page) -> Run:
    """Return the run with a page's figures added."""
    not_comparable = dict(run.not_comparable)
    for why, count in page.not_comparable.items():
        not_comparable[why] = not_comparable.get(why, 0) + count
    return replace(
        run,
        cursor=dict(page.cursor),
        compared=run.compared + page.compared,
        matched=run.matched + page.compared - page.broken,
        broken=run.broken + page.broken,
        not_comparable=not_comparable,
        detail={**run.detail, **page.detail},
        found=(*run.found, *page.breaks)[:FOUND_MAX] if run.run_id == 0 else (),
    )


def store_page(engine: sa.Engine, run: Run, page: Page) -> Run:
    """Store a page's figures and breaks in one transaction; return the run with them added.

    Raises CheckBusy if another process has stored a page of this run since this one last did.
    """
    after = add_page(run, page)
    with engine.begin() as connection:
        accepted = raise_breaks(connection, page.breaks, run_id=run.run_id)
        stored = connection.execute(
            _STORE,
            {
                "run_id": run.run_id,
                "before": json.dumps(dict(run.cursor)),
                "cursor": json.dumps(dict(after.cursor)),
                "compared": after.compared,
                "matched": after.matched,
                "broken": after.broken,
                "not_comparable": json.dumps(dict(after.not_comparable)),
                "detail": json.dumps(dict(after.detail)),
            },
        ).rowcount
        if not stored:
            raise CheckBusy(f"another process went on with run {run.run_id} of the check {run.check}")
    return replace(after, accepted=run.accepted + accepted)


def end_run(engine: sa.Engine, run: Run, state: RunState, *, dry_run: bool) -> Run:
    """End a run in a state; return it as it ended."""
    if dry_run:
        return replace(run, state=state)
    with engine.begin() as connection:
        finished_at = connection.execute(_END, {"run_id": run.run_id, "state": state}).scalar_one_or_none()
    return replace(run, state=state, finished_at=finished_at)


def running_run(connection: sa.Connection, check: str) -> Run | None:
    """Return the run of a check that is at work or was interrupted; None if there is none."""
    row = connection.execute(_RUNNING, {"check": check}).one_or_none()
    return None if row is None else _run_of(row)


def stop_run(connection: sa.Connection, run: Run, *, note: str) -> None:
    """Give up a run that was interrupted; `note` says what for."""
    connection.execute(_STOP, {"run_id": run.run_id, "note": note})


def insert_run(connection: sa.Connection, run: Run) -> Run:
    """Write the row of a run that begins; return the run with its number."""
    stored = connection.execute(_INSERT, _columns(run))
    return replace(run, run_id=stored.scalar_one())


_RUNS = sa.text(f"""
    SELECT {_COLUMNS} FROM kino.check_run
    WHERE (CAST(:check AS text) IS NULL OR "check" = :check) AND run_id < :before
    ORDER BY run_id DESC LIMIT :limit
""")  # noqa: S608
_ONE = sa.text(f"SELECT {_COLUMNS} FROM kino.check_run WHERE run_id = :run_id")  # noqa: S608
_LAST = sa.text(f"""
    SELECT DISTINCT ON ("check") {_COLUMNS} FROM kino.check_run
    WHERE "check" = ANY (CAST(:checks AS text[])) AND (NOT :only_complete OR state = 'complete')
    ORDER BY "check", run_id DESC
""")  # noqa: S608


def read_runs(connection: sa.Connection, *, check: str | None, before: int | None, limit: int) -> list[Run]:
    """Return runs, of one check or of all, the newest first, with a number below `before`."""
    wanted = {"check": check, "before": before or 2**62, "limit": limit}
    return [_run_of(row) for row in connection.execute(_RUNS, wanted)]


def read_run(connection: sa.Connection, run_id: int) -> Run | None:
    """Return one run; None if there is none with this number."""
    row = connection.execute(_ONE, {"run_id": run_id}).one_or_none()
    return None if row is None else _run_of(row)


def read_last_runs(connection: sa.Connection, checks: list[str], *, only_complete: bool = False) -> dict[str, Run]:
    """Return the newest run of each of these checks by its name; a check that never ran is left out."""
    rows = connection.execute(_LAST, {"checks": checks, "only_complete": only_complete})
    return {row.check: _run_of(row) for row in rows}


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a check's complete runs cover without a gap: from `since` (None: the beginning) to `until`."""

    since: datetime | None
    until: datetime
    to_xid: int


# The newest stretch without a gap: by number of transaction for a check of the ledger, by time for one of a source.
_COVERAGE = sa.text("""
    WITH run AS (
        SELECT run_id, CAST(CAST(from_xid AS text) AS bigint) AS from_xid,
               CAST(CAST(to_xid AS text) AS bigint) AS to_xid, since, until
        FROM kino.check_run WHERE "check" = :check AND state = 'complete' AND until IS NOT NULL
    ), reached AS (
        SELECT *, max(until) OVER w AS reached_until, max(to_xid) OVER w AS reached_xid FROM run
        WINDOW w AS (ORDER BY since NULLS FIRST, run_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
    ), islands AS (
        SELECT *, count(*) FILTER (WHERE since > reached_until OR from_xid > reached_xid)
                  OVER (ORDER BY since NULLS FIRST, run_id) AS island
        FROM reached
    )
    SELECT CASE WHEN bool_or(since IS NULL) THEN NULL ELSE min(since) END AS since, max(until) AS until,
           max(to_xid) AS to_xid
    FROM islands GROUP BY island ORDER BY island DESC LIMIT 1
""")


def read_coverage(connection: sa.Connection, check: str) -> Coverage | None:
    """Return what the newest complete runs of a check cover without a gap; None if no run was complete."""
    row = connection.execute(_COVERAGE, {"check": check}).one_or_none()
    return None if row is None else Coverage(row.since, row.until, row.to_xid)
