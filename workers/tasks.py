"""The sweeps as Celery tasks: each claims its slot, runs once, and stores its result in the slot's row."""

from __future__ import annotations

import os
import socket
from functools import cache
from typing import TYPE_CHECKING, Any

import redis
from celery import shared_task

from kino_refunds.db.engine import create_engine
from kino_refunds.db.faults import Fault, classify
from kino_refunds.errors import BadSettings, KinoError
from kino_refunds.events.connection import redis_client
from kino_refunds.intake.gate import read_gate
from kino_refunds.ledger import expire_lots as expire
from kino_refunds.outbox.relay import relay_refunds as relay
from kino_refunds.reconciliation.adapters import source_of
from kino_refunds.reconciliation.checks import CHECKS
from kino_refunds.reconciliation.clocks import read_clocks
from kino_refunds.reconciliation.overdue import overdue_rules_of
from kino_refunds.reconciliation.overdue import sweep_overdue as sweep_jobs
from kino_refunds.reconciliation.runs import BY_SCHEDULE, bench_for, run_check
from kino_refunds.reconciliation.verified import sample_clock as sample
from kino_refunds.schedule import claim_slot, entries, finish_slot
from kino_refunds.settings import load_settings
from kino_refunds.settlement.retries import sweep_retries as sweep
from kino_refunds.settlement.rules import rules_of
from kino_refunds.telemetry.log import get_logger, one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    import sqlalchemy as sa

    from kino_refunds.reconciliation.checks import Check
    from kino_refunds.settings import Settings

log = get_logger(__name__)


@cache
def _engine() -> sa.Engine:
    settings = load_settings()
    return create_engine(
        settings.require_database_url(), limits=settings.session_limits, application_name="kino-sweeps"
    )


@cache
def _redis() -> redis.Redis:
    return redis_client(load_settings().require_redis_url())


def _in_slot(name: str, run: Callable[[], dict[str, Any]], *, settles: bool) -> None:
    """Run in this slot; an error of a dependency or a setting is logged in one line, and the next run goes on.

    Raises any other error, which Celery logs with its traceback.
    """
    try:
        _run_in_slot(name, run, settles=settles)
    except Exception as error:
        if not isinstance(error, (KinoError, redis.RedisError)) and classify(error) is Fault.BISECT:
            raise
        log.warning("sweep failed: the next run goes on from there", task=name, error=one_line(error))


def _run_in_slot(name: str, run: Callable[[], dict[str, Any]], *, settles: bool) -> None:
    """Run in this slot unless another process has; log a run that found something to do. Raises what the run raises.

    A sweep that settles events does nothing while intake is paused: a build that the tripwire has stopped must not turn
    the pending events into dead letters.
    """
    entry = next((entry for entry in entries(load_settings()) if entry.name == name), None)
    if entry is None:
        raise BadSettings(f"beat started {name}, which is switched off in this worker's settings: give both the same")
    with _engine().begin() as connection:
        slot_at = claim_slot(connection, entry, claimed_by=f"{socket.gethostname()}:{os.getpid()}")
        paused = settles and read_gate(connection).paused
    if slot_at is None:
        return
    result = {"paused": True} if paused else run()
    with _engine().begin() as connection:
        finish_slot(connection, entry, slot_at, result)
    if any(result.values()):
        log.info("sweep ended", task=name, **result)


@shared_task(name="kino.sweep_retries")
def sweep_retries() -> None:
    """Settle pending events again whose time, or whose charge, has come."""
    settings = load_settings()

    def run() -> dict[str, Any]:
        swept = sweep(_engine(), rules_of(settings), lease=settings.retry_lease)
        return {"tried": swept.tried, "outcomes": swept.outcomes}

    _in_slot("kino.sweep_retries", run, settles=True)


@shared_task(name="kino.expire_lots")
def expire_lots() -> None:
    """Expire lots whose time has come, in small transactions, because a refund may wait for one of the lots."""

    def run() -> dict[str, Any]:
        with _engine().connect() as connection:
            disagreement = read_clocks(connection, _redis()).disagreement()
        if disagreement is not None:
            log.error("expiry is withheld: the clocks disagree, set them by NTP", why=disagreement)
            return {"withheld": {"clock": 1}}
        count = expired = -1
        while expired:
            with _engine().begin() as connection:
                expired = expire(connection)
            count += expired
        return {"lots": count + 1}

    _in_slot("kino.expire_lots", run, settles=False)


@shared_task(name="kino.sample_clock")
def sample_clock() -> None:
    """Store which instant belongs to which transaction: "verified through" is read from these samples."""

    def run() -> dict[str, Any]:
        with _engine().begin() as connection:
            sample(connection)
        return {}

    _in_slot("kino.sample_clock", run, settles=False)


@shared_task(name="kino.sweep_overdue")
def sweep_overdue() -> None:
    """Ask the job source about jobs whose event never came, and settle what it answers."""
    settings = load_settings()

    def run() -> dict[str, Any]:
        try:
            with source_of(settings) as source:
                overdue = overdue_rules_of(settings)
                report = sweep_jobs(_engine(), _redis(), source, rules_of(settings), overdue=overdue)
        except BadSettings as error:
            # The doctor reads it from the slot's row. In the log it is one line, because a traceback would hide it.
            log.error("overdue jobs are not asked about", error=str(error))  # noqa: TRY400
            return {"source_problem": str(error)}
        return {name: value for name, value in report.as_dict().items() if name != "verified_through"}

    _in_slot("kino.sweep_overdue", run, settles=True)


CHECK_BUDGET_S = 15.0
"""What one check may take of a round before it leaves the rest to the next one: a check that reads a large ledger for
the first time must not keep the others waiting for hours."""


@shared_task(name="kino.run_checks")
def run_checks() -> None:
    """Run every check over what is new, one after the other; one that fails keeps no other from running."""
    settings = load_settings()

    def run() -> dict[str, Any]:
        found = {check.name: _run_check(check, settings) for check in CHECKS}
        return {name: said for name, said in found.items() if said}

    _in_slot("kino.run_checks", run, settles=False)


def _run_check(check: Check, settings: Settings) -> dict[str, Any]:
    """Run one check, or go on with it; return what a person should see of it, nothing if all of it matched.

    Raises an error that is nobody's but ours.
    """
    try:
        with bench_for(check, settings, actor=BY_SCHEDULE) as bench:
            ended = run_check(check, bench, budget_s=CHECK_BUDGET_S)
        log.info(
            "check ended",
            check=check.name,
            run=ended.run_id,
            state=ended.state,
            compared=ended.compared,
            matched=ended.matched,
            broken=ended.broken,
            not_comparable=dict(ended.not_comparable),
        )
    except Exception as error:
        if not isinstance(error, KinoError) and classify(error) is Fault.BISECT:
            raise
        log.warning("check failed: the next round goes on from there", check=check.name, error=one_line(error))
        return {"error": one_line(error)}
    return {"state": ended.state, "broken": ended.broken} if ended.broken or not ended.is_complete else {}


@shared_task(name="kino.relay_refunds")
def relay_refunds() -> None:
    """Send the product an event for each refund, oldest first."""
    queue = load_settings().relay_queue

    def run() -> dict[str, Any]:
        count = relayed = 0
        while queue is not None and (relayed := relay(_engine(), _redis(), queue)):
            count += relayed
        return {"relayed": count}

    _in_slot("kino.relay_refunds", run, settles=False)
