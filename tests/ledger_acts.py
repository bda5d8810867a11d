"""What the ledger's own tests do on one connection: give, charge, end; and read back which lots are where."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from kino_refunds.errors import InstantNotFinal
from kino_refunds.ledger import (
    Balance,
    CauseKind,
    Charge,
    Grant,
    LotClass,
    Settlement,
    balance,
    grant_lots,
    hold_purchase,
    open_charge,
    void_purchase,
)
from kino_refunds.ledger.values import SettlementKind
from tests.clock import DAY, clock_at, release_purchase, settle_charges
from tests.scenario import until

NOW = datetime.now(UTC)
GRACE = 7 * DAY
LATER = NOW + 30 * DAY

WITHOUT = ("inbox", "times")
"""What integrity cannot ask of the ledger's own tests: they settle without an inbox, and set the clock as they like."""

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


def settlement(opened: Charge, kind: str = "refunded", *, at: datetime = NOW, reason: str | None = None) -> Settlement:
    """How a charge ends, by an event of its own."""
    usual, clause, ending = {
        "refunded": ("timeout", "2.timeout", "timeout.no_result"),
        "captured": ("completed", "1", "completed"),
    }[kind]
    return Settlement(
        opened.charge_id, SettlementKind(kind), reason or usual, clause, "v", ending, "active", "s", opened.job_id, at
    )


def end(connection: sa.Connection, *charges: Charge, kind: str = "refunded", now: datetime | None = NOW) -> None:
    """Settle charges in one batch, in the connection's transaction, at `now` (None: as it is)."""
    settle_charges(connection, [settlement(c, kind, at=(now or NOW) - DAY) for c in charges], now=now)


def end_and_commit(
    connection: sa.Connection, *charges: Charge, kind: str = "refunded", now: datetime | None = NOW
) -> None:
    """Settle charges in one batch, and commit."""
    end(connection, *charges, kind=kind, now=now)
    connection.commit()


DISPUTE: dict[str, Any] = {"cause_kind": CauseKind.DISPUTE, "cause_id": "dp-1", "actor": "ops"}
PAYOUT: dict[str, Any] = {"cause_kind": CauseKind.PAYOUT, "cause_id": "po-1", "actor": "ops"}


def freeze(
    connection: sa.Connection, purchase_id: str = "p-1", *, now: datetime | None = None, **cause: Any
) -> list[int]:
    """Hold a purchase, for a dispute unless another cause is given, at `now` (None: as it is); as kino_owner."""
    with clock_at(connection, now):
        return hold_purchase(connection, purchase_id, **(cause or DISPUTE))


def thaw(connection: sa.Connection, purchase_id: str = "p-1", *, now: datetime, **cause: Any) -> list[int]:
    """End that hold, at `now`."""
    return release_purchase(connection, purchase_id, now=now, **(cause or DISPUTE))


def void(connection: sa.Connection, purchase_id: str = "p-1", **cause: Any) -> int:
    """Void a purchase, for a payout unless another cause is given."""
    return void_purchase(connection, purchase_id, **(cause or PAYOUT))


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


def balance_at(connection: sa.Connection, account_id: str, at: datetime) -> Balance:
    """Ask for a past balance; where a transaction of the server's own (an ANALYZE) is open, ask again."""
    found: list[Balance] = []

    def ask() -> bool:
        try:
            found.append(balance(connection, account_id, at=at))
        except InstantNotFinal:
            return False
        finally:
            connection.rollback()
        return True

    until(ask)
    return found[0]


def expiries(connection: sa.Connection) -> list[datetime | None]:
    return list(connection.exec_driver_sql("SELECT expires_at FROM kino.credit_lot ORDER BY lot_id").scalars())


def transfers(
    connection: sa.Connection, *kinds: str, columns: str = "charge_id, lot_id, to_lot_id, credits"
) -> list[tuple[Any, ...]]:
    """Every transfer of these kinds: its kind, and these columns."""
    rows = connection.execute(
        sa.text(f"SELECT kind, {columns} FROM kino.transfer WHERE kind = ANY(:kinds) ORDER BY transfer_id"),
        {"kinds": list(kinds)},
    )
    return [tuple(row) for row in rows]
