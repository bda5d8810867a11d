"""What an account has, and every movement that led there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.errors import TransferNotFound
from kino_refunds.ledger.callers import fit, instant, microseconds
from kino_refunds.ledger.lots import require_instant

if TYPE_CHECKING:
    from datetime import datetime


@dataclass(frozen=True, slots=True)
class Balance:
    """Whole credits: `available` can be spent now, `held` belongs to jobs that are still open."""

    available: int
    held: int


@dataclass(frozen=True, slots=True)
class StatementLine:
    """One transfer as the account's owner sees it; `credits` is signed, by its effect on the wallet."""

    transfer_id: int
    at: datetime
    kind: str
    credits: int
    lot_id: int
    job_id: str | None
    reason: str | None


def balance(connection: sa.Connection, account_id: str, *, at: datetime | None = None) -> Balance:
    """Say what an account has now, or had at an instant; zero for an account that nobody knows.

    Now: the remaining credits of active, unexpired lots, and of open charges. `at`: the transfers posted
    by then, without lots that had expired by then; a freeze leaves no transfer, so it is not seen. The
    answer for an instant is final once every transaction that was open at it has ended. More than Postgres' bigint
    holds (2^63 - 1, over 1,024 of the largest lots) is given as that. Raises UnfitSession.
    """
    with fit(connection):
        if at is None:
            row = connection.execute(
                sa.text("SELECT available, held FROM kino.account_balance WHERE account_id = :account_id"),
                {"account_id": account_id},
            ).one_or_none()
        else:
            wanted = {"account_id": account_id, "at": require_instant("at", at)}
            row = connection.execute(_BALANCE_AT, wanted).one()
    return Balance(0, 0) if row is None else Balance(row.available, row.held)


_BALANCE_AT = sa.text("""
    WITH posted AS (
        SELECT t.* FROM kino.transfer t WHERE t.account_id = :account_id AND t.created_at <= :at
    ), wallet AS (
        SELECT coalesce(to_lot_id, lot_id) AS lot_id, credits FROM posted WHERE to_book = 'wallet'
        UNION ALL
        SELECT lot_id, -credits FROM posted WHERE from_book = 'wallet'
    )
    SELECT CAST(least(coalesce((SELECT sum(w.credits) FROM wallet w JOIN kino.credit_lot l USING (lot_id)
                     WHERE l.expires_at IS NULL
                        OR CASE WHEN l.extended_at > :at THEN l.extended_from ELSE l.expires_at END > :at),
                    0), 9223372036854775807) AS bigint) AS available,
           CAST(least(coalesce((SELECT sum(CASE WHEN to_book = 'held' THEN credits ELSE -credits END) FROM posted
                     WHERE 'held' IN (from_book, to_book)), 0), 9223372036854775807) AS bigint) AS held
""")


_OF_ACCOUNT = sa.text("SELECT true FROM kino.transfer WHERE transfer_id = :transfer_id AND account_id = :account_id")

_LINES = sa.text(f"""
    SELECT t.transfer_id, {microseconds("t.created_at")} AS created_us, t.kind, t.credits, t.reason, c.job_id,
           (CASE 'wallet' WHEN t.to_book THEN 1 WHEN t.from_book THEN -1 ELSE 0 END) AS sign,
           coalesce(t.to_lot_id, t.lot_id) AS lot_id
    FROM kino.transfer t LEFT JOIN kino.charge c ON c.charge_id = t.charge_id
    WHERE t.account_id = :account_id
      AND (t.xid, t.transfer_id) > (coalesce((SELECT xid FROM kino.transfer WHERE transfer_id = :after),
                                             CAST('0' AS xid8)), :after)
      AND t.xid < kino.horizon()
    ORDER BY t.xid, t.transfer_id LIMIT :limit
""")  # noqa: S608 - a constant


def statement(
    connection: sa.Connection, account_id: str, *, after: int | None = None, limit: int = 100
) -> list[StatementLine]:
    """List an account's transfers, oldest first, up to `limit`, from behind transfer id `after`.

    Only what lies below the transaction horizon, in the order of transactions and within one of transfer
    ids: a transaction that is still open has a higher id than every one below the horizon, but its
    transfers may have lower ids than theirs, and a reader that pages by those alone would never see them.
    `later_lines_exist` tells whether there are such transfers. Raises UnfitSession, and TransferNotFound if `after`
    is no transfer of this account: to begin anew would count lines twice.
    """
    with fit(connection):
        if after:  # 0 never was a transfer: a reader whose cursor is a number begins with it
            wanted = {"transfer_id": after, "account_id": account_id}
            if connection.execute(_OF_ACCOUNT, wanted).scalar_one_or_none() is None:
                raise TransferNotFound(f"account {account_id!r} has no transfer {after} to go on behind")
        rows = connection.execute(_LINES, {"account_id": account_id, "after": after or 0, "limit": limit}).all()
    return [
        StatementLine(
            row.transfer_id,
            instant(row.created_us),
            row.kind,
            row.sign * row.credits,
            row.lot_id,
            row.job_id,
            row.reason,
        )
        for row in rows
    ]


_LATER = sa.text("""
    SELECT EXISTS (SELECT FROM kino.transfer
                   WHERE account_id = :account_id AND xid >= kino.horizon())
""")


def later_lines_exist(connection: sa.Connection, account_id: str) -> bool:
    """Tell whether the account has transfers that `statement` does not list yet: a transaction before them is open.

    Ask before you call `statement`: when that transaction ends in between, the other order says no, and the lines
    that were read lack them all the same.
    """
    with fit(connection):
        return bool(connection.execute(_LATER, {"account_id": account_id}).scalar_one())
