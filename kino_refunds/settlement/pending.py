"""Pending rows: events that a retry can help are kept in Postgres, and settled again later (design, section 6)."""

from __future__ import annotations

import random
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.errors import MalformedMessage, SettledElsewhere
from kino_refunds.events.envelope import parse_stored
from kino_refunds.events.schema import to_json
from kino_refunds.settlement.deliveries import delivery_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from kino_refunds.settlement.decide import Ruling
    from kino_refunds.settlement.deliveries import Delivery
    from kino_refunds.settlement.record import Identity

FIRST_DELAY = timedelta(seconds=5)
"""How long before the first retry, at most: an event usually overtakes its charge by one product transaction."""
LONGEST_DELAY = timedelta(minutes=15)
HISTORY_LENGTH_MAX = 50
"""Attempts kept in a row's history; the oldest is dropped first."""


def retry_delay(attempts: int) -> timedelta:
    """Return a random delay before the next retry: full jitter below a ceiling that doubles from 5 s to 15 min."""
    # The jitter spreads the retries of a batch: retried all at once, they would meet at the same held lots again.
    ceiling = min(LONGEST_DELAY, FIRST_DELAY * (1 << min(attempts, 16)))
    return ceiling * random.random()  # noqa: S311 - spreads load, guards nothing


# `event` has the known fields only, without `message` (design, section 2), and is what is settled later. Its time stays
# the event's own, so a refund that waited is ruled on as if it had been settled at once.
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


def park(connection: sa.Connection, new: Sequence[Ruling]) -> None:
    """Write pending rows for events that had none; raises SettledElsewhere if another session wrote one meanwhile."""
    if not new:
        return
    # Sorted by the key, as every writer does: two sessions that share events wait in one direction only.
    rows = sorted(new, key=lambda ruling: ruling.delivery.identity)
    deliveries = [ruling.delivery for ruling in rows]
    inserted = connection.execute(
        _PARK,
        {
            "sources": [delivery.event.source for delivery in deliveries],
            "event_ids": [delivery.event.id for delivery in deliveries],
            "job_ids": [delivery.event.job_id for delivery in deliveries],
            "fingerprints": [delivery.fingerprint for delivery in deliveries],
            "events": [to_json(delivery.event).decode() for delivery in deliveries],
            "queues": [delivery.queue for delivery in deliveries],
            "outcomes": [ruling.outcome.value for ruling in rows],
            "delays_s": [retry_delay(0).total_seconds() for _ in rows],
        },
    ).all()
    # Two workers have one event id with two contents, before the charge is there: (1) both read no row, (2) A inserts
    # its content, (3) B's insert waits, (4) A commits, (5) B's insert does nothing, and B reads again: its content is a
    # conflict. Without (5) B would drop its message from Redis although its content has no row, and lose it.
    if len(inserted) < len(rows):
        message = "another session wrote a pending row for an event of this batch; nothing was written here"
        raise SettledElsewhere(message)


# The attempt is counted in the transaction that makes it. If Postgres goes away, neither is committed: an outage spends
# no attempt, and does not move an event's next retry towards 15 min (design, section 6).
_POSTPONE = sa.text("""
    UPDATE kino.pending_event p SET
        attempts = p.attempts + 1, outcome = again.outcome, leased_until = NULL,
        next_attempt_at = kino.clock() + make_interval(secs => again.delay_s),
        history = CASE WHEN jsonb_array_length(p.history) < :history_length_max THEN p.history ELSE p.history - 1 END
                  || jsonb_build_object('at', kino.clock(), 'outcome', again.outcome)
    FROM unnest(CAST(:sources AS text[]), CAST(:event_ids AS text[]), CAST(:outcomes AS text[]),
                CAST(:delays_s AS double precision[])) AS again (source, event_id, outcome, delay_s)
    WHERE p.source = again.source AND p.event_id = again.event_id
""")


def postpone(connection: sa.Connection, again: Sequence[Ruling]) -> None:
    """Set the next retry of events that were retried without success, and keep the outcome of this attempt.

    `lock_pending` has locked their rows, in the order of their keys. An event without a row was decided by a live
    duplicate during this attempt, and needs none.
    """
    if not again:
        return
    deliveries = [ruling.delivery for ruling in again]
    connection.execute(
        _POSTPONE,
        {
            "sources": [delivery.event.source for delivery in deliveries],
            "event_ids": [delivery.event.id for delivery in deliveries],
            "outcomes": [ruling.outcome.value for ruling in again],
            "delays_s": [retry_delay(delivery.attempts).total_seconds() for delivery in deliveries],
            "history_length_max": HISTORY_LENGTH_MAX,
        },
    )


_LOCK = sa.text("""
    SELECT p.event_id FROM kino.pending_event p
    JOIN unnest(CAST(:sources AS text[]), CAST(:event_ids AS text[])) AS e (source, event_id)
         ON p.source = e.source AND p.event_id = e.event_id
    ORDER BY p.source, p.event_id FOR UPDATE OF p
""")


def lock_pending(connection: sa.Connection, deliveries: Sequence[Delivery]) -> None:
    """Lock the rows of those deliveries that are pending, in the order of their keys, before anything else is locked.

    A sweep and a new event of the same job work on the same rows, each in an order of its own. Without one order (1) a
    sweep locks row 1, (2) a live batch locks row 2, (3) each waits for the other's row until the lock timeout.
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


def read_pending(connection: sa.Connection, identities: Collection[Identity]) -> list[Delivery]:
    """Return the pending events of these identities as deliveries, whether or not a sweep has leased them.

    An event that this build cannot read is left out and keeps its row: the sweep makes a dead letter of it.
    """
    wanted = {"sources": [source for source, _ in identities], "event_ids": [event_id for _, event_id in identities]}
    pending = []
    for row in connection.execute(_BESIDE, wanted):
        with suppress(MalformedMessage):
            event = parse_stored(row.event.encode())
            pending.append(delivery_of(event, pending_since=row.first_seen_at, attempts=row.attempts + 1))
    return pending


def unpark(connection: sa.Connection, done: Mapping[Identity, str]) -> None:
    """Delete the pending rows of events that need no retry; `done` is identity -> fingerprint."""
    if not done:
        return
    keys = sorted(done)
    # By the fingerprint too: a conflict has the same id, and would delete the row of the event that still needs a
    # retry.
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
