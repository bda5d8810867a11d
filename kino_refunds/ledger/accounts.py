"""Accounts: created by their first grant, and where their status and its history are kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa

from kino_refunds.ledger.callers import call

VIOLATION = "terms_violation"
"""The one reason of a termination that forfeits refunds (clause 6: "terminated for violation")."""


class AccountStatus(StrEnum):
    """What an account may do: only an active one is charged; a suspended one is still refunded."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    TERMINATED = "terminated"


class PastStatus(StrEnum):
    """What an account was at an instant, as far as a refund is concerned (clause 6)."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    TERMINATED = "terminated"
    TERMINATED_FOR_VIOLATION = "terminated_for_violation"


@dataclass(frozen=True, slots=True)
class StatusHistory:
    """Every change of an account's status, oldest first, as (when, to what, why); an account begins active."""

    changes: tuple[tuple[datetime, str, str], ...] = ()

    def at(self, instant: datetime) -> PastStatus:
        """Say what the account was at `instant`.

        A violation stands until the account is reinstated: one that is closed at its own request afterwards, or
        suspended, has been terminated for violation all the same.
        """
        status, violation = PastStatus.ACTIVE, False
        for changed_at, to_status, reason in self.changes:
            if changed_at > instant:
                break
            status = PastStatus(to_status)
            if status is PastStatus.ACTIVE:
                violation = False
            elif status is PastStatus.TERMINATED and reason == VIOLATION:
                violation = True
        return PastStatus.TERMINATED_FOR_VIOLATION if violation else status


_HISTORIES = sa.text("""
    SELECT account_id, changed_at, to_status, reason FROM kino.account_status_change
    WHERE account_id = ANY(CAST(:account_ids AS text[])) ORDER BY account_id, change_id
""")


def read_status_histories(connection: sa.Connection, account_ids: Collection[str]) -> dict[str, StatusHistory]:
    """Read the histories of these accounts; one without a change is not in the answer."""
    changes: dict[str, list[tuple[datetime, str, str]]] = {}
    for account_id, *change in connection.execute(_HISTORIES, {"account_ids": sorted(account_ids)}):
        changes.setdefault(account_id, []).append((change[0], change[1], change[2]))
    return {account_id: StatusHistory(tuple(each)) for account_id, each in changes.items()}


_SET_STATUS = sa.text("SELECT o_status_before FROM kino.set_account_status(CAST(:items AS jsonb))")


def set_account_status(
    connection: sa.Connection, account_id: str, status: AccountStatus, *, reason: str, actor: str
) -> AccountStatus:
    """Change an account's status in the caller's transaction, keep the change, return what it was before.

    `reason` is `VIOLATION` where a termination is meant to forfeit refunds (clause 6); any other reason
    does not. Raises AccountNotActive if there is no such account. As kino_oncall.
    """
    change = {"account_id": account_id, "status": status.value, "reason": reason, "actor": actor}
    return AccountStatus(call(connection, _SET_STATUS, [change])[0].o_status_before)
