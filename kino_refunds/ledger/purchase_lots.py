"""Hold, release, void and unvoid the lots of a purchase, each act for its own cause: a dispute, payout or request.

The SQL functions are meant to be called by other SQL functions (of requests and disputes). No role that logs in may
EXECUTE them; only kino_owner, as a member of kino_ledger, can call them from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from kino_refunds.ledger.callers import ledger_errors

if TYPE_CHECKING:
    from kino_refunds.ledger.values import CauseKind


def hold_purchase(
    connection: sa.Connection, purchase_id: str, *, cause_kind: CauseKind, cause_id: str, actor: str
) -> list[int]:
    """Freeze every lot of a purchase, expired lots and successors too; return the ids of the lots that this froze.

    A frozen lot keeps its credits, but no charge draws from it; refunds go back into it. Lots whose time has come are
    expired first.
    """
    # Expired first, because the end of a hold extends an expiry. A lot whose time had come, but which no sweep had
    # expired yet, would be active again then, and the customer could spend credits that had run out.
    held: list[int] = _act(
        connection, "hold_purchase", purchase_id=purchase_id, cause_kind=cause_kind, cause_id=cause_id, actor=actor
    )
    return held


def release_purchase(
    connection: sa.Connection, purchase_id: str, *, cause_kind: CauseKind, cause_id: str, actor: str
) -> list[int]:
    """End a cause's hold on a purchase; return the ids of the lots that are no longer frozen.

    A released lot expires no earlier than the lot grace from now, and no earlier than the time that was left when it
    was frozen. A lot that had expired before the hold and holds no credits is expired again.
    """
    # A lot that another cause still holds stays frozen: the end of one dispute must not release the credits of another.
    released: list[int] = _act(
        connection, "release_purchase", purchase_id=purchase_id, cause_kind=cause_kind, cause_id=cause_id, actor=actor
    )
    return released


def void_purchase(
    connection: sa.Connection, purchase_id: str, *, cause_kind: CauseKind, cause_id: str, actor: str
) -> int:
    """Take back the credits that are left in every lot of a purchase; return how many.

    Credits of these lots that open jobs hold are taken back when those jobs are refunded.
    """
    # The credits of open jobs are not taken now. If such a job is captured, they were spent. If it is refunded,
    # settle_charges puts them into the lot and takes them out again under an open cause: they cannot be spent.
    taken: int = _act(
        connection, "void_purchase", purchase_id=purchase_id, cause_kind=cause_kind, cause_id=cause_id, actor=actor
    )
    return taken


def unvoid_purchase(
    connection: sa.Connection, purchase_id: str, *, cause_kind: CauseKind, cause_id: str, actor: str
) -> int:
    """Undo all voids of a cause that are not undone yet, exactly; return how many credits came back.

    A lot with an open hold is frozen afterwards. Any other lot is placed as at the end of a hold.
    """
    # Exactly: the cause's void transfers less its unvoid transfers. So a second call returns 0, and where another cause
    # still voids a lot, its credits leave again under that cause.
    returned: int = _act(
        connection, "unvoid_purchase", purchase_id=purchase_id, cause_kind=cause_kind, cause_id=cause_id, actor=actor
    )
    return returned


def _act(
    connection: sa.Connection, function: str, purchase_id: str, cause_kind: CauseKind, cause_id: str, actor: str
) -> Any:
    statement = sa.text(f"SELECT kino.{function}(:purchase_id, :cause_kind, :cause_id, :actor)")
    wanted = {"purchase_id": purchase_id, "cause_kind": str(cause_kind), "cause_id": cause_id, "actor": actor}
    # No savepoint: the caller's dispute, payout or request must fail with this. If a hold were kept without the act
    # that caused it, nothing would release it, and the customer's credits would stay frozen.
    with ledger_errors():
        return connection.execute(statement, wanted).scalar_one()
