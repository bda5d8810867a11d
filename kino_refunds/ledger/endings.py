"""End charges: each is captured or refunded, once (P1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.ledger.callers import call
from kino_refunds.ledger.values import Settlement

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

# Two sessions settle one charge: (1) both read it open, (2) A inserts its settlement, (3) B's insert waits, (4) A
# commits, (5) B's insert does nothing, and B raises ChargeAlreadySettled. Without (5) the credits would be given back
# twice.
_SETTLE_CHARGES = sa.text("SELECT count(*) FROM kino.settle_charges(CAST(:items AS jsonb))")
_HELD_LOTS = sa.text("""
    SELECT o_charge_id FROM kino.held_lots(CAST(:items AS jsonb)) WHERE cardinality(o_lot_ids) > 0
""")


def settle_charges(connection: sa.Connection, settlements: Sequence[Settlement]) -> None:
    """Settle open charges in the caller's transaction, all or none, and move their credits.

    Captured credits are consumed. Refunded credits go back by the state of their lot, read under the lot's lock
    (design, section 4): into the lot; into a successor if the lot has expired or soon will; into a voided lot and out
    again. Lots and amounts are those of the charge's own lines (P4).

    Raises ChargeAlreadySettled if another session was first (P1), LedgerInconsistent if the lines are not what the
    charge took or name another account's lot, RefusedInput if a field breaks the rules or a charge stands twice in the
    call, and sqlalchemy's OperationalError (lock_not_available) if a lot is held for longer than the session's lock
    timeout.
    """
    # No savepoint: an error here loses the caller's whole transaction. In a savepoint a caller could go on after it and
    # commit an inbox row that says `refunded` for credits that never moved; the same event again would be a duplicate.
    if settlements:
        items = [each._asdict() | {"event_time": each.event_time.isoformat()} for each in settlements]
        call(connection, _SETTLE_CHARGES, items)


def charges_with_held_lots(connection: sa.Connection, charge_ids: Collection[int]) -> set[int]:
    """Return the ids of those charges that drew from a lot which another session holds at this instant; wait for none.

    The other lots stay locked until the caller's transaction ends.
    """
    # Only an answer for now: the caller puts the refunds of these charges off, as `busy`. A wrong answer makes a refund
    # late and moves no credits, because settle_charges locks the lots again.
    items = [{"charge_id": charge_id} for charge_id in sorted(charge_ids)]
    return {row.o_charge_id for row in call(connection, _HELD_LOTS, items)}
