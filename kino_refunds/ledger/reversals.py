"""Reversals: refund charges that were captured, because the capture was wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.ledger.callers import call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kino_refunds.ledger.values import Reversal

_REVERSE_CHARGES = sa.text("SELECT o_charge_id FROM kino.reverse_charges(CAST(:items AS jsonb))")


def reverse_charges(connection: sa.Connection, reversals: Sequence[Reversal]) -> None:
    """Refund captured charges in the caller's transaction, all or none, each charge once (P1). Connect as kino_oncall.

    The settlement stays `captured`; a correction row is added, and the credits go back by the lot rules of a refund.
    Idempotent on the reference: the same reversal again moves nothing. Raises ChargeNotCaptured, ChargeConflict
    (corrected before, with another reason, clause or reference), LedgerInconsistent, and RefusedInput if a field breaks
    the rules or a charge stands twice in the call.
    """
    # The correction's key is the charge, not the reference: under a second reference the same charge raises
    # ChargeConflict. Otherwise two people who each correct one capture would give its credits back twice.
    if reversals:
        call(connection, _REVERSE_CHARGES, [reversal._asdict() for reversal in reversals])
