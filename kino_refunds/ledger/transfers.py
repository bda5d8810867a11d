"""Post transfers: each moves credits from one book to another, so the books always sum to zero."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime


class Book(StrEnum):
    """The places a credit can be; `issued` is where they come from."""

    ISSUED = "issued"
    WALLET = "wallet"
    HELD = "held"
    CONSUMED = "consumed"
    EXPIRED = "expired"
    VOIDED = "voided"


class TransferKind(StrEnum):
    """Why credits move; the kind decides both books."""

    GRANT = "grant"
    HOLD = "hold"
    CAPTURE = "capture"
    REFUND = "refund"
    EXPIRE = "expire"
    VOID = "void"
    UNVOID = "unvoid"
    REVERSAL = "reversal"

    @property
    def books(self) -> tuple[Book, Book]:
        """The book that gives and the book that takes."""
        return _BOOKS[self]


_BOOKS = {
    TransferKind.GRANT: (Book.ISSUED, Book.WALLET),
    TransferKind.HOLD: (Book.WALLET, Book.HELD),
    TransferKind.CAPTURE: (Book.HELD, Book.CONSUMED),
    TransferKind.REFUND: (Book.HELD, Book.WALLET),
    TransferKind.EXPIRE: (Book.WALLET, Book.EXPIRED),
    TransferKind.VOID: (Book.WALLET, Book.VOIDED),
    TransferKind.UNVOID: (Book.VOIDED, Book.WALLET),
    TransferKind.REVERSAL: (Book.CONSUMED, Book.WALLET),
}


class Transfer(NamedTuple):
    """One movement of `credits` (whole, above zero) that is about to be posted."""

    kind: TransferKind
    account_id: str
    lot_id: int
    credits: int
    charge_id: int | None = None
    to_lot_id: int | None = None
    """The successor lot that takes what `lot_id` gave; None: the same lot."""
    reason: str | None = None
    event_at: datetime | None = None


# created_at and transfer_id are the database's: a statement of its own, after the lots are locked, so
# that along one lot both follow the order of the commits.
_POST = sa.text("""
    INSERT INTO kino.transfer
        (kind, from_book, to_book, account_id, lot_id, to_lot_id, charge_id, credits, reason, actor, event_at)
    SELECT kind, from_book, to_book, account_id, lot_id, to_lot_id, charge_id, credits, reason, :actor, event_at
    FROM unnest(CAST(:kinds AS text[]), CAST(:from_books AS text[]), CAST(:to_books AS text[]),
                CAST(:account_ids AS text[]), CAST(:lot_ids AS bigint[]), CAST(:to_lot_ids AS bigint[]),
                CAST(:charge_ids AS bigint[]), CAST(:credits AS bigint[]), CAST(:reasons AS text[]),
                CAST(:event_ats AS timestamptz[]))
         AS t (kind, from_book, to_book, account_id, lot_id, to_lot_id, charge_id, credits, reason, event_at)
""")


def post_transfers(connection: sa.Connection, transfers: Sequence[Transfer], *, actor: str) -> None:
    """Append `transfers` in the given order; call it after the lots they touch are locked (P5)."""
    if not transfers:
        return
    books = [transfer.kind.books for transfer in transfers]
    connection.execute(
        _POST,
        {
            "kinds": [transfer.kind.value for transfer in transfers],
            "from_books": [given.value for given, _ in books],
            "to_books": [taken.value for _, taken in books],
            "account_ids": [transfer.account_id for transfer in transfers],
            "lot_ids": [transfer.lot_id for transfer in transfers],
            "to_lot_ids": [transfer.to_lot_id for transfer in transfers],
            "charge_ids": [transfer.charge_id for transfer in transfers],
            "credits": [transfer.credits for transfer in transfers],
            "reasons": [transfer.reason for transfer in transfers],
            "event_ats": [transfer.event_at for transfer in transfers],
            "actor": actor,
        },
    )
