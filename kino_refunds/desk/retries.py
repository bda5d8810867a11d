"""Pending events, as on-call reads them and tries them again by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.settlement.pending import HISTORY_LENGTH_MAX
from kino_refunds.settlement.retries import RetryReport, sweep_retries

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime, timedelta

    from kino_refunds.db.engine import Connection, Engine
    from kino_refunds.settlement.rules import Rules

ROUND = 500
"""Events that are tried in one sweep."""


@dataclass(frozen=True, slots=True)
class PendingLine:
    """One pending event of a listing; `credits` are of its job's charge, if it has one."""

    event_id: str
    source: str
    job_id: str
    outcome: str
    attempts: int
    first_seen_at: datetime
    next_attempt_at: datetime
    credits: int


@dataclass(frozen=True, slots=True)
class PendingEvent:
    """One pending event with all its columns; `history` has each attempt's outcome, `event` is the event's JSON."""

    event_id: str
    source: str
    job_id: str
    outcome: str
    attempts: int
    queue: str
    first_seen_at: datetime
    next_attempt_at: datetime
    leased_until: datetime | None
    fingerprint: str
    event: str
    history: Sequence[Mapping[str, Any]]


_LIST = sa.text("""
    SELECT p.event_id, p.source, p.job_id, p.outcome, p.attempts, p.first_seen_at, p.next_attempt_at,
           coalesce(c.credits, 0) AS credits
    FROM kino.pending_event p LEFT JOIN kino.charge c USING (job_id)
    WHERE CAST(:after_event AS text) IS NULL OR (p.event_id, p.source) > (:after_event, :after_source)
    ORDER BY p.event_id, p.source LIMIT :limit
""")
_SHOW = sa.text("""
    SELECT event_id, source, job_id, outcome, attempts, queue, first_seen_at, next_attempt_at, leased_until,
           fingerprint, CAST(event AS text) AS event, history
    FROM kino.pending_event WHERE event_id = :event_id ORDER BY source
""")
_COUNT = sa.text("""
    SELECT count(*) FROM kino.pending_event WHERE CAST(:event_id AS text) IS NULL OR event_id = :event_id
""")
# A locked row is being tried at this moment, so it is skipped. The entry names the person; a full history loses its
# second entry, as in a sweep.
_HASTEN = sa.text("""
    UPDATE kino.pending_event p SET
        next_attempt_at = least(p.next_attempt_at, kino.clock()),
        history = CASE WHEN jsonb_array_length(p.history) < :history_length_max THEN p.history ELSE p.history - 1 END
                  || jsonb_build_array(jsonb_build_object('at', kino.clock(), 'actor', CAST(:actor AS text)))
    FROM (SELECT source, event_id FROM kino.pending_event
          WHERE CAST(:event_id AS text) IS NULL OR event_id = :event_id
          ORDER BY source, event_id FOR UPDATE SKIP LOCKED) AS free
    WHERE p.source = free.source AND p.event_id = free.event_id
""")


def list_pending(connection: Connection, *, after: tuple[str, str] | None, limit: int) -> list[PendingLine]:
    """Return the pending events behind `after` (event id and source), by event id and source."""
    event_id, source = after or (None, None)
    wanted = {"after_event": event_id, "after_source": source, "limit": limit}
    return [PendingLine(*row) for row in connection.execute(_LIST, wanted)]


def read_pending_events(connection: Connection, event_id: str) -> list[PendingEvent]:
    """Return the pending events with this id: one from each source that published it."""
    return [PendingEvent(*row) for row in connection.execute(_SHOW, {"event_id": event_id})]


def try_now(engine: Engine, rules: Rules, *, event_id: str | None, lease: timedelta, actor: str) -> RetryReport:
    """Try all pending events now, or the one that is named, and return the report; each history keeps the person.

    An event that a sweep has locked or leased is skipped. Raises what Postgres raises.
    """
    with engine.begin() as connection:
        connection.execute(_HASTEN, {"event_id": event_id, "history_length_max": HISTORY_LENGTH_MAX, "actor": actor})
        pending = connection.execute(_COUNT, {"event_id": event_id}).scalar_one()
    tried, outcomes = 0, Counter[str]()
    # As many rounds as these events need. An event that is put off may be due again within a second: with more rounds
    # the loop might never end.
    for _ in range(-(-pending // ROUND)):
        swept = sweep_retries(engine, rules, lease=lease, limit=ROUND, event_id=event_id)
        tried += swept.tried
        outcomes.update(swept.outcomes)
    return RetryReport(tried, dict(outcomes))
