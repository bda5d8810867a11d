"""The retry sweep: pending events whose time has come are settled again, by the same `settle` (design, section 6)."""

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
"""The longest lease that is believed. A later end was written by a clock that has been set back since: such an event is
due now. Otherwise its refund would wait until the clock has come that far again."""


@dataclass(frozen=True, slots=True)
class RetryReport:
    """The result of a sweep: how many events were retried, and how many ended in each outcome."""

    tried: int
    outcomes: Mapping[str, int]


def sweep_retries(
    engine: sa.Engine, rules: Rules, *, lease: timedelta, limit: int = 500, event_id: str | None = None
) -> RetryReport:
    """Settle due events again, as live events are settled; one round of at most `limit` jobs. Return what came of it.

    For the time of `lease` no other sweep takes these events. `event_id` limits the round to events with that id.
    Raises what Postgres raises: then the leases run out, and no attempt is spent.
    """
    # The lease is committed before anything is settled: settle has transactions of its own, and a row lock held across
    # them would make live events of the same jobs wait for this session.
    with engine.begin() as connection:
        due = lease_due(connection, lease=lease, build=rules.build, limit=limit, event_id=event_id)
    rulings = settle_batch(engine, due, rules) if due else []
    return RetryReport(len(due), dict(Counter(ruling.outcome.value for ruling in rulings)))


# A job's pending events are taken together. Otherwise the later one would be decided without the earlier, and a
# completion would capture a charge whose failure is still pending.
#
# Two sweeps at once: (1) A locks the due rows, (2) B skips them, for it waits for no lock, (3) A commits its leases,
# (4) B's next round sees them leased. A live duplicate needs no lease: it is decided at once, and the row goes with it.
#
# An event whose charge is there by now is due at once: P9 gives 5 s, and its next retry may be minutes away.
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
    """Lease events whose time has come, and events whose charge has come, and return them as deliveries.

    Runs in the caller's transaction, which must be committed before they are settled: the lease, not a lock, keeps a
    second sweep away from them. A lease is as long as the alive TTL of a worker, so events of a sweep that was killed
    are due again as soon as its worker's batch (P9).
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
            # Written by a newer build that was rolled back. As a letter it waits for a build that reads it; raised
            # here, it would stop the retries of all other events (P8).
            unread[row.source, row.event_id] = row.fingerprint
            letters.append(malformed_letter(raw, row.queue, error))
    # In the same transaction as the lease: the event has its row or its letter at every instant (P6).
    unpark(connection, unread)
    record_dead_letters(connection, letters, build=build)
    return due
