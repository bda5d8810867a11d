"""The inbox: what was decided for which event, so that the same event again changes nothing (P2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.errors import SettledElsewhere
from kino_refunds.settlement.outcomes import Outcome
from kino_refunds.settlement.record import Identity, KnownEvent, Record

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from datetime import datetime

    from kino_refunds.events.schema import Event
    from kino_refunds.settlement.decide import Ruling

TOGETHER_MAX = 100
"""So many waiting events of a job, the oldest, are decided together with a new one: a flood delays its own job only."""


_READ = sa.text("""
    SELECT kino.clock(), NULL, NULL, NULL, NULL
    UNION ALL
    SELECT NULL, i.source, i.event_id, i.fingerprint, i.outcome
    FROM unnest(CAST(:sources AS text[]), CAST(:event_ids AS text[])) AS e (source, event_id)
    JOIN kino.inbox_event i ON i.source = e.source AND i.event_id = e.event_id
    UNION ALL
    SELECT NULL, p.source, p.event_id, p.fingerprint, NULL
    FROM unnest(CAST(:sources AS text[]), CAST(:event_ids AS text[])) AS e (source, event_id)
    JOIN kino.pending_event p ON p.source = e.source AND p.event_id = e.event_id
    UNION ALL
    SELECT NULL, p.source, p.event_id, NULL, NULL
    FROM (SELECT w.source, w.event_id, w.job_id,
                 row_number() OVER (PARTITION BY w.job_id ORDER BY w.first_seen_at, w.source, w.event_id) AS nth
          FROM kino.pending_event w WHERE w.job_id = ANY(CAST(:job_ids AS text[]))) AS p
    JOIN kino.charge c ON c.job_id = p.job_id
    JOIN kino.open_charge o ON o.charge_id = c.charge_id
    WHERE p.nth <= :together_max
""")

_INSERT = sa.text("""
    INSERT INTO kino.inbox_event (source, event_id, job_id, fingerprint, outcome, event_at)
    SELECT * FROM unnest(CAST(:sources AS text[]), CAST(:event_ids AS text[]), CAST(:job_ids AS text[]),
                         CAST(:fingerprints AS text[]), CAST(:outcomes AS text[]), CAST(:event_ats AS timestamptz[]))
    ON CONFLICT (source, event_id) DO NOTHING
    RETURNING 1
""")


def read_record(connection: sa.Connection, events: Collection[Event]) -> Record:
    """Read what was said before of these events."""
    identities = {event.identity for event in events}
    parameters = {
        "sources": [source for source, _ in identities],
        "event_ids": [event_id for _, event_id in identities],
        "job_ids": list({event.job_id for event in events}),
        "together_max": TOGETHER_MAX,
    }
    decided, pending, beside = dict[Identity, KnownEvent](), dict[Identity, KnownEvent](), set[Identity]()
    read_at: datetime | None = None
    for clock, source, event_id, fingerprint, outcome in connection.execute(_READ, parameters):
        if clock is not None:
            read_at = clock
        elif fingerprint is None:
            beside.add((source, event_id))
        elif outcome is None:
            pending[source, event_id] = KnownEvent(fingerprint, None)
        else:
            decided[source, event_id] = KnownEvent(fingerprint, Outcome(outcome))
    assert read_at is not None, "the clock is one of the rows"
    return Record(decided, pending, frozenset(beside - identities), read_at)


def insert_inbox(connection: sa.Connection, final: Sequence[Ruling]) -> None:
    """Write final outcomes; raises SettledElsewhere if one of the events was decided since we read.

    Without that check two jobs under one event id, in the hands of two workers, are both refunded.
    """
    if not final:
        return
    rows = sorted(final, key=lambda ruling: ruling.delivery.identity)
    events = [ruling.delivery.event for ruling in rows]
    inserted = connection.execute(
        _INSERT,
        {
            "sources": [event.source for event in events],
            "event_ids": [event.id for event in events],
            "job_ids": [event.job_id for event in events],
            "fingerprints": [ruling.delivery.fingerprint for ruling in rows],
            "outcomes": [ruling.outcome.value for ruling in rows],
            "event_ats": [event.time for event in events],
        },
    ).all()
    if len(inserted) < len(rows):
        message = "one of these events was decided by another session"
        raise SettledElsewhere(message)
