"""Charges: the credits that a job takes from its account's lots until it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from kino_refunds.ledger.callers import call, instant, microseconds, savepoint
from kino_refunds.ledger.values import Charge, ChargeRequest

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

# Two sessions that open the same job meet at the key of kino.charge: (1) A inserts the charge, (2) B's insert waits,
# (3) A commits, (4) B's insert does nothing, and B returns A's charge. The account pays once for one job.
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
    """Open one charge and return it; see `open_charges` for what it promises and raises."""
    return open_charges(connection, [ChargeRequest(job_id, account_id, credits, deadline_at)], actor=actor)[0]


def open_charges(
    connection: sa.Connection, requests: Iterable[ChargeRequest], *, actor: str = "product"
) -> list[Charge]:
    """Move each job's credits from wallet to held (clause 1), all or none; return one charge a request, in their order.

    Runs in a savepoint of the caller's transaction: if the caller catches an error, nothing of the call is committed.
    Idempotent on `job_id`: the same request again returns the charge that it opened, with its first deadline. `actor`
    is stored with the transfers of each new charge.

    Raises ChargeConflict (the job is charged on other terms), ChargeAlreadySettled, AccountNotActive,
    InsufficientCredits, TooManyLots, in this precedence. Raises LedgerBusy if another session holds the job or a lot
    for longer than 2 s: try again. Raises UnfitSession if the connection is in autocommit or its encoding cannot carry
    an id.

    One call (of up to 1,000 requests) locks lots in the order of their ids. Call it once per transaction, or be ready
    to retry after a deadlock (SQLSTATE 40P01). At REPEATABLE READ or SERIALIZABLE be ready to retry after a
    serialization failure (40001) as well.
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
    # A savepoint, so that a refusal leaves the caller's own rows intact: the product can still store and commit that
    # the job was not charged. The ledger's rows are all undone, so no credits stay held for a job that was refused.
    with savepoint(connection):
        rows = call(connection, _OPEN_CHARGES, items)
    # The lines are for the caller to read only. A refund goes by the stored lines (`charge_line`), never by what a
    # caller passes (P4).
    return [
        Charge(
            charge_id=charge_id,
            job_id=job_id,
            account_id=account_id,
            credits=credits,
            deadline_at=instant(deadline_us),
            opened_at=instant(opened_us),
            lines=list(zip(lot_ids, lot_credits, strict=True)),
        )
        for charge_id, job_id, account_id, credits, deadline_us, opened_us, lot_ids, lot_credits in rows
    ]
