"""What the ledger's own tests do on one connection: give, charge, end; and read back which lots are where."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from kino_refunds.ledger import Charge, Ending, Grant, LotClass, grant_lots, open_charge
from tests.clock import end_charges

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
GRACE = 7 * DAY
LATER = NOW + 30 * DAY

SOLD = Grant("order-1", "ada", 100, LotClass.PURCHASED, LATER, 50, "p-1")


def give(product: sa.Connection, *grants: Grant) -> None:
    """Grant lots one after the other, numbered from 1 in a new database, and commit."""
    for grant in grants:
        grant_lots(product, [grant])
    product.commit()


def charge(product: sa.Connection, job_id: str = "job", credits: int = 10, account_id: str = "ada") -> Charge:
    """Open a charge and commit."""
    opened = open_charge(product, job_id=job_id, account_id=account_id, credits=credits, deadline_at=NOW)
    product.commit()
    return opened


def end(
    connection: sa.Connection,
    *charges: Charge,
    kind: str = "refunded",
    now: datetime | None = NOW,
    lot_grace: timedelta = GRACE,
) -> None:
    """Settle charges in one batch, in the connection's transaction, at `now` (None: as it is)."""
    event_at = (now or NOW) - DAY
    reason, clause = {"refunded": ("timeout", "2.timeout"), "captured": ("completed", "1")}[kind]
    for opened in charges:
        connection.execute(
            sa.text(
                "INSERT INTO kino.settlement"
                " (charge_id, kind, reason, clause, policy_version, event_source, event_id, event_time)"
                " VALUES (:charge_id, :kind, :reason, :clause, 'v', 's', :job_id, :now)"
            ),
            {
                "charge_id": opened.charge_id,
                "kind": kind,
                "reason": reason,
                "clause": clause,
                "job_id": opened.job_id,
                "now": now or NOW,
            },
        )
    endings = [
        Ending(c.charge_id, c.account_id, c.credits, c.lines, kind == "refunded", reason, event_at) for c in charges
    ]
    end_charges(connection, endings, now=now, lot_grace=lot_grace, actor="test")


def end_and_commit(
    connection: sa.Connection,
    *charges: Charge,
    kind: str = "refunded",
    now: datetime | None = NOW,
    lot_grace: timedelta = GRACE,
) -> None:
    """Settle charges in one batch, and commit."""
    end(connection, *charges, kind=kind, now=now, lot_grace=lot_grace)
    connection.commit()


def lot_states(connection: sa.Connection) -> list[tuple[int, str, int]]:
    """Every lot: id, state, remaining."""
    rows = connection.exec_driver_sql("SELECT lot_id, state, remaining FROM kino.credit_lot ORDER BY lot_id")
    return [(row.lot_id, row.state, row.remaining) for row in rows]


def backend(connection: sa.Connection) -> int:
    """Name the session of a connection, as the server does."""
    pid: int = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    return pid


def waits(observer: sa.Connection, pid: int) -> bool:
    """Say whether another session keeps this one waiting for a lock."""
    blocked: bool = observer.execute(
        sa.text("SELECT cardinality(pg_blocking_pids(:pid)) > 0"), {"pid": pid}
    ).scalar_one()
    observer.rollback()
    return blocked
