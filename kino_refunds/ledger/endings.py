"""How charges end: captured or refunded, each once (P1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.ledger.callers import call
from kino_refunds.ledger.values import Settlement

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_SETTLE_CHARGES = sa.text("SELECT count(*) FROM kino.settle_charges(CAST(:items AS jsonb))")
_HELD_LOTS = sa.text("""
    SELECT o_charge_id FROM kino.held_lots(CAST(:items AS jsonb)) WHERE cardinality(o_lot_ids) > 0
""")


def settle_charges(connection: sa.Connection, settlements: Sequence[Settlement]) -> None:
    """Settle open charges in the caller's transaction, all or none; their credits move by the lots' fates.

    Captured credits are consumed. Refunded ones go back where the lot's fate, read under its lock, sends them (design,
    section 4): into the lot; into a successor where the lot has expired or soon will; voided: back, then out again.
    Lots and amounts are those of the charge's own lines (P4).

    Raises ChargeAlreadySettled if another session was first (P1), LedgerInconsistent if the lines are not what the
    charge took or name another account's lot, sqlalchemy's OperationalError (lock_not_available) if a lot is held for
    longer than the session's lock timeout.
    """
    if settlements:
        items = [each._asdict() | {"event_time": each.event_time.isoformat()} for each in settlements]
        call(connection, _SETTLE_CHARGES, items)


def charges_with_held_lots(connection: sa.Connection, charge_ids: Collection[int]) -> set[int]:
    """Ask which of these charges drew from a lot that another session holds at this instant; waits for none.

    The lots that are free stay locked until the caller's transaction ends.
    """
    items = [{"charge_id": charge_id} for charge_id in sorted(charge_ids)]
    return {row.o_charge_id for row in call(connection, _HELD_LOTS, items)}
