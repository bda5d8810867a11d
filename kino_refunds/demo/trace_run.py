"""The trace run: scratch servers, a real worker, then the overdue sweep, and every job compared with the trace.

No code here settles a charge: charges are opened as a product opens them, events are published as the pipeline
publishes them, and a `celery -A workers.app worker` process does the rest.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.db.migrate import migrate
from kino_refunds.dev.embedded import Servers, servers
from kino_refunds.dev.processes import CeleryProcess, settings_for, start_worker
from kino_refunds.events.connection import redis_client
from kino_refunds.events.publisher import EventPublisher
from kino_refunds.events.queues import depths
from kino_refunds.events.schema import queue_of, to_json
from kino_refunds.ledger import ChargeRequest, grant_lots, open_charges
from kino_refunds.reconciliation.overdue import OverdueRules, sweep_overdue
from kino_refunds.reconciliation.sources import Answer, JobState
from kino_refunds.settings import Settings
from kino_refunds.settlement.deliveries import RECONCILER
from kino_refunds.settlement.rules import rules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import redis

    from kino_refunds.demo.trace import Job, Workload

CHUNK = 200
"""Charges opened in one product transaction, and events published after it."""
LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Figures:
    """The ledger's figures after the run; `refunded` excludes the refunds of the overdue sweep. Credits are whole."""

    jobs: int
    captured: int
    captured_credits: int
    refunded: int
    refunded_credits: int
    overdue_refunded: int
    overdue_refunded_credits: int
    open: int
    dead_letters: int
    breaks: int
    seconds: float
    """From the first published event to the last settlement, the overdue sweep included."""
    events_per_second: float
    """Published events over the time until the queues were empty; that time includes opening the charges."""


@dataclass(frozen=True, slots=True)
class TraceReport:
    """The result of a trace run: figures, a sentence for each disagreement, and the number of jobs for each reason."""

    figures: Figures
    disagreements: list[str]
    reasons: list[dict[str, Any]]


class AllUnknown:
    """The job source of a trace: it answers `unknown` for every job, because the trace does not know their ends."""

    def ask(self, job_ids: Sequence[str]) -> Mapping[str, Answer]:
        """Return `unknown` for every job."""
        return dict.fromkeys(job_ids, Answer(JobState.UNKNOWN))


@contextmanager
def scratch() -> Iterator[Servers]:
    """Run scratch servers with a migrated database for the time of the block."""
    with servers() as running:
        migrate(running.database_url(role="kino_owner"))
        yield running


def run_trace(
    workload: Workload, running: Servers, *, progress: Callable[[str, int, int], None] = lambda *_: None
) -> TraceReport:
    """Run `workload` through a real worker on these servers; return the report, which compares every job and wallet.

    `progress` is called with (stage, done, of) during the run. Raises ServerFailed if the worker ends.
    """
    product = create_engine(running.database_url(role="kino_product"), application_name="kino-product")
    operator = create_engine(running.database_url(), application_name="kino-trace")
    with ExitStack() as stack:
        stack.callback(product.dispose)
        stack.callback(operator.dispose)
        client = stack.enter_context(redis_client(running.redis_url()))
        with product.begin() as connection:
            grant_lots(connection, workload.grants)
        worker = start_worker(settings_for(running, KINO_LOG_FORMAT="json"), running.data_dir / "worker.log")
        stack.callback(worker.stop)
        started = time.monotonic()
        published = _submit(workload.jobs, product, running=running, client=client, worker=worker, progress=progress)
        _wait_until_drained(client, worker, published, progress)
        drained = time.monotonic()
        progress("asking about jobs without an event", 0, 0)
        _sweep_once(operator, client)
        ended = time.monotonic()
        with operator.connect() as connection:
            return TraceReport(
                _figures(connection, ended - started, published / (drained - started)),
                list(_disagreements(connection, workload.jobs)),
                [dict(row) for row in connection.execute(_REASONS).mappings()],
            )


def _sweep_once(engine: sa.Engine, client: redis.Redis) -> None:
    """Ask once about each job without an event, with the defaults of all other settings."""
    settings = Settings.model_construct()
    sweep_overdue(
        engine,
        client,
        AllUnknown(),
        rules_of(settings),
        overdue=OverdueRules(
            grace=settings.overdue_grace,
            asks=1,
            ask_window=timedelta(0),
            running_max=timedelta(hours=settings.overdue_running_max_h),
        ),
    )


def _submit(
    jobs: Sequence[Job],
    product: sa.Engine,
    running: Servers,
    client: redis.Redis,
    worker: CeleryProcess,
    progress: Callable[[str, int, int], None],
) -> int:
    published = 0
    with EventPublisher(running.redis_url()) as publisher:
        for start in range(0, len(jobs), CHUNK):
            chunk = jobs[start : start + CHUNK]
            with product.begin() as connection:
                open_charges(
                    connection, [ChargeRequest(j.job_id, j.account_id, j.credits, j.deadline_at) for j in chunk]
                )
            events = [job.event for job in chunk if job.event is not None]
            publisher.publish_many(islice(events, 0, None, 2))
            with client.pipeline(transaction=False) as bare:
                for event in islice(events, 1, None, 2):
                    bare.lpush(queue_of(event).value, to_json(event))
                bare.execute()
            published += len(events)
            worker.require_alive()
            progress("jobs submitted, events published", start + len(chunk), len(jobs))
    return published


def _wait_until_drained(
    client: redis.Redis, worker: CeleryProcess, published: int, progress: Callable[[str, int, int], None]
) -> None:
    while queued := sum(depths(client).values()):
        worker.require_alive()
        progress("events settled", published - queued, published)
        time.sleep(LOOK_EVERY_S)
    progress("events settled", published, published)


_FIGURES = sa.text("""
    SELECT count(*) AS jobs,
           count(*) FILTER (WHERE s.kind = 'captured') AS captured,
           coalesce(sum(c.credits) FILTER (WHERE s.kind = 'captured'), 0) AS captured_credits,
           count(*) FILTER (WHERE s.kind = 'refunded' AND s.event_source <> :reconciler) AS refunded,
           coalesce(sum(c.credits) FILTER (WHERE s.kind = 'refunded' AND s.event_source <> :reconciler), 0)
               AS refunded_credits,
           count(*) FILTER (WHERE s.kind = 'refunded' AND s.event_source = :reconciler) AS overdue_refunded,
           coalesce(sum(c.credits) FILTER (WHERE s.kind = 'refunded' AND s.event_source = :reconciler), 0)
               AS overdue_refunded_credits,
           count(*) FILTER (WHERE s.kind IS NULL) AS open,
           (SELECT count(*) FROM kino.dead_letter) AS dead_letters,
           (SELECT count(*) FROM kino.break) AS breaks
    FROM kino.charge c LEFT JOIN kino.settlement s USING (charge_id)
""")

_REASONS = sa.text("""
    SELECT status, reason, clause, count(*) AS jobs, CAST(sum(credits) AS bigint) AS credits
    FROM kino.charge_status GROUP BY status, reason, clause ORDER BY status, jobs DESC
""")


def _figures(connection: sa.Connection, seconds: float, events_per_second: float) -> Figures:
    row = connection.execute(_FIGURES, {"reconciler": RECONCILER}).mappings().one()
    counts = {name: int(value) for name, value in row.items()}
    return Figures(**counts, seconds=round(seconds, 2), events_per_second=round(events_per_second, 1))


def _disagreements(connection: sa.Connection, jobs: Iterable[Job]) -> Iterator[str]:
    """Yield a sentence for every job and every wallet that is not as the workload says."""
    found = {
        row.job_id: (row.account_id, row.credits, row.status, row.refunded)
        for row in connection.execute(sa.text("SELECT * FROM kino.charge_status"))
    }
    consumed: dict[str, int] = {}
    for job in jobs:
        status, refunded = ("refunded", job.credits) if job.refunded else ("captured", 0)
        wanted = (job.account_id, job.credits, status, refunded)
        if found.pop(job.job_id, None) != wanted:
            yield f"job {job.job_id} must be {status}; `kino-refunds why` would say otherwise"
        consumed[job.account_id] = consumed.get(job.account_id, 0) + job.credits - refunded
    for job_id in found:
        yield f"job {job_id} was never submitted"
    wallets = connection.execute(
        sa.text("""
            SELECT b.account_id, b.available, b.held,
                   (SELECT CAST(sum(credits) AS bigint) FROM kino.transfer t
                    WHERE t.account_id = b.account_id AND t.kind = 'grant') AS granted
            FROM kino.account_balance b
        """)
    )
    for row in wallets:
        if (row.available, row.held) != (row.granted - consumed.get(row.account_id, 0), 0):
            yield f"account {row.account_id} has {row.available} available and {row.held} held of {row.granted}"
