"""Whether an account or a grant exists, for a clear error before the ledger is asked about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

if TYPE_CHECKING:
    from kino_refunds.db.engine import Connection


def account_exists(connection: Connection, account_id: str) -> bool:
    """Return whether the ledger has this account; its first grant creates it."""
    found = sa.text("SELECT EXISTS (SELECT FROM kino.account WHERE account_id = :account_id)")
    return bool(connection.execute(found, {"account_id": account_id}).scalar_one())


def was_granted(connection: Connection, reference: str) -> bool:
    """Return whether a grant with this reference was made before."""
    found = sa.text("SELECT EXISTS (SELECT FROM kino.credit_lot WHERE reference = :reference)")
    return bool(connection.execute(found, {"reference": reference}).scalar_one())
