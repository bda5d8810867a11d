"""A seal as a row of the table `kino.seal`: its values, its digest, and reading it back.

A row that was changed by hand may hold any value. Such a row is read all the same, and its digest is then wrong.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.ledger.callers import EPOCH
from kino_refunds.reconciliation.seals.contents import Range
from kino_refunds.reconciliation.seals.format import instant_sql

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kino_refunds.reconciliation.seals.contents import Content

ROWS_MAX = 200_000
"""Rows that a seal has at most, lines not counted: it is written in a few seconds, within the limits of a session. A
single transaction that wrote more is one seal nevertheless."""
FIRST = bytes(32)
"""The digest before the first seal."""
FIRST_INSTANT, LAST_INSTANT = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
NOT_A_SUM = -1
"""In the place of a seal's credits that are no whole number: no seal was written with it."""


@dataclass(frozen=True, slots=True)
class Seal:
    """A seal as it is stored: what the transactions from `from_xid` to before `to_xid` wrote has this digest.

    `as_of`: everything that was written before this instant has been sealed with this seal or an earlier one (for a
    seal that is older than every sample of the clock: the oldest sample). `rows` counts all tables, `credits` are the
    sum of the transfers'.
    """

    seal_id: int
    format: int
    from_xid: int
    to_xid: int
    previous_to_xid: int | None
    """As `from_xid`; None for the first seal."""
    as_of: datetime
    sealed_at: datetime
    rows: int
    credits: int
    previous_digest: bytes
    digest: bytes

    @property
    def transactions(self) -> Range:
        """The range of transactions that it seals."""
        return Range(self.from_xid, self.to_xid)

    def digest_of(self, content: Content) -> bytes:
        """Return the digest that a seal of this content has."""
        head: list[object] = [
            "kino-seal",
            self.format,
            self.seal_id,
            self.from_xid,
            self.to_xid,
            _microseconds(self.as_of),
            _microseconds(self.sealed_at),
            self.rows,
            self.credits,
            self.previous_digest.hex(),
        ]
        tables = [part for name, (rows, digest) in content.tables.items() for part in (name, rows, digest)]
        return hashlib.sha256(b"".join(map(_field, [*head, *tables]))).digest()


def seal_text(seal: Seal) -> str:
    """Return the seal as people keep it outside: its number, a colon and its digest in hex."""
    return f"{seal.seal_id}:{seal.digest.hex()}"


def _field(value: object) -> bytes:
    encoded = str(value).encode()
    return b"%d:%s" % (len(encoded), encoded)


def _microseconds(instant: datetime) -> int:
    return (instant - EPOCH) // timedelta(microseconds=1)


_STORED = f"""
    SELECT seal_id, format, CAST(from_xid AS text) AS from_xid, CAST(to_xid AS text) AS to_xid,
           CAST(previous_to_xid AS text) AS previous_to_xid,
           {instant_sql("as_of")} AS as_of, {instant_sql("sealed_at")} AS sealed_at, rows,
           CAST(credits AS text) AS credits, previous_digest, digest
    FROM kino.seal
"""  # noqa: S608 - a constant
_NEWEST = sa.text(f"{_STORED} ORDER BY seal_id DESC LIMIT 1")
_FROM = sa.text(f"{_STORED} WHERE seal_id >= :first ORDER BY seal_id LIMIT :limit")
_BEFORE = sa.text(f"{_STORED} WHERE seal_id < :first ORDER BY seal_id DESC LIMIT 1")


def _seal(row: sa.Row[*tuple[Any, ...]]) -> Seal:
    # What a forger wrote must come to a wrong digest, and not end the check with an error.
    return Seal(
        seal_id=row.seal_id,
        format=row.format,
        from_xid=int(row.from_xid),
        to_xid=int(row.to_xid),
        previous_to_xid=None if row.previous_to_xid is None else int(row.previous_to_xid),
        as_of=_instant(row.as_of),
        sealed_at=_instant(row.sealed_at),
        rows=row.rows,
        credits=_whole(row.credits),
        previous_digest=bytes(row.previous_digest),
        digest=bytes(row.digest),
    )


def _instant(text: str) -> datetime:
    try:
        return EPOCH + timedelta(microseconds=int(text))
    except (ValueError, OverflowError):  # infinity, or a year that Python does not have
        return FIRST_INSTANT if text.startswith("-") else LAST_INSTANT


def _whole(text: str) -> int:
    try:
        number = Decimal(text)
        return int(number) if number == number.to_integral_value() else NOT_A_SUM
    except (InvalidOperation, ValueError, OverflowError):  # NaN, infinity
        return NOT_A_SUM


def newest_seal(connection: sa.Connection) -> Seal | None:
    """Return the newest seal; None if there is none yet."""
    row = connection.execute(_NEWEST).one_or_none()
    return None if row is None else _seal(row)


def seal_before(connection: sa.Connection, seal_id: int) -> Seal | None:
    """Return the newest seal before this number; None if there is none."""
    row = connection.execute(_BEFORE, {"first": seal_id}).one_or_none()
    return None if row is None else _seal(row)


def read_seals(connection: sa.Connection, first: int, limit: int) -> Iterator[Seal]:
    """Return at most `limit` seals, in their order, from the number `first` on."""
    return map(_seal, connection.execute(_FROM, {"first": first, "limit": limit}).all())
