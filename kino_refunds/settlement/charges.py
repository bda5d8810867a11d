"""Read the charges that a batch is about: the state of each, and which of them need a lot that is held."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.ledger.accounts import StatusHistory, read_status_histories
from kino_refunds.ledger.endings import charges_with_held_lots
from kino_refunds.ledger.values import SettlementKind
from kino_refunds.settlement.decide import ChargeFacts
from kino_refunds.settlement.outcomes import ChargeState

if TYPE_CHECKING:
    from collections.abc import Collection

ALWAYS_ACTIVE = StatusHistory()

# Read without a lock: another session may settle a charge right after this. The insert of the settlement finds that out
# (P1), the batch rolls back, and this is read again. A lock here would make a batch wait for charges that it may not
# even settle.
_READ_CHARGES = sa.text("""
    SELECT c.job_id, c.charge_id, c.account_id, c.credits, c.opened_at, s.kind, k.charge_id,
           a.status_reason IS NOT NULL AS has_history
    FROM unnest(CAST(:job_ids AS text[])) AS j (job_id)
    JOIN kino.charge c ON c.job_id = j.job_id
    JOIN kino.account a ON a.account_id = c.account_id
    LEFT JOIN kino.settlement s ON s.charge_id = c.charge_id
    LEFT JOIN kino.correction k ON k.charge_id = c.charge_id
""")


def read_charges(connection: sa.Connection, job_ids: Collection[str]) -> dict[str, ChargeFacts]:
    """Return the facts of these jobs' charges by job id; a job without a charge is left out."""
    rows = connection.execute(_READ_CHARGES, {"job_ids": sorted(job_ids)}).all()
    # The history is read only for the accounts that have one: almost no account ever changes its status.
    changed = {row[2] for row in rows if row[7]}
    histories = read_status_histories(connection, changed) if changed else {}
    charges = {}
    for job_id, charge_id, account_id, credits, opened_at, kind, corrected, _ in rows:
        if kind is None:
            state = ChargeState.OPEN
        # A corrected capture counts as refunded: its credits are back. As captured, a late failure would raise a break
        # about a customer who is owed nothing.
        elif kind == SettlementKind.REFUNDED or corrected is not None:
            state = ChargeState.REFUNDED
        else:
            state = ChargeState.CAPTURED
        history = histories.get(account_id, ALWAYS_ACTIVE)
        charges[job_id] = ChargeFacts(
            charge_id=charge_id,
            account_id=account_id,
            credits=credits,
            opened_at=opened_at,
            state=state,
            history=history,
        )
    return charges


def read_held_charges(connection: sa.Connection, job_ids: Collection[str]) -> frozenset[int]:
    """Return the ids of these jobs' open charges that drew from a lot which another session holds; wait for none.

    The other lots stay locked until the caller's transaction ends.
    """
    charges = read_charges(connection, job_ids).values()
    # Only open charges can move credits; of a settled one the lots no longer matter, and must not be locked for it.
    open_ids = {charge.charge_id for charge in charges if charge.state is ChargeState.OPEN}
    return frozenset(charges_with_held_lots(connection, open_ids))
