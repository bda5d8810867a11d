"""Grants: give credits to an account, and expire lots whose time has come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.ledger.callers import call, instant_or_none, microseconds, savepoint
from kino_refunds.ledger.values import Grant, Lot, LotClass, LotState

if TYPE_CHECKING:
    from collections.abc import Iterable

# Two sessions grant under one reference, and meet at its key in kino.credit_lot: (1) A inserts the lot, (2) B's insert
# waits, (3) A commits, (4) B's insert does nothing, and B returns A's lot. Without the key one payment, reported twice,
# would give its credits twice.
_GRANT_LOTS = sa.text(f"""
    SELECT o_lot_id, o_reference, o_account_id, o_class, o_granted, o_remaining, o_priority,
           {microseconds("o_expires_at")} AS expires_us, o_state
    FROM kino.grant_lots(CAST(:items AS jsonb))
""")  # noqa: S608 - a constant

_EXPIRE_LOTS = sa.text("SELECT kino.expire_lots(:limit)")


def grant_lots(connection: sa.Connection, grants: Iterable[Grant], *, actor: str = "grant") -> list[Lot]:
    """Give credits in the caller's transaction; return one lot for each grant, in the order of `grants`.

    `actor` says who gave the credits; it is stored with the transfer of each new lot. The account is created by its
    first grant. Runs in a savepoint: if the caller catches an error, nothing of the call is committed.

    Idempotent on `reference`: the same grant again returns its lot as it is now. Raises GrantConflict if a reference
    already names a grant on other terms (clause 1: a customer must be able to trust what was bought), LedgerBusy if
    another session holds one of the references for longer than 2 s, RefusedInput if a field breaks the rules, and
    UnfitSession if the connection is in autocommit or its encoding cannot carry an id.
    """
    items = [_item(grant, actor) for grant in grants]
    if not items:
        return []
    # A savepoint, so that after a conflict the caller can still record it. None of the call's lots is kept: a purchase
    # of several lots is given whole or not at all.
    with savepoint(connection):
        rows = call(connection, _GRANT_LOTS, items)
    # `remaining` and `state` are those of now: on a repeated grant the customer may have spent the credits already.
    return [
        Lot(
            lot_id=lot_id,
            reference=reference,
            account_id=account_id,
            lot_class=LotClass(lot_class),
            granted=granted,
            remaining=remaining,
            priority=priority,
            expires_at=instant_or_none(expires_us),
            state=LotState(state),
        )
        for lot_id, reference, account_id, lot_class, granted, remaining, priority, expires_us, state in rows
    ]


def _item(grant: Grant, actor: str) -> dict[str, Any]:
    return {
        "reference": grant.reference,
        "account_id": grant.account_id,
        "credits": grant.credits,
        "class": grant.lot_class.value,
        "expires_at": None if grant.expires_at is None else grant.expires_at.isoformat(),
        "priority": grant.priority,
        "purchase_id": grant.purchase_id,
        "actor": actor,
    }


def expire_lots(connection: sa.Connection, *, limit: int = 1000) -> int:
    """Expire up to `limit` (1 to 10,000) active lots whose time has come; return how many. Call again until it is 0.

    Skips a lot that another session holds: the next run finds it. Until then no charge draws from it, because
    `open_charges` compares the expiry with the clock and does not rely on the state. Frozen lots do not expire.
    """
    expired: int = connection.execute(_EXPIRE_LOTS, {"limit": limit}).scalar_one()
    return expired
