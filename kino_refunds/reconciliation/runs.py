"""Run a check page by page, each with its breaks in one transaction: a kill costs one page (design, part B)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.db.clock import read_clock
from kino_refunds.db.engine import create_engine
from kino_refunds.db.faults import Fault, classify
from kino_refunds.errors import BadWindow, CheckBusy
from kino_refunds.reconciliation.adapters import source_of
from kino_refunds.reconciliation.comparison import LiveBreak, Page, Scope, Window
from kino_refunds.reconciliation.verified import sample_clock
from kino_refunds.settlement.breaks import LIVE, Break, raise_breaks
from kino_refunds.settlement.rules import rules_of

if TYPE_CHECKING:
    from kino_refunds.reconciliation.checks import Check
    from kino_refunds.reconciliation.sources import JobSource
    from kino_refunds.settings import Settings
    from kino_refunds.settlement.rules import Rules

LONGEST_QUERY_MS = 600_000
"""One query of a check may read a large ledger whole; it holds no lock that anybody waits for."""
FOUND_MAX = 1_000
"""What a dry run keeps of what it found: memory stays flat, and nobody reads more."""
AGAIN = 1_000
"""Live breaks that are looked at again at once."""
LOCK_SPACE = 0x6B696E6F
"""The first half of the advisory locks of checks: the bytes of "kino"."""
BY_SCHEDULE = "schedule"
"""The actor of a run that nobody started by hand."""


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


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a run was asked for: a window of time (None: from where the last complete run ended), or everything."""

    since: datetime | None = None
    until: datetime | None = None
    full: bool = False

    @property
    def has_window(self) -> bool:
        """Whether a window was named: then an interrupted run of another window is given up."""
        return self.full or self.since is not None or self.until is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What every check works with: sessions that may run for long, the rules, and the other sides."""

    engine: sa.Engine
    rules: Rules
    settings: Settings
    source: JobSource | None
    actor: str


@contextmanager
def bench_for(check: Check, settings: Settings, *, actor: str) -> Iterator[Bench]:
    """Give what a check works with: long sessions with KINO_DATABASE_URL, and the job source if the check asks it.

    Raises BadSettings for a source whose settings are wrong. Where none is configured, the check says so.
    """
    longer = settings.session_limits.model_copy(
        update={
            "statement_timeout_ms": LONGEST_QUERY_MS,
            "transaction_timeout_ms": LONGEST_QUERY_MS,
            "idle_in_transaction_timeout_ms": LONGEST_QUERY_MS,
        }
    )
    engine = create_engine(settings.require_database_url(), limits=longer, application_name="kino-checks")
    wants_source = check.asks_source and settings.job_source is not None
    try:
        with source_of(settings) if wants_source else nullcontext() as source:
            yield Bench(engine=engine, rules=rules_of(settings), settings=settings, source=source, actor=actor)
    finally:
        engine.dispose()


def run_check(
    check: Check,
    bench: Bench,
    wanted: Wanted = Wanted(),
    *,
    dry_run: bool = False,
    budget_s: float | None = None,
    wait_s: float = 0.0,
    progress: Callable[[Run], None] = lambda _: None,
) -> Run:
    """Run a check, or go on with its interrupted run; return the run as it stands then.

    Looks again at every live break of the check's kinds first, by its key, and closes those whose sides agree now. With
    `dry_run` nothing is written: neither a row of the run nor a break. After `budget_s` seconds the run is left
    `running`, and the next one goes on. If another process runs this check, `wait_s` seconds are waited for it.
    `progress` is called after each page.

    Raises CheckBusy if that process takes longer, BadWindow for a window that cannot be compared, and what
    Postgres raises.
    """
    with _only_one(bench.engine, check, wait_s=wait_s):
        if not dry_run:
            _sample(bench.engine)
        run, scope = _begin(check, bench, wanted, dry_run=dry_run)
        if run.state is not RunState.RUNNING:
            return run
        if not dry_run:
            _look_again(check, scope, run)
        ends_at = None if budget_s is None else time.monotonic() + budget_s
        with closing(check.pages(scope, run.cursor)) as pages:
            for page in pages:
                run = _add(run, page) if dry_run else _store(bench.engine, run, page)
                progress(run)
                if not page.is_comparable:
                    return _end(bench.engine, run, RunState.NOT_COMPARABLE, dry_run=dry_run)
                if ends_at is not None and time.monotonic() > ends_at:
                    return run
        return _end(bench.engine, run, RunState.COMPLETE, dry_run=dry_run)


@contextmanager
def _only_one(engine: sa.Engine, check: Check, *, wait_s: float) -> Iterator[None]:
    """Hold the check's advisory lock; raises CheckBusy if another session does, and for longer than `wait_s`.

    The lock belongs to a transaction that writes and reads nothing, so it has no number and holds back no horizon. A
    process that is killed loses its session and with it the lock, at once; a lease would have to run out first.
    """
    with engine.connect() as connection:
        for name in ("idle_in_transaction_session_timeout", "transaction_timeout"):
            if name == "idle_in_transaction_session_timeout" or _knows(connection, name):
                connection.execute(_SET, {"name": name, "value": "0"})
        connection.execute(_SET, {"name": "lock_timeout", "value": str(max(1, int(wait_s * 1000)))})
        try:
            connection.execute(_LOCK, {"space": LOCK_SPACE, "check": check.name})
        except sa.exc.OperationalError as error:
            if classify(error) is not Fault.LOCK:
                raise
            raise CheckBusy(
                f"another process runs the check {check.name} at this moment; `kino-refunds reconcile list` shows how"
                " far it is"
            ) from error
        yield


_SET = sa.text("SELECT pg_catalog.set_config(:name, :value, true)")
_LOCK = sa.text("SELECT pg_catalog.pg_advisory_xact_lock(:space, pg_catalog.hashtext(:check))")


def _knows(connection: sa.Connection, setting: str) -> bool:
    found = connection.execute(
        sa.text("SELECT pg_catalog.current_setting(:name, true) IS NOT NULL"), {"name": setting}
    ).scalar_one()
    return bool(found)


def _sample(engine: sa.Engine) -> None:
    """Take a sample of the clock, so that a run reaches up to now and not to the minute before."""
    with engine.begin() as connection:
        sample_clock(connection)


# --- the window ------------------------------------------------------------------------------------------------

_NEWEST = sa.text("""
    SELECT sampled_at, CAST(CAST(xid AS text) AS bigint) AS xid FROM kino.xid_clock
    WHERE xid < kino.horizon() ORDER BY xid DESC LIMIT 1
""")
_SAMPLE_BEFORE = sa.text("""
    SELECT sampled_at, CAST(CAST(xid AS text) AS bigint) AS xid FROM kino.xid_clock
    WHERE sampled_at <= :instant AND xid < kino.horizon() ORDER BY xid DESC LIMIT 1
""")
# Complete runs end to end, from the beginning: a run of a later window that was asked for by hand leaves a gap, and
# what lies in the gap was not compared.
_REACH = sa.text("""
    WITH RECURSIVE run AS (
        SELECT run_id, CAST(CAST(from_xid AS text) AS bigint) AS from_xid,
               CAST(CAST(to_xid AS text) AS bigint) AS to_xid, since, until
        FROM kino.check_run WHERE "check" = :check AND state = 'complete' AND until IS NOT NULL
    ), reached AS (
        SELECT *, max(to_xid) OVER (ORDER BY from_xid, run_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS reach
        FROM run
    ), islands AS (
        SELECT *, count(*) FILTER (WHERE reach IS NULL AND from_xid > 0 OR from_xid > reach)
                  OVER (ORDER BY from_xid, run_id) AS island
        FROM reached
    )
    SELECT max(to_xid) AS to_xid, max(until) AS until FROM islands WHERE island = 0
""")


def _begin(check: Check, bench: Bench, wanted: Wanted, *, dry_run: bool) -> tuple[Run, Scope]:
    with bench.engine.begin() as connection:
        now = read_clock(connection)
        row = None if dry_run else connection.execute(_RUNNING, {"check": check.name}).one_or_none()
        run = None if row is None else _run_of(row)
        if run is not None and wanted.has_window:
            connection.execute(_STOP, {"run_id": run.run_id, "note": "given up for a run of another window"})
            run = None
        scope = Scope(
            engine=bench.engine,
            window=_everything(now) if run is None else run.window,
            full=wanted.full if run is None else run.full,
            now=now,
            policy=bench.rules.policy,
            overdue_grace=bench.settings.overdue_grace,
            grace=timedelta(seconds=bench.settings.check_grace_s),
            source=bench.source,
            dry_run=dry_run,
            relay_queue=bench.settings.relay_queue,
            matching_delay=bench.settings.matching_delay,
        )
        if run is not None:
            return run, scope
        window, problem = _window(check, connection, scope, wanted)
        scope = replace(scope, window=window)
        run = _new(check, bench, window, full=wanted.full, at=now)
        if problem is not None:
            run = replace(run, not_comparable={problem: 1})
        if not dry_run:
            run = replace(
                run, run_id=connection.execute(_INSERT, _columns(run) | {"build": bench.rules.build}).scalar_one()
            )
    if problem is not None:
        run = _end(bench.engine, run, RunState.NOT_COMPARABLE, dry_run=dry_run)
    return run, scope


def _everything(now: datetime) -> Window:
    return Window(since=None, until=now, from_xid=0, to_xid=0)


def _window(check: Check, connection: sa.Connection, scope: Scope, wanted: Wanted) -> tuple[Window, str | None]:
    """Return what to compare, and why it cannot be compared, if that is so; raises BadWindow."""
    if wanted.since is not None and wanted.until is not None and wanted.since >= wanted.until:
        raise BadWindow(
            f"the window ends at {wanted.until:%Y-%m-%dT%H:%M:%SZ}, before it begins: exchange --since and --until"
        )
    newest = connection.execute(_NEWEST).one_or_none()
    if newest is None:
        raise BadWindow(
            "no sample of the clock is below the horizon yet: a worker takes one every minute, try again then"
        )
    latest = min(newest.sampled_at, scope.now)
    for name, instant in (("--since", wanted.since), ("--until", wanted.until)):
        if instant is not None and instant > latest:
            raise BadWindow(
                f"{name} {instant:%Y-%m-%dT%H:%M:%SZ} is later than what can be compared now: the latest is"
                f" {latest.isoformat().replace('+00:00', 'Z')}"
            )
    reach = connection.execute(_REACH, {"check": check.name}).one()
    until_at, to_xid = latest, newest.xid
    if wanted.until is not None:
        sample = connection.execute(_SAMPLE_BEFORE, {"instant": wanted.until}).one_or_none()
        until_at, to_xid = wanted.until, sample.xid if sample is not None else 0
    since_at, from_xid = reach.until, reach.to_xid or 0
    if wanted.full:
        since_at, from_xid = None, 0
    elif wanted.since is not None:
        sample = connection.execute(_SAMPLE_BEFORE, {"instant": wanted.since}).one_or_none()
        since_at, from_xid = wanted.since, sample.xid if sample is not None else 0
    window = Window(since=since_at, until=until_at, from_xid=min(from_xid, to_xid), to_xid=to_xid)
    if check.window is None:
        return window, None
    return check.window(connection, replace(scope, window=window), wanted_since=wanted.since, wanted_until=wanted.until)


def _new(check: Check, bench: Bench, window: Window, *, full: bool, at: datetime) -> Run:
    return Run(
        run_id=0,
        check=check.name,
        window=window,
        full=full,
        state=RunState.RUNNING,
        cursor={},
        compared=0,
        matched=0,
        broken=0,
        not_comparable={},
        detail={},
        actor=bench.actor,
        started_at=at,
        finished_at=None,
    )


# --- the rows --------------------------------------------------------------------------------------------------

_COLUMNS = """
    run_id, "check", since, until, CAST(CAST(from_xid AS text) AS bigint) AS from_xid,
    CAST(CAST(to_xid AS text) AS bigint) AS to_xid, is_full, state, cursor, compared, matched, broken, not_comparable,
    detail, actor, started_at, finished_at
"""
_RUNNING = sa.text(f"SELECT {_COLUMNS} FROM kino.check_run WHERE \"check\" = :check AND state = 'running'")  # noqa: S608
_STOP = sa.text("""
    UPDATE kino.check_run SET state = 'stopped', finished_at = kino.clock(),
           detail = detail || jsonb_build_object('stopped', CAST(:note AS text))
    WHERE run_id = :run_id AND state = 'running'
""")
_INSERT = sa.text("""
    INSERT INTO kino.check_run ("check", since, until, from_xid, to_xid, is_full, not_comparable, actor, build,
                                started_at)
    VALUES (:check, :since, :until, CAST(CAST(:from_xid AS text) AS xid8), CAST(CAST(:to_xid AS text) AS xid8),
            :is_full, CAST(:not_comparable AS jsonb), :actor, :build, :started_at)
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
        "actor": run.actor,
        "started_at": run.started_at,
    }


def _add(run: Run, page: Page) -> Run:
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


def _store(engine: sa.Engine, run: Run, page: Page) -> Run:
    after = _add(run, page)
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


def _end(engine: sa.Engine, run: Run, state: RunState, *, dry_run: bool) -> Run:
    if dry_run:
        return replace(run, state=state)
    with engine.begin() as connection:
        finished_at = connection.execute(_END, {"run_id": run.run_id, "state": state}).scalar_one_or_none()
    return replace(run, state=state, finished_at=finished_at)


# --- live breaks -----------------------------------------------------------------------------------------------

_LIVE = sa.text("""
    SELECT break_id, kind, coalesce(subject, 'job:' || job_id) AS subject, job_id, charge_id FROM kino.break
    WHERE status = ANY (CAST(:live AS text[])) AND kind = ANY (CAST(:kinds AS text[])) AND break_id > :after
    ORDER BY break_id LIMIT :limit
""")
_CLOSE = sa.text("""
    UPDATE kino.break SET status = 'closed', closed_at = kino.clock(), run_id = :run_id,
           notes = notes || jsonb_build_array(jsonb_build_object(
               'at', kino.clock(), 'actor', 'reconciliation',
               'text', 'run ' || CAST(:run_id AS text) || ': the two sides agree'))
    WHERE break_id = ANY (CAST(:break_ids AS bigint[])) AND status = ANY (CAST(:live AS text[]))
""")


def _look_again(check: Check, scope: Scope, run: Run) -> None:
    """Look at every live break of the check's kinds; close those that are none any more, and renew the others."""
    after = 0
    while True:
        with scope.engine.connect() as connection:
            rows = connection.execute(
                _LIVE, {"live": [*LIVE], "kinds": [*check.closes], "after": after, "limit": AGAIN}
            ).all()
        if not rows:
            return
        after = rows[-1].break_id
        live = [LiveBreak(*row) for row in map(tuple, rows)]
        found = check.again(scope, live)
        closed = [break_id for break_id, now in found.items() if now is None]
        with scope.engine.begin() as connection:
            if closed:
                connection.execute(_CLOSE, {"break_ids": closed, "run_id": run.run_id, "live": [*LIVE]})
            raise_breaks(connection, [now for now in found.values() if now is not None], run_id=run.run_id)


# --- what was run ----------------------------------------------------------------------------------------------

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
