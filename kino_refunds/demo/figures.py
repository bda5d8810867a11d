"""The figures of the demo, read from the ledger while it runs and at its end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from kino_refunds.settlement.deliveries import RECONCILER

if TYPE_CHECKING:
    from collections.abc import Sequence


class Snapshot(NamedTuple):
    """The figures at one moment of the run."""

    at_s: float
    stage: str
    jobs: int
    submitted: int
    settled: dict[str, int]
    """Settled charges: `captured`, or the reason of the refund."""
    per_second: float
    p50_ms: float | None
    p99_ms: float | None
    queues: dict[str, int]
    pending: int
    dead_letters: int
    breaks: int


@dataclass(frozen=True)
class StoryReport:
    """The report at the end of the story; credits are whole, latencies are in ms from event (or charge) to COMMIT."""

    jobs: int
    messages: int
    outcomes: list[dict[str, Any]]
    """For each outcome: how many events had it, and the credits that they settled."""
    reasons: list[dict[str, Any]]
    dead_letters: list[dict[str, Any]]
    duplicates_absorbed: int
    retried: int
    overdue_found: int
    breaks: int
    latency: dict[str, Any]
    latency_of_killed: dict[str, Any]
    seconds: float
    promises: list[dict[str, Any]]
    proof: dict[str, Any]
    """What `reconcile prove` says at the end; the story's contradictions are live breaks, so not all of it holds."""

    @property
    def kept(self) -> bool:
        """Whether every promise held. Lateness alone is shown and is no failure, because the machine may be slow."""
        return all(each["word"] != "broken" for each in self.promises)


def unsettled(connection: sa.Connection) -> int:
    """Return how many charges have no settlement, plus how many events are pending."""
    return int(connection.execute(_UNSETTLED).scalar_one())


def standing(connection: sa.Connection) -> dict[str, Any]:
    """Return the fields of a `Snapshot` that are read from the ledger."""
    found: dict[str, Any] = connection.execute(_STANDING).scalar_one()
    return found


def ending(connection: sa.Connection, *, events: Sequence[str], killed_at: datetime) -> dict[str, Any]:
    """Return the fields of a `StoryReport` that the ledger has; `events` are those of the killed worker's batch."""
    batch = {"events": list(events), "killed_at": killed_at, "reconciler": RECONCILER}

    def rows(query: sa.TextClause, **values: Any) -> list[dict[str, Any]]:
        return [dict(row) for row in connection.execute(query, values).mappings()]

    return {
        "outcomes": rows(_OUTCOMES),
        "reasons": rows(_REASONS),
        "dead_letters": rows(_DEAD_LETTERS),
        "latency": rows(_LATENCY, batch=False, **batch)[0],
        "latency_of_killed": rows(_LATENCY, batch=True, **batch)[0],
        **rows(_COUNTS, reconciler=RECONCILER)[0],
    }


_UNSETTLED = sa.text("""
    SELECT (SELECT count(*) FROM kino.pending_event)
         + (SELECT count(*) FROM kino.charge c
            WHERE NOT EXISTS (SELECT FROM kino.settlement s WHERE s.charge_id = c.charge_id))
""")

_LATENCIES = """
    SELECT s.event_id, s.settled_at, s.event_source,
           1000 * extract(epoch FROM pg_xact_commit_timestamp(CAST(s.xid AS xid)) - greatest(s.event_time, c.opened_at))
               AS ms
    FROM kino.settlement s JOIN kino.charge c USING (charge_id)
"""

_STANDING = sa.text(f"""
    WITH latency AS ({_LATENCIES})
    SELECT jsonb_build_object(
        'settled', (SELECT coalesce(jsonb_object_agg(what, jobs), '{{}}') FROM (
                        SELECT CASE kind WHEN 'refunded' THEN reason ELSE kind END AS what,
                               count(*) AS jobs
                        FROM kino.settlement GROUP BY 1 ORDER BY 1) s),
        'p50_ms', (SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY ms) FROM latency),
        'p99_ms', (SELECT percentile_cont(0.99) WITHIN GROUP (ORDER BY ms) FROM latency),
        'pending', (SELECT count(*) FROM kino.pending_event),
        'dead_letters', (SELECT count(*) FROM kino.dead_letter),
        'breaks', (SELECT count(*) FROM kino.break))
""")  # noqa: S608 - a constant

_LATENCY = sa.text(f"""
    SELECT count(*) AS jobs,
           CAST(percentile_cont(0.5) WITHIN GROUP (ORDER BY ms) AS integer) AS p50_ms,
           CAST(percentile_cont(0.99) WITHIN GROUP (ORDER BY ms) AS integer) AS p99_ms,
           CAST(max(ms) AS integer) AS max_ms
    FROM ({_LATENCIES}) l
    WHERE event_source <> :reconciler
      AND (event_id = ANY(CAST(:events AS text[])) AND settled_at > :killed_at) = :batch
""")  # noqa: S608 - a constant

_OUTCOMES = sa.text("""
    SELECT i.outcome, count(*) AS events, CAST(coalesce(sum(c.credits), 0) AS bigint) AS credits
    FROM kino.inbox_event i
    LEFT JOIN kino.settlement s ON (s.event_source, s.event_id) = (i.source, i.event_id)
    LEFT JOIN kino.charge c ON c.charge_id = s.charge_id
    GROUP BY i.outcome ORDER BY credits DESC, events DESC
""")

_REASONS = sa.text("""
    SELECT reason, clause, count(*) AS jobs, CAST(sum(refunded) AS bigint) AS credits
    FROM kino.charge_status WHERE status = 'refunded' GROUP BY reason, clause ORDER BY credits DESC
""")

_DEAD_LETTERS = sa.text("""
    SELECT reason, count(*) AS letters FROM kino.dead_letter GROUP BY reason ORDER BY letters DESC, reason
""")

_COUNTS = sa.text("""
    SELECT (SELECT coalesce(sum(CAST(result ->> 'tried' AS integer)), 0)
            FROM kino.schedule_slot WHERE name = 'kino.sweep_retries') AS retried,
           (SELECT count(*) FROM kino.settlement WHERE event_source = :reconciler) AS overdue_found,
           (SELECT count(*) FROM kino.break) AS breaks
""")
