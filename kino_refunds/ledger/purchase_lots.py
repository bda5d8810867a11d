"""What a dispute, a payout or a request does to a purchase's lots, each for its own cause.

The functions behind these are called by other functions (requests, disputes). No role that logs in may EXECUTE them;
only kino_owner, as a member of kino_ledger, can call them from here.
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
    """Freeze every lot of a purchase, expired ones and successors too; return the ids of those that were not frozen.

    A frozen lot keeps its credits but nobody can draw them; refunds go back into it. What is due expires first.
    """
    held: list[int] = _act(
        connection, "hold_purchase", purchase_id=purchase_id, cause_kind=cause_kind, cause_id=cause_id, actor=actor
    )
    return held


def release_purchase(
    connection: sa.Connection, purchase_id: str, *, cause_kind: CauseKind, cause_id: str, actor: str
) -> list[int]:
    """End a cause's hold; return the ids of the lots that are frozen no longer.

    None of them expires within the lot grace from now, nor earlier than the time that was left when it was frozen; one
    that had expired before and holds nothing is expired again.
    """
    released: list[int] = _act(
        connection, "release_purchase", purchase_id=purchase_id, cause_kind=cause_kind, cause_id=cause_id, actor=actor
    )
    return released


def void_purchase(
    connection: sa.Connection, purchase_id: str, *, cause_kind: CauseKind, cause_id: str, actor: str
) -> int:
    """Take back what is left in every lot of a purchase; return the credits taken.

    Credits of these lots that are held by open jobs follow when those jobs are refunded.
    """
    taken: int = _act(
        connection, "void_purchase", purchase_id=purchase_id, cause_kind=cause_kind, cause_id=cause_id, actor=actor
    )
    return taken


def unvoid_purchase(
    connection: sa.Connection, purchase_id: str, *, cause_kind: CauseKind, cause_id: str, actor: str
) -> int:
    """Undo all voids of a cause that are not undone yet, exactly; return the credits that came back.

    The lots are frozen while a hold on them is open, else as at the end of a hold.
    """
    returned: int = _act(
        connection, "unvoid_purchase", purchase_id=purchase_id, cause_kind=cause_kind, cause_id=cause_id, actor=actor
    )
    return returned


def _act(
    connection: sa.Connection, function: str, purchase_id: str, cause_kind: CauseKind, cause_id: str, actor: str
) -> Any:
    statement = sa.text(f"SELECT kino.{function}(:purchase_id, :cause_kind, :cause_id, :actor)")
    wanted = {"purchase_id": purchase_id, "cause_kind": str(cause_kind), "cause_id": cause_id, "actor": actor}
    with ledger_errors():
        return connection.execute(statement, wanted).scalar_one()
