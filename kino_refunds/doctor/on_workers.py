"""The workers on the ledger: the gate, their heartbeats, and whether the scheduled sweeps run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from kino_refunds.doctor.findings import Finding, Level, expect
from kino_refunds.doctor.on_settings import JOB_SOURCE
from kino_refunds.intake.gate import Gate, read_gate
from kino_refunds.intake.workforce import Workforce, read_workforce
from kino_refunds.schedule import Run, entries, read_schedule
from kino_refunds.settings import Settings


def check_workers(connection: sa.Connection, settings: Settings) -> Iterator[Finding]:
    """Check what workers and beat have written about themselves."""
    yield _gate(read_gate(connection))
    yield _alive(read_workforce(connection))
    for run in read_schedule(connection, entries(settings)):
        yield _beat(run)
    if settings.job_source is not None:
        yield from _source(connection.execute(_SWEPT).scalar_one_or_none() or {})
    yield _stuck([_StuckMessage(*row) for row in connection.execute(_STUCK)])


def _gate(gate: Gate) -> Finding:
    if not gate.paused:
        return Finding("intake", "ok", "open")
    advice = (
        "our own code fails: see `kino-refunds dead-letters list --reason apply_error`; a fixed build reopens it"
        if gate.probed
        else "when the reason is gone: `kino-refunds intake resume`"
    )
    return Finding("intake", "fail", f"paused by {gate.actor} at {_shown(gate.changed_at)}: {gate.reason}", advice)


def _alive(workers: Workforce) -> Finding:
    last = f"the last was seen {_shown(workers.seen_at)}" if workers.seen_at else "none was ever seen"
    return expect(
        "workers",
        workers.alive > 0,
        f"{workers.alive} alive, build {workers.builds}" if workers.alive else f"0 alive; {last}",
        "start `celery -A workers.app worker`; if one runs and is not seen, its log says why",
    )


def _beat(run: Run) -> Finding:
    found = f"{run.what}: last {_shown(run.last) if run.last else 'never'}"
    if run.late:
        advice = "check that `celery -A workers.app beat` and a worker run, and that Redis is not full"
        return Finding("beat", "fail", found, advice)
    if run.last is None:
        return Finding("beat", "warn", found, "wait a minute; then check that `celery -A workers.app beat` runs")
    if run.stuck:
        return Finding(
            "beat",
            "warn",
            f"{found}, ended last {_shown(run.ended) if run.ended else 'never'}",
            "a worker's log says why it does not end",
        )
    return Finding("beat", "ok", found)


_SWEPT = sa.text("""
    SELECT result FROM kino.schedule_slot WHERE name = 'kino.sweep_overdue' AND finished_at IS NOT NULL
    ORDER BY slot_at DESC LIMIT 1
""")


def _source(swept: dict[str, Any]) -> Iterator[Finding]:
    """Give what the last sweep found wrong with the job source: the worker's source counts, not this shell's."""
    problem = swept.get("source_problem")
    if problem is None:
        return
    broken, errors = swept.get("source_broken", 0), swept.get("source_errors", 0)
    found = f"the last sweep got no answer for {broken + errors:,} jobs: {problem}"
    if not broken + errors:
        found = f"the last sweep could not ask: {problem}"
    if errors and not broken:
        level: Level = "warn" if swept.get("answers") else "away"
        advice = "the sweep asks again; if this stays, check that the source runs, its URL and its password"
        yield Finding(JOB_SOURCE, level, found, advice)
    else:
        advice = "none of these jobs is settled until the source is fixed; then `kino-refunds charges ask --dry-run`"
        yield Finding(JOB_SOURCE, "fail", found, advice)


# As the overdue sweep has noted it.
_STUCK = sa.text("""
    SELECT first_seen_at, job_ids FROM kino.waiting_message
    WHERE first_seen_at < kino.clock() - interval '1 day' ORDER BY first_seen_at, digest
""")
_JOBS_SHOWN = 5


class _StuckMessage(NamedTuple):
    first_seen_at: datetime
    job_ids: Sequence[str]


def _stuck(messages: Sequence[_StuckMessage]) -> Finding:
    """Report messages queued for more than a day: each withholds a presumed timeout only of the jobs that it names."""
    jobs = list(dict.fromkeys(job_id for message in messages for job_id in message.job_ids))
    more = f" and {len(jobs) - _JOBS_SHOWN:,} more" if len(jobs) > _JOBS_SHOWN else ""
    named = f"about {', '.join(map(ascii, jobs[:_JOBS_SHOWN]))}{more}" if jobs else "naming no job"
    return expect(
        "waiting messages",
        not messages,
        f"{len(messages):,} queued for more than a day, the first since {_shown(messages[0].first_seen_at)}, {named}"
        if messages
        else "none is queued for more than a day",
        "their jobs are not refunded as timed out until then: see `kino-refunds intake status`; the workers' logs say"
        " why a batch is kept",
        level="warn",
    )


def _shown(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%SZ}"
