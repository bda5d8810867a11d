"""Accounts: their status, and the history from which a status at a past instant is read.

An account is created by its first grant (`grant_lots`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import sqlalchemy as sa

from kino_refunds.ledger.callers import call

VIOLATION = "terms_violation"
"""The only reason for which a termination forfeits refunds (clause 6: "terminated for violation")."""


class AccountStatus(StrEnum):
    """What an account may do: only an active account is charged; a suspended account is still refunded."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    TERMINATED = "terminated"


class PastStatus(StrEnum):
    """The status of an account at a past instant, in the words that a refund depends on (clause 6)."""

    ACTIVE = "active"
    SUSPENDED = "suspended"
    TERMINATED = "terminated"
    TERMINATED_FOR_VIOLATION = "terminated_for_violation"


@dataclass(frozen=True, slots=True)
class StatusHistory:
    """The changes of one account's status, oldest first, each as (instant, new status, reason).

    Before its first change an account is active.
    """

    changes: tuple[tuple[datetime, str, str], ...] = ()

    def at(self, instant: datetime) -> PastStatus:
        """Return the status of the account at `instant`; a change at exactly that instant counts.

        A violation stands until the account is reinstated. An account that was terminated for violation, and was
        closed at its own request or suspended afterwards, is still terminated for violation.
        """
        status, violation = PastStatus.ACTIVE, False
        for changed_at, to_status, reason in self.changes:
            # A change after the event does not count. Otherwise a customer would forfeit a refund because we settled
            # the event late.
            if changed_at > instant:
                break
            status = PastStatus(to_status)
            # Only `active` ends a violation. Otherwise a customer who was terminated for violation could close the
            # account and be refunded again.
            if status is PastStatus.ACTIVE:
                violation = False
            elif status is PastStatus.TERMINATED and reason == VIOLATION:
                violation = True
        return PastStatus.TERMINATED_FOR_VIOLATION if violation else status


# By change_id, not by changed_at: set_account_status holds the account's row while it inserts, so the ids of one
# account follow the order in which its changes took effect, even if the clock was set back between two of them.
_HISTORIES = sa.text("""
    SELECT account_id, changed_at, to_status, reason FROM kino.account_status_change
    WHERE account_id = ANY(CAST(:account_ids AS text[])) ORDER BY account_id, change_id
""")


def read_status_histories(connection: sa.Connection, account_ids: Collection[str]) -> dict[str, StatusHistory]:
    """Return the status histories by account id; an account whose status never changed is left out."""
    changes: dict[str, list[tuple[datetime, str, str]]] = {}
    for account_id, *change in connection.execute(_HISTORIES, {"account_ids": sorted(account_ids)}):
        changes.setdefault(account_id, []).append((change[0], change[1], change[2]))
    return {account_id: StatusHistory(tuple(each)) for account_id, each in changes.items()}


# The function also writes the history row. A bare UPDATE of kino.account would leave none, and events from before the
# change would be settled by the new status: a refund would be lost, or paid although clause 6 forfeits it.
_SET_STATUS = sa.text("SELECT o_status_before FROM kino.set_account_status(CAST(:items AS jsonb))")


def set_account_status(
    connection: sa.Connection, account_id: str, status: AccountStatus, *, reason: str, actor: str
) -> AccountStatus:
    """Change an account's status in the caller's transaction, write the history row, and return the status before.

    Pass `VIOLATION` as `reason` if the termination must forfeit refunds (clause 6); no other reason does that. Connect
    as kino_oncall. Raises AccountNotActive if there is no such account, RefusedInput if `reason` or `actor` is not 1 to
    1,000 printable characters.
    """
    change = {"account_id": account_id, "status": status.value, "reason": reason, "actor": actor}
    return AccountStatus(call(connection, _SET_STATUS, [change])[0].o_status_before)
