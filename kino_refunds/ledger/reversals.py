"""Reversals: captured charges that are refunded after all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.ledger.callers import call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kino_refunds.ledger.values import Reversal

_REVERSE_CHARGES = sa.text("SELECT o_charge_id FROM kino.reverse_charges(CAST(:items AS jsonb))")


def reverse_charges(connection: sa.Connection, reversals: Sequence[Reversal]) -> None:
    """Correct captured charges in the caller's transaction, all or none, once a charge (P1); as kino_oncall.

    The charge stays captured; its credits go back by the refund's lot rules. Idempotent on the reference. Raises
    ChargeNotCaptured, ChargeConflict (corrected before, with another reason, clause or reference), LedgerInconsistent.
    """
    if reversals:
        call(connection, _REVERSE_CHARGES, [reversal._asdict() for reversal in reversals])
