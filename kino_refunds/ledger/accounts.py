"""Accounts: created by their first grant, and where their status and its history are kept."""

from __future__ import annotations

from enum import StrEnum

import sqlalchemy as sa

from kino_refunds.errors import AccountNotActive

VIOLATION = "terms_violation"
"""The one reason of a termination that forfeits refunds (clause 6: "terminated for violation")."""


class AccountStatus(StrEnum):
    """What an account may do: only an active one is charged; a suspended one is still refunded."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    TERMINATED = "terminated"


def set_account_status(
    connection: sa.Connection, account_id: str, status: AccountStatus, *, reason: str, actor: str
) -> AccountStatus:
    """Change an account's status in the caller's transaction, keep the change, return what it was before.

    `reason` is `VIOLATION` where a termination is meant to forfeit refunds (clause 6); any other reason
    does not. Raises AccountNotActive if there is no such account.
    """
    before = connection.execute(
        sa.text("SELECT status FROM kino.account WHERE account_id = :account_id FOR NO KEY UPDATE"),
        {"account_id": account_id},
    ).scalar_one_or_none()
    if before is None:
        message = f"account {account_id!r} does not exist; its first grant creates it"
        raise AccountNotActive(message)
    change = {
        "account_id": account_id,
        "before": before,
        "status": status.value,
        "reason": reason,
        "actor": actor,
    }
    connection.execute(
        sa.text("UPDATE kino.account SET status = :status, status_reason = :reason WHERE account_id = :account_id"),
        change,
    )
    connection.execute(
        sa.text(
            "INSERT INTO kino.account_status_change (account_id, from_status, to_status, reason, actor)"
            " VALUES (:account_id, :before, :status, :reason, :actor)"
        ),
        change,
    )
    return AccountStatus(before)
