"""The inbox: the final outcome of each event, so that the same event again changes nothing (P2)."""

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
"""How many pending events of a job, the oldest first, are decided together with a new one. A flood of events about one
job then delays that job only."""


# One statement, so that clock, inbox and pending rows are of one snapshot. With two, an event that another session
# moves from pending to the inbox in between could be seen in neither; ruled on as new, its inbox row would be refused.
# Only pending events of open charges join: where the charge is settled, their order changes no outcome that moves
# credits.
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

# Two workers have one event id, for two jobs: (1) both read no inbox row, (2) A settles its job and inserts the row,
# (3) B settles its own job, and its insert waits, (4) A commits, (5) B's insert does nothing, B counts one row too few
# and rolls its refund back. Read again, the event is a conflict at B. Without (5) both jobs are refunded by one event.
_INSERT = sa.text("""
    INSERT INTO kino.inbox_event (source, event_id, job_id, fingerprint, outcome, event_at)
    SELECT * FROM unnest(CAST(:sources AS text[]), CAST(:event_ids AS text[]), CAST(:job_ids AS text[]),
                         CAST(:fingerprints AS text[]), CAST(:outcomes AS text[]), CAST(:event_ats AS timestamptz[]))
    ON CONFLICT (source, event_id) DO NOTHING
    RETURNING 1
""")


def read_record(connection: sa.Connection, events: Collection[Event]) -> Record:
    """Return what is recorded about these events, and the instant of the reading by the ledger's clock."""
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
    """Write final outcomes; raises SettledElsewhere if another session decided one of the events since it was read.

    Without that check, two jobs under one event id that are settled by two workers are both refunded.
    """
    if not final:
        return
    # Sorted by the key, as every writer does: two sessions that share events wait in one direction only.
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
    # The error rolls back the whole transaction, with the credits that settle_charges has moved in it.
    if len(inserted) < len(rows):
        message = "another session decided an event of this batch; nothing was written, the batch is read again"
        raise SettledElsewhere(message)
