"""Run a check page by page, each with its breaks in one transaction: a kill costs one page (design, part B)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.db.clock import read_clock
from kino_refunds.db.engine import create_engine
from kino_refunds.db.faults import Fault, classify
from kino_refunds.errors import CheckBusy
from kino_refunds.reconciliation.adapters import source_of
from kino_refunds.reconciliation.comparison import LiveBreak, Scope, Window
from kino_refunds.reconciliation.run_rows import (
    Run,
    RunState,
    add_page,
    end_run,
    insert_run,
    running_run,
    stop_run,
    store_page,
)
from kino_refunds.reconciliation.verified import sample_clock
from kino_refunds.reconciliation.windows import Wanted, choose_window
from kino_refunds.settlement.breaks import LIVE, raise_breaks
from kino_refunds.settlement.rules import rules_of

if TYPE_CHECKING:
    from kino_refunds.reconciliation.checks import Check
    from kino_refunds.reconciliation.sources import JobSource
    from kino_refunds.settings import Settings
    from kino_refunds.settlement.rules import Rules

LONGEST_QUERY_MS = 600_000
"""One query of a check may read a large ledger whole; it holds no lock that anybody waits for."""
AGAIN = 1_000
"""Live breaks that are looked at again at once."""
LOCK_SPACE = 0x6B696E6F
"""The first half of the advisory locks of checks: the bytes of "kino"."""
BY_SCHEDULE = "schedule"
"""The actor of a run that nobody started by hand."""


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
    wanted: Wanted = Wanted(),  # noqa: B008 - a value that cannot change
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
                run = add_page(run, page) if dry_run else store_page(bench.engine, run, page)
                progress(run)
                if not page.is_comparable:
                    return end_run(bench.engine, run, RunState.NOT_COMPARABLE, dry_run=dry_run)
                if ends_at is not None and time.monotonic() > ends_at:
                    return run
        return end_run(bench.engine, run, RunState.COMPLETE, dry_run=dry_run)


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


def _begin(check: Check, bench: Bench, wanted: Wanted, *, dry_run: bool) -> tuple[Run, Scope]:
    with bench.engine.begin() as connection:
        now = read_clock(connection)
        run = None if dry_run else running_run(connection, check.name)
        if run is not None and wanted.has_window:
            stop_run(connection, run, note="given up for a run of another window")
            run = None
        elif run is not None and run.build != bench.rules.build:
            # Its first pages were judged by another policy, or by other code.
            stop_run(connection, run, note=f"given up by build {bench.rules.build}")
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
        window, problem = choose_window(check, connection, scope, wanted)
        scope = replace(scope, window=window)
        run = _new(check, bench, window, wanted, at=now)
        if problem is not None:
            # Ended where it is begun: a run of a window that cannot be compared must not be gone on with.
            run = replace(run, not_comparable={problem: 1}, state=RunState.NOT_COMPARABLE, finished_at=now)
        return run if dry_run else insert_run(connection, run), scope


def _everything(now: datetime) -> Window:
    return Window(since=None, until=now, from_xid=0, to_xid=0)


def _new(check: Check, bench: Bench, window: Window, wanted: Wanted, *, at: datetime) -> Run:
    detail: dict[str, object] = {}
    if wanted.since is not None:
        detail["asked_since"] = wanted.since.isoformat()
    if check.asks_source:
        detail["source"] = bench.settings.job_source_name
    return Run(
        run_id=0,
        check=check.name,
        window=window,
        full=wanted.full,
        state=RunState.RUNNING,
        cursor={},
        compared=0,
        matched=0,
        broken=0,
        not_comparable={},
        detail=detail,
        build=bench.rules.build,
        actor=bench.actor,
        started_at=at,
        finished_at=None,
    )


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
