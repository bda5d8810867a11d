"""Did a contestant write the rows that it had to write? Asked after each; faster is worth nothing without."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import sqlalchemy as sa

from kino_refunds.events.schema import Event, JobCompleted, JobFailed, JobSafetyRejected, JobTimedOut, fingerprint
from kino_refunds.policy.document import published_policy

# What an event of a job with an open charge comes to: the settlement, the transfer of each line, the outcome.
_ENDS: dict[type[Event], tuple[str, str, str]] = {
    JobCompleted: ("captured completed 1", "capture held consumed completed settlement", "captured"),
    JobFailed: (
        "refunded generation_failure 2.failure",
        "refund held wallet generation_failure settlement",
        "refunded",
    ),
    JobTimedOut: ("refunded timeout 2.timeout", "refund held wallet timeout settlement", "refunded"),
    JobSafetyRejected: (
        "refunded content_policy_rejection 2.safety",
        "refund held wallet content_policy_rejection settlement",
        "refunded",
    ),
}
_HOLD = "hold wallet held product"

_LINES = sa.text("""
    SELECT c.job_id, l.credits FROM kino.charge c JOIN kino.charge_line l USING (charge_id)
    WHERE c.job_id = ANY(CAST(:job_ids AS text[]))
""")

_WRITTEN = sa.text("""
    WITH job AS MATERIALIZED (
        SELECT charge_id, job_id, credits FROM kino.charge WHERE job_id = ANY(CAST(:job_ids AS text[])))
    SELECT 'settlement', concat_ws(' ', s.kind, s.reason, s.clause, s.policy_version), count(*), sum(j.credits)
    FROM job j JOIN kino.settlement s USING (charge_id) GROUP BY 2
    UNION ALL
    SELECT 'transfer', concat_ws(' ', t.kind, t.from_book, t.to_book, t.to_lot_id, t.reason, t.actor), count(*),
           sum(t.credits)
    FROM job JOIN kino.transfer t USING (charge_id) GROUP BY 2
    UNION ALL
    SELECT 'inbox_event', i.outcome, count(*), 0 FROM job JOIN kino.inbox_event i USING (job_id) GROUP BY 2
    UNION ALL
    SELECT 'pending_event', p.outcome, count(*), 0 FROM job JOIN kino.pending_event p USING (job_id) GROUP BY 2
    UNION ALL
    SELECT 'dead_letter', d.reason, count(*), 0 FROM job JOIN kino.dead_letter d USING (job_id) GROUP BY 2
""")

_IDENTITIES = sa.text("""
    SELECT i.source, i.event_id, i.fingerprint FROM kino.inbox_event i WHERE i.job_id = ANY(CAST(:job_ids AS text[]))
""")


def differences(connection: sa.Connection, events: Sequence[Event]) -> Iterator[str]:
    """Say where the rows of these events' jobs are not what one `settle` of each event writes.

    Counted by table and kind, with their credits; `violations` asks afterwards whether every line and lot agrees.
    """
    job_ids = {"job_ids": [event.job_id for event in events]}
    lines = defaultdict(list)
    for job_id, credits in connection.execute(_LINES, job_ids):
        lines[job_id].append(credits)
    due = _due(events, lines)
    written = {
        (table, what): (rows, int(credits)) for table, what, rows, credits in connection.execute(_WRITTEN, job_ids)
    }
    for table, what in sorted(due.keys() | written.keys()):
        wanted, found = due.get((table, what), (0, 0)), written.get((table, what), (0, 0))
        if wanted != found:
            yield f"{table} ({what}): {found[0]} rows of {found[1]} credits, must be {wanted[0]} of {wanted[1]}"
    told = {tuple(row) for row in connection.execute(_IDENTITIES, job_ids)}
    strangers = told ^ {(*event.identity, fingerprint(event)) for event in events}
    if strangers:
        yield f"inbox_event: {len(strangers)} events or fingerprints are missing, or not these jobs'"


def _due(events: Sequence[Event], lines: dict[str, list[int]]) -> dict[tuple[str, str], tuple[int, int]]:
    version = published_policy().at(datetime.now(UTC)).version
    rows: Counter[tuple[str, str]] = Counter()
    credits: Counter[tuple[str, str]] = Counter()
    for event in events:
        settlement, transfer, outcome = _ENDS[type(event)]
        taken = lines[event.job_id]
        for key, count, amount in (
            (("settlement", f"{settlement} {version}"), 1, sum(taken)),
            (("transfer", _HOLD), len(taken), sum(taken)),
            (("transfer", transfer), len(taken), sum(taken)),
            (("inbox_event", outcome), 1, 0),
        ):
            rows[key] += count
            credits[key] += amount
    return {key: (rows[key], credits[key]) for key in rows}
