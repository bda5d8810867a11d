"""Who works on the ledger: the gate, intake's heartbeats, and whether what runs by itself does."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from kino_refunds.doctor.findings import Finding, judge
from kino_refunds.schedule import Run, entries, read_schedule
from kino_refunds.settings import Settings
from kino_refunds.settlement.gate import Gate, read_gate


def check_workers(connection: sa.Connection, settings: Settings) -> Iterator[Finding]:
    """Look at what workers and beat have written about themselves."""
    yield _gate(read_gate(connection))
    yield _alive(connection.execute(_WORKERS).one())
    for run in read_schedule(connection, entries(settings)):
        yield _beat(run)


def _gate(gate: Gate) -> Finding:
    if not gate.paused:
        return Finding("intake", "ok", "open")
    advice = (
        "our own code fails, see `kino-refunds dead-letters list --reason apply_error`; a build that works reopens it"
        if gate.probed
        else "when the reason is gone: `kino-refunds intake resume`"
    )
    return Finding("intake", "fail", f"paused by {gate.actor} at {_shown(gate.changed_at)}: {gate.reason}", advice)


# Three heartbeats: one may be late behind a slow batch.
_WORKERS = sa.text("""
    WITH worker AS (
        SELECT build, seen_at,
               stopped_at IS NULL AND seen_at > kino.clock() - interval '30 seconds' AS alive
        FROM kino.intake_worker
    )
    SELECT count(*) FILTER (WHERE alive) AS alive, max(seen_at) AS seen_at,
           string_agg(DISTINCT build, ', ' ORDER BY build) FILTER (WHERE alive) AS builds
    FROM worker
""")


def _alive(workers: Any) -> Finding:
    last = f"the last was seen {_shown(workers.seen_at)}" if workers.seen_at else "none was ever seen"
    return judge(
        "workers",
        workers.alive > 0,
        f"{workers.alive} alive, build {workers.builds}" if workers.alive else f"0 alive; {last}",
        "start `celery -A workers.app worker`; one that runs and is not seen says why in its log",
    )


def _beat(run: Run) -> Finding:
    found = f"{run.what}: last {_shown(run.last) if run.last else 'never'}"
    if run.late:
        advice = "see that `celery -A workers.app beat` and a worker run, and that Redis is not full"
        return Finding("beat", "fail", found, advice)
    if run.last is None:
        return Finding("beat", "warn", found, "wait a minute; then see that `celery -A workers.app beat` runs")
    if run.stuck:
        return Finding(
            "beat",
            "warn",
            f"{found}, to its end {_shown(run.ended) if run.ended else 'never'}",
            "a worker's log says what stops it",
        )
    return Finding("beat", "ok", found)


def _shown(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%SZ}"
