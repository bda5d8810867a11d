"""Rows that no function would write, and what the ledger has written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from kino_refunds.ledger import Charge


def successors(connection: sa.Connection) -> list[dict[str, Any]]:
    """Every successor lot, whole but for the times the clock chose."""
    rows = connection.exec_driver_sql(
        "SELECT lot_id, account_id, class, granted, remaining, priority, expires_at, root_expires_at, purchase_id,"
        " successor_of, state FROM kino.credit_lot WHERE successor_of IS NOT NULL ORDER BY lot_id"
    )
    return [dict(row) for row in rows.mappings()]


@contextmanager
def tampered(superuser: sa.Connection, opened: Charge, lines: list[tuple[int, int]]) -> Iterator[None]:
    """Let a charge's lines be others while the block runs, as no function of the ledger writes them."""
    rewrite(superuser, opened.charge_id, lines)
    try:
        yield
    finally:
        rewrite(superuser, opened.charge_id, opened.lines)


def rewrite(superuser: sa.Connection, charge_id: int, lines: list[tuple[int, int]]) -> None:
    superuser.exec_driver_sql("SET session_replication_role = replica")
    superuser.execute(sa.text("DELETE FROM kino.charge_line WHERE charge_id = :charge_id"), {"charge_id": charge_id})
    for seq, (lot_id, credits) in enumerate(lines, start=1):
        superuser.execute(
            sa.text("INSERT INTO kino.charge_line VALUES (:charge_id, :seq, :lot_id, :credits)"),
            {"charge_id": charge_id, "seq": seq, "lot_id": lot_id, "credits": credits},
        )
    superuser.commit()


def written(connection: sa.Connection) -> dict[str, int]:
    """Count the rows of everything that opening a charge writes."""
    tables = ("charge", "charge_line", "transfer")
    return {table: connection.exec_driver_sql(f"SELECT count(*) FROM kino.{table}").scalar_one() for table in tables}
