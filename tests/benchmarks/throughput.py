"""How many events a second one worker settles, beside its Postgres and Valkey on this machine.

    make bench

Every run goes through the real thing: charges opened by the ledger, events queued in Valkey, one
`celery -A workers.app worker` process. Timed is everything from the first claim to the last drop. The
comparison is the same code with batches of one: one event, one transaction. Figures of one run compare with
each other; those of two machines do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import redis
import sqlalchemy as sa

from kino_refunds.db.engine import create_engine
from kino_refunds.embedded import Servers
from kino_refunds.events.client import redis_client
from kino_refunds.events.queues import depths
from kino_refunds.events.schema import ErrorOrigin, Event, JobCompleted, JobFailed, JobTimedOut, queue_of, to_json
from kino_refunds.ledger import ChargeRequest, Grant, LotClass, grant_lots, open_charges
from kino_refunds.processes import settings_for, start_worker
from kino_refunds.replay import scratch

ACCOUNTS = 500
CREDITS_A_JOB = 2
CHUNK = 1_000
LOOK_EVERY_S = 0.01
DEADLINE_S = 600.0


@dataclass(frozen=True)
class Run:
    """One worker over one backlog."""

    name: str
    events: int
    seconds: float
    rss_mib: float

    @property
    def per_second(self) -> float:
        return self.events / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=50_000, help="events in each large backlog")
    parser.add_argument("--single", type=int, default=5_000, help="events in the backlog for batches of one")
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, all on this machine")
    with scratch() as servers:
        grant(servers)
        refunds = measure(servers, "refunds, batch 500", "r", arguments.events, 500, refund)
        single = measure(servers, "refunds, batch 1", "s", arguments.single, 1, refund)
        mixed = measure(servers, "mixed, batch 500", "m", arguments.events, 500, mixture)
    print(
        json.dumps(
            {
                "refunds_per_second": round(refunds.per_second),
                "ratio_to_batch_1": round(refunds.per_second / single.per_second, 1),
                "mixed_events_per_second": round(mixed.per_second),
                "worker_rss_mib_max": round(max(run.rss_mib for run in (refunds, single, mixed)), 1),
            }
        )
    )


def grant(servers: Servers) -> None:
    """Two lots an account; the first is small, so that some charges span both."""
    engine = create_engine(servers.database_url(role="kino_product"), pooled=False)
    soon = datetime.now(UTC) + timedelta(days=30)
    with engine.begin() as connection:
        grant_lots(
            connection,
            [
                each
                for number in range(ACCOUNTS)
                for each in (
                    Grant(f"welcome-{number}", f"account-{number}", 25, LotClass.PROMOTIONAL, soon, priority=50),
                    Grant(f"pack-{number}", f"account-{number}", 10_000_000, LotClass.PURCHASED),
                )
            ],
        )


def refund(job_id: str, number: int) -> Event:
    """Every job fails on our side."""
    common: dict[str, Any] = {"id": f"{job_id}-end", "source": "bench", "time": datetime.now(UTC), "job_id": job_id}
    return JobFailed.of(error={"code": f"gpu_{number % 7}", "origin": ErrorOrigin.PLATFORM}, **common)


def mixture(job_id: str, number: int) -> Event:
    """Eight in ten complete, one fails, one times out."""
    common: dict[str, Any] = {"id": f"{job_id}-end", "source": "bench", "time": datetime.now(UTC), "job_id": job_id}
    match number % 10:
        case 0:
            return refund(job_id, number)
        case 5:
            return JobTimedOut.of(**common)
        case _:
            return JobCompleted.of(**common)


def measure(servers: Servers, name: str, prefix: str, events: int, batch: int, make: Any) -> Run:
    """Queue a backlog, start a worker on it, and time it until the last drop."""
    client = redis_client(servers.redis_url())
    jobs = [f"{prefix}-{number:07d}" for number in range(events)]
    open_jobs(servers, jobs)
    with client.pipeline(transaction=False) as pipeline:
        for number, job_id in enumerate(jobs):
            event = make(job_id, number)
            pipeline.lpush(queue_of(event).value, to_json(event))
            if number % CHUNK == CHUNK - 1:
                pipeline.execute()
        pipeline.execute()
    settings = settings_for(servers, KINO_INTAKE_BATCH=str(batch), KINO_LOG_LEVEL="warning")
    worker = start_worker(settings, servers.data_dir / "worker.log")
    try:
        seconds = time_backlog(client, events)
        rss_mib = peak_rss_mib(worker.pid)
    finally:
        worker.stop()
    settled = count_settled(servers, prefix)
    if settled != events:
        raise SystemExit(f"{name}: {settled} of {events} jobs are settled")
    run = Run(name, events, seconds, rss_mib)
    print(f"{name:<20} {events:>7,} events {seconds:>8.2f} s {run.per_second:>9,.0f}/s {rss_mib:>6.0f} MiB")
    return run


def open_jobs(servers: Servers, jobs: list[str]) -> None:
    engine = create_engine(servers.database_url(role="kino_product"), pooled=False)
    deadline = datetime.now(UTC) + timedelta(hours=1)
    for chunk in chunks(jobs):
        with engine.begin() as connection:
            open_charges(
                connection,
                [
                    ChargeRequest(job_id, f"account-{zlib.crc32(job_id.encode()) % ACCOUNTS}", CREDITS_A_JOB, deadline)
                    for job_id in chunk
                ],
            )


def chunks(jobs: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(jobs), CHUNK):
        yield jobs[start : start + CHUNK]


def time_backlog(client: redis.Redis, events: int) -> float:
    """Seconds from the first claim (at most one look earlier) until nothing waits and nothing is in flight."""
    deadline = time.monotonic() + DEADLINE_S
    started = None
    while time.monotonic() < deadline:
        looked = time.monotonic()
        found = depths(client)
        waiting = sum(found.values())
        if started is None and (found["in-flight"] or waiting < events):
            started = looked - LOOK_EVERY_S
        if waiting == 0 and started is not None:
            return looked - started
        time.sleep(LOOK_EVERY_S)
    raise SystemExit(f"the backlog was not settled within {DEADLINE_S:.0f} s")


def peak_rss_mib(pid: int) -> float:
    with Path(f"/proc/{pid}/status").open(encoding="ascii") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmHWM"].split()[0]) / 1024


def count_settled(servers: Servers, prefix: str) -> int:
    engine = create_engine(servers.database_url(), pooled=False)
    with engine.connect() as connection:
        return int(
            connection.execute(
                sa.text("SELECT count(*) FROM kino.settlement JOIN kino.charge USING (charge_id) WHERE job_id LIKE :p"),
                {"p": f"{prefix}-%"},
            ).scalar_one()
        )


if __name__ == "__main__":
    main()
