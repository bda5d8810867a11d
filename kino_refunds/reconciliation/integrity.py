"""Integrity: find what no ledger may contain, whatever was asked of it (P1 to P5; the queries are in integrity.sql)."""

from __future__ import annotations

from importlib import resources
from typing import Any

INTEGRITY = (resources.files("kino_refunds.reconciliation") / "integrity.sql").read_text(encoding="utf-8")


def violations(connection: Any) -> list[str]:
    """Return one sentence for each impossible thing in the ledger; `connection` is psycopg's or SQLAlchemy's."""
    driver = getattr(connection, "connection", connection)
    return [violation for _, violation in driver.cursor().execute(INTEGRITY.encode()).fetchall()]
