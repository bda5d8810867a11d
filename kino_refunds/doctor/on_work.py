"""What needs a person: overdue charges, dead letters, breaks, and how far the ledger is verified."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from kino_refunds.desk.status import Standing, counted, read_standing
from kino_refunds.doctor.findings import Finding, expect
from kino_refunds.reconciliation.checks import CHECKS
from kino_refunds.reconciliation.run_rows import RunState, read_last_runs
from kino_refunds.reconciliation.told import OFF
from kino_refunds.reconciliation.verified import HORIZON_AGE_FAIL, HORIZON_AGE_WARN, Verification, horizon_holders
from kino_refunds.settings import Settings


def check_work(connection: sa.Connection, settings: Settings) -> Iterator[Finding]:
    """Check what is open, and say what to do about it."""
    standing = read_standing(connection, settings)
    yield _overdue(standing)
    yield _letters(standing)
    found = f"{counted(standing.breaks_open, 'break')} open" if standing.breaks_open else "none is open"
    advice = "a job's ending disagrees with the ledger: `kino-refunds breaks list`"
    yield expect("breaks", not standing.breaks_open, found, advice)
    yield _checks(connection)
    yield _verified(standing.verified)
    yield _horizon(connection, standing.verified)


def _overdue(standing: Standing) -> Finding:
    late, overdue = standing.overdue_late, standing.overdue
    if late.charges:
        found = (
            f"{counted(late.charges, 'charge')} with {counted(late.credits, 'credit')} open more than 5 min past"
            " deadline and grace"
        )
        advice = "`kino-refunds charges ask --dry-run` shows what the job source knows, and why refunds are withheld"
        return Finding("overdue charges", "fail", found, advice)
    if overdue.charges:
        found = f"{counted(overdue.charges, 'charge')} past deadline and grace"
        return Finding(
            "overdue charges", "warn", found, "the sweep asks the job source about them; look again in 5 minutes"
        )
    return Finding("overdue charges", "ok", f"none, of {counted(standing.open.charges, 'open charge')}")


def _letters(standing: Standing) -> Finding:
    letters = standing.letters
    if not letters.count:
        return Finding("dead letters", "ok", "none is open")
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in letters.by_reason.items())
    found = f"{letters.count:,} open ({reasons}), {counted(letters.credits_at_stake, 'credit')} at stake"
    advice = "`kino-refunds dead-letters list`"
    return Finding("dead letters", "fail" if letters.credits_at_stake else "warn", found, advice)


def _checks(connection: sa.Connection) -> Finding:
    """Say which checks could compare nothing at their last run. That one never ran, or is late, is beat's finding."""
    last = read_last_runs(connection, [check.name for check in CHECKS])
    reasons = [
        f"{name}: {why}"
        for name, run in last.items()
        if run.state is RunState.NOT_COMPARABLE
        for why in run.not_comparable
        if why != OFF
    ]
    found = "; ".join(reasons) or f"{len(last)} have run"
    advice = "`kino-refunds reconcile list`; without a second side nothing is verified (deploy/README.md, Job sources)"
    return Finding("checks", "warn", found, advice) if reasons else Finding("checks", "ok", found)


def _verified(verified: Verification) -> Finding:
    if verified.through is None:
        advice = "beat and a worker take a sample every minute; wait for the second one"
        return Finding("verified through", "warn", "no sample of the clock is below the horizon yet", advice)
    found = f"every charge opened before {verified.through:%Y-%m-%d %H:%M:%SZ} is settled"
    return Finding("verified through", "ok", found)


def _horizon(connection: sa.Connection, verified: Verification) -> Finding:
    age = verified.horizon_age
    if age is None or age <= HORIZON_AGE_WARN:
        return Finding("horizon", "ok", "no transaction has been open for long")
    holders = "; ".join(
        holder.name + (f" since {holder.started_at:%Y-%m-%d %H:%M:%SZ}" if holder.started_at else "")
        for holder in horizon_holders(connection)
    )
    found = (
        f"held for {age.total_seconds() / 60:,.0f} min by {holders}"
        if holders
        else f"the newest sample below it is {age.total_seconds() / 60:,.0f} min old, and no transaction holds it now"
    )
    advice = (
        "statements, relay and proofs wait for that transaction: end it, if need be with pg_terminate_backend"
        if holders
        else "see that beat and a worker run: they take a sample every minute"
    )
    return Finding("horizon", "fail" if age > HORIZON_AGE_FAIL else "warn", found, advice)
