"""The retry sweep: pending events whose time has come go through `settle` once more (section 6)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.errors import MalformedMessage
from kino_refunds.events.envelope import parse_stored
from kino_refunds.settlement.batch import settle_batch
from kino_refunds.settlement.dead_letters import malformed_letter, record_dead_letters
from kino_refunds.settlement.deliveries import delivery_of
from kino_refunds.settlement.pending import LONGEST_DELAY, unpark

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kino_refunds.settlement.deliveries import Delivery
    from kino_refunds.settlement.rules import Rules

LONGEST_LEASE = timedelta(hours=1)
"""An event pending or leased for longer than this was so by a clock that has been set back since: it is due."""


@dataclass(frozen=True, slots=True)
class RetryReport:
    """What a sweep came to: events tried, and how many of each outcome."""

    tried: int
    outcomes: Mapping[str, int]


def sweep_retries(
    engine: sa.Engine, rules: Rules, *, lease: timedelta, limit: int = 500, event_id: str | None = None
) -> RetryReport:
    """Try due events once more, by the same way as live ones; one round of at most `limit` jobs.

    If Postgres goes away in between, the leases run out and no attempt is spent.
    """
    with engine.begin() as connection:
        due = lease_due(connection, lease=lease, build=rules.build, limit=limit, event_id=event_id)
    rulings = settle_batch(engine, due, rules) if due else []
    return RetryReport(len(due), Counter(ruling.outcome.value for ruling in rulings))


# A job's pending events are taken together, or the later one would be decided without the earlier.
_LEASE = sa.text("""
    WITH clock AS MATERIALIZED (
        SELECT now, now + make_interval(secs => :longest_wait_s) AS longest_wait,
               now + make_interval(secs => :longest_lease_s) AS longest_lease
        FROM (SELECT kino.clock() AS now) AS read
    ), due AS (
        SELECT p.source, p.event_id FROM kino.pending_event p
        WHERE (p.leased_until IS NULL OR p.leased_until <= (SELECT now FROM clock)
               OR p.leased_until > (SELECT longest_lease FROM clock))
          AND (CAST(:event_id AS text) IS NULL OR p.event_id = :event_id)
          AND p.job_id IN (
              SELECT d.job_id FROM kino.pending_event d
              WHERE (d.leased_until IS NULL OR d.leased_until <= (SELECT now FROM clock)
                     OR d.leased_until > (SELECT longest_lease FROM clock))
                AND (CAST(:event_id AS text) IS NULL OR d.event_id = :event_id)
                AND (d.next_attempt_at <= (SELECT now FROM clock)
                     OR d.next_attempt_at > (SELECT longest_wait FROM clock)
                     OR (d.outcome = 'charge_not_found'
                         AND EXISTS (SELECT FROM kino.charge c WHERE c.job_id = d.job_id)))
              ORDER BY d.next_attempt_at LIMIT :limit)
        FOR UPDATE SKIP LOCKED
    )
    UPDATE kino.pending_event p
    SET leased_until = kino.clock() + make_interval(secs => :lease_s) FROM due
    WHERE p.source = due.source AND p.event_id = due.event_id
    RETURNING CAST(p.event AS text) AS event, p.first_seen_at, p.attempts,
              p.source, p.event_id, p.fingerprint, p.queue
""")


def lease_due(
    connection: sa.Connection,
    *,
    lease: timedelta,
    build: str,
    limit: int = 500,
    event_id: str | None = None,
) -> list[Delivery]:
    """Take events whose time has come, and those whose charge has come, for the length of `lease`.

    In the caller's transaction, which must be committed before they are settled: the lease, not a lock,
    keeps a second sweep away from them. It runs out with the alive TTL of a worker, so what a sweep had in hand
    when it was killed comes back as soon as its worker's batch (P9). An event that this build cannot read, of a
    newer one that was taken back, becomes a dead letter: it must not stop the sweep for all others (P8).
    """
    rows = connection.execute(
        _LEASE,
        {
            "longest_wait_s": LONGEST_DELAY.total_seconds(),
            "longest_lease_s": max(lease, LONGEST_LEASE).total_seconds(),
            "lease_s": lease.total_seconds(),
            "limit": limit,
            "event_id": event_id,
        },
    )
    due, unread, letters = [], {}, []
    for row in rows:
        raw = row.event.encode()
        try:
            due.append(delivery_of(parse_stored(raw), pending_since=row.first_seen_at, attempts=row.attempts + 1))
        except MalformedMessage as error:
            unread[row.source, row.event_id] = row.fingerprint
            letters.append(malformed_letter(raw, row.queue, error))
    unpark(connection, unread)
    record_dead_letters(connection, letters, build=build)
    return due
