"""Charges as on-call lists them: what jobs took, and what of it is still open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from kino_refunds.db.engine import Connection


@dataclass(frozen=True, slots=True)
class ChargeLine:
    """One charge of a listing; `overdue`: it is open, and its deadline and grace have passed."""

    number: int
    job_id: str
    account_id: str
    credits: int
    status: str
    opened_at: datetime
    deadline_at: datetime
    age_s: int
    overdue: bool


_LIST = sa.text("""
    SELECT c.charge_id, c.job_id, c.account_id, c.credits, s.status, c.opened_at, c.deadline_at,
           floor(extract(epoch FROM kino.clock() - c.opened_at))::bigint AS age_s,
           o.charge_id IS NOT NULL AND o.deadline_at + CAST(:grace AS interval) < kino.clock() AS overdue
    FROM kino.charge c
    JOIN kino.charge_status s USING (job_id)
    LEFT JOIN kino.open_charge o USING (charge_id)
    WHERE c.charge_id > :after AND (CAST(:account_id AS text) IS NULL OR c.account_id = :account_id)
    ORDER BY c.charge_id LIMIT :limit
""")
# Read from the table of open charges alone: they are few among a ledger's charges, so the others are not read.
_LIST_OPEN = sa.text("""
    SELECT o.charge_id, c.job_id, o.account_id, o.credits, 'open' AS status, c.opened_at, o.deadline_at,
           floor(extract(epoch FROM kino.clock() - c.opened_at))::bigint AS age_s,
           o.deadline_at + CAST(:grace AS interval) < kino.clock() AS overdue
    FROM kino.open_charge o JOIN kino.charge c USING (charge_id)
    WHERE o.charge_id > :after AND (CAST(:account_id AS text) IS NULL OR o.account_id = :account_id)
    ORDER BY o.charge_id LIMIT :limit
""")


def list_charges(
    connection: Connection, *, only_open: bool, account_id: str | None, after: int, limit: int, grace: timedelta
) -> list[ChargeLine]:
    """Return charges with a number above `after`, the oldest first; of one account where one is named."""
    wanted = {"after": after, "account_id": account_id, "limit": limit, "grace": grace}
    rows = connection.execute(_LIST_OPEN if only_open else _LIST, wanted)
    return [ChargeLine(*row) for row in rows]
