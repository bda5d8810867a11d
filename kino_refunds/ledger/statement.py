"""Balances and statements: what an account has, now or at a past instant, and the transfers that led there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.errors import InstantNotFinal, TransferNotFound
from kino_refunds.ledger.callers import fit, instant, instant_or_none, microseconds
from kino_refunds.ledger.values import require_instant

if TYPE_CHECKING:
    from datetime import datetime


@dataclass(frozen=True, slots=True)
class Balance:
    """A balance in whole credits: `available` can be spent now, `held` is taken by charges that are still open."""

    available: int
    held: int


@dataclass(frozen=True, slots=True)
class StatementLine:
    """One transfer as the account's owner sees it; the sign of `credits` is its effect on the wallet."""

    transfer_id: int
    at: datetime
    kind: str
    credits: int
    lot_id: int
    job_id: str | None
    reason: str | None


def balance(connection: sa.Connection, account_id: str, *, at: datetime | None = None) -> Balance:
    """Return what an account has now, or had at an instant; zero for an account that does not exist.

    Now: the remaining credits of active, unexpired lots, and the credits of open charges. `at`: the transfers posted
    by then, without the lots that had expired by then, by the expiry that they had then. A freeze leaves no transfer,
    so a past balance ignores it. A sum above Postgres' bigint (2^63 - 1, over 1,024 of the largest lots) is returned as
    that number.

    The answer for an instant never changes. Raises InstantNotFinal, whose text names the latest instant that can be
    asked for, if an open transaction could still change it; ValueError if `at` has no offset; UnfitSession.
    """
    with fit(connection):
        if at is None:
            row = connection.execute(
                sa.text("SELECT available, held FROM kino.account_balance WHERE account_id = :account_id"),
                {"account_id": account_id},
            ).one_or_none()
        else:
            instant_asked = require_instant("at", at)
            require_final(connection, instant_asked)
            row = connection.execute(_BALANCE_AT, {"account_id": account_id, "at": instant_asked}).one()
    return Balance(0, 0) if row is None else Balance(row.available, row.held)


def final_through(connection: sa.Connection) -> datetime | None:
    """Return the latest instant whose balance cannot change any more; None if there is none yet.

    A row gets its instant after its transaction has its number. So once every transaction below the number of a sample
    has ended, no row can appear that is as old as the sample. A sweep takes a sample every minute. A moment in which no
    other session of this database has a number is as good: a row that such a session writes later is younger.
    """
    clock_us = connection.execute(_CLOCK).scalar_one()
    return instant_or_none(connection.execute(_FINAL, {"clock_us": clock_us}).scalar_one())


# Null where the next statement's snapshot would be older than this instant (every level but READ COMMITTED), and on a
# standby, which does not see the sessions that write. There only samples count; else an answer could change later.
_CLOCK = sa.text(f"""
    SELECT CASE WHEN current_setting('transaction_isolation') = 'read committed' AND NOT pg_is_in_recovery()
                THEN {microseconds("kino.clock()")} END
""")
# Every transaction that has a number holds a lock on that number until its end is visible to all sessions. Postgres'
# own workers (an ANALYZE) belong to no user and write no row of ours; a prepared transaction has no session, and
# counts.
_FINAL = sa.text(f"""
    SELECT greatest(
        (SELECT {microseconds("c.sampled_at")} FROM kino.xid_clock c
         WHERE c.xid < kino.horizon() ORDER BY c.xid DESC LIMIT 1),
        CASE WHEN NOT EXISTS (
                 SELECT FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
                 WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock' AND l.granted
                   AND l.pid IS DISTINCT FROM pg_backend_pid()
                   AND (l.pid IS NULL OR a.usesysid IS NOT NULL
                        AND a.datid = (SELECT oid FROM pg_database WHERE datname = current_database())))
             THEN CAST(:clock_us AS bigint) END)
""")  # noqa: S608 - a constant


def require_final(connection: sa.Connection, at: datetime, *, what: str | None = None) -> None:
    """Raise InstantNotFinal if what was before `at` may still change; its text names the latest instant.

    `what` says what ends at that instant, if the caller was not asked for an instant.
    """
    latest = final_through(connection)
    if latest is None:
        raise InstantNotFinal(
            "a transaction is open that may still change it, and no sample of the clock is below it; ask again soon"
        )
    if at > latest:
        text = f"what was after {latest:%Y-%m-%d %H:%M:%S.%fZ} may still change"
        if what is None:
            text += ", by a transaction that is open; ask for that instant or an earlier one, or again in a minute"
        else:
            text = f"{what}, and {text}; ask for an earlier one, or again when it has ended"
        raise InstantNotFinal(text)


# From transfers, never from `remaining`: that number is of now. A transfer with two lots (a refund into a successor)
# counts for the second, in which the credits arrived; counted for the first they would seem to have expired.
_BALANCE_AT = sa.text("""
    WITH posted AS (
        SELECT t.* FROM kino.transfer t WHERE t.account_id = :account_id AND t.created_at <= :at
    ), wallet AS (
        SELECT coalesce(to_lot_id, lot_id) AS lot_id, credits FROM posted WHERE to_book = 'wallet'
        UNION ALL
        SELECT lot_id, -credits FROM posted WHERE from_book = 'wallet'
    ), lot AS (
        -- The first change after that instant says what the expiry was before it.
        SELECT l.lot_id, CASE WHEN later.lot_id IS NULL THEN l.expires_at ELSE later.from_expires_at END AS expires_at
        FROM kino.credit_lot l
        LEFT JOIN LATERAL (SELECT c.lot_id, c.from_expires_at FROM kino.lot_change c
                           WHERE c.lot_id = l.lot_id AND c.changed_at > :at
                           ORDER BY c.change_id LIMIT 1) AS later ON true
        WHERE l.account_id = :account_id
    )
    SELECT CAST(least(coalesce((SELECT sum(w.credits) FROM wallet w JOIN lot l USING (lot_id)
                     WHERE l.expires_at IS NULL
                        OR l.expires_at > :at), 0), 9223372036854775807) AS bigint) AS available,
           CAST(least(coalesce((SELECT sum(CASE WHEN to_book = 'held' THEN credits ELSE -credits END) FROM posted
                     WHERE 'held' IN (from_book, to_book)), 0), 9223372036854775807) AS bigint) AS held
""")


_OF_ACCOUNT = sa.text("SELECT true FROM kino.transfer WHERE transfer_id = :transfer_id AND account_id = :account_id")

# Ordered by transaction, then by transfer id; read only below the horizon, where every transaction has ended. In the
# order of ids alone, a transaction that commits late would put lines behind a reader's cursor, which never sees them.
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
    """Return up to `limit` transfers of an account, oldest first, from behind transfer id `after`.

    The lines are those below the transaction horizon, in the order of transactions and, within one, of transfer ids. A
    transaction that is still open has a higher number than every one below the horizon, but its transfers may have
    lower ids than theirs: a reader that pages by ids alone would never see them. `later_lines_exist` tells whether
    there are such transfers. Raises UnfitSession, and TransferNotFound if `after` is no transfer of this account: to
    start again from the beginning would count lines twice.
    """
    with fit(connection):
        if after:  # no transfer has id 0: a reader whose cursor is a number starts with it
            wanted = {"transfer_id": after, "account_id": account_id}
            if connection.execute(_OF_ACCOUNT, wanted).scalar_one_or_none() is None:
                raise TransferNotFound(f"account {account_id!r} has no transfer {after} to go on behind")
        rows = connection.execute(_LINES, {"account_id": account_id, "after": after or 0, "limit": limit}).all()
    return [
        StatementLine(
            transfer_id=row.transfer_id,
            at=instant(row.created_us),
            kind=row.kind,
            credits=row.sign * row.credits,
            lot_id=row.lot_id,
            job_id=row.job_id,
            reason=row.reason,
        )
        for row in rows
    ]


_LATER = sa.text("""
    SELECT EXISTS (SELECT FROM kino.transfer
                   WHERE account_id = :account_id AND xid >= kino.horizon())
""")


def later_lines_exist(connection: sa.Connection, account_id: str) -> bool:
    """Tell whether the account has transfers that `statement` does not list yet, because an older transaction is open.

    Call this before `statement`. In the other order, that transaction may end in between: this says no, and the lines
    that were read lack those transfers all the same.
    """
    with fit(connection):
        return bool(connection.execute(_LATER, {"account_id": account_id}).scalar_one())
