"""Charges: what a job takes from its account's lots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.ledger.callers import call, instant, microseconds, savepoint
from kino_refunds.ledger.values import Charge, ChargeRequest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

_OPEN_CHARGES = sa.text(f"""
    SELECT o_charge_id, o_job_id, o_account_id, o_credits, {microseconds("o_deadline_at")} AS deadline_us,
           {microseconds("o_opened_at")} AS opened_us, o_lot_ids, o_lot_credits
    FROM kino.open_charges(CAST(:items AS jsonb))
""")  # noqa: S608 - a constant


def open_charge(
    connection: sa.Connection,
    *,
    job_id: str,
    account_id: str,
    credits: int,
    deadline_at: datetime,
    actor: str = "product",
) -> Charge:
    """Open one charge; see `open_charges`."""
    return open_charges(connection, [ChargeRequest(job_id, account_id, credits, deadline_at)], actor=actor)[0]


def open_charges(
    connection: sa.Connection, requests: Iterable[ChargeRequest], *, actor: str = "product"
) -> list[Charge]:
    """Move credits from wallet to held for each job, all or nothing, in the caller's transaction (clause 1).

    Runs in a savepoint: an error that the caller catches leaves nothing behind. Idempotent on `job_id`:
    the same request again returns the charge it opened. Returns one charge a request, in their order. `actor` is kept
    with the transfers of each charge that is new.

    Raises ChargeConflict (the job is charged on other terms), ChargeAlreadySettled, AccountNotActive,
    InsufficientCredits, TooManyLots, in this precedence; LedgerBusy if another session holds the job or a lot for
    longer than 2 s: try again. Lots are locked in the order of their ids within one call (of up to 1,000 requests):
    call it once per transaction, or be ready to retry after a deadlock. At REPEATABLE READ or SERIALIZABLE be ready
    to retry after a serialization failure (SQLSTATE 40001) as well. Raises UnfitSession if the connection is in
    autocommit or its encoding lacks an id.
    """
    items = [
        {
            "job_id": request.job_id,
            "account_id": request.account_id,
            "credits": request.credits,
            "deadline_at": request.deadline_at.isoformat(),
            "actor": actor,
        }
        for request in requests
    ]
    if not items:
        return []
    with savepoint(connection):
        return [_charge(row) for row in call(connection, _OPEN_CHARGES, items)]


def _charge(row: Any) -> Charge:
    charge_id, job_id, account_id, credits, deadline_us, opened_us, lot_ids, lot_credits = row
    lines = list(zip(lot_ids, lot_credits, strict=True))
    return Charge(
        charge_id=charge_id,
        job_id=job_id,
        account_id=account_id,
        credits=credits,
        deadline_at=instant(deadline_us),
        opened_at=instant(opened_us),
        lines=lines,
    )
