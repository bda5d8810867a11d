"""Events that another try can help wait here, in Postgres, and come back through `settle` (section 6)."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.errors import MalformedMessage, SettledElsewhere
from kino_refunds.events.envelope import parse_stored
from kino_refunds.settlement.dead_letters import malformed_letter, record_dead_letters
from kino_refunds.settlement.deliveries import Delivery, delivery_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from kino_refunds.settlement.inbox import Identity
    from kino_refunds.settlement.outcomes import Outcome

FIRST_DELAY = timedelta(seconds=5)
"""An event usually overtakes its charge by the length of one product transaction."""
LONGEST_DELAY = timedelta(minutes=15)
LONGEST_LEASE = timedelta(hours=1)
"""What waits or is leased for longer than this was written by a clock that has been set back since: it is due."""
GIVE_UP_AFTER = timedelta(hours=24)
"""A charge that has not come a day after its job ended is not late, it is missing: a person looks."""
HISTORY_LENGTH_MAX = 50

Waiting = tuple[Delivery, "Outcome"]


def retry_delay(attempts: int) -> timedelta:
    """Draw the wait before the next try: full jitter below a ceiling that doubles from 5 s to 15 min."""
    ceiling = min(LONGEST_DELAY, FIRST_DELAY * (1 << min(attempts, 16)))
    return ceiling * random.random()  # noqa: S311 - spreads load, guards nothing


def exhausted(delivery: Delivery, now: datetime) -> bool:
    """Say whether this event has been tried for as long as we try."""
    return delivery.pending_since is not None and now - delivery.pending_since >= GIVE_UP_AFTER


_PARK = sa.text("""
    INSERT INTO kino.pending_event
        (source, event_id, job_id, fingerprint, event, queue, outcome, first_seen_at, next_attempt_at)
    SELECT source, event_id, job_id, fingerprint, CAST(event AS jsonb), queue, outcome, kino.clock(),
           kino.clock() + make_interval(secs => delay_s)
    FROM unnest(CAST(:sources AS text[]), CAST(:event_ids AS text[]), CAST(:job_ids AS text[]),
                CAST(:fingerprints AS text[]), CAST(:events AS text[]), CAST(:queues AS text[]),
                CAST(:outcomes AS text[]), CAST(:delays_s AS double precision[]))
         AS p (source, event_id, job_id, fingerprint, event, queue, outcome, delay_s)
    ON CONFLICT (source, event_id) DO NOTHING
    RETURNING 1
""")


def park(connection: sa.Connection, waiting: Sequence[Waiting]) -> None:
    """Let events wait that did not wait before; raises SettledElsewhere if one of them does by now."""
    if not waiting:
        return
    rows = sorted(waiting, key=lambda row: row[0].identity)
    deliveries = [delivery for delivery, _ in rows]
    inserted = connection.execute(
        _PARK,
        {
            "sources": [delivery.event.source for delivery in deliveries],
            "event_ids": [delivery.event.id for delivery in deliveries],
            "job_ids": [delivery.event.job_id for delivery in deliveries],
            "fingerprints": [delivery.fingerprint for delivery in deliveries],
            "events": [delivery_of(delivery.event).raw.decode() for delivery in deliveries],
            "queues": [delivery.queue for delivery in deliveries],
            "outcomes": [outcome.value for _, outcome in rows],
            "delays_s": [retry_delay(0).total_seconds() for _ in rows],
        },
    ).all()
    if len(inserted) < len(rows):
        message = "one of these events was parked by another session"
        raise SettledElsewhere(message)


def postpone(connection: sa.Connection, again: Sequence[Waiting]) -> None:
    """Give events that were tried once more their next time, and keep what this attempt came to."""
    for delivery, outcome in sorted(again, key=lambda row: row[0].identity):
        source, event_id = delivery.identity
        row = {"source": source, "event_id": event_id}
        attempts = connection.execute(
            sa.text("SELECT attempts FROM kino.pending_event WHERE source = :source AND event_id = :event_id"),
            row,
        ).scalar_one_or_none()
        if attempts is None:
            continue  # a live duplicate decided it while this attempt was under way
        connection.execute(
            sa.text("""
                UPDATE kino.pending_event SET
                    attempts = attempts + 1, outcome = :outcome,
                    next_attempt_at = kino.clock() + make_interval(secs => :delay_s),
                    leased_until = NULL,
                    history = CASE WHEN jsonb_array_length(history) < :history_length_max
                                   THEN history ELSE history - 1 END
                              || jsonb_build_object('at', kino.clock(), 'outcome', CAST(:outcome AS text))
                WHERE source = :source AND event_id = :event_id
            """),
            {
                **row,
                "outcome": outcome.value,
                "delay_s": retry_delay(attempts + 1).total_seconds(),
                "history_length_max": HISTORY_LENGTH_MAX,
            },
        )


_LOCK = sa.text("""
    SELECT p.event_id FROM kino.pending_event p
    JOIN unnest(CAST(:sources AS text[]), CAST(:event_ids AS text[])) AS e (source, event_id)
         ON p.source = e.source AND p.event_id = e.event_id
    ORDER BY p.source, p.event_id FOR UPDATE OF p
""")


def lock_waiting(connection: sa.Connection, deliveries: Sequence[Delivery]) -> None:
    """Lock the rows of those events that have waited, in the order of their keys; before anything else is locked.

    A sweep and a new event of the same job have the same rows in hand, each in an order of its own.
    """
    keys = [delivery.identity for delivery in deliveries if delivery.pending_since is not None]
    if keys:
        connection.execute(_LOCK, {"sources": [key[0] for key in keys], "event_ids": [key[1] for key in keys]}).all()


_BESIDE = sa.text("""
    SELECT CAST(p.event AS text) AS event, p.first_seen_at, p.attempts
    FROM kino.pending_event p
    JOIN unnest(CAST(:sources AS text[]), CAST(:event_ids AS text[])) AS e (source, event_id)
         ON p.source = e.source AND p.event_id = e.event_id
    ORDER BY p.source, p.event_id
""")


def read_waiting(connection: sa.Connection, identities: Collection[Identity]) -> list[Delivery]:
    """Read events that wait, as deliveries of their own; a sweep's lease on them hinders nobody.

    One that this build cannot read stays where it is: the sweep makes a dead letter of it.
    """
    wanted = {"sources": [source for source, _ in identities], "event_ids": [event_id for _, event_id in identities]}
    waiting = []
    for row in connection.execute(_BESIDE, wanted):
        with suppress(MalformedMessage):
            event = parse_stored(row.event.encode())
            waiting.append(delivery_of(event, pending_since=row.first_seen_at, attempts=row.attempts + 1))
    return waiting


def unpark(connection: sa.Connection, done: Mapping[Identity, str]) -> None:
    """Delete the waiting rows of events that need no other try; `done` is identity -> fingerprint."""
    if not done:
        return
    keys = sorted(done)
    connection.execute(
        sa.text("""
            DELETE FROM kino.pending_event p
            USING unnest(CAST(:sources AS text[]), CAST(:event_ids AS text[]), CAST(:fingerprints AS text[]))
                  AS d (source, event_id, fingerprint)
            WHERE p.source = d.source AND p.event_id = d.event_id AND p.fingerprint = d.fingerprint
        """),
        {
            "sources": [source for source, _ in keys],
            "event_ids": [event_id for _, event_id in keys],
            "fingerprints": [done[key] for key in keys],
        },
    )


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
        sa.text("""
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
        """),
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


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep came to: events tried, and how many of each outcome."""

    tried: int
    outcomes: dict[str, int]


def sweep_retries(
    engine: sa.Engine,
    settle_deliveries: Callable[[Sequence[Delivery]], Collection[Outcome]],
    *,
    lease: timedelta,
    build: str,
    limit: int = 500,
    event_id: str | None = None,
) -> Swept:
    """Try due events once more, by the same way as live ones; one round of at most `limit`.

    If Postgres goes away in between, the leases run out and no attempt is spent.
    """
    with engine.begin() as connection:
        due = lease_due(connection, lease=lease, build=build, limit=limit, event_id=event_id)
    outcomes: dict[str, int] = {}
    for outcome in settle_deliveries(due) if due else ():
        outcomes[outcome.value] = outcomes.get(outcome.value, 0) + 1
    return Swept(len(due), outcomes)
