"""From publish to commit: events at an even pace, into a worker that has nothing else to do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import redis
import sqlalchemy as sa

from kino_refunds.dev.embedded import Servers
from kino_refunds.events.schema import Event, queue_of, to_json
from tests.benchmarks.backlog import engine_of, refund

SETTLED_WITHIN_S = 60.0
LOOK_EVERY_S = 0.05


@dataclass(frozen=True)
class Latency:
    """Milliseconds from publish to commit, at the pace that was kept."""

    per_second: float
    p50_ms: float
    p99_ms: float
    max_ms: float

    def as_json(self) -> dict[str, float]:
        """The figures, as exact as they deserve."""
        return {name: round(value, 1) for name, value in asdict(self).items()}


# Both clocks are this machine's. Postgres takes its time as the commit begins; its fsync comes after.
_LATENCY = sa.text("""
    SELECT count(*), percentile_disc(ARRAY[0.5, 0.99, 1.0]) WITHIN GROUP (ORDER BY ms) FROM (
        SELECT 1000 * extract(epoch FROM pg_xact_commit_timestamp(CAST(s.xid AS xid)) - s.event_time)::float8 AS ms
        FROM kino.charge c JOIN kino.settlement s USING (charge_id) WHERE c.job_id = ANY(CAST(:job_ids AS text[]))
    ) AS settled
""")


def publish_paced(client: redis.Redis, jobs: Sequence[str], per_second: float) -> tuple[list[Event], float]:
    """Publish the end of one job every 1/`per_second`; an event's time is the instant before its LPUSH.

    Returns the events and the pace that was kept: who falls behind publishes at once, and says so.
    """
    events = []
    started = time.monotonic()
    for number, job_id in enumerate(jobs):
        time.sleep(max(0.0, started + number / per_second - time.monotonic()))
        event = refund(job_id, number).model_copy(update={"time": datetime.now(UTC)})
        client.lpush(queue_of(event).value, to_json(event))
        events.append(event)
    return events, len(jobs) / (time.monotonic() - started)


def latency(servers: Servers, jobs: Sequence[str], per_second: float) -> Latency:
    """Read when these jobs were settled, once all of them are."""
    settled = 0
    deadline = time.monotonic() + SETTLED_WITHIN_S
    with engine_of(servers) as engine:
        while time.monotonic() < deadline:
            with engine.connect() as connection:
                settled, of = connection.execute(_LATENCY, {"job_ids": list(jobs)}).one()
            if settled == len(jobs):
                p50, p99, worst = of
                return Latency(per_second, p50, p99, worst)
            time.sleep(LOOK_EVERY_S)
    raise SystemExit(f"latency: {len(jobs) - settled} of {len(jobs)} jobs are not settled")
