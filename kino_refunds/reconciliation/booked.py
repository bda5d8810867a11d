"""Read what the ledger has of jobs: the charge of each, how it is settled, and the history of its account."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.ledger.accounts import StatusHistory, read_status_histories
from kino_refunds.ledger.values import SettlementKind
from kino_refunds.reconciliation.judging import Booked, can_be_charged

if TYPE_CHECKING:
    from collections.abc import Collection

_BOOKED = sa.text("""
    SELECT c.job_id, c.charge_id, c.account_id, c.credits, c.opened_at, c.deadline_at, s.kind, s.event_time,
           s.settled_at, k.charge_id IS NOT NULL AS corrected, a.status_reason IS NOT NULL AS has_history
    FROM unnest(CAST(:job_ids AS text[])) AS j (job_id)
    JOIN kino.charge c ON c.job_id = j.job_id
    LEFT JOIN kino.account a ON a.account_id = c.account_id
    LEFT JOIN kino.settlement s ON s.charge_id = c.charge_id
    LEFT JOIN kino.correction k ON k.charge_id = c.charge_id
""")
BY_KEY = sa.text("""
    SELECT pg_catalog.set_config(name, 'off', true)
    FROM unnest(CAST('{enable_seqscan,enable_bitmapscan,enable_hashjoin,enable_mergejoin}' AS text[])) AS n (name)
""")
"""For a transaction that reaches rows by key only. Otherwise Postgres reads a whole table of some 100,000 charges for
each page of 1,000."""
ALWAYS_ACTIVE = StatusHistory()


def read_booked(connection: sa.Connection, job_ids: Collection[str]) -> dict[str, Booked]:
    """Return what the ledger has of these jobs, by job id; a job without a charge is left out."""
    # Postgres takes no NUL and no lone surrogate, and one such id would fail the whole page.
    held = [job_id for job_id in job_ids if can_be_charged(job_id) or _can_be_sent(job_id)]
    connection.execute(BY_KEY)
    rows = connection.execute(_BOOKED, {"job_ids": held}).all()
    changed = {row.account_id for row in rows if row.has_history}
    histories = read_status_histories(connection, changed) if changed else {}
    return {
        row.job_id: Booked(
            charge_id=row.charge_id,
            account_id=row.account_id,
            credits=row.credits,
            opened_at=row.opened_at,
            deadline_at=row.deadline_at,
            kind=None if row.kind is None else SettlementKind(row.kind),
            event_time=row.event_time,
            settled_at=row.settled_at,
            corrected=row.corrected,
            history=histories.get(row.account_id, ALWAYS_ACTIVE),
        )
        for row in rows
    }


def _can_be_sent(job_id: str) -> bool:
    return "\0" not in job_id and not any("\ud800" <= each <= "\udfff" for each in job_id)
